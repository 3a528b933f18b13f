"""Embeds token ids, those that the previous step drew on the device too, and puts visual tokens in their places.

x[t] = embedding[id of t], or visual[id - 2^30] from the id 2^30 on
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, run, target_of

FIRST_VISUAL_ID = 1 << 30
BLOCK = 1024  # columns of one program: 8 values for each of its 128 threads


def embed_tokens_reference(
    token_id_T: Tensor,
    drawn_R: Tensor,
    embedding_VD: Tensor,
    visual_XD: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Returns x [T, D]. A token id (int32) of -1 - r stands for `drawn_R[r]` (int64), which is never empty."""
    drawn_T = drawn_R[(-1 - token_id_T).clamp_min(0)]
    id_T = torch.where(token_id_T < 0, drawn_T, token_id_T)
    if visual_XD is None:
        x_TD = embedding_VD[id_T]
    else:
        is_visual_T, row_T = id_T >= FIRST_VISUAL_ID, (id_T - FIRST_VISUAL_ID).clamp_min(0)
        x_TD = torch.where(is_visual_T[:, None], visual_XD[row_T], embedding_VD[id_T.masked_fill(is_visual_T, 0)])
    return x_TD if out is None else out.copy_(x_TD)


# Not specialised, so that one kernel serves all steps: R and X change with the batch, the ids' address with the step.
@triton.jit(do_not_specialize=["R", "X", "token_id", "drawn"])
def _embed_tokens_kernel(
    token_id, drawn, embedding, visual, y, y_stride, embedding_stride, visual_stride, R, V, X, D,
    BLOCK: tl.constexpr, FIRST_VISUAL: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(D, BLOCK)
    token = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    known = tl.load(token_id + token)
    index = -1 - known
    is_drawn = (index >= 0) & (index < R)
    row = tl.where(known < 0, tl.load(drawn + index, mask=is_drawn, other=-1), known.to(tl.int64))
    inside = column < D
    values = tl.load(embedding + row * embedding_stride + column, mask=inside & (row >= 0) & (row < V), other=0.0)
    if visual is not None:
        row = (known - FIRST_VISUAL).to(tl.int64)
        if row >= 0:
            values = tl.load(visual + row * visual_stride + column, mask=inside & (row < X), other=0.0)
    tl.store(y + token.to(tl.int64) * y_stride + column, values, mask=inside)


def plan_embed_tokens(
    token_id_T: Tensor,
    drawn_R: Tensor,
    embedding_VD: Tensor,
    visual_XD: Tensor | None = None,
    *,
    out: Tensor,
    target: Target,
) -> tuple[Launch, ...]:
    vocab, width = embedding_VD.shape
    visual = {} if visual_XD is None else {"visual": visual_XD}
    return (
        Launch(
            _embed_tokens_kernel,
            (len(token_id_T) * cdiv(width, BLOCK), 1, 1),
            {
                "token_id": token_id_T,
                "drawn": drawn_R,
                "embedding": embedding_VD,
                **visual,
                "y": out,
                "y_stride": out.stride(0),
                "embedding_stride": embedding_VD.stride(0),
                "visual_stride": 0 if visual_XD is None else visual_XD.stride(0),
                "R": len(drawn_R),
                "V": vocab,
                "X": 0 if visual_XD is None else len(visual_XD),
                "D": width,
            },
            {"BLOCK": BLOCK, "FIRST_VISUAL": FIRST_VISUAL_ID} | ({} if visual else {"visual": None}),
        ),
    )


def embed_tokens(
    token_id_T: Tensor,
    drawn_R: Tensor,
    embedding_VD: Tensor,
    visual_XD: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Computes `embed_tokens_reference`, but a token gets zeros if its id is of no known token and of no visual
    one, its r outside `drawn_R`, or its drawn id outside [0, V): the ids are on the GPU, so the host cannot check them
    and raise.

    Raises ValueError naming the argument that does not fit.
    """
    dtypes = list(SPEC.tolerances)
    require_one_of("embedding_VD", embedding_VD.dtype, dtypes)
    require(embedding_VD.ndim == 2, "embedding_VD", "rows [V, D]", tuple(embedding_VD.shape))
    require(token_id_T.ndim == 1, "token_id_T", "ids [T]", tuple(token_id_T.shape))
    require(drawn_R.ndim == 1, "drawn_R", "ids [R]", tuple(drawn_R.shape))
    device, shape = embedding_VD.device, (len(token_id_T), embedding_VD.shape[1])
    require_tensor("embedding_VD", embedding_VD, tuple(embedding_VD.shape), embedding_VD.dtype, device)
    require_tensor("token_id_T", token_id_T, shape[:1], torch.int32, device)
    require_tensor("drawn_R", drawn_R, (len(drawn_R),), torch.int64, device)
    if visual_XD is not None:
        require(visual_XD.ndim == 2, "visual_XD", "rows [X, D]", tuple(visual_XD.shape))
        require_tensor("visual_XD", visual_XD, (len(visual_XD), shape[1]), embedding_VD.dtype, device)
    if out is None:
        out = torch.empty(shape, dtype=embedding_VD.dtype, device=device)
    require_tensor("out", out, shape, embedding_VD.dtype, device)
    require(shape[0] <= 1 or out.stride(0) >= shape[1], "out", "rows that do not overlap", f"strides {out.stride()}")
    run(plan_embed_tokens(token_id_T, drawn_R, embedding_VD, visual_XD, out=out, target=target_of(device)))
    return out


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """Draws every third token, as one of R drawn ids in turn; the last X tokens are visual. Embedding and visual tokens
    have `padding` columns after them.
    """
    tokens, drawn, vocab, width, visual = case["T"], case["R"], case["V"], case["D"], case.sizes.get("X", 0)

    def rows(number: int) -> Tensor:
        values = torch.randn(number, width + case.sizes.get("padding", 0), dtype=torch.float32, device=device)
        return values.to(dtype)[:, :width]

    embedding_VD = rows(vocab)
    known_T = torch.randint(0, vocab, (tokens,), dtype=torch.int32, device=device)
    number_T = torch.arange(tokens, dtype=torch.int32, device=device)
    token_id_T = torch.where(number_T % 3 == 0, -1 - number_T % drawn, known_T)
    if visual:
        token_id_T[-visual:] = FIRST_VISUAL_ID + torch.arange(visual, dtype=torch.int32, device=device).flip(0)
    return {
        "token_id_T": token_id_T,
        "drawn_R": torch.randint(0, vocab, (drawn,), device=device),
        "embedding_VD": embedding_VD,
        "visual_XD": rows(visual) if visual else None,
    }


SPEC = KernelSpec(
    name="embed_tokens",
    used_by="every decoder: the start of each step",
    reference=embed_tokens_reference,
    plan=plan_embed_tokens,
    launcher=embed_tokens,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(bytes=case["T"] * (2 * dtype.itemsize * case["D"] + 4), flops=0),
    test_cases=(
        *(
            Case(f"width_{width}", {"T": 9, "R": 4, "V": 50, "D": width})
            for width in (1, 15, 16, 1023, 1024, 1025, 3584)
        ),
        Case("no_tokens", {"T": 0, "R": 4, "V": 50, "D": 16}),
        Case("one_of_one", {"T": 1, "R": 1, "V": 1, "D": 16}),
        Case("strided", {"T": 9, "R": 3, "V": 50, "D": 100, "padding": 28}),
        Case("visual", {"T": 9, "R": 3, "V": 50, "D": 1025, "X": 5, "padding": 28}),
        Case("all_visual", {"T": 4, "R": 1, "V": 3, "D": 16, "X": 4}),
    ),
    model_cases=(
        *(
            Case(f"width_{width}_{tokens}_tokens", {"T": tokens, "R": 64, "V": 151674, "D": width})
            for width in (896, 1536, 3584, 4096, 5120, 8192)
            for tokens in (1, 64, 8192)
        ),
        *(
            Case(f"width_{width}_{n}_tiles", {"T": 256 * n + 64, "R": 64, "V": 151674, "D": width, "X": 256 * n})
            for width in (896, 3584, 8192)
            for n in (1, 13)
        ),
    ),
    tolerances={dtype: Tolerance(0.0, 0.0, 0.0, "a copy") for dtype in (torch.float32, torch.float16, torch.bfloat16)},
    exact=True,
)
