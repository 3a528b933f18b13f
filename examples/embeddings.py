"""Encodes pictures once, keeps their visual tokens in a file, and asks about them without the vision tower.

python examples/embeddings.py
python examples/embeddings.py OpenGVLab/InternVL3-1B "What is the total?" pages.safetensors page1.png page2.png
"""

import sys
from importlib.resources import files

from safetensors.torch import load_file, save_file

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLES = files("internvl_rt") / "tiny/samples"
PICTURES = (str(SAMPLES / "4719.png"), str(SAMPLES / "31415.png"))


def main(
    model: str = "tiny", question: str = "Read the digits.", file: str = "embeddings.safetensors", *pictures: str
) -> None:
    pictures = pictures or PICTURES
    engine = Engine.from_pretrained(model, visual_cache_bytes=0)  # the file alone keeps the visual tokens
    save_file(dict(zip(pictures, engine.encode_images(pictures), strict=True)), file)
    visual_tokens = load_file(file)
    for picture in pictures:
        content = [
            {"type": "image_embeds", "image_embeds": visual_tokens[picture]},
            {"type": "text", "text": question},
        ]
        reply = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256))
        print(f"{picture}: {reply.text} ({reply.timings.vision_work.flops:.0f} operations in the vision tower)")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
