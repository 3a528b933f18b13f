"""Runs steps on the device: encodes their pictures, computes their tokens, draws the next ones.

A step is launched and collected later, so that on a GPU the next one can be launched while it runs. The drawn tokens
stay on the device, where the next step reads them, and are also copied to the host. From one launch to the next the
host does not wait for the device.

All work goes to one stream, whatever the calling thread's own stream is, so steps run one after another.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.inputs.picture import Picture
from internvl_rt.model.flash import rows_of_tiles
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.work import DecoderCost, Work, count_pairs, vision_work
from internvl_rt.steps.cuda_graph import Capture
from internvl_rt.steps.device_stream import Moment, to_device, to_host
from internvl_rt.steps.executor import SCORED_PER_PASS, Executor
from internvl_rt.steps.graph_steps import Computed, GraphSteps
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.logprobs import Scores, TokenLogprob, TokenScores, read_drawn, read_scores, targets_of
from internvl_rt.steps.orders import Capturing, Drawing, Encoding, Orders, Pass
from internvl_rt.steps.sampler import Sampler, add_biases, forbid
from internvl_rt.steps.step import Chunk, Step, lay_out, scored_rows, visual_of
from internvl_rt.steps.step_graph import NUM_STAGES
from internvl_rt.steps.uploads import Uploads
from internvl_rt.steps.visual_cache import VisualCache


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
        self._decoder_cost = DecoderCost(model.part, model.dtype, model.decoder_layer_bytes, cache.dtype)
        self.executor = Executor(model, cache.pool, max_draws=max_draws, num_threads=num_threads)
        self._lead = model.shard.lead
        self._orders = Orders(self._lead)
        self._graph_steps: GraphSteps | None = None
        self._sampler = Sampler(model.device)
        self._num_launched = 0  # steps that have not been collected
        self.num_encoded_tiles = 0

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
        """Prepares CUDA graphs, as `Executor.capture` does, which steps use from now on."""
        order = Capturing(self._cache.block_size, max_num_seqs, max_model_len, max_tokens_per_step, everything)
        with self._together():
            self._orders.give(order)
            self.executor.capture(order, capture)
        self._graph_steps = GraphSteps(self.executor, self._cache, self._orders)

    def _together(self) -> AbstractContextManager[None]:
        """Begins what all ranks do together, if there are several."""
        return nullcontext() if self._lead is None else self._lead.together()

    def check(self) -> None:
        """Raises EngineDeadError if another process is lost."""
        self._model.shard.check()

    def close(self) -> None:
        """Ends the other processes, if there are any."""
        self._model.shard.close()

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
        with self._together(), self.executor.use():
            start, num_encoded_tiles = Moment(self._device), self.num_encoded_tiles
            if step.has_prompts:
                for chunk in step.chunks:
                    self._encode_pictures(chunk)
            encoded = Moment(self._device) if step.has_prompts else start
            if self._graph_steps is not None and self._graph_steps.takes(step):
                x_TD, logits_RV, token_id_R = self._graph_steps.run(step)
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
            if self._lead is not None:
                self._lead.check()  # without another rank the device computes to the end, but not what it should
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
        self.executor.stream.synchronize()
        self._num_launched = 0
        with self._together(), self.executor.stream.use():
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

    def _compute(self, step: Step) -> Computed:
        """Computes a step without graphs."""
        n, visual = len(step.decodes), visual_of(step)
        shape, flat = lay_out(step, self._cache, self._device)
        row_R = np.array([*range(n), *(n + row for row in step.draw_rows)], np.int32)
        drawing = Drawing(scored_rows(step), sum(map(len, visual)), step.num_draws)
        order = Pass(shape, max(step.counts, default=1), row_R, flat.numpy(), drawing)
        self._orders.give(order)
        x_TD = self.executor.run_pass(order, flat, visual)
        return Computed(x_TD[n:], self.executor.logits(x_TD, row_R))

    @torch.inference_mode()
    def _score(self, step: Step, x_TD: Tensor) -> list[Scores]:
        """Computes scores of the scored places from the last layer's output for the chunks' tokens."""
        num_top = max(scored.places.num_top for scored in step.scored)
        parts = torch.split(to_device(torch.from_numpy(targets_of(step)), self._device), SCORED_PER_PASS)
        logits = self.executor.scored_logits(x_TD, scored_rows(step))
        return [Scores(logits_RV, part, num_top) for logits_RV, part in zip(logits, parts, strict=True)]

    @torch.inference_mode()
    def _draw(self, step: Step, logits_RV: Tensor) -> tuple[NDArray[np.int64], Scores | None]:
        """Draws tokens into `drawn_R`; returns host copies of them and of the requested log-probabilities."""
        draws, token_id_R = step.draws, self.executor.drawn_R[: step.num_draws]
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
        """Returns visual tokens [X, D] of a picture, for use on the calling thread's own stream.

        If it is not decided which of its tiles are compressed, it returns what the vision tower gives for them.
        """
        with self._together(), self.executor.use():
            visual_XD = self._visual_of(picture, salt)
        return self.executor.stream.hand_over(visual_XD)

    def _visual_of(self, picture: Picture, salt: str | None) -> Tensor:
        """Returns visual tokens [X, D]: given with the picture, kept from an earlier time, or computed now."""
        if picture.visual_XD is not None:
            return self._uploads.load(picture).get().to(self._device)
        visual_XD = self._visual_cache.get(picture, salt)
        if visual_XD is None:
            visual_XD = self._uploads.load(picture).get().to(self._device)
            if self._model.shard.vision:
                visual_XD = self._encode(visual_XD)
            else:
                self.num_encoded_tiles += picture.num_tiles
            self._visual_cache.put(picture, salt, visual_XD)
        if picture.compressed is not None:
            row_X = rows_of_tiles(picture.compressed, self._model.config)
            visual_XD = visual_XD[to_device(torch.from_numpy(row_X), self._device)]
        return visual_XD

    def _encode(self, tiles: Tensor) -> Tensor:
        """Encodes one picture's tiles, which are on the device, to visual tokens [X, D]. Ranks share several tiles."""
        self.num_encoded_tiles += len(tiles)
        if self._lead is None or len(tiles) == 1:
            return self.executor.encode(tiles).flatten(0, 1)
        self._orders.give(Encoding(len(tiles), tiles.dtype == torch.uint8))
        return self.executor.encode_together(tiles).flatten(0, 1)

    def _work_of(self, step: Step) -> Work:
        """Counts the work of a step of the decoder."""
        num_decodes, num_context = len(step.decodes), step.decodes.num_context
        num_seen, num_pairs, num_rows = num_context, num_context, num_decodes
        if step.chunks:
            stops = [chunk.stop for chunk in step.chunks]
            num_seen, num_pairs = num_seen + sum(stops), num_pairs + count_pairs(step.counts, stops)
            num_rows += len(step.logit_rows)
        num_seqs = num_decodes + len(step.chunks)
        return self._decoder_cost.work(num_decodes + step.num_tokens, num_seen, num_pairs, num_rows, num_seqs)
