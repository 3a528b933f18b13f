"""Takes arrays of other libraries, such as CuPy and JAX, without a copy: by DLPack or the CUDA array interface."""

import sys
from typing import Any, Protocol, TypeAlias

import numpy as np

from internvl_rt.errors import MediaError, quoted


class SupportsDLPack(Protocol):
    def __dlpack__(self, *args: Any, **keywords: Any) -> Any: ...


class SupportsCudaArrayInterface(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


ForeignArray: TypeAlias = SupportsDLPack | SupportsCudaArrayInterface


def is_foreign(kind: type) -> bool:
    """Says whether objects of this type hand out their memory; NumPy's and torch's own are known without that."""
    torch = sys.modules.get("torch")  # only a program that has imported it has tensors
    if issubclass(kind, np.ndarray) or (torch is not None and issubclass(kind, torch.Tensor)):
        return False
    return hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__")


def adopted(given: Any) -> Any:
    """Returns a foreign array as a tensor that shares its memory, on its device; anything else as it is.

    Raises MediaError where the array's library, or torch, refuses that.
    """
    kind = type(given)
    if not is_foreign(kind):
        return given
    import torch  # here, since pictures can be read without it

    try:
        if hasattr(kind, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(given)
        return torch.as_tensor(given, device="cuda")
    except Exception as error:  # of any kind: another library's code runs here
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise MediaError(f"{name} cannot be taken as an array ({quoted(error)}); convert it to NumPy's") from error
