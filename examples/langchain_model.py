"""Makes an engine a step of LangChain, from picture and question to text. Install langchain-core for it.

python examples/langchain_model.py
python examples/langchain_model.py OpenGVLab/InternVL3-1B "What is the total?" page1.png page2.png
"""

import sys
from importlib.resources import files

from langchain_core.runnables import RunnableLambda

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLES = files("internvl_rt") / "tiny/samples"
PICTURES = (str(SAMPLES / "4719.png"), str(SAMPLES / "31415.png"))


def build_step(engine: Engine) -> RunnableLambda[dict[str, str], str]:
    def ask(asked: dict[str, str]) -> str:
        content = [{"type": "image", "image": asked["picture"]}, {"type": "text", "text": asked["question"]}]
        return engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256)).text

    return RunnableLambda(ask)


def main(model: str = "tiny", question: str = "Read the digits.", *pictures: str) -> None:
    step = build_step(Engine.from_pretrained(model))
    # LangChain calls from several threads, and the engine answers them together.
    for text in step.batch([{"picture": picture, "question": question} for picture in pictures or PICTURES]):
        print(text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
