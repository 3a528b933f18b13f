"""Copies whole blocks within a KV pool, for all layers, keys and values at once: pool[:, :, to] = pool[:, :, from].

A block that sequences share is copied before one of them writes to it. The kernel moves bytes, whatever they mean.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

CHUNK_BYTES = 8192  # bytes that a program copies: four times 16 bytes of each of its 128 threads
ID_DTYPES = (torch.int32, torch.int64)
MAX_GRID = 65535  # the most programs in a grid's second and third dimension


def copy_blocks_reference(pool_LKBGPC: Tensor, source_N: Tensor, destination_N: Tensor) -> None:
    """Overwrites the blocks `destination_N` of `pool_LKBGPC` [layers, 2, B, G, P, C] with the blocks `source_N`.

    The copies happen at the same time: destinations are distinct, and none is the source of another pair.
    """
    pool_LKBGPC[:, :, destination_N.long()] = pool_LKBGPC[:, :, source_N.long()]


@triton.jit(do_not_specialize=["num_blocks", "source", "destination"])
def _copy_blocks_kernel(
    pool, source, destination, layer_stride, kind_stride, block_stride, num_blocks, num_kinds, SIZE,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Copies a chunk of one pair, layer and kind (keys or values). SIZE, CHUNK and strides count elements of `pool`."""
    pair, layer, kind = tl.program_id(0), tl.program_id(1) // num_kinds, tl.program_id(1) % num_kinds
    from_block, to_block = tl.load(source + pair).to(tl.int64), tl.load(destination + pair).to(tl.int64)
    in_pool = (from_block >= 0) & (from_block < num_blocks) & (to_block >= 0) & (to_block < num_blocks)
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = (element < SIZE) & in_pool
    chunk = pool + layer.to(tl.int64) * layer_stride + kind.to(tl.int64) * kind_stride + element
    values = tl.load(chunk + from_block * block_stride, mask=inside)
    tl.store(chunk + to_block * block_stride, values, mask=inside)


def _as_words(pool: Tensor) -> Tensor:
    """Views the pool as [layers, 2, B, elements of a block]: int32 if all blocks are aligned words, else bytes."""
    size = pool.shape[3:].numel()
    words = pool.as_strided((*pool.shape[:3], size), (*pool.stride()[:3], 1)).view(torch.uint8)
    lengths = (words.data_ptr(), words.storage_offset(), *words.stride()[:3], words.shape[3])
    return words.view(torch.int32) if all(length % 4 == 0 for length in lengths) else words


def plan_copy_blocks(
    pool_LKBGPC: Tensor, source_N: Tensor, destination_N: Tensor, *, target: Target
) -> tuple[Launch, ...]:
    words = _as_words(pool_LKBGPC)
    num_layers, num_kinds, num_blocks, size = words.shape
    chunk = CHUNK_BYTES // words.itemsize
    return (
        Launch(
            _copy_blocks_kernel,
            (len(source_N), num_layers * num_kinds, cdiv(size, chunk)),
            {
                "pool": words,
                "source": source_N,
                "destination": destination_N,
                "layer_stride": words.stride(0),
                "kind_stride": words.stride(1),
                "block_stride": words.stride(2),
                "num_blocks": num_blocks,
                "num_kinds": num_kinds,
                "SIZE": size,
            },
            {"CHUNK": chunk},
        ),
    )


def copy_blocks(pool_LKBGPC: Tensor, source_N: Tensor, destination_N: Tensor) -> None:
    """Computes `copy_blocks_reference`, for any dtype; ids are int32 or int64. Layers, kinds and blocks may lie apart.

    A pair with an id outside [0, B) is not copied: the ids are on the GPU, so the host cannot check them and raise.
    Raises ValueError naming the argument that does not fit.
    """
    pool = pool_LKBGPC
    require(pool.ndim == 6, "pool_LKBGPC", "shape [layers, 2, B, G, P, C]", tuple(pool.shape))
    size = pool.shape[3:].numel()
    require(size > 0, "pool_LKBGPC", "blocks of some elements", tuple(pool.shape))
    whole = pool[:1, :1, :1].is_contiguous()
    require(whole, "pool_LKBGPC", "blocks that are contiguous", f"strides {pool.stride()}")
    apart = pool.shape[2] <= 1 or pool.stride(2) >= size
    require(apart, "pool_LKBGPC", "blocks that do not overlap", f"strides {pool.stride()}")
    limit = MAX_GRID * CHUNK_BYTES
    require(size * pool.itemsize <= limit, "pool_LKBGPC", f"blocks of at most {limit} bytes", size * pool.itemsize)
    layers = pool.shape[0] * pool.shape[1]
    require(layers <= MAX_GRID, "pool_LKBGPC", f"layers * 2 of at most {MAX_GRID}", layers)
    for name, ids in (("source_N", source_N), ("destination_N", destination_N)):
        require(ids.ndim == 1, name, "indices [N]", tuple(ids.shape))
        require_one_of(name, ids.dtype, ID_DTYPES)
        require_tensor(name, ids, tuple(source_N.shape), ids.dtype, pool.device)
    run(plan_copy_blocks(pool, source_N, destination_N, target=target_of(pool.device)))


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Makes a pool of `layers` layers, given from `first_layer` on; `padding` counts the elements after each block."""
    layers, blocks, groups, places, channels = (case[size] for size in ("layers", "B", "G", "P", "C"))
    size = groups * places * channels
    shape = (layers, 2, blocks, size + case.sizes.get("padding", 0))
    pool = torch.randint(0, 256, shape, device=device) if dtype == torch.uint8 else torch.randn(shape, device=device)
    pool = pool.to(dtype)[case.sizes.get("first_layer", 0) :, :, :, :size].unflatten(3, (groups, places, channels))
    blocks_in_disorder = torch.randperm(blocks, device=device).to(case.sizes.get("ids", torch.int64))
    pairs = case["N"]
    return {
        "pool_LKBGPC": pool,
        "source_N": blocks_in_disorder[:pairs] if "source" not in case.sizes else blocks_in_disorder[:1].repeat(pairs),
        "destination_N": blocks_in_disorder[pairs : 2 * pairs],
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    block_bytes = case["layers"] * 2 * case["G"] * case["P"] * case["C"] * dtype.itemsize
    return Cost(bytes=case["N"] * (2 * block_bytes + 16), flops=0)


def _case(name: str, pairs: int, layers: int, groups: int, places: int, channels: int, **more: object) -> Case:
    sizes = {"N": pairs, "layers": layers, "B": 2 * pairs + 2, "G": groups, "P": places, "C": channels}
    return Case(name, {**sizes, **more})


SPEC = KernelSpec(
    name="copy_blocks",
    used_by="the KV cache of every model: when answers to one prompt begin to differ (copy on write)",
    reference=copy_blocks_reference,
    plan=plan_copy_blocks,
    launcher=copy_blocks,
    make_inputs=_make_inputs,
    cost=_cost,
    test_cases=(
        _case("one_pair", 1, 2, 2, 16, 32),
        _case("no_pairs", 0, 2, 2, 16, 32),
        _case("no_layers", 2, 0, 2, 16, 32),
        _case("several_pairs", 5, 3, 2, 16, 16),
        _case("one_source_of_all", 3, 2, 1, 16, 16, source="same"),
        _case("odd", 3, 2, 3, 5, 7),  # a block is not a whole number of words in dtypes of 2 bytes and of 1
        _case("one_byte", 2, 1, 1, 1, 1),
        *(_case(f"channels_{channels}", 2, 1, 2, 32, channels) for channels in (31, 32, 33)),  # around a chunk
        _case("several_chunks", 2, 1, 3, 64, 128),
        _case("layer_slice", 3, 4, 2, 16, 16, first_layer=2),
        _case("unaligned_slice", 3, 3, 1, 3, 3, first_layer=1),
        *(_case(f"padding_{padding}", 3, 2, 1, 8, 16, padding=padding) for padding in (1, 2, 16)),
        _case("ids_of_32_bits", 4, 2, 1, 16, 16, ids=torch.int32),
    ),
    model_cases=tuple(
        _case(f"{name}_{pairs}_blocks", pairs, layers, groups, 64, channels)
        for name, layers, groups, channels in (
            ("1b", 24, 2, 64),
            ("2b", 28, 2, 128),
            ("8b", 28, 4, 128),
            ("9b", 48, 2, 128),
            ("14b", 48, 8, 128),
            ("38b", 64, 8, 128),
            ("78b", 80, 8, 128),
        )
        for pairs in (1, 16)
    ),
    tolerances={
        dtype: Tolerance(0.0, 0.0, 0.0, "a copy")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
    },
    in_place=("pool_LKBGPC",),
    exact=True,
)
