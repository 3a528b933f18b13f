"""Runs decoder steps from CUDA graphs: decode steps whole, of prefills with few tokens the layers.

A graph is captured for one shape; a step runs in the next larger shape, padded with rows of length 0 and tokens without
a slot. Graphs read a step's numbers from one buffer on the device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.step_inputs import Sampling, StepInputs
from internvl_rt.model.work import decoder_work
from internvl_rt.steps.cuda_graph import Capture, Replay
from internvl_rt.steps.device_stream import Moment, host_memory
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sampler import UnlistedArguments, unlisted_words, wrap_unlisted
from internvl_rt.steps.step import Draw, Step, StepShape, fill_step, picked_rows, wrap_step

# Rows of a prefill graph, one for each sequence: one row, for a single user, or a few, decodes included. Not more:
# attention starts programs for every row and all the tokens of the bucket, and empty rows take time too.
PREFILL_ROWS = (1, 8)
PREFILL_TOKENS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4096, 256), *range(4096, 8193, 512))
# At this work per layer an H100 takes as long as its CPU takes for the layer's ten launches, 0.7 ms.
FLOPS_OF_LAUNCHES = 450e9
NUM_STAGES = 4


class _Stage:
    """Host memory from which steps are copied to the device, with its arrays for the shape that it held last."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = host_memory(size, torch.int32, device)
        self.copied: Moment | None = None  # when the latest copy has ended
        self._shape: StepShape | None = None  # the shape of `_arrays`
        self._arrays: tuple[dict[str, Any], UnlistedArguments | None] = {}, None

    def arrays(self, shape: StepShape, start: int) -> tuple[dict[str, Any], UnlistedArguments | None]:
        """Returns a step's arrays, from `start` on, and the arguments of its draws before them, if there is room."""
        if shape != self._shape:
            arguments = UnlistedArguments(self.flat[:start], shape.num_rows) if start else None
            views = shape.views(self.flat[start : start + shape.size].numpy(), np.float32)
            self._shape, self._arrays = shape, (views, arguments)
        return self._arrays


class _Buffer:
    """Device memory in which graphs find a step's numbers: the arguments of its draws, if any, then its arrays.

    The host fills one of several stages, so that it never writes what a copy may still read.
    """

    def __init__(self, cache: KVCache, shapes: Iterable[StepShape], device: torch.device, *, draws: bool) -> None:
        self._cache, self._draws = cache, draws
        size = max((self._start(shape) + shape.size for shape in shapes), default=0)
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)
        self._stages = cycle([_Stage(size, device) for _ in range(NUM_STAGES)])

    def inputs(self, shape: StepShape, **rest: Any) -> StepInputs:
        """Returns inputs that lie in the buffer, and fills them with a step without sequences, for a capture."""
        start = self._start(shape)
        flat = self._flat[start : start + shape.size].zero_()
        arrays = shape.views(flat, torch.float32)
        for name in arrays.keys() & {"slot_T", "block_table_SN", "split_W3"}:  # no slots, no blocks, nothing to split
            arrays[name].fill_(-1)
        return wrap_step(shape, flat, logit_row_R=None, **rest)

    def sampling(self, shape: StepShape) -> Sampling:
        """Returns the arguments of a step's draws."""
        return wrap_unlisted(self._flat, shape.num_rows)

    def fill(self, step: Step, shape: StepShape, draws: Sequence[Draw] = ()) -> None:
        stage, start = next(self._stages), self._start(shape)
        if stage.copied is not None:
            stage.copied.wait()
        arrays, arguments = stage.arrays(shape, start)
        fill_step(step, self._cache, arrays)
        if arguments is not None:
            arguments.fill(draws)
        end = start + shape.size
        self._flat[:end].copy_(stage.flat[:end], non_blocking=True)
        stage.copied = Moment(self._flat.device)

    def _start(self, shape: StepShape) -> int:
        return unlisted_words(shape.num_rows) if self._draws else 0


class DecodeGraphs:
    """Runs steps in which every sequence has one new token, with one graph for each number of sequences.

    `compute` writes logits into the memory [S, V] that it is given, a part of `logits_SV`, which all graphs share. It
    reads the previous step's tokens from `drawn_R` and writes there the tokens that it draws.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs, Tensor, Sampling], Tensor],
        cache: KVCache,
        drawn_R: Tensor,
        logits_SV: Tensor,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        width = -(-max_model_len // cache.block_size)
        shapes = [StepShape(n, n, width, cache.num_split_items(n)) for n in reversed(decode_buckets(max_num_seqs))]
        self._buffer = _Buffer(cache, shapes, drawn_R.device, draws=True)
        self._buckets: dict[int, tuple[StepShape, Replay]] = {}
        for shape in shapes:
            rows, how = shape.num_rows, self._buffer.sampling(shape)
            inputs = self._buffer.inputs(shape, num_decodes=rows, max_query_len=1, drawn_R=drawn_R)
            self._buckets[rows] = shape, capture(partial(compute, inputs, logits_SV[:rows], how))

    def takes(self, step: Step) -> bool:
        """Says whether a step can run here: each sequence computes its last token, no prompt, and draws one."""
        num_rows = len(step.chunks)
        return not step.has_prompts and len(step.draws) == step.num_tokens == num_rows <= max(self._buckets)

    def run(self, step: Step) -> tuple[Tensor, bool]:
        """Returns logits [S, V], which the next call overwrites, and whether the graph drew the step's tokens.

        If not, what it drew is void: lists of tokens, grammars and log-probabilities are no part of a graph.
        """
        num_rows = len(step.chunks)
        is_drawn = step.is_plain and not any(draw.sequence.lists_tokens for draw in step.draws)
        shape, replay = self._buckets[min(bucket for bucket in self._buckets if bucket >= num_rows)]
        self._buffer.fill(step, shape, step.draws if is_drawn else ())
        replay.run()
        return replay.result[:num_rows], is_drawn


class PrefillGraphs:
    """Runs the layers of other steps with few tokens, with a graph for each number of sequences and of tokens.

    `compute` maps a step's inputs and x_TD to the output of the last layer. Embeddings before it, with visual tokens at
    changing places, and logits after it are launched without a graph. All sequences run as prefills, even of one token.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs, Tensor], Tensor],
        cache: KVCache,
        drawn_R: Tensor,
        x_TD: Tensor,
        capture: Capture,
        *,
        max_model_len: int,
        buckets: Sequence[int],
    ) -> None:
        """x_TD: memory for the tokens of the largest of `buckets`, which are ascending."""
        width, all_rows = -(-max_model_len // cache.block_size), sorted(PREFILL_ROWS, reverse=True)
        shapes = [StepShape(n, rows, width, num_items=0) for n in reversed(buckets) for rows in all_rows]
        self._buffer = _Buffer(cache, shapes, x_TD.device, draws=False)
        self._x_TD = x_TD
        self._buckets: dict[tuple[int, int], tuple[StepShape, StepInputs, Replay]] = {}  # by (rows, tokens)
        for shape in shapes:
            tokens = shape.num_tokens
            inputs = self._buffer.inputs(shape, num_decodes=0, max_query_len=tokens, drawn_R=drawn_R)
            self._buckets[shape.num_rows, tokens] = shape, inputs, capture(partial(compute, inputs, x_TD[:tokens]))

    def takes(self, step: Step) -> bool:
        rows, tokens = max(self._buckets, default=(0, 0))
        return len(step.chunks) <= rows and step.num_tokens <= tokens

    def run(self, step: Step, embed: Callable[[StepInputs], Tensor]) -> Tensor:
        """Returns x_RD of the rows whose logits are needed; the next call may overwrite it."""
        num_rows, num_tokens = len(step.chunks), step.num_tokens
        size = min(s for s in self._buckets if s[0] >= num_rows and s[1] >= num_tokens)
        shape, inputs, replay = self._buckets[size]
        self._buffer.fill(step, shape)
        picked = picked_rows(step, self._x_TD.device)
        self._x_TD[: shape.num_tokens] = embed(replace(inputs, **picked))
        replay.run()
        row_R = picked["logit_row_R"]
        return replay.result[:num_tokens] if row_R is None else replay.result[row_R]


def prefill_buckets(config: DecoderConfig, max_tokens: int) -> list[int]:
    """Returns token counts of prefill graphs, ascending, up to where the GPU no longer waits for launches."""

    def layer_flops(num_tokens: int) -> float:
        return decoder_work(config, torch.bfloat16, [num_tokens], [num_tokens], 0).flops / config.num_layers

    return [n for n in PREFILL_TOKENS if n <= max_tokens and layer_flops(n) <= FLOPS_OF_LAUNCHES]


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Returns 1, 2, 4, 8, 16, 24, 32, ... and `max_num_seqs`, ascending."""
    return sorted({n for n in (1, 2, 4, *range(8, max_num_seqs, 8)) if n < max_num_seqs} | {max_num_seqs})
