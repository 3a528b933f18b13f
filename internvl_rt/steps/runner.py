"""Runs steps on the device: encodes their pictures, computes their tokens, draws the next ones.

A step is launched and collected later, so that on a GPU the next one can be launched while it runs. The drawn tokens
stay on the device, where the next step reads them, and are also copied to the host. From one launch to the next the
host does not wait for the device.

All work goes to one stream, whatever the calling thread's own stream is, so steps run one after another.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from internvl_rt.inputs.picture import Picture
from internvl_rt.model.internvl import InternVL, named_parameters
from internvl_rt.model.work import DecoderCost, Work, count_pairs, vision_work
from internvl_rt.steps.cpu_threads import CpuThreads
from internvl_rt.steps.cuda_graph import Capture, Job, TileGraphs, cuda_capture
from internvl_rt.steps.device_stream import DeviceStream, Moment, to_device, to_host
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.logprobs import Scores, TokenLogprob, TokenScores, read_drawn, read_scores, targets_of
from internvl_rt.steps.sampler import Sampler, add_biases, forbid, listing_sampling
from internvl_rt.steps.step import Chunk, Step, StepShape, build_step, empty_step
from internvl_rt.steps.step_graph import NUM_STAGES, Computed, StepGraphs
from internvl_rt.steps.uploads import Uploads
from internvl_rt.steps.visual_cache import VisualCache

MAX_TILES_PER_PASS = 16  # bounds the vision tower's activations; one picture has at most 13 by default
SCORED_PER_PASS = 256  # rows of a scored prompt whose logits exist at once: 155 MB of float32 at 152k tokens


class StepResult(NamedTuple):
    """What a step has computed, on the host."""

    token_ids: list[int]  # one for each draw of the step; -1 where the logits are not finite
    logprobs: list[TokenLogprob | None]  # of the drawn tokens, if requested
    scores: list[list[TokenScores]]  # one list for each entry of the step's `scored`
    vision_s: float
    decoder_s: float  # decoder and sampling
    num_tiles: int  # encoded tiles
    vision_work: Work
    decoder_work: Work


@dataclass(slots=True)
class LaunchedStep:
    """A step that runs on the device. Its tensors are on the host; they are filled when `done` has passed."""

    step: Step
    number: int  # the KV cache's number for this step
    start: Moment
    encoded: Moment
    done: Moment
    num_tiles: int
    token_id_R: NDArray[np.int64]
    drawn: Scores | None
    scored: list[Scores]


class Runner:
    """Runs steps on the device: launches them, and returns their results once they have ended."""

    def __init__(
        self,
        model: InternVL,
        cache: KVCache,
        visual_cache: VisualCache,
        uploads: Uploads,
        *,
        max_draws: int,
        num_threads: int | None = None,
    ) -> None:
        """max_draws: most tokens that a step can draw. Every kernel is launched by itself until `capture` is called.

        num_threads: that compute on the CPU; see `CpuThreads`.
        """
        self._model, self._cache, self._visual_cache, self._uploads = model, cache, visual_cache, uploads
        self._device = model.device
        self._decoder_cost = DecoderCost(model.config.decoder, model.dtype, model.decoder_layer_bytes, cache.dtype)
        self.stream = DeviceStream(model.device)
        self._threads = CpuThreads(num_threads) if model.device.type == "cpu" else None
        self.stream.adopt([*named_parameters(model.weights).values(), *model.buffers, *cache.buffers])
        self._tile_graphs: TileGraphs | None = None
        self._step_graphs: StepGraphs | None = None
        self._sampler = Sampler(model.device)
        self._num_launched = 0  # steps that have not been collected
        with self.stream.use():
            self._drawn_R = torch.zeros(max_draws, dtype=torch.int64, device=model.device)
        self.num_encoded_tiles = 0

    def _on_device(self) -> AbstractContextManager[Any]:
        """Computes what is called inside the `with` block on the engine's stream, or with its threads."""
        return self.stream.use() if self._threads is None else self._threads.use()

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the model computes in."""
        return self._model.dtype

    def capture(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_tokens_per_step: int,
        everything: bool = True,
        capture: Capture | None = None,
    ) -> None:
        """Prepares CUDA graphs that passes of the vision tower, decode steps and short prefills use from now on.

        everything: whether all are captured now, instead of a few now and the others when they are first needed. Their
            kernels are built now all the same.

        A terminal shows the progress, and what is being done, if it takes longer than a second.
        """
        model, drawn_R, capture = self._model, self._drawn_R, capture or cuda_capture()
        limits = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
        with self.stream.use():
            self._tile_graphs = TileGraphs(model.encode_tiles, model.config.vision.image_size, model.device, capture)
            self._step_graphs = StepGraphs(
                model, self._cache, drawn_R, capture, max_tokens_per_step=max_tokens_per_step, **limits
            )
            few_layers = model.cut(2)
            run_the_others = partial(self._run_the_others, few_layers, max_tokens_per_step)
            warm_up = [Job("kernels that are in no graph", run_the_others)]
            if not everything:
                warm_up += self._tile_graphs.warm_up(few_layers.encode_tiles)
                warm_up += self._step_graphs.warm_up(few_layers)
            jobs = [Job(name, torch.inference_mode()(run)) for name, run in warm_up]
            for graphs in (self._tile_graphs, self._step_graphs):
                jobs += graphs.captures(everything=everything)
            with tqdm(jobs, "kernels and CUDA graphs", leave=False, delay=1, disable=None) as bar:
                for job in bar:
                    bar.set_postfix_str(job.name)
                    job.run()

    def _run_the_others(self, model: InternVL, max_tokens_per_step: int) -> None:
        """Runs what is in no graph, so that its kernels are built before the first answer: the largest step, and more.

        model: a few layers, which need the same kernels as all.
        """
        ops, device, layers = model.ops, model.device, self._cache.layers[: len(model.weights.decoder.layers)]
        shape = StepShape(0, 1, max_tokens_per_step, table_width=1, num_items=0)
        flat = torch.empty(shape.size, dtype=torch.int32, device=device)
        model.run_step(empty_step(shape, flat, drawn_R=self._drawn_R), layers)
        if ops.resizes_on_device:
            pixels = torch.zeros(64, 48, 3, dtype=torch.uint8, device=device)
            for columns in (1, 2):  # Triton builds another kernel if all tiles together are a multiple of 16 wide
                ops.resize_tiles(pixels, columns, 1, self._model.config.vision.image_size, False)
        self._cache.copy_blocks(np.zeros((1, 2), np.int32))
        ops.sample(self._model.logits_memory(1).zero_(), listing_sampling(device), self._drawn_R[:1].clone())

    def load_pictures(self, chunk: Chunk) -> None:
        """Decodes the pictures that a chunk touches, if that was not done. Raises MediaError for a broken one."""
        sequence = chunk.sequence
        for index in sequence.pictures_within(chunk.start, chunk.stop):
            picture = sequence.pictures[index]
            if index not in sequence.visual and not self._visual_cache.hold(picture, sequence.salt):
                self._uploads.load(picture)

    def launch(self, step: Step) -> LaunchedStep:
        """Starts a step and returns before a GPU has ended it. Appends nothing to the sequences.

        Fewer than NUM_STAGES steps may be launched and not yet collected: each has memory of its own on the host.
        A step from graphs does not enter inference mode, which takes microseconds: what is captured has no gradients.
        """
        assert self._num_launched < NUM_STAGES, "a step that was launched has not been collected"
        with self._on_device():
            start, num_encoded_tiles = Moment(self._device), self.num_encoded_tiles
            if step.has_prompts:
                for chunk in step.chunks:
                    self._encode_pictures(chunk)
            encoded = Moment(self._device) if step.has_prompts else start
            if self._step_graphs is not None and self._step_graphs.takes(step):
                x_TD, logits_RV, token_id_R = self._step_graphs.run(step)
            else:
                x_TD, logits_RV, token_id_R = self._compute(step)
            scored = self._score(step, x_TD) if step.scored and x_TD is not None else []
            drawn = None
            if token_id_R is None:
                token_id_R, drawn = self._draw(step, logits_RV[: step.num_draw_rows])
            done = Moment(self._device)
        self._num_launched += 1
        return LaunchedStep(
            step=step,
            number=self._cache.blocks.num_steps,
            start=start,
            encoded=encoded,
            token_id_R=token_id_R,
            drawn=drawn,
            scored=scored,
            done=done,
            num_tiles=self.num_encoded_tiles - num_encoded_tiles,
        )

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Waits for a step to end and returns its results. If the wait fails, nothing that it wrote will be reused."""
        self._num_launched -= 1
        try:
            launched.done.wait()
        except BaseException:
            self._cache.end_step(launched.number, failed=True)
            raise
        self._cache.end_step(launched.number)
        config, dtype, step = self._model.config, self._model.dtype, launched.step
        return StepResult(
            token_ids=launched.token_id_R.tolist(),
            logprobs=read_drawn(step, launched.drawn),
            scores=read_scores(step, launched.scored),
            vision_s=launched.start.seconds_until(launched.encoded),
            decoder_s=launched.encoded.seconds_until(launched.done),
            num_tiles=launched.num_tiles,
            vision_work=vision_work(config, dtype, launched.num_tiles, self._model.vision_layer_bytes),
            decoder_work=self._work_of(step),
        )

    def fail(self) -> None:
        """Follows a failed launch, when no other step is under way: nothing that it wrote will be reused."""
        self.stream.synchronize()
        self._num_launched = 0
        with self.stream.use():
            self._cache.end_all_steps()

    def stats(self) -> dict[str, int | float]:
        """Counts what the caches hold and have saved, in tokens and bytes."""
        blocks, visual = self._cache.blocks.stats(), self._visual_cache
        return {
            "kv_blocks": blocks["num_blocks"],
            "kv_blocks_used": blocks["num_used"] + blocks["num_deferred"],
            "kv_blocks_cached": blocks["num_cached"],
            "prefix_queried_tokens": blocks["queried_tokens"],
            "prefix_hit_tokens": blocks["hit_tokens"],
            "visual_cache_bytes": visual.num_bytes,
            "visual_cache_queries": visual.num_queries,
            "visual_cache_hits": visual.num_hits,
            "encoded_tiles": self.num_encoded_tiles,
        }

    @torch.inference_mode()
    def _compute(self, step: Step) -> Computed:
        """Computes a step without graphs."""
        x_TD = self._model.run_step(build_step(step, self._cache, self._drawn_R), self._cache.layers)
        n, x_RD = len(step.decodes), x_TD
        if len(step.draw_rows) < step.num_tokens:
            x_RD = self._rows(x_TD, [*range(n), *(n + row for row in step.draw_rows)])
        return Computed(x_TD[n:], self._model.logits(x_RD))

    @torch.inference_mode()
    def _score(self, step: Step, x_TD: Tensor) -> list[Scores]:
        """Computes scores of the scored places from the last layer's output for the chunks' tokens."""
        num_top = max(scored.places.num_top for scored in step.scored)
        rows = np.array(step.logit_rows[len(step.draw_rows) :], np.int64)[:, None]
        both = to_device(torch.from_numpy(np.concatenate((rows, targets_of(step)), axis=1)), self._device)
        parts = torch.split(both, SCORED_PER_PASS)
        return [Scores(self._model.logits(x_TD[part[:, 0]]), part[:, 1:], num_top) for part in parts]

    @torch.inference_mode()
    def _draw(self, step: Step, logits_RV: Tensor) -> tuple[NDArray[np.int64], Scores | None]:
        """Draws tokens into `drawn_R`; returns host copies of them and of the requested log-probabilities."""
        draws, token_id_R = step.draws, self._drawn_R[: step.num_draws]
        if not draws:
            return np.empty(0, np.int64), None
        wanted: list[int] = []
        raw_RV = logits_RV
        if not step.is_plain:
            logits_RV = self._rows(logits_RV, [draw.row for draw in draws])
            wanted = [row for row, draw in enumerate(draws) if draw.sequence.params.logprobs is not None]
            raw_RV = self._rows(logits_RV, wanted)  # before biases, and before a grammar forbids tokens
            biases = {row: draw.sequence.bias for row, draw in enumerate(draws) if draw.sequence.bias is not None}
            if biases:
                add_biases(logits_RV, biases)
            masks = {row: draw.sequence.mask_W for row, draw in enumerate(draws) if draw.sequence.mask_W is not None}
            if masks:
                forbid(logits_RV, list(masks), np.stack(list(masks.values())))
        self._model.ops.sample(logits_RV, self._sampler.build(draws), token_id_R)
        drawn = None
        if wanted:
            num_top = max(draw.sequence.params.logprobs or 0 for draw in draws)
            drawn = Scores(raw_RV, self._rows(token_id_R, wanted)[:, None], num_top)
        return to_host(token_id_R).numpy(), drawn

    def _rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Copies some rows."""
        return tensor[to_device(torch.tensor(rows, dtype=torch.int64), tensor.device)]

    @torch.inference_mode()
    def _encode_pictures(self, chunk: Chunk) -> None:
        """Encodes a picture when the first chunk touches it, and drops it when a chunk starts after it."""
        sequence = chunk.sequence
        touched = sequence.pictures_within(chunk.start, chunk.stop)
        for index in [index for index in sequence.visual if index not in touched]:
            del sequence.visual[index]
        for index in touched:
            if index not in sequence.visual:
                sequence.visual[index] = self._visual_of(sequence.pictures[index], sequence.salt)

    @torch.inference_mode()
    def encode(self, picture: Picture, salt: str | None) -> Tensor:
        """Returns visual tokens [X, D] of a picture, for use on the calling thread's own stream."""
        with self._on_device():
            visual_XD = self._visual_of(picture, salt)
        return self.stream.hand_over(visual_XD)

    def _visual_of(self, picture: Picture, salt: str | None) -> Tensor:
        """Returns visual tokens [X, D]: given with the picture, kept from an earlier time, or computed now."""
        if picture.visual_XD is not None:
            return self._uploads.load(picture).get().to(self._device)
        visual_XD = self._visual_cache.get(picture, salt)
        if visual_XD is None:
            visual_XD = self._encode(self._uploads.load(picture).get().to(self._device))
            self._visual_cache.put(picture, salt, visual_XD)
        return visual_XD

    def _encode(self, tiles: Tensor) -> Tensor:
        """Encodes one picture's tiles, which are on the device, to visual tokens [X, D]."""
        self.num_encoded_tiles += len(tiles)
        graphs = self._tile_graphs if tiles.dtype == torch.uint8 else None
        encode = self._model.encode_tiles if graphs is None else graphs.encode
        return torch.cat([encode(part) for part in torch.split(tiles, MAX_TILES_PER_PASS)]).flatten(0, 1)

    def _work_of(self, step: Step) -> Work:
        """Counts the work of a step of the decoder."""
        num_decodes, num_context = len(step.decodes), step.decodes.num_context
        num_seen, num_pairs, num_rows = num_context, num_context, num_decodes
        if step.chunks:
            stops = [chunk.stop for chunk in step.chunks]
            num_seen, num_pairs = num_seen + sum(stops), num_pairs + count_pairs(step.counts, stops)
            num_rows += len(step.logit_rows)
        return self._decoder_cost.work(num_decodes + step.num_tokens, num_seen, num_pairs, num_rows)
