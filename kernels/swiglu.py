"""SwiGLU: y = silu(g) * u, where one product gave the packed rows (g | u)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up_T2F: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
