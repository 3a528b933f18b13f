"""Computes how likely the model finds each of some given answers.

python examples/score_answers.py
python examples/score_answers.py OpenGVLab/InternVL3-1B photo.jpg "Is it day or night?" Day Night
"""

import sys
from importlib.resources import files
from math import exp

from internvl_rt import Engine, InternVLError

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")
ANSWERS = ("4719", "4119", "471", "Picture 1")


def main(model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.", *answers: str) -> None:
    answers = answers or ANSWERS
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    # With the end token it is the probability of this answer and no longer one.
    scores = engine.score([{"role": "user", "content": content}], answers, include_end=True)
    probabilities = [exp(score.total) for score in scores]
    print("probability  share  answer")
    for probability, answer in sorted(zip(probabilities, answers, strict=True), reverse=True):
        print(f"{probability:11.3g}  {probability / sum(probabilities):5.1%}  {answer}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
