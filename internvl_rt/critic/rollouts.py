"""Makes preference pairs from answers that a model has drawn, by the rules of MMPR, the data of InternVL's MPO.

Where answers can be checked, right ones are chosen and wrong ones rejected (`correctness_pairs`). Where they cannot, an
answer is chosen, and rejected is its first half as the model continues it without the picture (`continuation_pairs`,
"Dropout Next-Token Prediction" in the paper). Sources: mmpr_data_pipeline_correctness_postprocess.py,
mmpr_data_pipeline_dropout_ntp.py and utils/accuracy_reward.py in tools/reasoning_data_pipeline of InternVL.
"""

import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Literal

from internvl_rt.critic.pair_file import PairRecord
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.voting import unboxed
from internvl_rt.errors import RequestError, check_list, quoted
from internvl_rt.inputs.prompt import MARKER
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.values import Flag, Integer, OneOf, OrNone, Text, read, read_fields

CONTINUATION = SamplingParams(max_tokens=2048, temperature=0.7, top_k=50)  # the official draws
_KEPT_SHARE = 0.5  # of a chosen answer's words, that its rejected continuation begins with
_TRIGGERS = ("Final answer:", "Final Answer:", "答案:")
_LEAST_BOXED = 21  # characters of an answer whose result stands in a box: less is no reasoning
MAX_ROLLOUTS = 2000  # of one question: a million pairs
_TEXT = Text(0, 1 << 20)

Form = Literal["final", "boxed"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """An answer that a model has drawn, and whether its result is right.

    result: what the answer comes to, such as "12"; None: it is in no form that can be read, or nobody has looked.
    """

    response: str
    is_correct: bool
    result: str | None = None

    def __post_init__(self) -> None:
        read_fields(self, {"response": _TEXT, "is_correct": Flag(), "result": OrNone(_TEXT)})


def extract_answer(response: str, form: Form = "final") -> str | None:
    r"""Reads the result of an answer; None if it is not in the form that was asked for.

    form: "final": some reasoning, then a last line such as "Final answer: 12" (or 答案:), at least two line breaks in
        all. "boxed": the result stands in the last \boxed{...}; without one the whole answer is the result, and one of
        less than 21 characters has none.
    """
    response = read("response", response, _TEXT)
    if read("form", form, OneOf(("final", "boxed"))) == "boxed":
        boxed = unboxed(response)
        return None if len(response) < _LEAST_BOXED else response if boxed is None else boxed
    trigger = next((each for each in _TRIGGERS if each in response), None)
    if trigger is None or response.count(trigger) > 2 or response.count("\n") < 2:
        return None
    reasoning, _, result = response.rpartition(trigger)
    return result.strip() if reasoning.strip() and "\n" not in result.strip() else None


def same_answer(result: str, truth: str) -> bool:
    """Returns whether two results are the same text, the same option, or numbers within a thousandth of the truth.

    Case and a few units do not count; "B.", "B. seven" and "(B)" are option B. These are the official rules that need
    no other package, but that "3.7" is not option 3 here. For formulas give `check_rollouts` a function of your own.
    """
    if result.lower() == truth.lower():
        return True
    option, truth_option = result.strip(), truth.strip()
    option = option[0] if option[:1].isalpha() and option[1:2] == "." else option
    option = option[1] if option[:1] == "(" and option[2:3] == ")" else option
    if option.lower() == truth_option.lower():
        return True
    number, truth_number = _number(result), _number(truth)
    if number is None or not truth_number:
        return False
    return abs(number - truth_number) / abs(truth_number) <= 1e-3


def _number(text: str) -> float | None:
    for unit in ("degrees", "degree", "\\angle", "°", "%", "cm"):
        text = text.replace(unit, "")
    try:
        return float(text)
    except ValueError:
        return None


def check_rollouts(
    responses: Items[str], truth: str, *, form: Form = "final", is_same: Callable[[str, str], bool] = same_answer
) -> list[Rollout]:
    """Reads the result of each answer that a model has drawn, and compares it with the right one.

    form: that of `extract_answer`. is_same: takes a result and `truth`, and says whether the result is right. An answer
    without a readable result is wrong. Raises RequestError, or what `is_same` raises.
    """
    check_list("responses", responses, "texts")
    texts = [read(f"responses[{index}]", text, _TEXT) for index, text in enumerate(responses)]
    truth = read("truth", truth, _TEXT)
    results = [extract_answer(text, form) for text in texts]
    judged = zip(texts, results, strict=True)
    return [Rollout(text, result is not None and bool(is_same(result, truth)), result) for text, result in judged]


def correctness_pairs(
    question: str,
    images: Items[str],
    rollouts: Items[Rollout],
    *,
    answer: str | None = None,
    max_pairs: int = 15,
    seed: int = 0,
) -> list[PairRecord]:
    """Pairs the right answers to a question with the wrong ones; no pair if all are right or all are wrong.

    images: paths of the question's pictures, as in `PairRecord`; () for none. answer: what the right answer comes to.
    max_pairs: at most this many pairs, drawn at random by `seed`, with a wrong answer whose result was read, and as
        many with one that has no result: a model must learn the form, too.

    A pair is left out if the right result is part of the wrong one, as "7" of "7 or 8", which may be right after all;
    results that are None are not compared. Answers without text and pairs that occur twice are left out too. Raises
    RequestError.
    """
    check_list("rollouts", rollouts, "rollouts")
    if len(rollouts) > MAX_ROLLOUTS:
        raise RequestError(f"rollouts: expected at most {MAX_ROLLOUTS:,}, got {len(rollouts):,}; take a part of them")
    for index, rollout in enumerate(rollouts):
        if not isinstance(rollout, Rollout):
            raise RequestError(f"rollouts[{index}]: expected a Rollout, got {quoted(rollout)}; make one of it")
    max_pairs, draw = read("max_pairs", max_pairs, Integer(1)), random.Random(read("seed", seed, Integer(0)))
    right = [each for each in rollouts if each.is_correct and each.response]
    wrong = [each for each in rollouts if not each.is_correct and each.response]
    pairs = [(good, bad) for good in right for bad in wrong if not _entails(bad.result, good.result)]
    readable = [(good.response, bad.response) for good, bad in pairs if bad.result is not None]
    unreadable = [(good.response, bad.response) for good, bad in pairs if bad.result is None]
    drawn = [pair for some in (readable, unreadable) for pair in draw.sample(some, min(len(some), max_pairs))]
    return [PairRecord(question, *pair, images, answer) for pair in dict.fromkeys(drawn)]


def _entails(result: str | None, part: str | None) -> bool:
    return result is not None and part is not None and part.lower() in result.lower()


def continuation_pairs(
    engine: Engine,
    records: Items[PairRecord],
    params: SamplingParams = CONTINUATION,
    *,
    progress: bool = False,
) -> list[PairRecord]:
    """Makes a rejected answer for each chosen one: its first half, continued by a model that does not see the pictures.

    Half of the words, as single spaces part them, are kept; the markers of pictures are taken out of the question. All
    are generated in one batch, and `params` with n answers gives n records for each. A `rejected` that is there already
    is not read. Raises RequestError.
    """
    check_list("records", records, "records")
    read("progress", progress, Flag())
    for index, record in enumerate(records):
        if not isinstance(record, PairRecord):
            raise RequestError(f"records[{index}]: expected a PairRecord, got {quoted(record)}; make one of it")
    begun = [_first_half(record.chosen) for record in records]
    batch = [
        [
            {"role": "user", "content": record.question.replace(MARKER, "").strip()},
            {"role": "assistant", "content": beginning},
        ]
        for record, beginning in zip(records, begun, strict=True)
    ]
    replies = engine.generate(batch, params, progress=progress)
    return [
        replace(record, rejected=beginning + choice.text)
        for record, beginning, reply in zip(records, begun, replies, strict=True)
        for choice in reply.choices
    ]


def _first_half(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[: int(len(words) * _KEPT_SHARE)]).strip()
