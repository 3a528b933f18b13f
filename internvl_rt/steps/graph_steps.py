"""Brings steps to CUDA graphs: lays them out as the graphs read them, and finds the tokens that they draw."""

from bisect import bisect_left
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.steps.device_stream import host_memory
from internvl_rt.steps.executor import Executor
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.orders import Drawing, Key, Orders, Replays
from internvl_rt.steps.sampler import UnlistedArguments, unlisted_words
from internvl_rt.steps.step import Step, StepArrays, scored_rows, visual_of
from internvl_rt.steps.step_graph import ARGUMENTS_AT, NUM_STAGES, Place


class Computed(NamedTuple):
    """What a step left on the device, until the next step."""

    x_TD: Tensor | None  # the last layer's output for the chunks' tokens; None if there are no chunks
    logits_RV: Tensor  # of the rows that tokens are drawn from, and perhaps more rows behind them
    # On the host, where the tokens will be that were drawn. None: none were, and what is in `drawn_R` is void.
    token_id_R: NDArray[np.int64] | None = None


class _Views(NamedTuple):
    """A stage's memory, and the device's, as a step of one size sees it."""

    arrays: StepArrays
    arguments: UnlistedArguments
    on_host: Tensor
    drawn_R: Tensor  # the tokens that the step draws, on the device
    host_R: Tensor  # and where they will be on the host
    token_id_R: NDArray[np.int64]  # the same memory


class _Stage:
    """Memory on the host from which steps are copied to the device and to which it writes the tokens that they draw.

    It keeps the views that it had last, because each takes a while to make.
    """

    def __init__(self, number: int, size: int, tokens_R: Tensor, device: torch.device) -> None:
        self.flat = host_memory(size, torch.int32, device)
        self.flat[:ARGUMENTS_AT] = number
        self._tokens_R = tokens_R
        self._key: tuple[Place, int, int] | None = None
        self._views: _Views | None = None

    def views(self, place: Place, num_rows: int, num_draws: int, drawn_R: Tensor) -> _Views:
        """num_rows: how many draws the graph makes; the step needs the first `num_draws`."""
        key = place, num_rows, num_draws
        if self._views is None or self._key != key:
            self._views = _Views(
                StepArrays(place.shape, self.flat[place.start : place.stop].numpy()),
                UnlistedArguments(self.flat[ARGUMENTS_AT:][: unlisted_words(num_rows)], num_rows),
                self.flat[: place.stop],
                drawn_R[:num_draws],
                self._tokens_R[:num_draws],
                self._tokens_R[:num_draws].numpy(),
            )
            self._key = key
        return self._views


class GraphSteps:
    """Runs steps from the graphs of an `Executor`, and of all other ranks."""

    def __init__(self, executor: Executor, cache: KVCache, orders: Orders) -> None:
        graphs = executor.step_graphs
        assert graphs is not None, "graphs were captured"
        self._executor, self._graphs, self._cache, self._orders = executor, graphs, cache, orders
        rows = enumerate(graphs.tokens_KR[:NUM_STAGES])
        self._stages = cycle([_Stage(number, graphs.size, tokens_R, executor.device) for number, tokens_R in rows])

    def takes(self, step: Step) -> bool:
        """Says whether there is a graph for a step of its size."""
        decodes, chunks, graphs = len(step.decodes), len(step.chunks), self._graphs
        if not chunks:
            return decodes <= graphs.decode_sizes[-1]
        if step.num_draw_rows > max(graphs.head_sizes, default=0):
            return False
        return any(_holds(size, (decodes, chunks, step.num_tokens)) for size in graphs.layer_sizes)

    def run(self, step: Step) -> Computed:
        """Runs a step; the next call overwrites what it returns, but the tokens on the host.

        Lists of tokens, grammars and log-probabilities are no part of a graph: with them the tokens are not drawn.
        """
        decodes, draws, graphs = step.decodes, step.chunk_draws, self._graphs
        is_drawn = step.is_plain and not (decodes.lists_tokens or any(draw.sequence.lists_tokens for draw in draws))
        if not step.chunks:
            size = graphs.decode_sizes[bisect_left(graphs.decode_sizes, len(decodes))]
            keys: tuple[Key, ...] = ((size,),)
            views = self._fill(step, graphs.places[keys[0]], size, is_drawn=is_drawn)
            visual: list[Tensor] = []
        else:
            needed = len(decodes), len(step.chunks), step.num_tokens
            layers = min(size for size in graphs.layer_sizes if _holds(size, needed))
            rows = graphs.head_sizes[bisect_left(graphs.head_sizes, step.num_draw_rows)]
            keys = (layers, (0, rows)) if step.num_draw_rows else (layers,)
            views = self._fill(step, graphs.places[layers], rows, is_drawn=is_drawn)
            visual = visual_of(step)
        drawing = Drawing(scored_rows(step), sum(map(len, visual)), 0 if is_drawn else step.num_draws)
        replays = Replays(keys, step.num_tokens, views.on_host.numpy(), drawing)
        self._orders.give(replays)
        x_TD = self._executor.replay(replays, views.on_host, visual)
        return Computed(x_TD, graphs.logits_RV, self._tokens_of(views) if is_drawn else None)

    def _tokens_of(self, views: _Views) -> NDArray[np.int64]:
        """Returns where the host will find the tokens that graphs draw for a step, which have been launched."""
        if not self._graphs.writes_to_host:
            views.host_R.copy_(views.drawn_R, non_blocking=True)
        return views.token_id_R

    def _fill(self, step: Step, place: Place, num_rows: int, *, is_drawn: bool) -> _Views:
        """Writes a step, and arguments for the `num_rows` draws of a graph if its tokens are drawn."""
        views = next(self._stages).views(place, num_rows, step.num_draws, self._executor.drawn_R)
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
            at = views.on_host.numpy()[self._graphs.rows_at : self._graphs.rows_at + num_rows]
            at[: len(rows)], at[len(rows) :] = rows, 0
        return views


_NO_IDS = np.empty(0, np.int32)


def _holds(size: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    return all(most >= each for most, each in zip(size, needed, strict=True))
