"""Plans a device's memory: weights, workspaces of the vision tower and of a step, and the KV cache."""

import gc
from dataclasses import dataclass

import torch

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig
from internvl_rt.engine.failures import is_out_of_memory
from internvl_rt.engine.host_memory import free_host_bytes
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import RequestError, TranslateErrors
from internvl_rt.model.card import format_bytes
from internvl_rt.model.work import kv_block_bytes
from internvl_rt.steps.cuda_graph import TILE_BUCKETS
from internvl_rt.steps.kv_cache import least_num_blocks, plan_num_blocks
from internvl_rt.steps.step_graph import head_buckets, layer_buckets
from internvl_rt.steps.tile_encoder import MAX_TILES_PER_PASS

DEFAULT_CPU_CACHE_BYTES = 4 << 30  # the system commits memory only as it is used
RESERVE = 0.05  # part of the free memory, left for fragmentation, sampling and the driver
# torch keeps a workspace of 32 MiB (on sm_90, less elsewhere) for each of cuBLAS and cuBLASLt, and for each thread that
# multiplies: the one that builds the engine and captures graphs, and the one that runs the steps.
CUBLAS_BYTES = 2 * 2 * (32 << 20)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device. Workspaces are computed from shapes, for the largest pass that the engine makes."""

    device: str
    total_bytes: int | None  # None on the CPU, whose memory other programs share
    weight_bytes: int
    vision_bytes: int
    step_bytes: int
    graph_bytes: int  # memory that CUDA graphs keep
    cublas_bytes: int
    visual_cache_bytes: int
    block_size: int  # tokens
    num_blocks: int
    block_bytes: int

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def fixed_bytes(self) -> int:
        """All but the KV cache. On the CPU, visual tokens come out of what is kept free."""
        workspaces = self.vision_bytes + self.step_bytes + self.graph_bytes + self.cublas_bytes
        return self.weight_bytes + workspaces + (self.visual_cache_bytes if self.total_bytes is not None else 0)

    def render(self) -> str:
        """Formats the plan as a table for people."""
        num_tokens = self.num_blocks * self.block_size
        blocks = f"{num_tokens:,} tokens in {self.num_blocks:,} blocks of {self.block_size}"
        sizes = {
            "memory": self.total_bytes,
            "weights": self.weight_bytes,
            "vision workspace": self.vision_bytes,
            "step workspace": self.step_bytes,
            "CUDA graphs": self.graph_bytes or None,
            "cuBLAS": self.cublas_bytes or None,
            "visual tokens": self.visual_cache_bytes,
        }
        rows = [("device", self.device), *((label, format_bytes(n)) for label, n in sizes.items() if n is not None)]
        rows.append(("KV cache", f"{format_bytes(self.cache_bytes)}: {blocks}"))
        return "\n".join(f"{label:<17} {text}" for label, text in rows)


def plan_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    options: EngineOptions,
    *,
    weight_bytes: int,
    dense_bytes: int = 0,
    graphs: bool,
    weights_are_loaded: bool = True,
    kv_dtype: torch.dtype | None = None,
    vision: bool = True,
) -> MemoryPlan:
    """Plans the memory: the KV cache gets `kv_cache_bytes`, or what is left, which on the CPU is at most 4 GiB of it.

    kv_dtype: of keys and values in the cache; None: `dtype`.
    dense_bytes: of the largest quantised weight, as it is multiplied out for a product of many rows
    graphs: whether CUDA graphs will be captured
    vision: whether the vision tower runs here
    weights_are_loaded: if not, what is free must hold them as well

    Raises RequestError unless all fits into what is free, with one sequence of `max_model_len`.
    """
    max_num_tokens, max_num_seqs = options.tokens_per_step(device), options.max_num_seqs
    kv_dtype = kv_dtype or dtype
    vision_bytes = vision_workspace_bytes(config, dtype, MAX_TILES_PER_PASS) if vision else 0
    step_bytes = step_workspace_bytes(config.decoder, dtype, max_num_tokens, max_num_seqs) + dense_bytes
    if options.uses_torch(device):
        seq_len = options.max_model_len or config.decoder.max_position
        step_bytes += torch_attention_bytes(config.decoder, dtype, device, max_num_tokens, seq_len, kv_dtype)
    free_bytes: int | None
    total_bytes, graph_bytes, cublas_bytes = None, 0, 0
    if device.type == "cuda":
        cublas_bytes = CUBLAS_BYTES
        if graphs:
            graph_bytes = graphs_bytes(config, dtype, max_num_tokens, max_num_seqs, vision=vision) + dense_bytes
        free_bytes, total_bytes = _free_bytes(device)
    else:
        free_bytes = free_host_bytes()
        if free_bytes is not None:
            free_bytes //= options.num_processes  # all take theirs from the same memory
    workspace_bytes = vision_bytes + step_bytes + graph_bytes + cublas_bytes
    fixed_bytes = workspace_bytes + (0 if weights_are_loaded else weight_bytes)
    block_bytes = kv_block_bytes(config.decoder, kv_dtype, options.block_size)
    left = DEFAULT_CPU_CACHE_BYTES
    if free_bytes is not None:
        room = int(free_bytes * (1 - RESERVE))
        if fixed_bytes > room:
            all_bytes = room + (weight_bytes if weights_are_loaded else 0)
            raise RequestError(_too_large(dtype, device, weight_bytes, workspace_bytes, all_bytes))
        most = room - fixed_bytes - (options.visual_cache_bytes if device.type == "cuda" else 0)
        left = most if device.type == "cuda" else min(left, most)
        if options.kv_cache_bytes is not None:
            most = free_bytes - fixed_bytes
        least = least_num_blocks(config.decoder, options.block_size, options.max_model_len) * block_bytes
        if least > most:
            raise RequestError(_no_room_for_cache(dtype, device, options, least, max(most, 0)))
    num_blocks = plan_num_blocks(
        config.decoder,
        kv_dtype,
        block_size=options.block_size,
        cache_bytes=left if options.kv_cache_bytes is None else options.kv_cache_bytes,
        max_num_seqs=max_num_seqs,
        max_model_len=options.max_model_len,
    )
    if free_bytes is not None and num_blocks * block_bytes > free_bytes - fixed_bytes:
        raise RequestError(
            f"a KV cache of {format_bytes(num_blocks * block_bytes)} was asked for, but beside the model {device} has "
            f"{format_bytes(free_bytes - fixed_bytes)} free; lower kv_cache_bytes, max_model_len or max_num_seqs"
        )
    return MemoryPlan(
        device=str(device),
        total_bytes=total_bytes,
        weight_bytes=weight_bytes,
        vision_bytes=vision_bytes,
        step_bytes=step_bytes,
        graph_bytes=graph_bytes,
        cublas_bytes=cublas_bytes,
        visual_cache_bytes=options.visual_cache_bytes,
        block_size=options.block_size,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
    )


def check_tower_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, weight_bytes: int) -> None:
    """Raises RequestError unless the vision tower and its workspace fit into what is free."""
    free_bytes = _free_bytes(device)[0] if device.type == "cuda" else free_host_bytes()
    workspace_bytes = vision_workspace_bytes(config, dtype, MAX_TILES_PER_PASS)
    room = None if free_bytes is None else int(free_bytes * (1 - RESERVE))
    if room is not None and weight_bytes + workspace_bytes > room:
        raise RequestError(_too_large(dtype, device, weight_bytes, workspace_bytes, room))


def split_cache(plans: tuple[MemoryPlan, MemoryPlan], given: tuple[bool, bool], device: torch.device) -> list[int]:
    """Splits what two models leave of one device into two KV caches, of as many tokens each, in bytes.

    plans: what each would take alone, before either is loaded; neither gets a larger cache than that. given: whether
    the size of each cache is not to be chosen.

    Raises RequestError if the models do not fit with the caches that were given, or a block.
    """
    free_bytes = _free_bytes(device)[0] if device.type == "cuda" else free_host_bytes()
    sizes = [plan.cache_bytes for plan in plans]
    if free_bytes is None:
        return sizes
    weight_bytes = sum(plan.weight_bytes for plan in plans)
    left = int((free_bytes - weight_bytes) * (1 - RESERVE)) - sum(plan.fixed_bytes for plan in plans) + weight_bytes
    left -= sum(size for size, is_given in zip(sizes, given, strict=True) if is_given)
    chosen = [index for index in (0, 1) if not given[index]]
    per_token = {index: plans[index].block_bytes / plans[index].block_size for index in chosen}
    # The one that needs fewer tokens is first; the other one gets what that leaves.
    for index in sorted(chosen, key=lambda index: sizes[index] / per_token[index]):
        num_tokens = left / sum(per_token.values())
        sizes[index] = min(sizes[index], int(num_tokens * per_token.pop(index)))
        left -= sizes[index]
    if left < 0 or any(sizes[index] < plans[index].block_bytes for index in chosen):
        needs = " and ".join(format_bytes(plan.fixed_bytes) for plan in plans)
        raise RequestError(
            f"the two models need {needs} besides their KV caches, but {device} has {format_bytes(free_bytes)} free; "
            "put each on a device of its own, choose smaller ones, or lower kv_cache_bytes, max_num_seqs, "
            "max_tokens_per_step and visual_cache_bytes"
        )
    return sizes


def _too_large(dtype: torch.dtype, device: torch.device, weight_bytes: int, workspace_bytes: int, room: int) -> str:
    """Says in one line that weights and workspaces do not fit into `room`, and what may."""
    remedies = "a smaller model or another device"
    if weight_bytes <= room:
        remedies = f"a lower max_tokens_per_step, max_num_seqs or max_model_len, {remedies}"
    if dtype == torch.float32 and (weight_bytes + workspace_bytes) // 2 <= room:
        remedies = f"dtype bfloat16 ({format_bytes(weight_bytes // 2)}), {remedies}"
    return (
        f"the model needs {format_bytes(weight_bytes)} for its weights in {str(dtype).removeprefix('torch.')} and "
        f"{format_bytes(workspace_bytes)} of workspace, but {device} has {format_bytes(room)} free; choose {remedies}"
    )


def _no_room_for_cache(dtype: torch.dtype, device: torch.device, options: EngineOptions, least: int, most: int) -> str:
    """Says in one line that the `most` bytes beside the model hold no sequence, and which options change that."""
    lower = ["max_tokens_per_step", "max_num_seqs"]
    if options.max_model_len is not None or options.uses_torch(device):
        lower.append("max_model_len")
    if device.type == "cuda" and options.kv_cache_bytes is None and options.visual_cache_bytes:
        lower.append("visual_cache_bytes")
    smaller = "dtype bfloat16, a smaller model" if dtype == torch.float32 else "a smaller model"
    return (
        f"the KV cache of one sequence needs {format_bytes(least)}, but beside the model {device} has "
        f"{format_bytes(most)} free; choose a lower {', '.join(lower[:-1])} or {lower[-1]}, {smaller} or another "
        "device, or end what else takes its memory"
    )


def memory_errors(device: torch.device) -> TranslateErrors:
    """Makes one line of the error of an allocation that fails all the same, as when others take memory meanwhile."""

    def translate(error: BaseException) -> RequestError | None:
        if not is_out_of_memory(error):
            return None
        return RequestError(
            f"the memory of {device} ran out while the model was loaded; choose a smaller dtype or model, another "
            "device, or a lower kv_cache_bytes, or end what else takes its memory"
        )

    return TranslateErrors(translate)


def _free_bytes(device: torch.device) -> tuple[int, int]:
    """Returns the bytes of the device that can still be allocated, and the bytes that it has.

    Memory that torch keeps but can give back is free too, and so is that of an unused engine that a caller's error or
    other reference cycle holds: garbage is collected first.
    """
    gc.collect()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    kept = stats.get("reserved_bytes.all.current", 0) - stats.get("allocated_bytes.all.current", 0)
    return free_bytes + kept - stats.get("inactive_split_bytes.all.current", 0), total_bytes


def graphs_bytes(
    config: ModelConfig, dtype: torch.dtype, max_tokens_per_step: int, max_num_seqs: int, *, vision: bool = True
) -> int:
    """Adds up what all CUDA graphs keep: a common workspace, and inputs and results at fixed addresses.

    Each graph of tiles has its own result. Those of steps share logits, visual tokens, and what the layers compute.
    """
    decoder = config.decoder
    sizes = layer_buckets(decoder, max_num_seqs, max_tokens_per_step)
    num_tokens = max((decodes + tokens for decodes, _, tokens in sizes), default=0)
    num_logits = max([max_num_seqs, *head_buckets(sizes, max_draws=1 << 30)])
    workspace = step_workspace_bytes(decoder, dtype, num_tokens, max_num_seqs)
    tiles, visual = 0, 0
    if vision:
        workspace = max(workspace, vision_workspace_bytes(config, dtype, MAX_TILES_PER_PASS))
        tiles = max(TILE_BUCKETS) * 3 * config.vision.image_size**2
        visual = sum(TILE_BUCKETS) * config.rows_per_tile * decoder.hidden_size
    tokens = 2 * num_tokens * decoder.hidden_size
    logits = num_logits * decoder.vocab_size
    return int(workspace + tiles + dtype.itemsize * (tokens + visual + logits))


def vision_workspace_bytes(config: ModelConfig, dtype: torch.dtype, num_tiles: int) -> int:
    """Counts the most that a pass over `num_tiles` tiles holds, with pixels and visual tokens."""
    vision, width = config.vision, config.vision.hidden_size
    pixels = num_tiles * 3 * vision.image_size**2
    patches = num_tiles * vision.num_patches * 3 * vision.patch_size**2
    rows = num_tiles * (vision.num_patches + 1)
    layer = rows * (2 * width + max(4 * width, vision.intermediate_size + width))  # x and normed; qkv and y, or MLP
    visual = num_tiles * config.rows_per_tile * config.decoder.hidden_size
    merged = num_tiles * config.tokens_per_tile * config.downsample**2 * width
    if config.flash is not None:  # the router's keys and values of all patches, which are there twice for a moment
        merged = max(merged, 4 * num_tiles * vision.num_patches * width)
    return pixels + dtype.itemsize * (max(patches + rows * width, layer, rows * width + merged + visual) + visual)


def step_workspace_bytes(config: DecoderConfig, dtype: torch.dtype, num_tokens: int, num_seqs: int) -> int:
    """Counts the most that a step of `num_tokens` tokens holds, with logits and float32 copies for `num_seqs` draws."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = qkv + 2 * config.num_heads * config.head_dim
    mlp = 3 * config.intermediate_size
    if config.experts is not None:  # of each pair of a token and its expert: SwiGLU, and what the expert adds
        mlp = config.experts.num_chosen * (config.intermediate_size + config.hidden_size) + config.hidden_size
    layer = num_tokens * (3 * config.hidden_size + max(attention, mlp))
    return dtype.itemsize * layer + num_seqs * config.vocab_size * (dtype.itemsize + 3 * 4)


def torch_attention_bytes(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: int,
    seq_len: int,
    kv_dtype: torch.dtype | None = None,
) -> int:
    """Counts the most that torch's attention holds besides its output, for new tokens at the end of a sequence.

    It gathers keys and values, first in 8 bits if that is their `kv_dtype`, and makes a mask, as bools and as numbers.
    On a GPU it also repeats keys and values for each head, and holds all scores twice (`scaled_dot_product_attention`
    has no fused kernel for masks with GQA).
    """
    num_tokens = min(num_tokens, seq_len)
    numbers = 2 * config.num_kv_heads * config.head_dim * seq_len + num_tokens * seq_len
    if device.type != "cpu":
        numbers += 2 * config.num_heads * (config.head_dim + num_tokens) * seq_len
    in_8_bits = 0 if kv_dtype in (None, dtype) else 2 * config.num_kv_heads * config.head_dim * seq_len
    return num_tokens * seq_len + in_8_bits + dtype.itemsize * numbers
