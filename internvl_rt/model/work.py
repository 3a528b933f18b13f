"""The least work of a pass in FLOPs and bytes, and the least time that a device needs for it.

FLOPs are those of products and attention. Bytes are weights (read once), embeddings, keys and values: what no
implementation can keep on the chip. Norms, rotary positions, softmax and activations are left out, so that no kernel
can take less time than counted here. The functions are pure, so that benches, tests and the engine count alike.

Of experts a step reads those that its tokens choose. How many these are is not known; they are counted as if tokens
chose independently and evenly, as routers are trained to: of X experts, n tokens that have J each choose
X (1 - (1 - J / X)^n). For one token this is J, whatever it chooses. In a layer with a window, what tokens see is
counted as if every sequence were longer than it, or none.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

import torch

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Work:
    flops: int  # an addition and a multiplication are two
    bytes: int  # to or from the device's memory

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NO_WORK = Work(0, 0)


class LayerBytes(NamedTuple):
    """Bytes of the weights of all layers of a decoder: what every step reads, and all experts."""

    shared: int
    experts: int = 0


@dataclass(slots=True)
class Tally:
    """Time and work of one stage, summed up. The numbers are plain, because a step adds to them for each request."""

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0

    def add(self, seconds: float, work: Work) -> None:
        self.seconds += seconds
        self.flops += work.flops
        self.bytes += work.bytes

    def __iadd__(self, other: "Tally") -> "Tally":
        self.add(other.seconds, other.work)
        return self

    @property
    def work(self) -> Work:
        return Work(self.flops, self.bytes)


def kv_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Counts the bytes of one token's keys and values in all layers. Those in 8 bits have a scale in 16 bits a head."""
    head_bytes = config.head_dim * dtype.itemsize + 2 * (dtype.itemsize == 1)
    return 2 * config.num_layers * config.num_kv_heads * head_bytes


def layers_of_block(config: DecoderConfig) -> int:
    """Counts the layers that a block of the KV cache has keys and values of: those without a window, or those with one.

    A block serves either kind; where one kind has more layers, a block has room for that many.
    """
    num_windowed = sum(window is not None for window in config.windows)
    return max(num_windowed, config.num_layers - num_windowed)


def kv_block_bytes(config: DecoderConfig, dtype: torch.dtype, block_size: int) -> int:
    """Counts the bytes of a block of `block_size` tokens in the KV cache. A token takes one of `num_tables` blocks."""
    return kv_bytes_per_token(config, dtype) // config.num_layers * layers_of_block(config) * block_size


def vision_work(config: ModelConfig, dtype: torch.dtype, num_tiles: int, layer_bytes: int | None = None) -> Work:
    """Counts the work of one pass of vision tower and projector over `num_tiles` tiles; NO_WORK for none.

    layer_bytes: of the weights of the tower's layers; None: they are dense
    """
    if num_tiles == 0:
        return NO_WORK
    vision, width = config.vision, config.vision.hidden_size
    rows = vision.num_patches + 1  # of a tile, with the class token
    patch = 3 * vision.patch_size**2 * width
    layer = 4 * width**2 + 2 * width * vision.intermediate_size
    merged, visual = width * config.downsample**2, config.decoder.hidden_size
    projector = merged * visual + visual**2
    flops = 2 * (vision.num_patches * patch + vision.num_layers * rows * layer + config.tokens_per_tile * projector)
    flops += vision.num_layers * 4 * rows**2 * width  # attention: scores, and sums of values
    norm = 2 if vision.norm == "layer_norm" else 1
    vectors = (2 * norm + 2 + 2 + 2 * vision.qk_norm) * width  # norms, scales, biases of proj and fc2, norms of q and k
    vectors += vision.intermediate_size + 3 * vision.qkv_bias * width
    weights = patch + (2 + rows) * width + projector + 2 * merged + 2 * visual
    if layer_bytes is None:
        layer_bytes = dtype.itemsize * vision.num_layers * (layer + vectors)
    work = Work(num_tiles * flops, dtype.itemsize * weights + layer_bytes)
    return work if config.flash is None else work + _flash_work(config, dtype, num_tiles)


def _flash_work(config: ModelConfig, dtype: torch.dtype, num_tiles: int) -> Work:
    """Counts what Flash adds for all tiles, those that will not be compressed too: router and second projector."""
    width, visual, patches = config.vision.hidden_size, config.decoder.hidden_size, config.vision.num_patches
    merged = width * config.downsample**4
    gating, projector = 4 * 8 * width**2 + 2 * width, 2 * merged * visual + 6 * visual**2
    products = 2 * patches * 2 * width**2 + 4 * 2 * width**2 + gating + config.least_tokens_per_tile * projector
    attention = 4 * 4 * patches * width  # of one query in four rounds
    vectors = (1 + 2 * 4 + 2 * 2 + 4 * 7 + 2) * width + 2 + 2 * merged + 5 * visual  # query, biases and norms
    weights = 2 * 4 * width**2 + gating + projector + vectors
    return Work(num_tiles * (2 * products + attention), dtype.itemsize * weights)


def decoder_work(
    config: DecoderConfig,
    dtype: torch.dtype,
    chunk_lens: Items[int],
    seq_lens: Items[int],
    num_logit_rows: int,
    layer_bytes: LayerBytes | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Work:
    """Counts the work of one step of the decoder, logits included.

    chunk_lens: how many tokens of each sequence are computed; their keys and values are written
    seq_lens: how many tokens each sequence has with these; their keys and values are read, once for each sequence, even
        where sequences share them
    layer_bytes: of the weights of all layers; None: they are dense
    kv_dtype: of keys and values in the cache; None: `dtype`
    """
    num_pairs, cost = count_pairs(chunk_lens, seq_lens), DecoderCost(config, dtype, layer_bytes, kv_dtype)
    return cost.work(sum(chunk_lens), sum(seq_lens), num_pairs, num_logit_rows, len(seq_lens))


def count_pairs(chunk_lens: Items[int], seq_lens: Items[int]) -> int:
    """Counts pairs of a token of the chunks and one that it attends to: itself and all before it in its sequence."""
    # A chunk of n in a sequence of s: n * s - (0 + 1 + ... + n - 1) pairs.
    seen: int = sum(map(mul, chunk_lens, seq_lens))
    unseen: int = sum(map(mul, chunk_lens, chunk_lens)) - sum(chunk_lens)
    return seen - unseen // 2


class DecoderCost:
    """What the decoder's steps cost: the numbers that do not change from step to step."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        layer_bytes: LayerBytes | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """layer_bytes: of the weights of all layers; None: they are dense. kv_dtype: of the cache; None: `dtype`."""
        width, layers = config.hidden_size, config.num_layers
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shared, mlp, experts = width * (2 * q + 2 * kv), 3 * width * config.intermediate_size, config.experts
        head, size = config.vocab_size * width, dtype.itemsize
        vectors = 2 * width + config.qkv_bias * (q + 2 * kv) + config.qk_norm * 2 * config.head_dim
        vectors += config.o_bias * width + config.sinks * config.num_heads
        if experts is None:
            self._chosen, held, shared = 0.0, 0, shared + mlp
            matrices = shared
        else:
            self._chosen = experts.num_chosen / experts.num_experts
            shared += width * experts.num_experts
            matrices = shared + int(self._chosen * experts.count_here * mlp)
            vectors += experts.biases * experts.num_experts
            held = experts.count_here * (mlp + experts.biases * (2 * config.intermediate_size + width))
        windows = [window for window in config.windows if window is not None]
        self._window, self._windowed = max(windows, default=0), len(windows) / layers
        self._flops = 2 * layers * matrices, 4 * layers * q, 2 * head  # of a token, a pair, a row of logits
        if layer_bytes is None:
            layer_bytes = LayerBytes(size * layers * (shared + vectors), size * layers * held)
        self._bytes = *layer_bytes, size * (head + width)  # of all layers, of all experts, of the head
        self._seen_bytes = kv_bytes_per_token(config, kv_dtype or dtype)
        self._token_bytes = size * width + self._seen_bytes

    def work(self, num_tokens: int, num_seen: int, num_pairs: int, num_logit_rows: int, num_seqs: int) -> Work:
        """Counts `decoder_work` from sums: new tokens, tokens of all sequences, pairs as `count_pairs` counts them."""
        if self._windowed:
            in_windows = min(num_seen, num_tokens + num_seqs * (self._window - 1))
            num_seen -= round(self._windowed * (num_seen - in_windows))
            num_pairs -= round(self._windowed * max(0, num_pairs - num_tokens * self._window))
        of_token, of_pair, of_row = self._flops
        of_layers, of_experts, of_head = self._bytes
        flops = num_tokens * of_token + num_pairs * of_pair + num_logit_rows * of_row
        read = of_layers + num_tokens * self._token_bytes + num_seen * self._seen_bytes
        if of_experts:
            read += round(of_experts * (1 - (1 - self._chosen) ** num_tokens))
        return Work(flops, read + of_head if num_logit_rows else read)


@dataclass(frozen=True, slots=True)
class Roof:
    """The most that a device can do."""

    flops_per_s: float
    bytes_per_s: float
    name: str

    def floor_s(self, work: Work) -> float:
        """Returns the seconds below which no device under this roof can do the work."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


# From NVIDIA's data sheets, by CUDA's device name: TFLOP/s of dense products of 16-bit numbers with float32 sums,
# TFLOP/s of float32 products without rounding to TF32, GB/s of memory.
_DATA_SHEETS = {
    "NVIDIA A100-SXM4-80GB": (312.0, 19.5, 2039.0),
    "NVIDIA A100 80GB PCIe": (312.0, 19.5, 1935.0),
    "NVIDIA H100 80GB HBM3": (989.4, 67.0, 3350.0),
    "NVIDIA H200": (989.4, 67.0, 4800.0),
    "NVIDIA B200": (2250.0, 80.0, 8000.0),
    "NVIDIA L40S": (362.05, 91.6, 864.0),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 1008.0),
}


def roof_of(device: torch.device, dtype: torch.dtype) -> Roof | None:
    """Returns the device's roof by its data sheet; None for the CPU and for devices that are not in the table."""
    return None if device.type != "cuda" else data_sheet_roof(torch.cuda.get_device_name(device), dtype)


def data_sheet_roof(device_name: str, dtype: torch.dtype) -> Roof | None:
    """Returns the roof as `roof_of` does, for a device with this CUDA name."""
    if device_name not in _DATA_SHEETS:
        return None
    half, single, memory = _DATA_SHEETS[device_name]
    tflops = single if dtype == torch.float32 else half
    kind = str(dtype).removeprefix("torch.")
    return Roof(tflops * 1e12, memory * 1e9, f"{device_name}, data sheet: {tflops:g} TFLOP/s {kind}, {memory:g} GB/s")
