"""CUDA as far as torch's users see it, on a machine without a GPU: tensors, streams, events, graphs, an allocator.

Nothing is as fast as a GPU and nothing runs beside anything, but everything that the host asks for is noted in terms of
what CUDA promises: work of one stream is ordered, work of two is not, unless an event orders it; the host knows that
work has ended only if it has waited. So mistakes show that a real GPU hides most of the time:

* the host waits: for an event, or in a copy from or to memory that is not pinned;
* a stream uses what another one writes, or writes what another one uses, without an order between them;
* memory is given back while a stream that did not allocate it may still use it.

A device tensor is a wrapper around one of the CPU, which computes. What Triton launches is noted and not computed.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from internvl_rt.kernels import _launch

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
Clock = dict[int, int]  # how far each stream has come, by its number
READ_ONLY = {"first", "count", "weights"}  # arguments of kernels that engines share; all others count as written


class Machine:
    """The one GPU, and what its host knows."""

    def __init__(self) -> None:
        self.host: Clock = {}  # what the host knows to have ended
        self.streams: list[Stream] = []
        self.waits: list[dict[str, Any]] = []
        self.races: list[str] = []
        self.launches: list[_launch.Launch] = []
        self.num_replays = 0
        self.pinned: dict[int, Tensor] = {}  # by address; kept, so that no other memory has the address
        self.local = threading.local()

    @property
    def stream(self) -> "Stream":
        return getattr(self.local, "stream", self.streams[0])

    @property
    def phase(self) -> str:
        return getattr(self.local, "phase", "")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.local.phase = self.phase, phase
        try:
            yield
        finally:
            self.local.phase = before

    def wait(self, what: str, clock: Clock) -> None:
        """The host waits until all streams have come so far."""
        assert getattr(self.local, "graph", None) is None, f"{what} during a capture"
        if any(at > self.host.get(number, 0) for number, at in clock.items()):
            self.waits.append({"what": what, "phase": self.phase})
        merge(self.host, clock)

    def work(self, what: str, read: Iterable["Block"], written: Iterable["Block"]) -> None:
        """Something is launched on the current stream, or noted in the graph that it is captured in."""
        graph = getattr(self.local, "graph", None)
        if graph is not None:
            graph.read |= set(read)
            graph.written |= set(written)
            return
        stream = self.stream
        merge(stream.seen, self.host)
        stream.seen[stream.number] = stream.seen.get(stream.number, 0) + 1
        for block in {*read, *written}:
            block.used(what, stream, is_written=block in written)


MACHINE = Machine()


def merge(clock: Clock, other: Clock) -> None:
    for number, at in other.items():
        clock[number] = max(clock.get(number, 0), at)


class Block:
    """Memory of the device."""

    def __init__(self) -> None:
        self.owner = MACHINE.stream
        self.in_graph = getattr(MACHINE.local, "graph", None) is not None
        self.recorded: set[int] = set()
        self.written: Clock = {}
        self.read: Clock = {}

    def used(self, what: str, stream: "Stream", *, is_written: bool) -> None:
        kinds = [("written", self.written), *([("read", self.read)] if is_written else [])]
        for kind, uses in kinds:
            for number, at in uses.items():
                if stream.seen.get(number, 0) < at:
                    MACHINE.races.append(f"{what} on stream {stream.number}: {kind} by stream {number}, in no order")
        uses = self.written if is_written else self.read
        uses[stream.number] = stream.seen[stream.number]

    def __del__(self) -> None:
        known = dict(self.owner.seen)
        merge(known, MACHINE.host)
        for uses in (self.written, self.read):
            for number, at in uses.items():
                if known.get(number, 0) < at and number not in self.recorded and not self.in_graph:
                    MACHINE.races.append(f"memory of stream {self.owner.number} given back, used by stream {number}")


class Stream:
    def __init__(self, device: object = None) -> None:
        self.number, self.seen = len(MACHINE.streams), Clock()
        self.device_index, self.cuda_stream = 0, self.number
        MACHINE.streams.append(self)

    def wait_stream(self, other: "Stream") -> None:
        merge(self.seen, other.seen)

    def wait_event(self, event: "Event") -> None:
        merge(self.seen, event.seen)

    def synchronize(self) -> None:
        MACHINE.wait("a stream", self.seen)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seen: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or MACHINE.stream).seen)

    def synchronize(self) -> None:
        MACHINE.wait("an event", self.seen)

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


@contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    before = MACHINE.stream
    MACHINE.local.stream = stream
    try:
        yield
    finally:
        MACHINE.local.stream = before


class Graph:
    def __init__(self) -> None:
        self.read: set[Block] = set()
        self.written: set[Block] = set()

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local", "other threads may work meanwhile"
        assert MACHINE.stream is not MACHINE.streams[0], "the default stream cannot be captured"
        self.stream, MACHINE.local.graph = MACHINE.stream, self

    def capture_end(self) -> None:
        MACHINE.local.graph = None

    def replay(self) -> None:
        MACHINE.num_replays += 1
        MACHINE.work("a graph", self.read, self.written)


class DeviceTensor(Tensor):
    """What says that it is on a GPU, and has its numbers in `inner`. To torch, which has no CUDA here, it is "meta"."""

    inner: Tensor
    block: Block
    device = DEVICE  # type: ignore[assignment]
    is_meta = False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block) -> "DeviceTensor":
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        self.inner, self.block = inner, block
        return self

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Stream) -> None:
        self.block.recorded.add(stream.number)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class CudaMode(TorchDispatchMode):
    """Sees what no device tensor is an argument of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}
NO_WORK = EMPTY | {aten.detach, aten.alias, aten._unsafe_view}


@torch.inference_mode(False)  # no wrapper is an inference tensor: torch lets none be a view of one that is not
def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func._overloadpacket
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with CudaMode():
            return func.decompose(*args, **kwargs)
    if kwargs.pop("pin_memory", None):
        return pinned(func(*args, **kwargs))
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [leaf for leaf in given if isinstance(leaf, DeviceTensor)]
    target = kwargs.get("device")
    to_cuda = target is not None and torch.device(target).type == "cuda"
    if not on_device and not to_cuda:
        return func(*args, **kwargs)
    if packet is aten._to_copy and on_device and to_cuda and kwargs.get("dtype") in (None, args[0].dtype):
        return args[0]
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    to_cpu = target is not None and not to_cuda
    if packet in (aten._to_copy, aten.copy_):
        note_copy(args, kwargs, to_cuda=to_cuda, to_cpu=to_cpu)
    elif packet in WAITING or (packet in (aten.index, aten.index_put_, aten.index_put) and waits(args)):
        MACHINE.work(str(func), [each.block for each in on_device], [])
        MACHINE.wait(str(func), MACHINE.stream.seen)
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if to_cpu or packet is aten._local_scalar_dense:
        return result
    by_storage = {each.inner.untyped_storage()._cdata: each for each in on_device}
    by_id = {id(each.inner): each for each in on_device}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in by_id:
            return by_id.get(id(value), value)
        if packet is aten.copy_ and not isinstance(args[0], DeviceTensor):
            return args[0]
        parent = by_storage.get(value.untyped_storage()._cdata)
        return DeviceTensor(value, Block() if parent is None else parent.block)

    wrapped = tree_map(wrap, result)
    if packet in EMPTY:
        result.zero_()  # so that what nobody computes is no index that leads anywhere
    elif packet not in NO_WORK and not func.is_view:
        note_work(func, on_device, args, kwargs, wrapped)
    return wrapped


def note_work(func: Any, on_device: list[DeviceTensor], args: Any, kwargs: dict[str, Any], result: Any) -> None:
    arguments = zip(func._schema.arguments, args, strict=False)
    changed = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    changed += [kwargs[name] for name in ("out",) if name in kwargs]
    written = {each.block for each in tree_leaves((changed, result)) if isinstance(each, DeviceTensor)}
    MACHINE.work(str(func), {each.block for each in on_device} - written, written)


def note_copy(args: Any, kwargs: dict[str, Any], *, to_cuda: bool, to_cpu: bool) -> None:
    """A copy between host and device waits unless it is asked not to and the host's memory is pinned."""
    source = args[0] if len(args) == 1 else args[1]
    target = args[0] if len(args) > 1 else None
    from_device = isinstance(source, DeviceTensor)
    into_device = isinstance(target, DeviceTensor) if target is not None else to_cuda or (from_device and not to_cpu)
    if from_device == into_device:
        return
    host = target if from_device else source
    non_blocking = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
    if from_device:
        MACHINE.work("a copy to the host", [source.block], [])
    if not (non_blocking and is_pinned(host)) and (host is None or host.dim() > 0 or from_device):
        MACHINE.wait(f"a copy {'from' if from_device else 'to'} the device", MACHINE.stream.seen)


def waits(args: Any) -> bool:
    """Whether an index is a mask, whose number of places the host must know, or comes from the host's memory."""
    indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
    return any(each.dtype == torch.bool or not isinstance(each, DeviceTensor) for each in indices)


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def pinned(tensor: Tensor) -> Tensor:
    MACHINE.pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def is_pinned(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.untyped_storage().data_ptr() in MACHINE.pinned


def launch(real: Any, launch: _launch.Launch, device: torch.device) -> None:
    MACHINE.launches.append(launch)
    tensors = {name: each for name, each in launch.args.items() if isinstance(each, DeviceTensor)}
    read = {each.block for name, each in tensors.items() if name in READ_ONLY}
    MACHINE.work(launch.kernel.__name__, read, {each.block for each in tensors.values()} - read)
    real(launch, device)


def use_fake_cuda() -> CudaMode:
    """From here on torch has a GPU, in threads that enter the mode."""
    Stream()  # the default one
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37)
    fakes: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (1 << 36, 1 << 37),
        "memory_stats": lambda device: defaultdict(int),
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 0,
        "max_memory_reserved": lambda device: 0,
        "empty_cache": lambda: None,
        "graph_pool_handle": object,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": use_stream,
        "current_stream": lambda device=None: MACHINE.stream,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.Tensor.pin_memory = lambda self: self if is_pinned(self) else pinned(self.clone())  # type: ignore[method-assign]
    real = _launch._run
    _launch._run = lambda each, device: launch(real, each, device)
    return CudaMode()
