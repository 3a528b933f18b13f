"""Runs chunks on the device: encodes the pictures they touch, computes the step, draws the next tokens."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.cuda_graph import DecodeGraphs, TileGraphs
from internvl_rt.kv_cache import KVCache
from internvl_rt.model.internvl import InternVL
from internvl_rt.sampler import sample
from internvl_rt.step import Chunk, build_step

MAX_TILES_PER_PASS = 16  # bounds the vision tower's activations; one picture has at most 13 by default


@dataclass(frozen=True, slots=True)
class StepResult:
    tokens: list[tuple[Chunk, int]]  # the chunks that reached their sequence's end, each with its next token
    vision_s: float
    decoder_s: float  # decoder and sampling


class Runner:
    def __init__(
        self,
        model: InternVL,
        cache: KVCache,
        tile_graphs: TileGraphs | None = None,
        decode_graphs: DecodeGraphs | None = None,
    ) -> None:
        """Graphs of `model.encode_tiles` and `model.run_step`; without them everything runs kernel by kernel."""
        self._model, self._cache = model, cache
        self._tile_graphs, self._decode_graphs = tile_graphs, decode_graphs

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> StepResult:
        """Computes the chunks and advances their sequences' `num_computed`; drawing a token appends nothing."""
        start_s = time.perf_counter()
        for chunk in chunks:
            self._encode_pictures(chunk)
        self._synchronize()
        encoded_s = time.perf_counter()
        try:
            logits_RV = self._compute(chunks)
            sampled = [chunk for chunk in chunks if chunk.samples]
            token_ids = sample(logits_RV, [chunk.sequence for chunk in sampled]) if sampled else []
            for chunk in chunks:
                chunk.sequence.num_computed = chunk.stop
            self._synchronize()
            self._cache.publish([(chunk.sequence.seq_id, chunk.stop) for chunk in chunks])
        except BaseException:
            self._cache.end_step(failed=True)
            raise
        self._cache.end_step()
        done_s = time.perf_counter()
        return StepResult(list(zip(sampled, token_ids, strict=True)), encoded_s - start_s, done_s - encoded_s)

    def _compute(self, chunks: list[Chunk]) -> Tensor:
        """Logits [R, V] of the chunks that reach their sequence's end."""
        if self._decode_graphs is not None and self._decode_graphs.takes(chunks):
            return self._decode_graphs.run(chunks)
        return self._model.run_step(build_step(chunks, self._cache, self._model.device), self._cache.layers)

    def _encode_pictures(self, chunk: Chunk) -> None:
        """A picture is encoded when the first chunk touches it and dropped when a chunk starts behind it."""
        sequence = chunk.sequence
        touched = sequence.pictures_within(chunk.start, chunk.stop)
        for index in [index for index in sequence.visual if index not in touched]:
            del sequence.visual[index]
        for index in touched:
            if index not in sequence.visual:
                tiles = torch.split(sequence.pictures[index].tiles(), MAX_TILES_PER_PASS)
                visual_IMD = [self._encode(part) for part in tiles]
                sequence.visual[index] = torch.cat(visual_IMD).flatten(0, 1)

    def _encode(self, tiles: Tensor) -> Tensor:
        if self._tile_graphs is not None and tiles.dtype == torch.uint8:
            return self._tile_graphs.encode(tiles)
        return self._model.encode_tiles(tiles.to(self._model.device))

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
