"""Computes passes of a model on one device, from numbers alone. Every rank has one (`model/shard.py`).

All work goes to one stream, whatever the calling thread's own stream is, so passes run one after another. What ranks do
together they do in the same order: a pass, the logits of scored tokens, the tokens that rank 0 draws.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from internvl_rt.model.internvl import InternVL, named_parameters
from internvl_rt.steps.cpu_threads import CpuThreads
from internvl_rt.steps.cuda_graph import Capture, Job, cuda_capture
from internvl_rt.steps.device_stream import DeviceStream, to_device
from internvl_rt.steps.kv_pool import KVPool
from internvl_rt.steps.orders import Capturing, Pass, Replays, Words
from internvl_rt.steps.sampler import listing_sampling
from internvl_rt.steps.step import StepShape, empty_step, wrap_step
from internvl_rt.steps.step_graph import StepGraphs
from internvl_rt.steps.tile_encoder import TileEncoder

SCORED_PER_PASS = 256  # rows of a scored prompt whose logits exist at once: 155 MB of float32 at 152k tokens


class Executor:
    """Runs a model's passes: each kernel is launched by itself, or CUDA graphs after `capture` was called.

    drawn_R: the tokens that the last step drew, on the device
    """

    def __init__(self, model: InternVL, pool: KVPool, *, max_draws: int, num_threads: int | None = None) -> None:
        """max_draws: most tokens that a step can draw. num_threads: that compute on the CPU; see `CpuThreads`."""
        self.model, self._pool, self.device = model, pool, model.device
        self.stream = DeviceStream(model.device)
        self._threads = CpuThreads(num_threads) if model.device.type == "cpu" else None
        weights = (tensor for path, tensor in named_parameters(model.weights).items() if model.shard.holds(path))
        self.stream.adopt([*weights, *model.buffers, *pool.buffers])
        self._tiles = TileEncoder(model)
        self.step_graphs: StepGraphs | None = None
        with self.stream.use():
            self.drawn_R = torch.zeros(max_draws, dtype=torch.int64, device=model.device)

    def use(self) -> AbstractContextManager[Any]:
        """Computes what is called inside the `with` block on the engine's stream, or with its threads."""
        return self.stream.use() if self._threads is None else self._threads.use()

    def capture(self, order: Capturing, capture: Capture | None = None) -> None:
        """Prepares CUDA graphs that passes of the vision tower, decode steps and short prefills use from now on.

        order.everything: whether all are captured now, instead of a few now and the others when they are first needed.
            Their kernels are built now all the same.

        A terminal shows the progress, and what is being done, if it takes longer than a second.
        """
        model, capture = self.model, capture or cuda_capture()
        *limits, everything = order
        with self.stream.use():
            self.step_graphs = StepGraphs(model, self._pool, self.drawn_R, capture, *limits)
            few_layers = model.cut(2)
            run_the_others = partial(self._run_the_others, few_layers, order.max_tokens_per_step)
            warm_up = [Job("kernels that are in no graph", run_the_others)]
            captures: list[Job] = []
            if model.shard.vision:
                of_tiles, captures = self._tiles.prepare_graphs(few_layers, capture, everything=everything)
                warm_up += of_tiles
            if not everything:
                warm_up += self.step_graphs.warm_up(few_layers)
            jobs = [Job(name, torch.inference_mode()(run)) for name, run in warm_up]
            jobs += [*captures, *self.step_graphs.captures(everything=everything)]
            hidden = model.shard.rank > 0 or None  # None: unless this is a terminal
            with tqdm(jobs, "kernels and CUDA graphs", leave=False, delay=1, disable=hidden) as bar:
                for job in bar:
                    bar.set_postfix_str(job.name)
                    job.run()

    def _run_the_others(self, model: InternVL, max_tokens_per_step: int) -> None:
        """Runs what is in no graph, so that its kernels are built before the first answer: the largest step, and more.

        model: a few layers, which need the same kernels as all.
        """
        ops, device, layers = model.ops, model.device, self._pool.layers[: len(model.weights.decoder.layers)]
        num_tables = model.config.decoder.num_tables
        shape = StepShape(0, 1, max_tokens_per_step, table_width=1, num_items=0, num_tables=num_tables)
        flat = torch.empty(shape.size, dtype=torch.int32, device=device)
        model.run_step(empty_step(shape, flat, drawn_R=self.drawn_R), layers)
        if ops.resizes_on_device:
            pixels = torch.zeros(64, 48, 3, dtype=torch.uint8, device=device)
            for columns in (1, 2):  # Triton builds another kernel if all tiles together are a multiple of 16 wide
                ops.resize_tiles(pixels, columns, 1, self.model.config.vision.image_size, False)
        self._pool.copy_blocks(np.zeros((1, 2), np.int32))
        ops.sample(self.model.logits_memory(1).zero_(), listing_sampling(device), self.drawn_R[:1].clone())

    def encode(self, tiles: Tensor) -> Tensor:
        """Encodes tiles, which are on the device, to visual tokens [I, M, D]."""
        return self._tiles.encode(tiles)

    @torch.inference_mode()
    def encode_together(self, tiles: Tensor) -> Tensor:
        """Encodes tiles of rank 0, each rank as many, and returns them all there: visual tokens [I, M, D].

        tiles: on other ranks, memory for those of rank 0.
        """
        shard, config = self.model.shard, self.model.config
        assert shard.group is not None, "there are several ranks"
        each = -(-len(tiles) // shard.size)
        mine = shard.group.share(tiles.contiguous())[shard.rank * each : (shard.rank + 1) * each]
        shape = each, config.rows_per_tile, config.decoder.hidden_size
        visual_IMD = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        if len(mine):
            visual_IMD[: len(mine)] = self.encode(mine)
        return shard.group.gather(visual_IMD).flatten(0, 1)[: len(tiles)]

    @torch.inference_mode()
    def run_pass(self, step: Pass, flat: Tensor, visual: Items[Tensor] | None) -> Tensor:
        """Computes a step without graphs: x_TD after the last layer, of all its tokens.

        flat: `step.flat` in memory of the host. visual: the visual tokens of the step; None: rank 0 has them.
        """
        shared_XD = self._share_visual(step.drawing.num_visual, visual) if step.drawing.num_visual else None
        how: dict[str, Any] = {"drawn_R": self.drawn_R, "visual_XD": shared_XD}
        inputs = wrap_step(step.shape, flat.to(self.device, non_blocking=True), max_query_len=step.max_query_len, **how)
        return self.model.run_step(inputs, self._pool.layers)

    @torch.inference_mode()
    def logits(self, x_TD: Tensor, row_R: Words) -> Tensor:
        """Computes the logits [R, V] of some rows."""
        if len(row_R) < len(x_TD):
            x_TD = x_TD[to_device(torch.from_numpy(row_R.astype(np.int64)), self.device)]
        return self.model.logits(x_TD)

    def replay(self, step: Replays, flat: Tensor, visual: Items[Tensor] | None) -> Tensor | None:
        """Computes a step from graphs: x_TD after the last layer, of its chunks' tokens; None: it has no chunks.

        flat, visual: as for `run_pass`
        """
        graphs = self.step_graphs
        assert graphs is not None, "graphs were captured"
        if step.drawing.num_visual:
            self._share_visual(step.drawing.num_visual, visual, graphs.visual_XD)
        graphs.run(step.keys, flat)
        return graphs.x_of_chunks(step.keys, step.num_tokens)

    def scored_logits(self, x_TD: Tensor, scored_X: Words) -> Iterable[Tensor]:
        """Computes the logits of scored tokens of the chunks, in parts."""
        for start in range(0, len(scored_X), SCORED_PER_PASS):
            yield self.logits(x_TD, scored_X[start : start + SCORED_PER_PASS])

    def _share_visual(self, num_visual: int, visual: Items[Tensor] | None, out: Tensor | None = None) -> Tensor:
        """Joins visual tokens [X, D], on rank 0, and copies them to the other ranks."""
        if out is None:
            out = torch.empty(
                num_visual, self.model.config.decoder.hidden_size, dtype=self.model.dtype, device=self.device
            )
        out = out[:num_visual]
        if visual is not None:
            torch.cat(list(visual), out=out)
        group = self.model.shard.group
        return out if group is None else group.share(out)
