"""The jitted body of vit_attention.

The softmax is the online one (Milakov and Gimelshein 2018, Dao 2023): it keeps a running maximum, sum and weighted
value. A patch's softmax starts from the class token's key, so that the loop runs over the L patch keys alone, which are
whole blocks for L = 1024. One more program of each tile and head, in the same launch, computes the class token's query.
"""

import triton
import triton.language as tl

from internvl_rt.kernels._softmax import probability


@triton.jit
def inverse_rms_kernel(qkv, inverse_rms, qkv_stride, eps, E: tl.constexpr, BLOCK: tl.constexpr):
    """Computes inverse_rms [2, R]: one over the root mean square of each row's q (part 0) and of its k (part 1)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    values = tl.load(qkv + row * qkv_stride + part * E + column, mask=column < E, other=0.0).to(tl.float32)
    tl.store(inverse_rms + part * tl.num_programs(0) + row, 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / E + eps))


@triton.jit
def _class_query(
    patch_qkv, class_qkv, y, weight_C, patch_k_scale, class_q_scale, class_k_scale, qkv_stride, scale_log2,
    L: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes the class token's single query. Its time goes to reading k and v, so it does not use the matrix units.

    Each lane of a block of keys runs an online softmax of its own over the keys that it meets, starting from the class
    token's maximum. The lanes are combined at the end, so that the loop waits for no other warp.
    """
    channel, lane = tl.arange(0, C), tl.arange(0, BLOCK)
    q_C = tl.load(class_qkv + channel).to(tl.float32) * weight_C * class_q_scale
    k_C = tl.load(class_qkv + E + channel).to(tl.float32) * class_k_scale
    v_C = tl.load(class_qkv + 2 * E + channel).to(tl.float32)
    top = tl.zeros([BLOCK], tl.float32) + tl.sum(q_C * k_C, axis=0) * scale_log2
    total = tl.where(lane == 0, 1.0, 0.0)
    acc = tl.where(lane[:, None] == 0, v_C[None, :], 0.0)
    k_pointers = patch_qkv + E + lane[:, None] * qkv_stride + channel[None, :]
    for start in tl.range(0, L, BLOCK, num_stages=STAGES):
        inside = (start + lane < L) | (L % BLOCK == 0)
        k = tl.load(k_pointers, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(k_pointers + E, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.sum(k * q_C[None, :], axis=1) * scale_log2
        if patch_k_scale is not None:
            score *= tl.load(patch_k_scale + start + lane, mask=inside, other=0.0)
        score = tl.where(inside, score, float("-inf"))
        new_top = tl.maximum(top, score)
        shrink, p = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total = total * shrink + p
        acc = acc * shrink[:, None] + v * p[:, None]
        top = new_top
        k_pointers += BLOCK * qkv_stride
    share = tl.exp2(top - tl.max(top, axis=0))
    out = tl.sum(acc * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(y + channel, out.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "num_patch_rows"])  # one kernel for any number of tiles
def vit_attention_kernel(
    qkv, y, descriptor, inverse_rms, q_norm, k_norm, qkv_stride, y_stride, num_rows, num_patch_rows, scale_log2,
    L: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CLASS_BLOCK: tl.constexpr, CLASS_STAGES: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes a block of queries. Programs of one tile and head are neighbours, to keep its keys and values in L2.

    `descriptor` describes qkv's rows if the host made one; otherwise every program makes its own, in scratch memory.

    With norms the scores are inverse_rms_q * inverse_rms_k * sum_c q[c] * w_q[c] * w_k[c] * k[c]. The factor of q and
    both weights are multiplied into the block of q once, the factor of a row of k into its column of scores. Up to
    rounding this equals normalising q and k; it rounds to the dtype less often, and k needs no change in memory.
    """
    E: tl.constexpr = H * C
    BLOCKS: tl.constexpr = (L + BLOCK_M - 1) // BLOCK_M + 1  # blocks of queries; the last one is the class token
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % H
    tile = tl.program_id(0) // BLOCKS // H
    first_row = tile.to(tl.int64) * L  # the first row of the tile's patches
    class_row = tile.to(tl.int64) + num_patch_rows
    qkv_stride = tl.cast(qkv_stride, tl.int64)
    patch_qkv = qkv + first_row * qkv_stride + head * C
    class_qkv = qkv + class_row * qkv_stride + head * C
    channel = tl.arange(0, C)

    weight_C = tl.full([C], 1.0, tl.float32)
    patch_k_scale = None
    class_q_scale = 1.0
    class_k_scale = 1.0
    if inverse_rms is not None:
        weight_C = tl.load(q_norm + head * C + channel).to(tl.float32)
        weight_C *= tl.load(k_norm + head * C + channel).to(tl.float32)
        patch_k_scale = inverse_rms + num_rows + first_row
        class_q_scale = tl.load(inverse_rms + class_row)
        class_k_scale = tl.load(inverse_rms + num_rows + class_row)

    if block == BLOCKS - 1:
        _class_query(
            patch_qkv, class_qkv, y + class_row * y_stride + head * C, weight_C, patch_k_scale, class_q_scale,
            class_k_scale, qkv_stride, scale_log2, L, E, C, CLASS_BLOCK, CLASS_STAGES,
        )  # fmt: skip
    else:
        query = block * BLOCK_M + tl.arange(0, BLOCK_M)
        key = tl.arange(0, BLOCK_N)
        real = (query < L) | (L % BLOCK_M == 0)
        q = tl.load(patch_qkv + query[:, None] * qkv_stride + channel[None, :], mask=real[:, None], other=0.0)
        if descriptor is not None:
            rows = descriptor
        elif USE_TMA:
            rows = tl.make_tensor_descriptor(qkv, [num_rows, 3 * E], [qkv_stride, 1], [BLOCK_N, C])
        else:
            k_pointers = patch_qkv + E + key[:, None] * qkv_stride + channel[None, :]
        if inverse_rms is not None:
            q_scale = tl.load(inverse_rms + first_row + query, mask=real, other=0.0)
            q = (q.to(tl.float32) * q_scale[:, None] * weight_C[None, :]).to(q.dtype)

        class_k = tl.load(class_qkv + E + channel).to(tl.float32)
        class_v = tl.load(class_qkv + 2 * E + channel).to(tl.float32)
        top = tl.sum(q.to(tl.float32) * class_k[None, :], axis=1) * (class_k_scale * scale_log2)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, C], tl.float32) + class_v[None, :]
        for start in range(0, L, BLOCK_N):
            inside = (start + key < L) | (L % BLOCK_N == 0)
            if USE_TMA:
                k = rows.load([tile * L + start, E + head * C])
                v = rows.load([tile * L + start, 2 * E + head * C])
            else:
                k = tl.load(k_pointers, mask=inside[:, None], other=0.0)
                v = tl.load(k_pointers + E, mask=inside[:, None], other=0.0)
                k_pointers += BLOCK_N * qkv_stride
            score = tl.dot(q, k.T, input_precision=PRECISION)
            if patch_k_scale is not None:
                score *= tl.load(patch_k_scale + start + key, mask=inside, other=0.0)[None, :]
            score = tl.where(inside[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1) * scale_log2)
            shrink, p = tl.exp2(top - new_top), probability(score * scale_log2 - new_top[:, None], v.dtype)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        y_pointers = y + (first_row + query)[:, None] * y_stride + head * C + channel[None, :]
        tl.store(y_pointers, (acc * (1.0 / total)[:, None]).to(y.dtype.element_ty), mask=real[:, None])
