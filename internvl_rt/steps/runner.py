"""Runs steps on the device: encodes their pictures, computes their tokens, draws the next ones.

A step is launched and collected later, so that on a GPU the next one can be launched while it runs. The drawn tokens
stay on the device, where the next step reads them, and are also copied to the host. From one launch to the next the
host does not wait for the device.

All work goes to one stream, whatever the calling thread's own stream is, so steps run one after another.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from internvl_rt.inputs.picture import Picture
from internvl_rt.model.internvl import InternVL, named_parameters
from internvl_rt.model.step_inputs import Sampling, StepInputs
from internvl_rt.model.work import Work, decoder_work, vision_work
from internvl_rt.steps.cuda_graph import Capture, TileGraphs, cuda_capture
from internvl_rt.steps.device_stream import DeviceStream, Moment, to_device, to_host
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.logprobs import Logprobs, TokenLogprob, read_drawn, read_scores
from internvl_rt.steps.sampler import Sampler, forbid
from internvl_rt.steps.step import Chunk, Step, build_step
from internvl_rt.steps.step_graph import DecodeGraphs, PrefillGraphs, prefill_buckets
from internvl_rt.steps.uploads import Uploads
from internvl_rt.steps.visual_cache import VisualCache

MAX_TILES_PER_PASS = 16  # bounds the vision tower's activations; one picture has at most 13 by default
SCORED_PER_PASS = 256  # rows of a scored prompt whose logits exist at once: 155 MB of float32 at 152k tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has computed, on the host."""

    token_ids: list[int]  # one for each draw of the step; -1 where the logits are not finite
    logprobs: list[TokenLogprob | None]  # of the drawn tokens, if requested
    scores: list[list[TokenLogprob]]  # one list for each scored span of a prompt
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
    token_id_R: Tensor
    drawn: Logprobs | None
    scored: list[Logprobs]


class Runner:
    """Runs steps on the device: launches them, and returns their results once they have ended."""

    def __init__(
        self, model: InternVL, cache: KVCache, visual_cache: VisualCache, uploads: Uploads, *, max_draws: int
    ) -> None:
        """max_draws: most tokens that a step can draw. Every kernel is launched by itself until `capture` is called."""
        self._model, self._cache, self._visual_cache, self._uploads = model, cache, visual_cache, uploads
        self.stream = DeviceStream(model.device)
        self.stream.adopt([*named_parameters(model.weights).values(), *model.buffers, *cache.buffers])
        self._tile_graphs: TileGraphs | None = None
        self._decode_graphs: DecodeGraphs | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        self._sampler = Sampler(model.device)
        with self.stream.use():
            self._drawn_R = torch.zeros(max_draws, dtype=torch.int64, device=model.device)
        self.num_encoded_tiles = 0

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the model computes in."""
        return self._model.dtype

    @torch.inference_mode()
    def capture(
        self, *, max_num_seqs: int, max_model_len: int, max_tokens_per_step: int, capture: Capture | None = None
    ) -> None:
        """Captures CUDA graphs that passes of the vision tower, decode steps and short prefills use from now on.

        What the graphs call refers to the model and the cache, not to this object, which holds the graphs.
        """
        model, cache, config, drawn_R = self._model, self._cache, self._model.config, self._drawn_R

        def decode(inputs: StepInputs, logits_SV: Tensor, sampling: Sampling) -> Tensor:
            logits_SV = model.logits(model.run_step(inputs, cache.layers), logits_SV)
            model.ops.sample(logits_SV, sampling, drawn_R[: len(logits_SV)])
            return logits_SV

        def prefill(inputs: StepInputs, x_TD: Tensor) -> Tensor:
            return model.run_layers(inputs, x_TD, cache.layers)

        with self.stream.use():
            capture = capture or cuda_capture()
            self._tile_graphs = TileGraphs(model.encode_tiles, config.vision.image_size, model.device, capture)
            logits_SV, buckets = model.logits_memory(max_num_seqs), prefill_buckets(config.decoder, max_tokens_per_step)
            self._decode_graphs = DecodeGraphs(
                decode, cache, drawn_R, logits_SV, capture, max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
            num_tokens, width = max(buckets, default=0), config.decoder.hidden_size
            x_TD = torch.zeros(num_tokens, width, dtype=model.dtype, device=model.device)
            self._prefill_graphs = PrefillGraphs(
                prefill, cache, drawn_R, x_TD, capture, max_model_len=max_model_len, buckets=buckets
            )

    def load_pictures(self, chunk: Chunk) -> None:
        """Decodes the pictures that a chunk touches, if that was not done. Raises MediaError for a broken one."""
        sequence = chunk.sequence
        for index in sequence.pictures_within(chunk.start, chunk.stop):
            picture = sequence.pictures[index]
            if index not in sequence.visual and not self._visual_cache.hold(picture, sequence.salt):
                self._uploads.load(picture)

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Starts a step and returns before a GPU has ended it. Appends nothing to the sequences."""
        with self.stream.use():
            start, num_encoded_tiles = Moment(self._model.device), self.num_encoded_tiles
            if step.has_prompts:
                for chunk in step.chunks:
                    self._encode_pictures(chunk)
            encoded = Moment(self._model.device) if step.has_prompts else start
            scored: list[Logprobs] = []
            is_drawn = False
            if self._decode_graphs is not None and self._decode_graphs.takes(step):
                logits_RV, is_drawn = self._decode_graphs.run(step)
            else:
                logits_RV, scored = self._compute(step)
            token_id_R, drawn = self._draw(step, logits_RV, is_drawn=is_drawn)
            return LaunchedStep(
                step=step,
                number=self._cache.blocks.num_steps,
                start=start,
                encoded=encoded,
                token_id_R=token_id_R,
                drawn=drawn,
                scored=scored,
                done=Moment(self._model.device),
                num_tiles=self.num_encoded_tiles - num_encoded_tiles,
            )

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Waits for a step to end and returns its results. If the wait fails, nothing that it wrote will be reused."""
        try:
            launched.done.wait()
        except BaseException:
            self._cache.end_step(launched.number, failed=True)
            raise
        self._cache.end_step(launched.number)
        config, dtype, step = self._model.config, self._model.dtype, launched.step
        stops = [chunk.stop for chunk in step.chunks]
        return StepResult(
            token_ids=launched.token_id_R.tolist(),
            logprobs=read_drawn(step, launched.drawn),
            scores=read_scores(step, launched.scored),
            vision_s=launched.start.seconds_until(launched.encoded),
            decoder_s=launched.encoded.seconds_until(launched.done),
            num_tiles=launched.num_tiles,
            vision_work=vision_work(config, dtype, launched.num_tiles),
            decoder_work=decoder_work(config.decoder, dtype, step.counts, stops, len(step.logit_rows)),
        )

    def fail(self) -> None:
        """Follows a failed launch, when no other step is under way: nothing that it wrote will be reused."""
        self.stream.synchronize()
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

    def _compute(self, step: Step) -> tuple[Tensor, list[Logprobs]]:
        """Computes the logits of the draws, and the log-probabilities of the scored tokens."""
        model = self._model
        if self._prefill_graphs is not None and self._prefill_graphs.takes(step):
            x_RD = self._prefill_graphs.run(step, model.embed)
        else:
            x_RD = model.run_step(build_step(step, self._cache, self._drawn_R), self._cache.layers)
        logits_RV = model.logits(x_RD[: step.num_draw_rows])
        if not step.scored:
            return logits_RV, []
        token_ids = [i for span in step.scored for i in span.sequence.token_ids[span.first : span.last + 1]]
        num_top = max(span.sequence.params.prompt_logprobs or 0 for span in step.scored)
        target_R = to_device(torch.tensor(token_ids), model.device)
        parts = (torch.split(rows, SCORED_PER_PASS) for rows in (x_RD[step.num_draw_rows :], target_R))
        return logits_RV, [Logprobs(model.logits(x), targets, num_top) for x, targets in zip(*parts, strict=True)]

    def _draw(self, step: Step, logits_RV: Tensor, *, is_drawn: bool) -> tuple[Tensor, Logprobs | None]:
        """Draws tokens into `drawn_R`; returns host copies of them and of the requested log-probabilities.

        is_drawn: a graph has drawn them already, and no log-probabilities are requested.
        """
        draws, token_id_R = step.draws, self._drawn_R[: len(step.draws)]
        if is_drawn or not draws:
            return to_host(token_id_R), None
        wanted: list[int] = []
        raw_RV = logits_RV
        if not step.is_plain:
            logits_RV = self._rows(logits_RV, [draw.row for draw in draws])
            wanted = [row for row, draw in enumerate(draws) if draw.sequence.params.logprobs is not None]
            raw_RV = self._rows(logits_RV, wanted)  # before a grammar forbids tokens
            masks = {row: draw.sequence.mask_W for row, draw in enumerate(draws) if draw.sequence.mask_W is not None}
            if masks:
                forbid(logits_RV, list(masks), np.stack(list(masks.values())))
        self._model.ops.sample(logits_RV, self._sampler.build(draws), token_id_R)
        drawn = None
        if wanted:
            num_top = max(draw.sequence.params.logprobs or 0 for draw in draws)
            drawn = Logprobs(raw_RV, self._rows(token_id_R, wanted), num_top)
        return to_host(token_id_R), drawn

    def _rows(self, tensor: Tensor, rows: list[int]) -> Tensor:
        """Copies some rows."""
        return tensor[to_device(torch.tensor(rows, dtype=torch.int64), tensor.device)]

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
        with self.stream.use():
            visual_XD = self._visual_of(picture, salt)
        return self.stream.hand_over(visual_XD)

    def _visual_of(self, picture: Picture, salt: str | None) -> Tensor:
        """Returns visual tokens [X, D]: given with the picture, kept from an earlier time, or computed now."""
        if picture.visual_XD is not None:
            return self._uploads.load(picture).get().to(self._model.device)
        visual_XD = self._visual_cache.get(picture, salt)
        if visual_XD is None:
            visual_XD = self._encode(self._uploads.load(picture).get().to(self._model.device))
            self._visual_cache.put(picture, salt, visual_XD)
        return visual_XD

    def _encode(self, tiles: Tensor) -> Tensor:
        """Encodes one picture's tiles, which are on the device, to visual tokens [X, D]."""
        self.num_encoded_tiles += len(tiles)
        graphs = self._tile_graphs if tiles.dtype == torch.uint8 else None
        encode = self._model.encode_tiles if graphs is None else graphs.encode
        return torch.cat([encode(part) for part in torch.split(tiles, MAX_TILES_PER_PASS)]).flatten(0, 1)
