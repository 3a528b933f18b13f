"""Runs decoder steps from CUDA graphs.

A graph is captured for one shape; a step runs in the next larger shape, padded with rows of length 0 and tokens without
a slot. There are three kinds:

  decode   a whole step of sequences that decode: from their last tokens to the tokens that they draw
  layers   embedding and layers of a step with chunks, beside which sequences may decode
  head     logits of such a step and the tokens drawn from them; not run if nothing is drawn

Graphs read a step's numbers from one buffer on the device, and the tokens that the step before drew from `drawn_R`.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.step_inputs import HostTokens, Sampling
from internvl_rt.model.work import decoder_work
from internvl_rt.steps.cuda_graph import Capture, Job, Replay
from internvl_rt.steps.device_stream import host_memory
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.orders import Key
from internvl_rt.steps.sampler import unlisted_words, wrap_unlisted
from internvl_rt.steps.step import StepShape, empty_step

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
ARGUMENTS_AT = 4  # words; the first is the number of the stage, the others leave the arguments aligned
# What a single user needs for answers and for prompts of up to one picture, captured before the first step.
LIKELY = ((1,), (2,), (4,), (8,), (0, 1), *((0, 1, tokens) for tokens in NUM_TOKENS if tokens <= 512))

# A key names a graph: (decodes,), (0, draws) of a head, or the sizes of a step with chunks: (decodes, chunks, tokens).


class Place(NamedTuple):
    """Where a graph finds a step in the buffer, behind the arguments of draws and their rows."""

    shape: StepShape
    start: int
    stop: int


def _named(key: Key) -> str:
    """Returns what a graph computes, for who waits for it."""
    match key:
        case (decodes,):
            return f"a decode step of {decodes} sequences"
        case (0, draws):
            return f"{draws} draws after prompts"
        case _:
            return f"prompts of {key[2]} tokens beside {key[0]} decodes"


class StepGraphs:
    """Computes steps from graphs that are captured when they are first needed, or before.

    The graphs refer to the model and the cache's memory. `drawn_R` gets the tokens that they draw. Build this outside
    of torch's inference mode: then steps can write its memory without entering that, which takes microseconds.

    decode_sizes, layer_sizes, head_sizes: of each kind of graph
    places: of the graphs with layers. rows_at: where a head finds the rows of draws from chunks
    """

    def __init__(
        self,
        model: InternVL,
        pool: KVPool,
        drawn_R: Tensor,
        capture: Capture,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_tokens_per_step: int,
    ) -> None:
        self._model, self._pool, self._drawn_R, self._capture = model, pool, drawn_R, capture
        self._table_width = -(-max_model_len // block_size)
        self.decode_sizes = decode_buckets(max_num_seqs)
        self.layer_sizes = layer_buckets(model.first_part, max_num_seqs, max_tokens_per_step)
        self.head_sizes = head_buckets(self.layer_sizes, len(drawn_R))
        num_tokens = max((decodes + tokens for decodes, _, tokens in self.layer_sizes), default=0)
        shape = num_tokens, model.config.decoder.hidden_size
        self.x_TD, self.visual_XD = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        self.logits_RV = model.logits_memory(max(max_num_seqs, *self.head_sizes, 0))
        self.rows_at = ARGUMENTS_AT + unlisted_words(max(self.head_sizes, default=0))
        keys = [*((decodes,) for decodes in self.decode_sizes), *self.layer_sizes]
        self.places = {key: self._place(*key) for key in keys}
        self.size = max(place.stop for place in self.places.values())
        self._flat = torch.zeros(self.size, dtype=torch.int32, device=model.device)
        # Where the host finds the tokens that each stage's step draws; the last row is for captures.
        self.tokens_KR = host_memory((NUM_STAGES + 1, len(drawn_R)), torch.int64, model.device)
        self.writes_to_host = model.ops.writes_to_host
        self._on_host = HostTokens(self.tokens_KR, self._flat[:1]) if self.writes_to_host else None
        self._replays: dict[Key, Replay] = {}
        self._parts: dict[int, Tensor] = {}  # of `_flat`, by their size, because a slice takes a microsecond to make

    def _keys(self) -> list[list[Key]]:
        """Lists what is or may be captured: of each kind of graphs the largest first."""
        layers = sorted(self.layer_sizes, key=lambda size: size[0] + size[2], reverse=True)
        decode, head = (sorted(sizes, reverse=True) for sizes in (self.decode_sizes, self.head_sizes))
        return [[(decodes,) for decodes in decode], [*layers], [(0, draws) for draws in head]]

    def warm_up(self, model: InternVL) -> list[Job]:
        """Lists runs of a model that needs the same kernels, for every graph: so these kernels are built."""

        def run(key: Key) -> None:
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

    def run(self, keys: Items[Key], flat: Tensor) -> None:
        """Replays graphs, one after the other, of a step that lies in memory of the host for copies to the device."""
        replays, size = [self._replay_of(key) for key in keys], len(flat)
        if size not in self._parts:
            self._parts[size] = self._flat[:size]
        self._parts[size].copy_(flat, non_blocking=True)
        for replay in replays:
            replay.run()

    def x_of_chunks(self, keys: Items[Key], num_tokens: int) -> Tensor | None:
        """Returns the last layer's output for the chunks' tokens, until the next step; None if there are no chunks."""
        return self.x_TD[keys[0][0] : keys[0][0] + num_tokens] if len(keys[0]) > 1 else None

    def _place(self, decodes: int, chunks: int = 0, tokens: int = 0) -> Place:
        items = self._model.num_split_items(decodes) if decodes else 0
        shape = StepShape(decodes, chunks, tokens, self._table_width, items, self._model.config.decoder.num_tables)
        arguments_end = ARGUMENTS_AT + unlisted_words(decodes)
        start = self.rows_at + -(-self.head_sizes[-1] // 4) * 4 if chunks else arguments_end
        return Place(shape, start, start + shape.size)

    def _replay_of(self, key: Key) -> Replay:
        """Returns a graph. If it is not captured yet, this runs it first on a step without sequences."""
        if key not in self._replays:
            self._capture_graph(key)
        return self._replays[key]

    @torch.inference_mode()
    def _capture_graph(self, key: Key) -> None:
        drawn_R = self._drawn_R.clone()  # the step that is to run may read it
        self._replays[key] = self._capture(self._computation(key, self._model))
        self._drawn_R.copy_(drawn_R)

    def _computation(self, key: Key, model: InternVL) -> Callable[[], Tensor]:
        """Returns what a graph computes, which does not refer to this object, and clears its part of the buffer."""
        drawn_R, logits_RV, x_TD, on_host = self._drawn_R, self.logits_RV, self.x_TD, self._on_host
        self._flat[:ARGUMENTS_AT].fill_(NUM_STAGES)  # the steps under way keep their tokens
        layers = self._pool.layers[: len(model.weights.decoder.layers)]
        if len(key) == 2:
            _, num_draws = key
            row_R = self._flat[self.rows_at : self.rows_at + num_draws].zero_()
            sampling = wrap_unlisted(self._flat[ARGUMENTS_AT : self.rows_at].zero_(), num_draws)

            def head() -> Tensor:
                return _draw(model, x_TD.index_select(0, row_R), logits_RV[:num_draws], sampling, drawn_R, on_host)

            return head
        place = self.places[key]
        flat = self._flat[place.start : place.stop]
        if len(key) == 1:
            inputs = empty_step(place.shape, flat, drawn_R=drawn_R)
            sampling = wrap_unlisted(self._flat[ARGUMENTS_AT : place.start].zero_(), key[0])

            def decode() -> Tensor:
                y_TD = model.run_step(inputs, layers)
                return _draw(model, y_TD, logits_RV[: len(y_TD)], sampling, drawn_R, on_host)

            return decode
        inputs = empty_step(place.shape, flat, drawn_R=drawn_R, visual_XD=self.visual_XD)
        return partial(model.run_step, inputs, layers, x_TD[: len(inputs.token_id_T)])


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
