"""Computes passes of the vision tower: each kernel is launched by itself, or CUDA graphs are."""

import torch
from torch import Tensor

from internvl_rt.model.internvl import InternVL
from internvl_rt.steps.cuda_graph import Capture, Job, TileGraphs

MAX_TILES_PER_PASS = 16  # bounds the vision tower's activations; one picture has at most 13 by default


class TileEncoder:
    """Encodes tiles on the model's device, on the current stream."""

    def __init__(self, model: InternVL) -> None:
        self._model = model
        self._graphs: TileGraphs | None = None

    def prepare_graphs(
        self, few_layers: InternVL, capture: Capture, *, everything: bool
    ) -> tuple[list[Job], list[Job]]:
        """Uses graphs from now on. Returns what builds their kernels, if not all are captured now, and the captures.

        few_layers: the same model with few layers
        """
        model = self._model
        self._graphs = graphs = TileGraphs(model.encode_tiles, model.config.vision.image_size, model.device, capture)
        warm_up = [] if everything else graphs.warm_up(few_layers.encode_tiles)
        return warm_up, graphs.captures(everything=everything)

    @torch.inference_mode()
    def encode(self, tiles: Tensor) -> Tensor:
        """Encodes tiles, which are on the device, to visual tokens [I, M, D]."""
        graphs = self._graphs if tiles.dtype == torch.uint8 else None
        encode = self._model.encode_tiles if graphs is None else graphs.encode
        return torch.cat([encode(part) for part in torch.split(tiles, MAX_TILES_PER_PASS)])
