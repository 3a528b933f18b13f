"""`internvl-rt best-of`: the best of several answers, by a critic, by the model's own judgement, or by a vote."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from internvl_rt.arguments import device_and_numbers
from internvl_rt.chat import check_question, system_part
from internvl_rt.errors import RequestError
from internvl_rt.terminal import importing, say

if TYPE_CHECKING:
    from internvl_rt.engine.best_of import Critic, RankedAnswer, Ranking
    from internvl_rt.engine.engine import Engine
    from internvl_rt.engine.voting import MajorityVote


def run(args: argparse.Namespace) -> int:
    """Takes the arguments of `best-of`; all are checked before torch is imported. Raises InternVLError."""
    if args.prompt is None:
        raise RequestError("expected a PROMPT, got none; give the question that is to be answered")
    if args.max_steps is not None and not (args.critic and 1 <= args.max_steps <= 1 << 20):
        raise RequestError("--max-steps: expected a number above 0 beside --critic; leave it out")
    if args.critic_device != "auto" and not args.critic:
        raise RequestError("--critic-device: there is no --critic; leave it out")
    if args.stop_score is not None and (args.vote or not math.isfinite(args.stop_score)):
        raise RequestError("--stop-score: expected a number beside --critic or --judge; leave it out")
    params, media = check_question(args, n=args.n)
    engine, critic = _load(args)
    question = {"role": "user", "content": [*media, {"type": "text", "text": args.prompt}]}
    ranking = engine.best_of(
        [*system_part(args), question],
        args.n,
        critic=critic,
        params=params,
        greedy_first=args.greedy_first,
        stop_score=args.stop_score,
    )
    if args.json:
        print(json.dumps(_document(ranking), indent=2, ensure_ascii=False))
    elif args.all:
        for answer in ranking.answers:
            print(f"[{_shown(answer)}] {answer.text}")
    else:
        print(ranking.text)
    if not args.json:
        for answer in ranking.answers:
            if answer.error is not None:
                say(f"answer {answer.index} has no score: {answer.error}")
        say(f"scores: {' '.join(map(_shown, ranking.answers))}{_unfinished(ranking)}")
    return 0


def _load(args: argparse.Namespace) -> "tuple[Engine, Critic | MajorityVote]":
    """Loads the model and what chooses among its answers."""
    with importing():
        from internvl_rt.checkpoint.find import find_model
    model, critic = find_model(args.model), args.critic and find_model(args.critic)
    with importing():
        from internvl_rt.critic.judge import Judge
        from internvl_rt.critic.pairing import load_with_critic
        from internvl_rt.critic.visual_prm import MAX_STEPS, VisualPRM
        from internvl_rt.engine.engine import Engine
        from internvl_rt.engine.voting import MajorityVote
    options = {**device_and_numbers(args), "v2pe_delta": args.v2pe_delta, "max_tiles": args.max_tiles}
    if critic:
        engine, scorer = load_with_critic(
            model, critic, options=options, critic_options=options | {"device": args.critic_device}
        )
        return engine, VisualPRM(scorer.engine, max_steps=args.max_steps or MAX_STEPS)
    engine = Engine.from_pretrained(model, **options)
    return engine, MajorityVote() if args.vote else Judge(engine)


def _shown(answer: "RankedAnswer") -> str:
    return "-" if answer.score is None else f"{answer.score:.3f}"


def _unfinished(ranking: "Ranking") -> str:
    return f" ({ranking.num_unfinished} answers were given up)" if ranking.num_unfinished else ""


def _document(ranking: "Ranking") -> dict[str, Any]:
    answers = []
    for answer in ranking.answers:
        found = answer.judgement
        steps = [
            {"step": step, "score": score}
            for step, score in zip(getattr(found, "steps", ()), getattr(found, "scores", ()), strict=True)
        ]
        answers.append(
            {"text": answer.text, "index": answer.index, "score": answer.score}
            | ({"steps": steps} if steps else {})
            | {"finish_reason": answer.choice.finish_reason}
            | ({} if answer.error is None else {"error": str(answer.error)})
        )
    usage = {"prompt_tokens": ranking.usage.prompt_tokens, "completion_tokens": ranking.usage.completion_tokens}
    return {
        "answers": answers,
        "num_unfinished": ranking.num_unfinished,
        "usage": usage,
        "drawing_s": ranking.drawing_s,
        "total_s": ranking.total_s,
    }
