"""Runs decoder steps from CUDA graphs: decode steps whole, of prefills with few tokens the layers.

A graph is captured for one shape; a step runs in the next larger shape, padded with rows of length 0 and tokens without
a slot. Graphs read a step's numbers from one buffer on the device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.step_inputs import Sampling, StepInputs
from internvl_rt.model.work import decoder_work
from internvl_rt.steps.cuda_graph import Capture, Replay
from internvl_rt.steps.device_stream import Fence, host_memory
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sampler import UnlistedArguments, unlisted_words, wrap_unlisted
from internvl_rt.steps.step import Draw, Step, StepShape, fill_step, picked_rows, wrap_step

# Rows of a prefill graph, one for each sequence: one row, for a single user, or a few, decodes included. Not more:
# attention starts programs for every row and all the tokens of the bucket, and empty rows take time too.
PREFILL_ROWS = (1, 8)
PREFILL_TOKENS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4096, 256), *range(4096, 8193, 512))
# At this work per layer an H100 takes as long as its CPU takes for the layer's ten launches, 0.7 ms.
FLOPS_OF_LAUNCHES = 450e9


class _Stage:
    """Host memory from which steps are copied to the device, and its arrays for every shape that it has held."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = host_memory(size, torch.int32, device)
        self.copied = Fence(device)
        self._arrays: dict[StepShape, tuple[dict[str, Any], UnlistedArguments]] = {}
        self._held: StepShape | None = None

    def arrays(self, shape: StepShape, start: int) -> tuple[dict[str, Any], UnlistedArguments]:
        """Returns a step's arrays, from `start` on, and the arguments of its draws before them."""
        if shape not in self._arrays:
            flat = self.flat.numpy()
            views = shape.views(flat[start : start + shape.size], np.float32)
            self._arrays[shape] = views, UnlistedArguments(flat[:start], shape.num_rows if start else 0)
        found = self._arrays[shape]
        if shape != self._held:
            self._held = shape
            found[1].forget()
        return found


class _Buffer:
    """Device memory in which graphs find a step's numbers: the arguments of its draws, if any, then its arrays.

    The host fills one of several stages, so that it never writes what a copy may still read.
    """

    NUM_STAGES = 4

    def __init__(self, cache: KVCache, shapes: Iterable[StepShape], device: torch.device, *, draws: bool) -> None:
        self._cache, self._draws = cache, draws
        size = max(self._start(shape) + shape.size for shape in shapes)
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)
        self._stages = [_Stage(size, device) for _ in range(self.NUM_STAGES)]
        self._next = 0

    def arrays(self, shape: StepShape) -> Tensor:
        """Returns the part of the buffer that holds a step's arrays."""
        start = self._start(shape)
        return self._flat[start : start + shape.size]

    def sampling(self, shape: StepShape) -> Sampling:
        """Returns the arguments of a step's draws."""
        return wrap_unlisted(self._flat, shape.num_rows)

    def pad(self, shape: StepShape) -> None:
        """Fills the buffer with a step without sequences, for a capture."""
        self.arrays(shape).copy_(torch.from_numpy(_padding(shape)))

    def fill(self, step: Step, shape: StepShape, draws: Sequence[Draw] = ()) -> None:
        stage, start = self._stages[self._next], self._start(shape)
        self._next = (self._next + 1) % self.NUM_STAGES
        stage.copied.wait()
        arrays, arguments = stage.arrays(shape, start)
        fill_step(step, self._cache, arrays)
        if self._draws:
            arguments.fill(draws)
        end = start + shape.size
        self._flat[:end].copy_(stage.flat[:end], non_blocking=True)
        stage.copied.set()

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
            self._buffer.pad(shape)
            flat, rows = self._buffer.arrays(shape), shape.num_rows
            inputs = wrap_step(shape, flat, num_decodes=rows, max_query_len=1, drawn_R=drawn_R, logit_row_R=None)
            how = self._buffer.sampling(shape)
            self._buckets[rows] = shape, capture(partial(compute, inputs, logits_SV[:rows], how))

    def takes(self, step: Step) -> bool:
        """Says whether a step can run here: each sequence computes its last token, no prompt, and draws one."""
        num_rows = len(step.chunks)
        return not step.has_prompts and len(step.draws) == step.num_tokens == num_rows <= max(self._buckets)

    @staticmethod
    def draws(step: Step) -> bool:
        """Says whether the graph also draws such a step's tokens; if not, the tokens that it draws are void."""
        return step.is_plain and not any(draw.sequence.lists_tokens for draw in step.draws)

    def run(self, step: Step) -> Tensor:
        """Returns logits [S, V], which the next call overwrites."""
        num_rows = len(step.chunks)
        shape, replay = self._buckets[min(bucket for bucket in self._buckets if bucket >= num_rows)]
        self._buffer.fill(step, shape, step.draws if self.draws(step) else ())
        replay.run()
        return replay.result[:num_rows]


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
        self._buffer = _Buffer(cache, shapes, x_TD.device, draws=False) if shapes else None
        self._x_TD = x_TD
        self._buckets: dict[tuple[int, int], tuple[StepInputs, Replay]] = {}  # by (rows, tokens)
        self._shapes = {(shape.num_rows, shape.num_tokens): shape for shape in shapes}
        for size, shape in self._shapes.items():
            assert self._buffer is not None, "there are shapes"
            self._buffer.pad(shape)
            tokens, flat = shape.num_tokens, self._buffer.arrays(shape)
            inputs = wrap_step(shape, flat, num_decodes=0, max_query_len=tokens, drawn_R=drawn_R, logit_row_R=None)
            self._buckets[size] = inputs, capture(partial(compute, inputs, x_TD[:tokens]))

    def takes(self, step: Step) -> bool:
        rows, tokens = max(self._buckets, default=(0, 0))
        return len(step.chunks) <= rows and step.num_tokens <= tokens

    def run(self, step: Step, embed: Callable[[StepInputs], Tensor]) -> Tensor:
        """Returns x_RD of the rows whose logits are needed; the next call may overwrite it."""
        num_rows, num_tokens = len(step.chunks), step.num_tokens
        size = min(s for s in self._buckets if s[0] >= num_rows and s[1] >= num_tokens)
        shape, (inputs, replay) = self._shapes[size], self._buckets[size]
        assert self._buffer is not None, "there are buckets"
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


def _padding(shape: StepShape) -> NDArray[np.int32]:
    """Builds a step without sequences: lengths 0, no slots, nothing to split."""
    flat = np.zeros(shape.size, np.int32)
    found = shape.views(flat, np.float32)
    for name in found.keys() & {"slot_T", "block_table_SN", "split_W3"}:
        found[name][...] = -1
    return flat
