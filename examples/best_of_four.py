"""Draws four answers and prints them, the best first: by a critic's scores, or without a critic by a vote.

python examples/best_of_four.py
python examples/best_of_four.py OpenGVLab/InternVL3-8B page.png "What is the total?" OpenGVLab/VisualPRM-8B-v1_1
"""

import sys
from importlib.resources import files

from internvl_rt import Engine, InternVLError, MajorityVote, SamplingParams
from internvl_rt.critic import load_with_critic

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")


def main(model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.", critic: str = "") -> None:
    engine, chooser = load_with_critic(model, critic) if critic else (Engine.from_pretrained(model), MajorityVote())
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    params = SamplingParams(max_tokens=256, temperature=2.0 if model == "tiny" else 0.6, seed=0)
    ranking = engine.best_of([{"role": "user", "content": content}], 4, critic=chooser, params=params)
    for answer in ranking.answers:
        print("no score" if answer.score is None else f"{answer.score:8.4f}", repr(answer.text))
    print("best:", ranking.text)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
