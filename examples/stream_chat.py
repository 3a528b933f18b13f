"""Talks about pictures: each line of stdin is a question, and the answer appears while the model writes it.

echo "Read the digits." | python examples/stream_chat.py
python examples/stream_chat.py OpenGVLab/InternVL3-1B page.png
"""

import sys
from importlib.resources import files

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")


def main(model: str = "tiny", *pictures: str) -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture} for picture in pictures or (SAMPLE,)]
    messages = []
    print("Ask a question; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": line.strip()}]})
        content = []  # the first question has the pictures
        answer = ""
        for piece in engine.stream(messages, SamplingParams(max_tokens=1024)):
            print(piece.text, end="", flush=True)
            answer += piece.text
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
