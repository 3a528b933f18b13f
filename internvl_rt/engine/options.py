"""What an engine is asked to be, checked once."""

from dataclasses import dataclass

import torch

from internvl_rt.errors import RequestError
from internvl_rt.inputs.prepare import Delta
from internvl_rt.steps.kv_cache import BLOCK_SIZES

DEFAULT_VISUAL_CACHE_BYTES = 256 << 20  # some ten pictures of 13 tiles on the 8B
MAX_DRAFT_TOKENS = 15  # with the token before them 16 rows, as many as the products of few rows take


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The arguments of `Engine.from_pretrained`, which says what they mean. Raises RequestError naming a bad one."""

    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_tokens_per_step: int = 8192
    max_waiting: int = 1024
    prefix_cache: bool = True
    visual_cache_bytes: int = DEFAULT_VISUAL_CACHE_BYTES
    num_draft_tokens: int = 0
    v2pe_delta: Delta = 1.0
    max_tiles: int | None = None
    seed: int | None = None
    backend: str = "auto"
    cuda_graphs: bool = True
    programmatic_launch: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_tokens_per_step", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        for name in ("max_waiting", "visual_cache_bytes"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("cuda_graphs", "programmatic_launch"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not 0 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise RequestError(f"num_draft_tokens must be from 0 to {MAX_DRAFT_TOKENS}, got {self.num_draft_tokens}")
        if self.block_size not in BLOCK_SIZES:
            raise RequestError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
