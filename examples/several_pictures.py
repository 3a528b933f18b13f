"""Asks one question about several pictures, with a text in front of each.

python examples/several_pictures.py
python examples/several_pictures.py OpenGVLab/InternVL3-1B "What has changed?" before.jpg after.jpg
"""

import sys
from importlib.resources import files

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLES = files("internvl_rt") / "tiny/samples"
PICTURES = (str(SAMPLES / "7.png"), str(SAMPLES / "42.png"))


def main(model: str = "tiny", question: str = "Which picture shows the larger number?", *pictures: str) -> None:
    engine = Engine.from_pretrained(model)
    content = []
    for number, picture in enumerate(pictures or PICTURES, start=1):
        content.append({"type": "text", "text": f"Number {number}: "})
        content.append({"type": "image", "image": picture})
    content.append({"type": "text", "text": question})
    reply = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256))
    print(reply.text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
