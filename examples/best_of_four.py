"""Draws four answers, and chooses the one whose tokens have the highest mean log-probability.

python examples/best_of_four.py
python examples/best_of_four.py OpenGVLab/InternVL3-1B page.png "What is the total?" 0.7
"""

import sys
from importlib.resources import files
from statistics import mean

from internvl_rt import Choice, Engine, InternVLError, SamplingParams

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")


def mean_logprob(choice: Choice) -> float:
    return mean(token.logprob for token in choice.logprobs)


def main(
    model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.", temperature: str = "2.0"
) -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    params = SamplingParams(max_tokens=16, n=4, temperature=float(temperature), seed=0, logprobs=0)
    reply = engine.chat([{"role": "user", "content": content}], params)
    for choice in reply.choices:
        print(f"{mean_logprob(choice):8.4f}  {choice.text!r}")
    print("best:", max(reply.choices, key=mean_logprob).text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
