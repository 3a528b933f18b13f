"""Runs decoder steps from CUDA graphs.

A graph is captured for one shape; a step runs in the next larger shape, padded with rows of length 0 and tokens without
a slot. There are three kinds:

  decode   a whole step of sequences that decode: from their last tokens to the tokens that they draw
  layers   embedding and layers of a step with chunks, beside which sequences may decode
  head     logits of such a step and the tokens drawn from them; not run if nothing is drawn

Graphs read a step's numbers from one buffer on the device, and the tokens that the step before drew from `drawn_R`.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain, cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.step_inputs import Sampling
from internvl_rt.model.work import decoder_work
from internvl_rt.steps.cuda_graph import Capture, Replay
from internvl_rt.steps.device_stream import Moment, host_memory
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.sampler import UnlistedArguments, unlisted_words, wrap_unlisted
from internvl_rt.steps.step import Step, StepArrays, StepShape, empty_step, visual_of

# Chunks of a graph: one, for a single user, or a few. Not more: attention starts programs for every chunk and all the
# tokens of the bucket, and empty rows take time too.
NUM_CHUNKS = (1, 8)
NUM_TOKENS = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4096, 256), *range(4096, 8193, 512))
# Room for sequences that decode beside chunks, unless there are more. Products of many rows take no longer with a few
# more, so other numbers need no graphs of their own.
DECODES_BESIDE = 64
# Up to so many tokens every model has graphs. Beyond, those have that do less work per layer than this: then an H100
# takes less than the 0.7 ms that its CPU takes for the layer's ten launches.
GRAPH_TOKENS, FLOPS_OF_LAUNCHES = 2048, 450e9
NUM_STAGES = 4
# What a single user needs for answers and for prompts of up to one picture, captured before the first step.
LIKELY = ((1,), (2,), (4,), (8,), (0, 1), *((0, 1, tokens) for tokens in NUM_TOKENS if tokens <= 512))


# Names a graph: (decodes,), (0, draws) of a head, or the sizes of a step with chunks: (decodes, chunks, tokens).
_Key = tuple[int, ...]


class Computed(NamedTuple):
    """What a step left on the device, until the next step."""

    x_TD: Tensor | None  # the last layer's output for the chunks' tokens; None if there are no chunks
    logits_RV: Tensor  # of the rows that tokens are drawn from, and perhaps more rows behind them
    is_drawn: bool  # whether the tokens are in `drawn_R`; if not, what is there is void


class _Place(NamedTuple):
    """Where a graph finds a step in the buffer: arguments of draws, and their rows; the arrays from `start` on."""

    shape: StepShape
    start: int
    stop: int


class _Views(NamedTuple):
    """A stage's memory as a step with a place and a number of draws sees it."""

    arrays: StepArrays
    arguments: UnlistedArguments
    host: Tensor
    device: Tensor


class _Stage:
    """Host memory from which steps are copied to the device, with the views that it had last: each takes a while."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = host_memory(size, torch.int32, device)
        self.copied: Moment | None = None  # when the latest copy has ended
        self._key: tuple[_Place, int] | None = None
        self._views: _Views | None = None

    def views(self, place: _Place, num_draws: int, on_device: Tensor) -> _Views:
        if self._views is None or self._key != (place, num_draws):
            arrays = StepArrays(place.shape, self.flat[place.start : place.stop].numpy())
            arguments = UnlistedArguments(self.flat[: unlisted_words(num_draws)], num_draws)
            self._views = _Views(arrays, arguments, self.flat[: place.stop], on_device[: place.stop])
            self._key = place, num_draws
        return self._views


class StepGraphs:
    """Runs steps from graphs that are captured when they are first needed, or before.

    The graphs refer to the model and the cache. `drawn_R` gets the tokens that they draw. Build this outside of torch's
    inference mode: then steps can write its memory without entering that, which takes microseconds.
    """

    def __init__(
        self,
        model: InternVL,
        cache: KVCache,
        drawn_R: Tensor,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_tokens_per_step: int,
    ) -> None:
        self._model, self._cache, self._drawn_R, self._capture = model, cache, drawn_R, capture
        self._table_width = -(-max_model_len // cache.block_size)
        self._decode_sizes = decode_buckets(max_num_seqs)
        self._layer_sizes = layer_buckets(model.config.decoder, max_num_seqs, max_tokens_per_step)
        self._head_sizes = head_buckets(self._layer_sizes, len(drawn_R))
        num_tokens = max((decodes + tokens for decodes, _, tokens in self._layer_sizes), default=0)
        shape = num_tokens, model.config.decoder.hidden_size
        self._x_TD, self._visual_XD = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        self._logits_RV = model.logits_memory(max(max_num_seqs, *self._head_sizes, 0))
        self._rows_at = unlisted_words(max(self._head_sizes, default=0))  # where the rows of draws from chunks are
        keys = [*((decodes,) for decodes in self._decode_sizes), *self._layer_sizes]
        self._places = {key: self._place(*key) for key in keys}
        size = max(place.stop for place in self._places.values())
        self._flat = torch.zeros(size, dtype=torch.int32, device=model.device)
        self._stages = cycle([_Stage(size, model.device) for _ in range(NUM_STAGES)])
        self._replays: dict[_Key, Replay] = {}

    def _keys(self) -> list[list[_Key]]:
        """Lists what is or may be captured: of each kind of graphs the largest first."""
        layers = sorted(self._layer_sizes, key=lambda size: size[0] + size[2], reverse=True)
        decode, head = (sorted(sizes, reverse=True) for sizes in (self._decode_sizes, self._head_sizes))
        return [[(decodes,) for decodes in decode], [*layers], [(0, draws) for draws in head]]

    @torch.inference_mode()
    def run_all(self, model: InternVL) -> None:
        """Runs a model that needs the same kernels on a step of every size that has a graph: so they are built."""
        for key in chain.from_iterable(self._keys()):
            self._computation(key, model)()

    def capture(self, *, everything: bool) -> None:
        """Captures the graphs that a single user needs, or all of them."""
        for keys in self._keys():
            for number, key in enumerate(keys):
                if everything or number == 0 or key in LIKELY:
                    self._replay_of(key)

    def takes(self, step: Step) -> bool:
        """Says whether there is a graph for a step of its size."""
        decodes, chunks = len(step.decodes), len(step.chunks)
        if not chunks:
            return decodes <= self._decode_sizes[-1]
        if step.num_draw_rows > max(self._head_sizes, default=0):
            return False
        return any(_holds(size, (decodes, chunks, step.num_tokens)) for size in self._layer_sizes)

    def run(self, step: Step) -> Computed:
        """Runs a step; the next call overwrites what it returns.

        Lists of tokens, grammars and log-probabilities are no part of a graph: with them the tokens are not drawn.
        """
        decodes, draws = step.decodes, step.chunk_draws
        is_drawn = step.is_plain and not (decodes.lists_tokens or any(draw.sequence.lists_tokens for draw in draws))
        if not step.chunks:
            size = next(n for n in self._decode_sizes if n >= len(decodes))
            replay = self._replay_of((size,))
            self._fill(step, self._places[(size,)], size, is_drawn=is_drawn)
            replay.run()
            return Computed(None, self._logits_RV, is_drawn)
        layers = min(
            size for size in self._layer_sizes if _holds(size, (len(decodes), len(step.chunks), step.num_tokens))
        )
        rows = next(n for n in self._head_sizes if n >= step.num_draw_rows)
        replays = [self._replay_of(layers)]
        if step.num_draw_rows:
            replays.append(self._replay_of((0, rows)))
        self._fill(step, self._places[layers], rows, is_drawn=is_drawn)
        if visual := visual_of(step):
            torch.cat(visual, out=self._visual_XD[: sum(map(len, visual))])
        for replay in replays:
            replay.run()
        x_TD = self._x_TD[layers[0] : layers[0] + step.num_tokens]
        return Computed(x_TD, self._logits_RV, is_drawn)

    def _place(self, decodes: int, chunks: int = 0, tokens: int = 0) -> _Place:
        items = self._cache.num_split_items(decodes) if decodes else 0
        shape = StepShape(decodes, chunks, tokens, self._table_width, items)
        start = self._rows_at + -(-self._head_sizes[-1] // 4) * 4 if chunks else unlisted_words(decodes)
        return _Place(shape, start, start + shape.size)

    def _fill(self, step: Step, place: _Place, num_draws: int, *, is_drawn: bool) -> None:
        """Copies a step to the device, with the arguments of its draws if these are drawn."""
        stage = next(self._stages)
        if stage.copied is not None:
            stage.copied.wait()
        arrays, arguments, on_host, on_device = stage.views(place, num_draws, self._flat)
        arrays.fill(step, self._cache)
        decodes = step.decodes
        if not is_drawn:
            arguments.fill((), _NO_IDS, [])
        elif not step.chunks:
            arguments.fill(decodes.sequences, decodes.seq_id_S, decodes.counter_S)
        else:
            sequences, _, counters = zip(*step.draws, strict=True) if step.num_draws else ((), (), ())
            seq_ids = np.array([sequence.seq_id for sequence in sequences], np.int32)
            arguments.fill(sequences, seq_ids, np.array(counters, np.int64))
        if step.chunks:
            rows = [*range(len(decodes)), *(place.shape.num_decodes + row for row in step.draw_rows)]
            at = stage.flat.numpy()[self._rows_at : self._rows_at + num_draws]
            at[: len(rows)], at[len(rows) :] = rows, 0
        on_device.copy_(on_host, non_blocking=True)
        stage.copied = Moment(self._flat.device)

    def _replay_of(self, key: _Key) -> Replay:
        """Returns a graph. If it is not captured yet, this runs it first on a step without sequences."""
        if key not in self._replays:
            self._capture_graph(key)
        return self._replays[key]

    @torch.inference_mode()
    def _capture_graph(self, key: _Key) -> None:
        drawn_R = self._drawn_R.clone()  # the step that is to run may read it
        self._replays[key] = self._capture(self._computation(key, self._model))
        self._drawn_R.copy_(drawn_R)

    def _computation(self, key: _Key, model: InternVL) -> Callable[[], Tensor]:
        """Returns what a graph computes, which does not refer to this object, and clears its part of the buffer."""
        drawn_R, logits_RV, x_TD = self._drawn_R, self._logits_RV, self._x_TD
        layers = self._cache.layers[: len(model.weights.decoder.layers)]
        if len(key) == 2:
            _, num_draws = key
            row_R = self._flat[self._rows_at : self._rows_at + num_draws].zero_()
            sampling = wrap_unlisted(self._flat[: self._rows_at].zero_(), num_draws)

            def head() -> Tensor:
                return _draw(model, x_TD.index_select(0, row_R), logits_RV[:num_draws], sampling, drawn_R)

            return head
        place = self._places[key]
        flat = self._flat[place.start : place.stop]
        if len(key) == 1:
            inputs = empty_step(place.shape, flat, drawn_R=drawn_R)
            sampling = wrap_unlisted(self._flat[: place.start].zero_(), key[0])

            def decode() -> Tensor:
                y_TD = model.run_step(inputs, layers)
                return _draw(model, y_TD, logits_RV[: len(y_TD)], sampling, drawn_R)

            return decode
        inputs = empty_step(place.shape, flat, drawn_R=drawn_R, visual_XD=self._visual_XD)
        return partial(model.run_step, inputs, layers, x_TD[: len(inputs.token_id_T)])


_NO_IDS = np.empty(0, np.int32)


def _draw(model: InternVL, x_RD: Tensor, logits_RV: Tensor, sampling: Sampling, drawn_R: Tensor) -> Tensor:
    """Computes logits and draws a token from each row."""
    logits_RV = model.logits(x_RD, logits_RV)
    model.ops.sample(logits_RV, sampling, drawn_R[: len(logits_RV)])
    return logits_RV


def _holds(size: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    return all(most >= each for most, each in zip(size, needed, strict=True))


def prefill_buckets(config: DecoderConfig, max_tokens: int) -> list[int]:
    """Returns token counts of graphs with chunks, ascending, as far as there are graphs for a model."""

    def layer_flops(num_tokens: int) -> float:
        return decoder_work(config, torch.bfloat16, [num_tokens], [num_tokens], 0).flops / config.num_layers

    sizes = sorted({*(n for n in NUM_TOKENS if n < max_tokens), max(max_tokens, NUM_TOKENS[0])})
    return [n for n in sizes if n <= GRAPH_TOKENS or layer_flops(n) <= FLOPS_OF_LAUNCHES]


def layer_buckets(config: DecoderConfig, max_num_seqs: int, max_tokens: int) -> list[tuple[int, int, int]]:
    """Returns the sizes of graphs with chunks, ascending: sequences that decode, chunks, tokens of the chunks."""
    decodes = sorted({0, min(max_num_seqs, DECODES_BESIDE), max_num_seqs})
    tokens = prefill_buckets(config, max_tokens)
    return [(beside, chunks, n) for beside in decodes for chunks in NUM_CHUNKS for n in tokens]


def head_buckets(layer_sizes: list[tuple[int, int, int]], max_draws: int) -> list[int]:
    """Returns numbers of draws, ascending, up to those of every sequence that decodes and one of each chunk."""
    most = max((decodes + chunks for decodes, chunks, _ in layer_sizes), default=0)
    return decode_buckets(min(most, max_draws)) if most else []


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Returns 1, 2, 4, 8, 16, 24, 32, ... and `max_num_seqs`, ascending."""
    return sorted({n for n in (1, 2, 4, *range(8, max_num_seqs, 8)) if n < max_num_seqs} | {max_num_seqs})
