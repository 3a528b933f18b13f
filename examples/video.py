"""Asks a question about a video: a file, which needs the extra internvl-rt[video], or frames that a program has made.

python examples/video.py
python examples/video.py OpenGVLab/InternVL3-1B film.mp4 "What happens in the video?"
"""

import sys
from importlib.resources import files

import numpy as np
from PIL import Image

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLE = files("internvl_rt") / "tiny/samples/7.png"


def fade_in() -> list[np.ndarray]:
    """Makes four frames, uint8 [height, width, 3], in which a digit grows lighter."""
    pixels = np.asarray(Image.open(SAMPLE).convert("RGB"))
    return [(pixels * light).astype(np.uint8) for light in (0.7, 0.8, 0.9, 1.0)]


def main(model: str = "tiny", video: str | None = None, question: str = "Read the digits.") -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "video", "video": video or fade_in()}, {"type": "text", "text": question}]
    reply = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256))
    print(reply.text)
    print(f"the frames took {reply.usage.image_tokens} visual tokens")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
