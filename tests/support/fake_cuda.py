"""Replaces torch.cuda on a machine without a GPU: tensors, streams, events, graphs and an allocator.

All work runs immediately on the CPU, but is recorded with only the order that CUDA guarantees: the work of one stream
is ordered, the work of two streams is unordered unless an event orders it, and the host knows that work has ended only
after it has waited for it. This reveals mistakes that a real GPU hides most of the time:

* the host waits: for an event, or in a copy from or to memory that is not pinned;
* one stream reads or writes memory that another stream writes, or writes memory that another reads, without an order;
* memory is freed while a stream that did not allocate it may still use it.

A device tensor wraps a CPU tensor, which holds the numbers. Triton's launches are recorded and not computed. The GPU
that all this runs on is in fake_device.py.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from internvl_rt.kernels import _launch
from support.fake_device import (
    L2_BYTES,
    MACHINE,
    Block,
    Event,
    Graph,
    Stream,
    UseStream,
    empty_cache,
    set_stream,
    synchronise,
)

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
READ_ONLY = {"first", "count", "weights"}  # kernel arguments that engines share; all others count as written


class DeviceTensor(Tensor):
    """A tensor that says it is on a GPU; `inner` has its numbers. Torch, which has no CUDA here, sees a meta tensor."""

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
    """Handles the calls in which no argument is a device tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}
NO_WORK = EMPTY | {aten.detach, aten.alias, aten._unsafe_view}


@torch.inference_mode(False)  # torch forbids an inference tensor as a view of a normal one, so wrappers are normal
def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func._overloadpacket
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with CudaMode():
            return func.decompose(*args, **kwargs)
    if kwargs.pop("pin_memory", None):
        made = func(*args, **kwargs)
        return pinned(made.zero_() if packet in EMPTY else made)  # a token that is never drawn must be valid
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
        if MACHINE.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
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
        return DeviceTensor(value, Block(value.untyped_storage().nbytes()) if parent is None else parent.block)

    wrapped = tree_map(wrap, result)
    if packet in EMPTY:
        result.zero_()  # an index that is never computed must be a valid one
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
    """Records a wait for a copy between host and device, unless it is non_blocking and the host's memory is pinned."""
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
    """Says whether an index makes the host wait: a mask, whose true entries it must count, or a tensor on the host."""
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
    """Gives torch a GPU, in the threads that enter the returned mode."""
    Stream()  # the default stream
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37)
    properties.L2_cache_size = L2_BYTES
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
        "empty_cache": empty_cache,
        "synchronize": synchronise,
        "device": lambda device: nullcontext(),
        "clock_rate": lambda device: 1980,
        "get_sync_debug_mode": lambda: MACHINE.sync_debug_mode,
        "set_sync_debug_mode": lambda mode: setattr(MACHINE, "sync_debug_mode", mode),
        "graph_pool_handle": object,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": UseStream,
        "set_stream": set_stream,
        "current_stream": lambda device=None: MACHINE.stream,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch._C._cuda_endAllocateToPool = lambda index, pool: MACHINE.open_pools.discard(pool)  # type: ignore[attr-defined]
    torch._C._host_emptyCache = lambda: None  # type: ignore[attr-defined]
    torch._C._cuda_releasePool = lambda index, pool: None  # type: ignore[attr-defined]
    torch.Tensor.pin_memory = lambda self: self if is_pinned(self) else pinned(self.clone())  # type: ignore[method-assign]
    real = _launch._run
    _launch._run = lambda each, device: launch(real, each, device)
    return CudaMode()
