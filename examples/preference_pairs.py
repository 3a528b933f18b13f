"""Draws answers, pairs right ones with wrong ones in a file for the official trainer of MPO, and scores the pairs.

python examples/preference_pairs.py pairs.jsonl
python examples/preference_pairs.py pairs.jsonl OpenGVLab/InternVL3-1B-Instruct page.png "What is the total?" 12.50
"""

import sys
from importlib.resources import files
from pathlib import Path

from internvl_rt import Engine, InternVLError, SamplingParams
from internvl_rt.critic import Rollout, correctness_pairs, read_pairs, score_pairs, write_pairs

SAMPLE = str(files("internvl_rt") / "tiny/samples/4719.png")


def main(
    file: str, model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.", truth: str = "4719"
) -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    params = SamplingParams(n=16, max_tokens=64, temperature=2.0 if model == "tiny" else 1.0, seed=0)
    texts = [choice.text for choice in engine.chat([{"role": "user", "content": content}], params).choices]
    rollouts = [Rollout(text, is_correct=text == truth) for text in texts]
    folder, name = Path(picture).parent, Path(picture).name
    write_pairs(file, correctness_pairs(f"<image>\n{question}", [name], rollouts, answer=truth, max_pairs=4))
    pairs = read_pairs(file, root=folder)
    scores = score_pairs(None, engine, pairs)
    for pair, *logprobs in zip(pairs, scores.reference_chosen_B, scores.reference_rejected_B, strict=True):
        print(f"{logprobs[0]:9.3f} {pair.chosen!r}  over {logprobs[1]:9.3f} {pair.rejected!r}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
