"""Builds a results file like one from a GPU, with invented numbers, to test the pages and pictures made from it."""

from typing import Any

ENVIRONMENT = {
    "device": "Imaginary H200",
    "device_kind": "cuda",
    "num_sms": 132,
    "memory_bytes": 150_000_000_000,
    "driver": None,
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "num_threads": 16,
}
COPY_GB_S, PEAKS = 4000.0, {"float32": 45.0, "bfloat16": 780.0, "float16": 775.0, "float8_e4m3fn": 1450.0}
KERNELS = {  # name -> (bytes, flops, share of the roof)
    "vit_attention/vit_300m_13_tiles": (109e6, 56e9, 0.55),
    "vit_attention/vit_6b_13_tiles": (341e6, 175e9, 0.62),
    "gemm_epilogue/vit_300m_fc1_13_tiles": (145e6, 112e9, 0.7),
    "layer_norm/projector_6b_13_tiles": (170e6, 0.3e9, 0.91),
    "rms_norm/decoder_3584_1_rows": (22e3, 14e3, 0.01),
    "add_norm/decoder_8192_3392_rows": (222e6, 0.2e9, 0.86),
    "gemv/8b_gate_up_1_rows": (272e6, 0.27e9, 0.81),
    "gemv/1b_gate_up_1_rows": (17e6, 17e6, 0.45),
    "decode_attention/8b_64_x_32768": (4.3e9, 30e9, 0.83),
    "prefill_attention/8b_3392_behind_0": (56e6, 82e9, 0.5),
    "sample/vocab_151674_16_rows": (10e6, 40e6, 0.3),
}


def environment(**changes: Any) -> dict[str, Any]:
    return {**ENVIRONMENT, **changes}


def part(kind: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    document = {"part": kind, "schema": 1, "rows": rows, "environment": ENVIRONMENT, "command": f"bench {kind}"}
    return {
        "status": "done",
        "command": f"bench {kind}",
        "wall_s": 12.5,
        "exit_code": 0,
        "document": document,
        **changes,
    }


def spread(median_us: float) -> dict[str, float]:
    return {"median_us": median_us, "low_us": 0.98 * median_us, "high_us": 1.03 * median_us}


def kernel_rows() -> list[dict[str, Any]]:
    rows = []
    for name, (num_bytes, flops, share) in KERNELS.items():
        by_memory, by_flops = num_bytes / COPY_GB_S / 1e3, flops / PEAKS["bfloat16"] / 1e6
        roof_us = max(by_memory, by_flops)
        row = {"name": f"{name}/bfloat16", **spread(roof_us / share), "bytes": int(num_bytes), "flops": int(flops)}
        row |= {"gb_s": num_bytes / row["median_us"] / 1e3, "tflops": flops / row["median_us"] / 1e6}
        kind = "bandwidth" if by_memory >= by_flops else "compute"
        rows.append(row | {"roof_us": roof_us, "roof_percent": 100 * share, "roof_kind": kind})
        rows.append({**row, "baseline": "what torch does", **spread(1.3 * row["median_us"])})
    return rows


def decode_rows(model: str, floor_us: float, kv_us: float) -> list[dict[str, Any]]:
    """kv_us: the time to read the keys and values of one sequence with 2,048 tokens."""
    return [
        {
            "name": f"decode/{model}/{batch}x{context}/bfloat16",
            "batch": batch,
            "context_tokens": context,
            **spread(1.3 * (floor_us + kv_us * batch * context / 2048) + 60),
            "bytes": int(4000 * (floor_us + kv_us * batch * context / 2048)) * 1000,
            "flops": int(batch * floor_us * 4e6),
        }
        for context in (2048, 32000)
        for batch in (1, 8, 64)
    ]


def prefill_rows(model: str, us_per_token: float) -> list[dict[str, Any]]:
    text = [(f"{n}_tokens", n, 0) for n in (128, 512, 2048, 8192)]
    pictures = [(f"{n}_tiles", 64 + 256 * n, n) for n in (1, 4, 13)]
    return [
        {
            "name": f"prefill/{model}/{case}/bfloat16",
            "prompt_tokens": tokens,
            "tiles": tiles,
            **spread(900 + us_per_token * tokens + 1400 * tiles),
            "prefill_median_us": 900 + us_per_token * tokens,
        }
        for case, tokens, tiles in (*text, *pictures)
    ]


def comparison_rows() -> list[dict[str, Any]]:
    ours, theirs = 0.0006, 0.021
    settings = {"model": "InternVL3-1B", "dtype": "bfloat16"}
    return [
        {"side": "ours", **settings, "first_token_s": 0.03, "per_token_s": ours},
        {"side": "theirs", **settings, "first_token_s": 0.09, "per_token_s": theirs},
        {"side": "ratio", **settings, "first_token_s_ratio": 1 / 3, "per_token_s_ratio": ours / theirs},
    ]


def build_results() -> dict[str, Any]:
    copies = ((2**20, 3100.0), (2**26, 3900.0), (2**32, COPY_GB_S))
    roofline: list[dict[str, Any]] = [{"name": f"copy/{n}", "bytes": n, "gb_s": rate} for n, rate in copies]
    roofline += [{"name": f"product/{dtype}", "dtype": dtype, "tflops": peak} for dtype, peak in PEAKS.items()]
    roofline += [{"name": "graph_node", "median_us": 1.2}, {"name": "exp2", "g_per_s": 3900.0}]
    tiles = [
        {"name": f"vision/InternVL3-1B/{n}_tiles/bfloat16", "tiles": n, **spread(500 + 1300 * n)}
        for n in (1, 2, 4, 7, 13)
    ]
    return {
        "schema": 1,
        "environment": environment(),
        "budget_s": 540,
        "parts": {
            "build": part("build", [{"rms_of_a_product": 8.0}]),
            "contract": part("tests", [{"name": "gemv", "passed": 900, "failed": 0, "errors": 0}]),
            "model_agreement": part("tests", [{"name": "test_model_agreement", "passed": 5, "failed": 0, "errors": 0}]),
            "gpu_tests": part("tests", [{"name": "test_memory", "passed": 30, "failed": 0, "errors": 0}]),
            "sanitizer": part("tests", [{"memory_errors": 0}]),
            "roofline": part("roofline", roofline),
            "decode_1b": part("decode", decode_rows("InternVL3-1B", 230, 6)),
            "decode_8b": part("decode", decode_rows("InternVL3-8B", 3300, 30)),
            "vision_1b": part("vision", tiles),
            "prefill_1b": part("prefill", prefill_rows("InternVL3-1B", 2.0)),
            "prefill_8b": part("prefill", prefill_rows("InternVL3-8B", 24.0)),
            "kernels": part("kernels", kernel_rows()),
            "compare_transformers": part("compare_transformers", comparison_rows()),
            "serve_1b": {"status": "not run", "reason": "no time was left"},
        },
    }
