"""Uses one kernel in a torch module, without the engine, and compares it with its reference.

python examples/kernel_in_torch.py
TRITON_INTERPRET=1 python examples/kernel_in_torch.py
"""

import os

import torch
from torch import Tensor, nn

from internvl_rt.kernels.rms_norm import SPEC, rms_norm, rms_norm_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on the CPU, slowly
EPS = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width), requires_grad=False)  # the kernel has no backward pass

    def forward(self, x: Tensor) -> Tensor:
        norm = rms_norm if x.is_cuda or INTERPRETED else rms_norm_reference
        print(f"{norm.__name__} runs on {x.device}")
        return norm(x, self.weight, EPS)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, x = RMSNorm(896).to(device), torch.randn(4, 896, device=device)
    y, expected = module(x), rms_norm_reference(x, module.weight, EPS)
    print(f"largest difference from the reference: {(y - expected).abs().max():.1e}")
    limit = SPEC.tolerances[x.dtype]
    torch.testing.assert_close(y, expected, rtol=limit.rtol, atol=limit.atol)


if __name__ == "__main__":
    main()
