"""A stream on which an engine's device does one thing after another, and copies that the host does not wait for.

On the CPU there are no streams: work is done when it is called, and this module does nothing.

Memory that was allocated on one stream and is used on another must not be reused before that use has ended:
`record_stream` tells torch's allocator so. Pinned memory comes from torch's host allocator, which reuses it only when
the copies from and to it have ended.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

T = TypeVar("T")


class DeviceStream:
    """A stream of a device that no other DeviceStream has, as long as torch has one left."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = _unused_stream(device)
            _IN_USE[self._stream.device_index, self._stream.cuda_stream] = self

    def use(self) -> AbstractContextManager[Any]:
        """Sends what the calling thread launches inside the `with` block to this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Makes this stream wait for the calling thread's stream, whose tensors it uses from now on."""
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """Makes the calling thread's stream wait for this stream, whose tensor it uses from now on."""
        if self._stream is not None:
            caller = torch.cuda.current_stream(self.device)
            caller.wait_stream(self._stream)
            tensor.record_stream(caller)
        return tensor

    def synchronize(self) -> None:
        """Waits until everything on this stream has ended."""
        if self._stream is not None:
            self._stream.synchronize()


# torch has 32 streams and gives them out in turn, again and again. Two engines on one would wait for each other, and a
# graph that one captures would contain what the other launches.
_NUM_STREAMS = 32
_IN_USE: "WeakValueDictionary[tuple[int, int], DeviceStream]" = WeakValueDictionary()


def _unused_stream(device: torch.device) -> torch.cuda.Stream:
    for _ in range(_NUM_STREAMS):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if (stream.device_index, stream.cuda_stream) not in _IN_USE:
            break
    return stream


class Arriving(NamedTuple):
    """A tensor that a stream may still be filling."""

    tensor: Tensor
    filled: torch.cuda.Event | None = None  # None: the tensor is filled

    @classmethod
    def on_current_stream(cls, tensor: Tensor) -> "Arriving":
        """Wraps a tensor that the current stream fills with the work it has been given so far."""
        if tensor.device.type != "cuda":
            return cls(tensor)
        filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        filled.record(torch.cuda.current_stream(tensor.device))
        return cls(tensor, filled)

    def wait(self, timeout_s: float) -> bool:
        """Returns True: nobody has to wait on the host."""
        return True

    def get(self) -> Tensor:
        """Returns the tensor. Work that the current stream is given from now on finds it filled."""
        if self.tensor.device.type == "cuda":
            stream = torch.cuda.current_stream(self.tensor.device)
            if self.filled is not None:
                stream.wait_event(self.filled)
            self.tensor.record_stream(stream)
        return self.tensor


class Moment:
    """A point in time on the device's current stream, or on the host's clock for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.host_s = time.perf_counter()  # when the host recorded it
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: "Moment") -> float:
        """Both moments must have passed."""
        if self._event is None or later._event is None:
            return later.host_s - self.host_s
        return float(self._event.elapsed_time(later._event)) / 1e3


def on_this_stream(work: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """Returns `work` for another thread, on the stream that the calling thread uses now."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.current_stream(device)

    def do() -> T:
        with torch.cuda.stream(stream):
            return work()

    return do


def host_memory(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocates host memory [*shape] that is copied to or from the device without waiting."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device, in the order of the current stream; the host does not wait.

    The host may change its tensor afterwards, unless that is pinned. If the device is the CPU, nothing is copied.
    """
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Returns a host copy that is filled when the current stream has reached this point."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
