"""Logits to tokens: penalties, temperature, top_k, top_p, min_p, and one draw per row by inverse CDF.

    x = penalised logits;  w = floor(2^42 * 2^(-(max x - x) * log2(e) / temperature))      the softmax, in integers
    kept = the first top_k tokens by x (ties by index), of those the first ones that reach top_p of their weight,
           and of those the ones with w >= min_p * 2^42
    token = the first kept token by id whose running weight exceeds u * (weight of all kept tokens)
            -1 if a logit is NaN or +inf, or all are -inf: then no token can be drawn

The weights are integers and the float32 steps to them round once each, so that sums do not depend on their order, and
kernel and reference agree to the bit on every machine. They are as exact as a softmax in float32: within a part in 2^24
for every half octave below the largest; a token 2^43 times less likely than the largest is never drawn. u is the first
number of `numpy.random.Philox(key=seed, counter=counter)`. The draw runs by id and not by size, because another batch
or another chunking changes the logits' rounding: two near ties that swap change a draw by size, but not one by id.

Two kernels read the row: the first finds the largest logits, the second adds up the weights and draws. Up to 8 programs
share a row, because one multiprocessor alone takes 5 us to read 0.6 MB from L2. The last of them to arrive draws: the
weights are summed by spans of some hundred tokens, so it finds the span, and then the token in it. Nothing is sorted.
For top_k and top_p the second kernel also lists the largest thousand tokens or so and finds the last kept token by
bisection in that list. If the list does not reach far enough (a flat row, a large top_k), the drawing program alone
makes some eight passes over the row to find the part of the order that matters. These passes take most of the time:
on an H200, with 151,674 tokens in bfloat16, one row without filters was measured at 22 us, and 16 rows of mixed
parameters, some of them flat, at 1,235 us.
"""

import numpy as np
import torch
from torch import Tensor

from internvl_rt.kernels._contract import Case, Cost, KernelSpec, Tolerance, require, require_one_of, require_tensor
from internvl_rt.kernels._launch import Launch, Target, cdiv, next_power_of_2, run, target_of
from internvl_rt.kernels._sample_body import draw_kernel, row_peaks_kernel

MAX_VOCAB = 2**18  # a place holds an id beside a 32-bit key; a row's weights, each up to 2^42, sum to at most 2^60
EDGE = 16  # elements; if memory goes on up to a multiple of it, rows of any length are read 16 bytes at a time
GROUPS = 128  # groups of the tokens of a slice; their largest logits decide which tokens are listed
EXACT = Tolerance(0, 0, 0, "the result is an integer, from integers")


def sample_reference(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    penalty_R3: Tensor,
    listed_start_R1: Tensor,
    listed_id: Tensor,
    listed_count: Tensor,
    seed_R: Tensor,
    counter_R: Tensor,
) -> Tensor:
    """Draws ids, int64 [R]; takes the largest logit (of equals the first) at temperature 0.

    A row in which a logit is NaN or +inf, or in which penalties leave nothing but -inf, gives -1. A row of `penalty_R3`
    is the penalties for repetition, presence and frequency, which `SamplingParams` describes.
    listed_id[listed_start_R1[r] : listed_start_R1[r + 1]] are the tokens that row r has generated so far, each once;
    `listed_count` says how often, and a negative count forbids a token. `seed_R` holds the bits of 64-bit seeds.
    """
    peak_R, token_R = logits_RV.max(1)
    if logits_RV.is_meta:
        return token_R
    token_R = token_R.masked_fill(~peak_R.isfinite(), -1)  # the largest of a row is NaN if there is one in it
    others_R = (temperature_R != 0) | (listed_start_R1.diff() > 0)
    for row in others_R.nonzero().flatten().tolist():
        listed = slice(int(listed_start_R1[row]), int(listed_start_R1[row + 1]))
        x_V = _penalised(logits_RV[row].float(), listed_id[listed].long(), listed_count[listed], penalty_R3[row])
        peak, best_id = x_V.max(0)
        if temperature_R[row] == 0 or not peak.isfinite():
            token_R[row] = best_id if peak.isfinite() else -1
            continue
        id_K, weight_K = kept_reference(
            x_V, float(temperature_R[row]), int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row])
        )
        token_R[row] = id_K[draw_reference(weight_K.cumsum(0), int(seed_R[row]), int(counter_R[row]))]
    return token_R


def _penalised(x_V: Tensor, id_K: Tensor, count_K: Tensor, penalty_3: Tensor) -> Tensor:
    repetition, presence, frequency = penalty_3.float()  # tensors, as CUDA multiplies by a number's reciprocal
    old_K = x_V[id_K]
    new_K = torch.where(old_K > 0, old_K / repetition, old_K * repetition) - presence - frequency * count_K
    new_K = new_K.clamp_max(torch.finfo(torch.float32).max).masked_fill(count_K < 0, -torch.inf)
    return x_V.index_copy(0, id_K, torch.where(old_K < torch.inf, new_K, old_K))  # NaN and +inf stay, to be noticed


def kept_reference(x_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Returns the ids of the tokens that may be drawn, in ascending order, and their weights."""
    x_V, id_V = torch.sort(x_V, descending=True, stable=True)
    weight_V = weight_reference(x_V, temperature)
    weight_V = weight_V[:top_k] if top_k else weight_V
    limit = max(1, -(-int(top_p * 2**62) * int(weight_V.sum()) >> 62))  # rounded up
    kept = (weight_V.cumsum(0) - weight_V < limit) & (weight_V >= int(np.ceil(min_p * 2**42))) & (weight_V > 0)
    id_K, order_K = id_V[: len(kept)][kept].sort()
    return id_K, weight_V[kept][order_K]


def draw_reference(total_K: Tensor, seed: int, counter: int) -> int:
    """Returns the index of the drawn token among the kept ones; `total_K` is the running sum of their weights."""
    word = np.random.Philox(key=seed % 2**64, counter=counter).random_raw()
    target = (word >> 11) * int(total_K[-1]) >> 53  # u has 53 bits
    return int(torch.searchsorted(total_K, target, right=True))


def weight_reference(x_V: Tensor, temperature: float) -> Tensor:
    """Computes integer weights [V], 2^42 for the largest of the float32 `x_V`."""
    rate = torch.tensor(1.4426950408889634) / torch.tensor(temperature)  # float32
    octaves_V = ((x_V.max() - x_V) * rate.clamp_max(3e38)).clamp_max(43.0)
    fixed_V = (octaves_V * 2**24).long()
    f_V = fixed_V & (2**24 - 1)
    q_V = torch.full_like(f_V, 0x72C75)  # 2^-f as a polynomial that is exact at 0 and off by 2^-27 at most elsewhere
    for coefficient in (0x53A2D4, 0x273E53D, 0xE34B488, 0x3D7F5BFB, 0xB1721652):
        q_V = coefficient - (f_V * q_V >> 24)
    return 2**31 - (f_V * q_V >> 25) << 11 >> (fixed_V >> 24)


def _edge_of(x_RV: Tensor) -> int:
    """Returns EDGE if memory goes on after every row, the last too, up to a multiple of EDGE elements; else 1."""
    rows, vocab = x_RV.shape
    behind_last = x_RV.untyped_storage().nbytes() // x_RV.itemsize - x_RV.storage_offset() - (rows - 1) * x_RV.stride(0)
    return EDGE if behind_last >= cdiv(vocab, EDGE) * EDGE else 1


def plan_sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    penalty_R3: Tensor,
    listed_start_R1: Tensor,
    listed_id: Tensor,
    listed_count: Tensor,
    seed_R: Tensor,
    counter_R: Tensor,
    *,
    out: Tensor,
    host_KR: Tensor | None = None,
    host_row_1: Tensor | None = None,
    target: Target,
) -> tuple[Launch, ...]:
    rows, vocab = logits_RV.shape
    device = logits_RV.device
    size = next_power_of_2(vocab)
    # The time of a row does not depend on their number: 16 rows fill 128 multiprocessors, 64 rows put 4 blocks on each.
    slices = min(8, max(1, size // 512))
    block = min(2048, max(GROUPS, size // slices // 4))  # a larger block takes more registers than 16 warps have
    penalised = listed_id.numel() > 0
    x_RV = torch.empty(rows, cdiv(vocab, EDGE) * EDGE, device=device)[:, :vocab] if penalised else logits_RV
    shared: dict[str, Tensor | int] = {
        "best": torch.empty(rows, slices, dtype=torch.int64, device=device),
        "peaks": torch.empty(rows, slices, GROUPS, dtype=torch.int32, device=device),
        "arrived": torch.empty(rows, dtype=torch.int32, device=device),
        "V": vocab,
        "slice_len": cdiv(vocab, slices * block) * block,
    }
    list_len = min(2048, max(128, size // 4))
    return (
        Launch(
            row_peaks_kernel,
            (rows * slices, 1, 1),
            {
                "logits": logits_RV,
                "copy": x_RV,
                "listed_start": listed_start_R1,
                "listed_id": listed_id,
                "listed_count": listed_count,
                "penalty": penalty_R3,
                "logits_stride": logits_RV.stride(0),
                "copy_stride": x_RV.stride(0),
                **shared,
            },
            {
                "SLICES": slices,
                "GROUPS": GROUPS,
                "BLOCK": 2 * block,
                "EDGE": _edge_of(logits_RV),
                "PENALISED": penalised,
            },
            num_warps=max(4, block // 128),
            wide_loads=_edge_of(logits_RV) == EDGE and logits_RV.stride(0) % EDGE == 0 and block >= GROUPS * 8,
        ),
        Launch(
            draw_kernel,
            (rows * slices, 1, 1),
            {
                "x": x_RV,
                "y": out,
                "host": out if host_KR is None else host_KR,
                "host_row": listed_start_R1 if host_row_1 is None else host_row_1,
                "kept_mass": torch.empty(rows, dtype=torch.int64, device=device),
                "spans": torch.empty(rows, list_len, dtype=torch.int64, device=device),
                "lengths": torch.empty(rows, slices, dtype=torch.int32, device=device),
                # one list for each slice, and one for the row
                "lists": torch.empty(rows, slices + 1, list_len, dtype=torch.int32, device=device),
                "temperature": temperature_R,
                "top_k": top_k_R,
                "top_p": top_p_R,
                "min_p": min_p_R,
                "seed": seed_R,
                "counter": counter_R,
                "x_stride": x_RV.stride(0),
                "host_stride": 0 if host_KR is None else host_KR.stride(0),
                **shared,
            },
            {
                "SLICES": slices,
                "GROUPS": GROUPS,
                "LIST": list_len,
                "SPAN": max(16, size // list_len),
                "BLOCK": block,
                "EDGE": _edge_of(x_RV),
                "ON_HOST": host_KR is not None,
            },
            num_warps=max(4, block // 128),
            wide_loads=False,  # 4 elements a thread; the arithmetic of the weights takes the time, not the loads
        ),
    )


def sample(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    penalty_R3: Tensor,
    listed_start_R1: Tensor,
    listed_id: Tensor,
    listed_count: Tensor,
    seed_R: Tensor,
    counter_R: Tensor,
    *,
    out: Tensor | None = None,
    host_KR: Tensor | None = None,
    host_row_1: Tensor | None = None,
) -> Tensor:
    """Computes `sample_reference` to the bit. V is at most MAX_VOCAB; listed ids outside the vocabulary are ignored.

    host_KR: int64 [K, at least R], memory on the host, pinned, or Triton raises ValueError; its row `host_row_1` gets
        the ids too, once the device has come so far.
    host_row_1: int32 [1], on the device, because a graph writes to another row at every replay.

    Temperature, top_p, min_p and the penalties are float32; top_k (0: all) and the lists are int32; seed and counter
    are int64. Their values are on the device and are not checked; they must be in the ranges of `SamplingParams`.
    Raises ValueError naming the argument that does not fit.
    """
    require_one_of("logits_RV", logits_RV.dtype, SPEC.tolerances)
    require(logits_RV.ndim == 2, "logits_RV", "rows [R, V]", tuple(logits_RV.shape))
    rows, vocab = logits_RV.shape
    device = logits_RV.device
    require(1 <= vocab <= MAX_VOCAB, "logits_RV", f"a vocabulary from 1 to {MAX_VOCAB}", vocab)
    require_tensor("logits_RV", logits_RV, (rows, vocab), logits_RV.dtype, device)
    for name, tensor, shape, dtype in (
        ("temperature_R", temperature_R, (rows,), torch.float32),
        ("top_k_R", top_k_R, (rows,), torch.int32),
        ("top_p_R", top_p_R, (rows,), torch.float32),
        ("min_p_R", min_p_R, (rows,), torch.float32),
        ("penalty_R3", penalty_R3, (rows, 3), torch.float32),
        ("listed_start_R1", listed_start_R1, (rows + 1,), torch.int32),
        ("listed_id", listed_id, (listed_id.numel(),), torch.int32),
        ("listed_count", listed_count, (listed_id.numel(),), torch.int32),
        ("seed_R", seed_R, (rows,), torch.int64),
        ("counter_R", counter_R, (rows,), torch.int64),
    ):
        require_tensor(name, tensor, shape, dtype, device)
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=device)
    require(penalty_R3.is_contiguous(), "penalty_R3", "a contiguous tensor", f"strides {penalty_R3.stride()}")
    require_tensor("out", out, (rows,), torch.int64, device)
    require((host_KR is None) == (host_row_1 is None), "host_row_1", "a tensor with host_KR, else None", host_row_1)
    if host_KR is not None and host_row_1 is not None:
        require(host_KR.ndim == 2 and host_KR.shape[1] >= rows, "host_KR", f"[K, {rows} or more]", tuple(host_KR.shape))
        require(host_KR.device.type == "cpu", "host_KR", "memory on the host", host_KR.device)
        require_tensor("host_KR", host_KR, tuple(host_KR.shape), torch.int64, host_KR.device)
        require_tensor("host_row_1", host_row_1, (1,), torch.int32, device)
    filters = (temperature_R, top_k_R, top_p_R, min_p_R)
    penalties = (penalty_R3, listed_start_R1, listed_id, listed_count)
    operands = (logits_RV, *filters, *penalties, seed_R, counter_R)
    run(plan_sample(*operands, out=out, host_KR=host_KR, host_row_1=host_row_1, target=target_of(device)))
    return out


# temperature, top_k, top_p, min_p, repetition, presence, frequency
GREEDY, PLAIN = (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0), (1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)
MIXED = (
    PLAIN,
    GREEDY,
    (0.7, 5, 1.0, 0.0, 1.3, 0.0, 0.0),
    (1.0, 0, 0.9, 0.0, 1.0, 0.5, 0.25),
    (1.5, 40, 0.8, 0.05, 0.8, -0.5, 0.1),
    (1.0, 0, 1e-6, 0.0, 1.0, 0.0, 0.0),
    (100.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0),
    (100.0, 10**6, 0.99, 0.2, 1.0, 0.0, 0.0),
    (0.01, 1, 1.0, 1.0, 1.0, 0.0, 0.0),
    (1e-30, 3, 0.5, 0.0, 1.0, 0.0, 0.0),
)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Makes rows that take those of `parameters` in turn. Every four rows list 1, 2, 3 and 0 times `listed` tokens.

    `fill` chooses the kind of logits. The rows are cut from a tensor with `padding` more columns, which hold NaN.
    """
    rows, vocab = case["R"], case["V"]
    logits = 3 * torch.randn(rows, vocab + case.sizes.get("padding", 0), device=device)
    fill = case.sizes.get("fill", "normal")
    if fill == "ties":
        logits = logits.round()
    elif fill == "constant":
        logits = torch.full_like(logits, -2.5)
    elif fill == "huge":
        logits = 1e4 * logits
    elif fill == "sparse":  # all but one token in eight are forbidden, in row 0 all
        logits[:, torch.arange(logits.shape[1], device=device) % 8 != 5] = -torch.inf
        logits[:1] = -torch.inf
    elif fill == "broken":
        logits[:, vocab // 2] = torch.inf
        logits[1::2, vocab // 3 :: 7] = torch.nan
    logits[:, vocab:] = torch.nan
    parameters = torch.tensor([case["parameters"][row % len(case["parameters"])] for row in range(rows)]).view(rows, 7)
    temperature_R, top_k_R, top_p_R, min_p_R = (column.clone() for column in parameters[:, :4].to(device).unbind(1))
    listed = [min(vocab, case.sizes.get("listed", 0) * ((row + 1) % 4)) for row in range(rows)]
    ids = [torch.randperm(vocab)[:count] for count in listed]
    listed_id = torch.cat([torch.zeros(0), *ids]).to(device, torch.int32)
    return {
        "logits_RV": logits.to(dtype)[:, :vocab],
        "temperature_R": temperature_R,
        "top_k_R": top_k_R.int(),
        "top_p_R": top_p_R,
        "min_p_R": min_p_R,
        "penalty_R3": parameters[:, 4:].to(device).clone(memory_format=torch.contiguous_format),
        "listed_start_R1": torch.tensor([0, *np.cumsum(listed)], dtype=torch.int32, device=device),
        "listed_id": listed_id,
        "listed_count": torch.randint(-1, 4, listed_id.shape, dtype=torch.int32, device=device),
        "seed_R": torch.randint(-(2**63), 2**63 - 1, (rows,), device=device),
        "counter_R": torch.randint(0, 1000, (rows,), device=device),
    }


SPEC = KernelSpec(
    name="sample",
    used_by="every model: draws the tokens of each step",
    reference=sample_reference,
    plan=plan_sample,
    launcher=sample,
    make_inputs=_make_inputs,
    cost=lambda case, dtype: Cost(dtype.itemsize * case["R"] * case["V"], flops=3 * case["R"] * case["V"]),
    test_cases=(
        *(Case(f"vocab_{vocab}", {"R": 10, "V": vocab, "parameters": MIXED}) for vocab in (17, 1000)),
        *(Case(f"vocab_{vocab}_row", {"R": 1, "V": vocab, "parameters": (PLAIN,)}) for vocab in (1, 2, 127, 128, 129)),
        Case("slices", {"R": 5, "V": 3001, "parameters": MIXED}),
        Case("no_rows", {"R": 0, "V": 64, "parameters": MIXED}),
        Case("strided", {"R": 3, "V": 100, "parameters": MIXED, "padding": 28}),
        Case("short_padding", {"R": 3, "V": 205, "parameters": MIXED, "padding": 2}),
        Case("padded_and_penalised", {"R": 3, "V": 1005, "parameters": MIXED[1:], "padding": 3, "listed": 40}),
        Case("penalties", {"R": 6, "V": 600, "parameters": MIXED[1:], "listed": 40}),
        *(Case(fill, {"R": 6, "V": 203, "parameters": MIXED, "fill": fill}) for fill in ("ties", "huge", "sparse")),
        Case("broken", {"R": 2, "V": 50, "parameters": (PLAIN,), "fill": "broken"}),
        Case("more_ties_than_listed", {"R": 4, "V": 700, "parameters": (GREEDY, *MIXED[3:6]), "fill": "constant"}),
    ),
    model_cases=tuple(
        Case(f"vocab_{vocab}_{rows}_rows{'_penalised' * bool(listed)}", sizes)  # rows are padded as in the engine
        for vocab in (151674, 92553)
        for rows in (1, 16, 64)
        for listed in (0, 20)
        for sizes in ({"R": rows, "V": vocab, "parameters": MIXED, "listed": listed, "padding": -vocab % EDGE},)
    ),
    tolerances={torch.float32: EXACT, torch.float16: EXACT, torch.bfloat16: EXACT},
)
