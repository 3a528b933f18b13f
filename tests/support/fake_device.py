"""Holds the GPU of fake_cuda.py: streams, events, graphs, an allocator, and a clock.

A launch costs LAUNCH_US. Recently used memory is in L2 and costs nothing; other memory is read at READ_MB_S. Events
round the time to EVENT_US. An error during a capture leaves the capture open, as in torch.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from internvl_rt.kernels import _launch

Clock = dict[int, int]  # stream number -> how many pieces of work it has done
LAUNCH_US, EVENT_US, READ_MB_S, L2_BYTES = 1.1, 0.5, 1e6, 16 << 20
REPLAY = "a graph"


class Machine:
    """The one GPU, and which of its work the host knows to have ended."""

    def __init__(self) -> None:
        self.host: Clock = {}  # the work that the host knows to have ended
        self.streams: list[Stream] = []
        self.waits: list[dict[str, Any]] = []
        self.races: list[str] = []
        self.launches: list[_launch.Launch] = []
        self.num_replays = 0
        self.pinned: dict[int, Tensor] = {}  # by address; tensors are kept so that no address is used again
        self.clock_us = 0.0
        self.in_l2: OrderedDict[int, int] = OrderedDict()  # block number -> bytes, the most recently used last
        self.num_blocks = 0
        self.sync_debug_mode = 0
        self.open_pools: set[object] = set()  # the pools of captures that have not ended
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
        """Makes the host wait until all streams have reached `clock`."""
        graph = getattr(self.local, "graph", None)
        if graph is not None:
            graph.broken = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if any(at > self.host.get(number, 0) for number, at in clock.items()):
            self.waits.append({"what": what, "phase": self.phase})
        merge(self.host, clock)

    def work(self, what: str, read: Iterable["Block"], written: Iterable["Block"]) -> None:
        """Launches work on the current stream, or adds it to the graph that is being captured."""
        read, written = set(read), set(written)
        graph = getattr(self.local, "graph", None)
        if graph is not None:
            graph.read |= read
            graph.written |= written
            graph.nodes.append(read | written)
            return
        if what != REPLAY:
            self.run(read | written)
        stream = self.stream
        merge(stream.seen, self.host)
        stream.seen[stream.number] = stream.seen.get(stream.number, 0) + 1
        for block in {*read, *written}:
            block.used(what, stream, is_written=block in written)

    def run(self, blocks: set["Block"]) -> None:
        """Advances the clock by the time of one launch that uses these blocks."""
        self.clock_us += LAUNCH_US
        for block in sorted(blocks, key=lambda block: block.number):
            if block.number not in self.in_l2:
                self.clock_us += block.num_bytes / READ_MB_S
            self.in_l2[block.number] = block.num_bytes
            self.in_l2.move_to_end(block.number)
        while sum(self.in_l2.values()) > L2_BYTES:
            self.in_l2.popitem(last=False)


MACHINE = Machine()


def merge(clock: Clock, other: Clock) -> None:
    for number, at in other.items():
        clock[number] = max(clock.get(number, 0), at)


class Block:
    """One allocation of device memory."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.number = num_bytes, MACHINE.num_blocks
        MACHINE.num_blocks += 1
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
        self.at_us = EVENT_US * round(MACHINE.clock_us / EVENT_US)
        self.seen = dict((stream or MACHINE.stream).seen)

    def synchronize(self) -> None:
        MACHINE.wait("an event", self.seen)

    def elapsed_time(self, other: "Event") -> float:
        return (other.at_us - self.at_us) / 1e3


def set_stream(stream: Stream) -> None:
    MACHINE.local.stream = stream


class UseStream:
    """Replaces torch.cuda.stream; the stream stays the current one until the context is left."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = MACHINE.stream
        set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


class Graph:
    def __init__(self) -> None:
        self.read: set[Block] = set()
        self.written: set[Block] = set()
        self.nodes: list[set[Block]] = []
        self.broken = False

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **_: object) -> None:
        assert capture_error_mode == "thread_local", "other threads may work meanwhile"
        assert MACHINE.stream is not MACHINE.streams[0], "the default stream cannot be captured"
        self.stream, MACHINE.local.graph, self.pool = MACHINE.stream, self, pool
        MACHINE.open_pools.add(pool)

    def capture_end(self) -> None:
        MACHINE.local.graph = None
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        MACHINE.open_pools.discard(self.pool)

    def replay(self) -> None:
        MACHINE.num_replays += 1
        MACHINE.work(REPLAY, self.read, self.written)
        for blocks in self.nodes:
            MACHINE.run(blocks)


def synchronise() -> None:
    for stream in MACHINE.streams:
        stream.synchronize()


def empty_cache() -> None:
    assert not MACHINE.open_pools, "a capture is half open"
