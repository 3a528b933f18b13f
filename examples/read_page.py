"""Asks a question about one picture; prints the answer, its tokens, and where the time went.

python examples/read_page.py
python examples/read_page.py OpenGVLab/InternVL3-1B page.png "What is the total?"
"""

import sys
from importlib.resources import files

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")


def main(model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.") -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    reply = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256))
    print(reply.text)
    usage = reply.usage
    print(f"{usage.prompt_tokens} tokens of prompt, {usage.image_tokens} visual; {usage.completion_tokens} of answer")
    print(reply.timings.render(engine.roof))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
