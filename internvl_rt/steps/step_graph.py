"""Runs decoder steps from CUDA graphs.

A graph is captured for one shape; a step runs in the next larger shape, padded with rows of length 0 and tokens without
a slot. There are three kinds:

  decode   a whole step of sequences that decode: from their last tokens to the tokens that they draw
  layers   embedding and layers of a step with chunks, beside which sequences may decode
  head     logits of such a step and the tokens drawn from them; not run if nothing is drawn

Graphs read a step's numbers from one buffer on the device, and the tokens that the step before drew from `drawn_R`.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.step_inputs import HostTokens, Sampling
from internvl_rt.model.work import decoder_work
from internvl_rt.steps.cuda_graph import Capture, Job, Replay
from internvl_rt.steps.device_stream import host_memory
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
# A step must have ended, and its tokens must have been read, before this many others are launched.
NUM_STAGES = 4
_ARGUMENTS_AT = 4  # words; the first is the number of the stage, the others leave the arguments aligned
# What a single user needs for answers and for prompts of up to one picture, captured before the first step.
LIKELY = ((1,), (2,), (4,), (8,), (0, 1), *((0, 1, tokens) for tokens in NUM_TOKENS if tokens <= 512))


# Names a graph: (decodes,), (0, draws) of a head, or the sizes of a step with chunks: (decodes, chunks, tokens).
_Key = tuple[int, ...]


class Computed(NamedTuple):
    """What a step left on the device, until the next step."""

    x_TD: Tensor | None  # the last layer's output for the chunks' tokens; None if there are no chunks
    logits_RV: Tensor  # of the rows that tokens are drawn from, and perhaps more rows behind them
    # On the host, where the tokens will be that were drawn. None: none were, and what is in `drawn_R` is void.
    token_id_R: NDArray[np.int64] | None = None


class _Place(NamedTuple):
    """Where a graph finds a step in the buffer, behind the arguments of draws and their rows."""

    shape: StepShape
    start: int
    stop: int


class _Views(NamedTuple):
    """A stage's memory, and the device's, as a step of one size sees it."""

    arrays: StepArrays
    arguments: UnlistedArguments
    on_host: Tensor
    on_device: Tensor
    drawn_R: Tensor  # the tokens that the step draws, on the device
    host_R: Tensor  # and where they will be on the host
    token_id_R: NDArray[np.int64]  # the same memory


class _Stage:
    """Memory on the host from which steps are copied to the device and to which it writes the tokens that they draw.

    It keeps the views that it had last, because each takes a while to make.
    """

    def __init__(self, number: int, size: int, tokens_KR: Tensor, device: torch.device) -> None:
        """tokens_KR: memory for the tokens of all stages, of which this one's are row `number`."""
        self.flat = host_memory(size, torch.int32, device)
        self.flat[:_ARGUMENTS_AT] = number
        self._tokens_R = tokens_KR[number]
        self._key: tuple[_Place, int, int] | None = None
        self._views: _Views | None = None

    def views(self, place: _Place, num_rows: int, num_draws: int, flat: Tensor, drawn_R: Tensor) -> _Views:
        """num_rows: how many draws the graph makes; the step needs the first `num_draws`. The rest is on the device."""
        key = place, num_rows, num_draws
        if self._views is None or self._key != key:
            self._views = _Views(
                StepArrays(place.shape, self.flat[place.start : place.stop].numpy()),
                UnlistedArguments(self.flat[_ARGUMENTS_AT:][: unlisted_words(num_rows)], num_rows),
                self.flat[: place.stop],
                flat[: place.stop],
                drawn_R[:num_draws],
                self._tokens_R[:num_draws],
                self._tokens_R[:num_draws].numpy(),
            )
            self._key = key
        return self._views


def _named(key: _Key) -> str:
    """Returns what a graph computes, for who waits for it."""
    match key:
        case (decodes,):
            return f"a decode step of {decodes} sequences"
        case (0, draws):
            return f"{draws} draws after prompts"
        case _:
            return f"prompts of {key[2]} tokens beside {key[0]} decodes"


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
        # where the rows of draws from chunks are
        self._rows_at = _ARGUMENTS_AT + unlisted_words(max(self._head_sizes, default=0))
        keys = [*((decodes,) for decodes in self._decode_sizes), *self._layer_sizes]
        self._places = {key: self._place(*key) for key in keys}
        size = max(place.stop for place in self._places.values())
        self._flat = torch.zeros(size, dtype=torch.int32, device=model.device)
        tokens_KR = host_memory((NUM_STAGES + 1, len(drawn_R)), torch.int64, model.device)  # the last is for captures
        self._stages = cycle([_Stage(number, size, tokens_KR, model.device) for number in range(NUM_STAGES)])
        self._on_host = HostTokens(tokens_KR, self._flat[:1]) if model.ops.writes_to_host else None
        self._replays: dict[_Key, Replay] = {}

    def _keys(self) -> list[list[_Key]]:
        """Lists what is or may be captured: of each kind of graphs the largest first."""
        layers = sorted(self._layer_sizes, key=lambda size: size[0] + size[2], reverse=True)
        decode, head = (sorted(sizes, reverse=True) for sizes in (self._decode_sizes, self._head_sizes))
        return [[(decodes,) for decodes in decode], [*layers], [(0, draws) for draws in head]]

    def warm_up(self, model: InternVL) -> list[Job]:
        """Lists runs of a model that needs the same kernels, for every graph: so these kernels are built."""

        def run(key: _Key) -> None:
            self._computation(key, model)()

        return [Job(f"kernels for {_named(key)}", partial(run, key)) for keys in self._keys() for key in keys]

    def captures(self, *, everything: bool) -> list[Job]:
        """Lists captures of the graphs that a single user needs, or of all."""
        return [
            Job(f"graph of {_named(key)}", partial(self._replay_of, key))
            for keys in self._keys()
            for number, key in enumerate(keys)
            if everything or number == 0 or key in LIKELY
        ]

    def takes(self, step: Step) -> bool:
        """Says whether there is a graph for a step of its size."""
        decodes, chunks = len(step.decodes), len(step.chunks)
        if not chunks:
            return decodes <= self._decode_sizes[-1]
        if step.num_draw_rows > max(self._head_sizes, default=0):
            return False
        return any(_holds(size, (decodes, chunks, step.num_tokens)) for size in self._layer_sizes)

    def run(self, step: Step) -> Computed:
        """Runs a step; the next call overwrites what it returns, but the tokens on the host.

        Lists of tokens, grammars and log-probabilities are no part of a graph: with them the tokens are not drawn.
        """
        decodes, draws = step.decodes, step.chunk_draws
        is_drawn = step.is_plain and not (decodes.lists_tokens or any(draw.sequence.lists_tokens for draw in draws))
        if not step.chunks:
            size = self._decode_sizes[bisect_left(self._decode_sizes, len(decodes))]
            replay = self._replay_of((size,))
            views = self._fill(step, self._places[(size,)], size, is_drawn=is_drawn)
            replay.run()
            return Computed(None, self._logits_RV, self._tokens_of(views) if is_drawn else None)
        layers = min(
            size for size in self._layer_sizes if _holds(size, (len(decodes), len(step.chunks), step.num_tokens))
        )
        rows = self._head_sizes[bisect_left(self._head_sizes, step.num_draw_rows)]
        replays = [self._replay_of(layers)]
        if step.num_draw_rows:
            replays.append(self._replay_of((0, rows)))
        views = self._fill(step, self._places[layers], rows, is_drawn=is_drawn)
        if visual := visual_of(step):
            torch.cat(visual, out=self._visual_XD[: sum(map(len, visual))])
        for replay in replays:
            replay.run()
        x_TD = self._x_TD[layers[0] : layers[0] + step.num_tokens]
        return Computed(x_TD, self._logits_RV, self._tokens_of(views) if is_drawn else None)

    def _tokens_of(self, views: _Views) -> NDArray[np.int64]:
        """Returns where the host will find the tokens that graphs draw for a step, which have been launched."""
        if self._on_host is None:
            views.host_R.copy_(views.drawn_R, non_blocking=True)
        return views.token_id_R

    def _place(self, decodes: int, chunks: int = 0, tokens: int = 0) -> _Place:
        items = self._cache.num_split_items(decodes) if decodes else 0
        shape = StepShape(decodes, chunks, tokens, self._table_width, items)
        arguments_end = _ARGUMENTS_AT + unlisted_words(decodes)
        start = self._rows_at + -(-self._head_sizes[-1] // 4) * 4 if chunks else arguments_end
        return _Place(shape, start, start + shape.size)

    def _fill(self, step: Step, place: _Place, num_rows: int, *, is_drawn: bool) -> _Views:
        """Copies a step to the device, and arguments for the `num_rows` draws of a graph if its tokens are drawn."""
        views = next(self._stages).views(place, num_rows, step.num_draws, self._flat, self._drawn_R)
        views.arrays.fill(step, self._cache)
        decodes, arguments = step.decodes, views.arguments
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
            at = views.on_host.numpy()[self._rows_at : self._rows_at + num_rows]
            at[: len(rows)], at[len(rows) :] = rows, 0
        views.on_device.copy_(views.on_host, non_blocking=True)
        return views

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
        drawn_R, logits_RV, x_TD, on_host = self._drawn_R, self._logits_RV, self._x_TD, self._on_host
        self._flat[:_ARGUMENTS_AT].fill_(NUM_STAGES)  # the steps under way keep their tokens
        layers = self._cache.layers[: len(model.weights.decoder.layers)]
        if len(key) == 2:
            _, num_draws = key
            row_R = self._flat[self._rows_at : self._rows_at + num_draws].zero_()
            sampling = wrap_unlisted(self._flat[_ARGUMENTS_AT : self._rows_at].zero_(), num_draws)

            def head() -> Tensor:
                return _draw(model, x_TD.index_select(0, row_R), logits_RV[:num_draws], sampling, drawn_R, on_host)

            return head
        place = self._places[key]
        flat = self._flat[place.start : place.stop]
        if len(key) == 1:
            inputs = empty_step(place.shape, flat, drawn_R=drawn_R)
            sampling = wrap_unlisted(self._flat[_ARGUMENTS_AT : place.start].zero_(), key[0])

            def decode() -> Tensor:
                y_TD = model.run_step(inputs, layers)
                return _draw(model, y_TD, logits_RV[: len(y_TD)], sampling, drawn_R, on_host)

            return decode
        inputs = empty_step(place.shape, flat, drawn_R=drawn_R, visual_XD=self._visual_XD)
        return partial(model.run_step, inputs, layers, x_TD[: len(inputs.token_id_T)])


_NO_IDS = np.empty(0, np.int32)


def _draw(
    model: InternVL,
    x_RD: Tensor,
    logits_RV: Tensor,
    sampling: Sampling,
    drawn_R: Tensor,
    on_host: HostTokens | None,
) -> Tensor:
    """Computes logits and draws a token from each row."""
    logits_RV = model.logits(x_RD, logits_RV)
    model.ops.sample(logits_RV, sampling, drawn_R[: len(logits_RV)], on_host)
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
