"""The weights of a layer as small frozen values. Only the tables of operations unpack them.

`Linear` is the only kind of weight so far. Another kind is another class, and a case wherever a table unpacks
`weight_NK`: `linear`, `embed_tiles` and `merge_patches` of `Ops`; `linear`, `norm_qkv_rope_kv` and `paged_attention` of
`TritonOps`.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """The dense kind: y = x W^T + b."""

    weight_NK: Tensor
    bias_N: Tensor | None

    @property
    def num_outputs(self) -> int:
        return self.weight_NK.shape[0]


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm with a bias; RMSNorm without one."""

    weight_D: Tensor
    bias_D: Tensor | None
    eps: float


def bias_of(part: Linear | Norm) -> Tensor:
    """Returns the bias of a part that always has one: the patch embedding, or the projector's norm or first product."""
    bias = part.bias_N if isinstance(part, Linear) else part.bias_D
    assert bias is not None, "this part of every InternVL has a bias"
    return bias


def qk_weights(q_norm: Norm | None, k_norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Returns the weights of the norms on q and k, and their eps; no weights where there are no norms."""
    if q_norm is None or k_norm is None:
        return None, None, 0.0
    return q_norm.weight_D, k_norm.weight_D, q_norm.eps
