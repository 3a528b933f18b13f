"""The page bench/results/launch-plans.md: predicted times of steps, against targets and against what was measured."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch_fit import FITTED, READ, Observation, observations_of, summary
from launch_model import Device
from step_plans import Step, decode_step, prompt_step

from internvl_rt.bench.document import load

RESULTS = Path(__file__).with_name("results")
SMALL, LARGE = "InternVL3-1B", "InternVL3-8B"
WITH_EXPERTS = "InternVL3_5-30B-A3B", "InternVL3_5-GPT-OSS-20B-A4B-Preview"
STEPS = (
    *((model, batch, context) for model in (SMALL, LARGE) for context in (2048, 8192, 32000) for batch in (1, 8, 64)),
    *((f"InternVL3-{size}", 1, 2048) for size in ("2B", "9B", "14B", "38B")),
    *((model, batch, 2048) for model in WITH_EXPERTS for batch in (1, 8, 64)),
)
TARGETS_MS = (  # for one sequence: model, context, then H100 and H200 (None: no target)
    (SMALL, 2048, (0.50, 0.42)),
    (SMALL, 32000, (None, 0.75)),
    (LARGE, 2048, (None, 3.9)),
)
EXPERIMENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as it is", {}),
    ("weights to L2 during attention", {"prefetch": True}),
    ("earlier trigger", {"early": True}),
    ("both", {"prefetch": True, "early": True}),
)
MIXED = ((SMALL, 16, 512), (SMALL, 64, 2048), (LARGE, 16, 512), (LARGE, 64, 2048))  # model, decodes, prompt tokens
SHORT_TOKENS, PREFIXES = 64, (3392, 8192, 32704)


def short(device: Device) -> str:
    return device.name.split()[1]


def fitted_observations(device: Device) -> list[Observation]:
    """What the device's constants were fitted to."""
    documents = {name: load(RESULTS / name) for name in device.fitted_to["files"]}
    return observations_of(documents, device.fitted_to["without"])


def render(devices: Mapping[str, Device]) -> str:
    cards = list(devices.values())
    found = {card.name: fitted_observations(card) for card in cards}
    lines = ["# Launch plans", "", *_head(cards), "", *_targets(cards, found), ""]
    lines += _table("Decode steps", _step_rows(cards, found), _STEPS_NOTE)
    lines += _table("Where a step's time beyond its floor goes", _loss_rows(cards), _LOSS_NOTE)
    lines += _table("Mixed steps", _mixed_rows(cards), _MIXED_NOTE)
    lines += _table("First token of a short chunk behind a long prefix", _chunk_rows(cards), _CHUNK_NOTE)
    lines += _table("How far the model is from what was measured", _error_rows(cards, found), _ERRORS_NOTE)
    return "\n".join(lines).rstrip() + "\n"


def _head(cards: list[Device]) -> Iterator[str]:
    yield "**Predicted, not measured**, in bfloat16: from the launches that the kernels' plan functions return, and the"
    yield "[constants](../device_costs.json) of each device. Written by"
    yield "`python bench/launch_plans.py --out bench/results/launch-plans.md`."
    yield ""
    for card in cards:
        files = ", ".join(f"[{Path(name).stem}]({Path(name).with_suffix('.md')})" for name in card.fitted_to["files"])
        without = ", ".join(f"`{pattern}`" for pattern in card.fitted_to["without"])
        counts = Counter(card.sources[name].partition(":")[0] for name in (*READ, *FITTED))
        told = f"{counts['fitted']} constants fitted to and {counts['read']} read from {files or 'no file'}"
        told += f" (but not {without})" if without else ""
        yield f"* {card.name}: {told}; the others are from the data sheet or assumed."


_STEPS_NOTE = (
    "Milliseconds of the device for one step as a graph; `floor` by the data sheet, `share` is floor over predicted. "
    "`measured` is a user's time a token in the run that the constants are fitted to; on the H100 the host limited the "
    "1B's steps of up to 8 sequences then."
)
_LOSS_NOTE = (
    "Microseconds of a step of one sequence. `boundary` and `first load` are of all launches; `start and end`, "
    "`exchange` and `sum of parts` of products and attention; `change of programs` is what a multiprocessor loses "
    "where its programs end and others start (`bench/launch_model.py`)."
)
_MIXED_NOTE = (
    "Sequences that decode at 2,048 tokens beside a prompt: one graph of the layers, which reads the weights once, and "
    "one of the head. Milliseconds of the device, and of the host, which works ahead; `apart` is what a graph of the "
    "decodes and then one of the prompt would take. `eager` counts launches outside of graphs. Target: 2 ms for 16 "
    "decodes and 512 tokens on the 1B. The H100's host is that of the run that the constants are fitted to, when a "
    "step cost it 0.9 ms."
)
_CHUNK_NOTE = (
    f"A prompt of {SHORT_TOKENS} tokens behind cached ones, one sequence: milliseconds of the device, and of them in "
    "attention. Splits are counted from the planned launch: programs for each block of queries."
)
_ERRORS_NOTE = (
    "Of the rows that the constants were fitted to: median error, and the worst ratio of predicted to measured time. "
    "Kernels ran alone, cold, in a graph; `step` has decode steps and the kernels of a profiled step."
)


def _table(title: str, rows: list[list[str]], note: str) -> list[str]:
    head, *body = rows
    ruler = ["---" if index == 0 else "---:" for index in range(len(head))]
    return [f"## {title}", "", note, "", *("| " + " | ".join(row) + " |" for row in (head, ruler, *body)), ""]


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.3f}" if microseconds < 10000 else f"{microseconds / 1000:.2f}"


def _step_rows(cards: list[Device], found: Mapping[str, list[Observation]]) -> list[list[str]]:
    columns = ("floor", "predicted", "share", "without PDL", "measured")
    rows = [["model", "batch", "context", *(f"{short(card)} {column}" for card in cards for column in columns)]]
    for model, batch, context in STEPS:
        step, row = decode_step(model, batch, context), [model, str(batch), f"{context:,}"]
        for card in cards:
            floor, predicted = step.floor_us(card), step.gpu_us(card)
            measured = {each.name: each.measured_us for each in found[card.name]}
            seen = measured.get(f"decode/{model}/{batch}x{context}/bfloat16")
            row += [milliseconds(floor), milliseconds(predicted), f"{floor / predicted:.0%}"]
            row += [milliseconds(step.gpu_us(card, pdl=False)), "" if seen is None else milliseconds(seen)]
        rows.append(row)
    return rows


def losses_us(step: Step, device: Device) -> dict[str, float]:
    """The predicted time of a step beyond its floor, by what it is spent on."""
    lost = Counter({"start of the graph": step.num_replays * device.graph_start_us})
    for op, terms in step.terms_us(device):
        lost.update({name: op.times * value for name, value in terms.items()})
        lost["bytes"] -= op.times * op.floor_us(device)
    lost["below the data sheet's bandwidth"] = lost.pop("bytes")
    return dict(lost)


def _loss_rows(cards: list[Device]) -> list[list[str]]:
    cases = [(model, context, card) for model, context, _ in TARGETS_MS for card in cards]
    steps = [(decode_step(model, 1, context), card) for model, context, card in cases]
    lost = [losses_us(step, card) for step, card in steps]
    names = sorted(lost[0], key=lambda name: -sum(each[name] for each in lost))
    head = ["of", *(f"{model.removeprefix('InternVL3-')} {context:,} {short(card)}" for model, context, card in cases)]
    floors = ["floor", *(f"{step.floor_us(card):.0f}" for step, card in steps)]
    sums = ["predicted", *(f"{step.gpu_us(card):.0f}" for step, card in steps)]
    return [head, floors, *([name, *(f"{each[name]:.0f}" for each in lost)] for name in names), sums]


def _targets(cards: list[Device], found: Mapping[str, list[Observation]]) -> Iterator[str]:
    """The targets against the predictions, with and without the experiments."""
    yield "Milliseconds of the device for one step, with what two experiments would give if they work:"
    yield ""
    yield "| batch 1 | target | " + " | ".join(name for name, _ in EXPERIMENTS) + " | verdict |"
    yield "|---|" + "---:|" * (len(EXPERIMENTS) + 1) + "---|"
    for model, context, limits in TARGETS_MS:
        for card in cards:
            limit = limits[("H100", "H200").index(short(card))]
            times = [decode_step(model, 1, context).gpu_us(card, **how) for _, how in EXPERIMENTS]
            verdict = _verdict(times, limit, _step_error(card, found[card.name]))
            name, asked = f"{model}, {context:,} tokens, {short(card)}", f"{limit:.2f}" if limit else ""
            yield f"| {name} | {asked} | {' | '.join(map(milliseconds, times))} | {verdict} |"


def _step_error(card: Device, found: list[Observation]) -> float:
    return next((median for kind, _, median, _, _ in summary(card, found) if kind == "step"), 0.0)


def _verdict(times_us: list[float], limit_ms: float | None, error: float) -> str:
    """times_us: by EXPERIMENTS. error: how far predictions of steps are off in the median."""
    if limit_ms is None:
        return "no target"
    ratios = [us / 1000 / limit_ms for us in times_us]
    met = [name for (name, _), ratio in zip(EXPERIMENTS, ratios, strict=True) if ratio <= 1]
    if met:
        return f"met: {met[0]}"
    open_question = (
        f", which the model cannot tell from 1: it is off by {error:.1%}" if min(ratios) <= 1 + error else ""
    )
    return f"missed: {min(ratios):.2f} times it at best{open_question}"


def _mixed_rows(cards: list[Device]) -> list[list[str]]:
    columns = ("device", "apart", "host")
    rows = [["step", "eager", *(f"{short(card)} {column}" for card in cards for column in columns)]]
    for model, batch, tokens in MIXED:
        step = prompt_step(model, tokens, batch=batch, context=2048)
        apart = decode_step(model, batch, 2048), prompt_step(model, tokens)
        row = [f"{model}, {batch} decodes and {tokens:,} tokens", str(sum(step.num_eager))]
        for card in cards:
            times_us = step.gpu_us(card), sum(each.gpu_us(card) for each in apart), step.host_us(card)
            row += map(milliseconds, times_us)
        rows.append(row)
    return rows


def _chunk_rows(cards: list[Device]) -> list[list[str]]:
    rows = [["prompt", "splits", *(f"{short(card)} {what}" for card in cards for what in ("all", "attention"))]]
    for model in (SMALL, LARGE):
        for prefix in PREFIXES:
            step = prompt_step(model, SHORT_TOKENS, prefix)
            attention = next(op for op in step.operations if op.name == "prompt's attention")
            row = [f"{model}, {SHORT_TOKENS} behind {prefix:,}", str(max(1, attention.works[0].parts))]
            for card in cards:
                in_attention_us = attention.times * sum(attention.terms_us(card).values())
                row += [milliseconds(step.gpu_us(card)), milliseconds(in_attention_us)]
            rows.append(row)
    return rows


def _error_rows(cards: list[Device], found: Mapping[str, list[Observation]]) -> list[list[str]]:
    rows = [["device", "what", "rows", "median error", "worst", "of"]]
    for card in cards:
        for kind, number, median, worst, name in summary(card, found[card.name]):
            rows.append([short(card), kind, str(number), f"{median:.1%}", f"{worst:.2f}", f"`{name}`"])
    return rows
