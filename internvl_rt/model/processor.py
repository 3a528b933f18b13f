"""What torch makes of the processor at hand."""

import torch


def runs_onednn() -> bool:
    """Says whether oneDNN's products are compiled for this processor: one with AVX2, whose torch has oneDNN."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and torch._C._has_mkldnn


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def multiplies(dtype: torch.dtype) -> bool:
    """Says whether oneDNN takes a dtype on this processor, perhaps slowly."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def instructions() -> str:
    """Names what torch and oneDNN compute with: "AVX2", "AVX512, AVX512-BF16, AMX" and so on."""
    found = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": has_amx()}
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, is_there in found.items() if is_there)])


def default_dtype() -> torch.dtype:
    """Returns bfloat16 where the processor has instructions that multiply it (AMX or AVX512-BF16), else float32."""
    has_instructions = has_amx() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if runs_onednn() and has_instructions and multiplies(torch.bfloat16) else torch.float32
