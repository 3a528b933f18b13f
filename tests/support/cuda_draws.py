"""Draws on the CPU the random numbers that CUDA gives for a seed, so that test cases have the same inputs as on a GPU.

torch's generator on a GPU is Philox4x32-10 (Salmon and others 2011, "Parallel random numbers: as easy as 1, 2, 3").
Each thread has its own sequence of numbers, and each call begins where the call before it ended. The layout and the
transformations follow torch 2.11's DistributionTemplates.h and Randperm.cuh, and cuRAND's manual of device functions.

`rand`, `randint` and `randperm` give the same numbers; of `randn` the last bit may differ, because logarithm, sine and
cosine are not CUDA's own. Calls for more than 270,336 numbers depend on the number of multiprocessors, which is taken
from an H100 or H200. The test marked `gpu` in tests/kernels/test_cuda_draws.py compares with a real GPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Words = npt.NDArray[np.uint64]  # each below 2^32
BLOCK = 256  # threads
MAX_BLOCKS = 132 * (2048 // BLOCK)
LOW = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)


def philox(counter: Sequence[Words], key: int) -> tuple[Words, ...]:
    """Computes four random words from each counter of four words, in ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key) & LOW, np.uint64(key) >> HALF_WORD
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = second >> HALF_WORD ^ c1 ^ k0, second & LOW, first >> HALF_WORD ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def _uniform(word: Words) -> npt.NDArray[np.float32]:
    """Turns each word into a number in (0, 1]."""
    return (word.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)


def _normals(*words: Words) -> Iterator[npt.NDArray[np.float32]]:
    """Turns each pair of words into two normal numbers by Box and Muller: one word gives the radius, one the angle."""
    turn = np.float64(np.float32(2 * math.pi * 2.0**-32))
    for first, second in (words[:2], words[2:]):
        angle = (second.astype(np.float32).astype(np.float64) * turn + turn / 2).astype(np.float32).astype(np.float64)
        radius = np.sqrt((-2 * np.log(_uniform(first).astype(np.float64))).astype(np.float32))
        yield (radius * np.sin(angle)).astype(np.float32)
        yield (radius * np.cos(angle)).astype(np.float32)


class CudaDraws(TorchFunctionMode):
    """Makes `torch.randn` and similar calls with a `device` return the numbers of CUDA's generator, on the CPU.

    Calls without a device still draw from the CPU's generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.offset = seed, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draw = {torch.randn: self._randn, torch.rand: self._rand, torch.randint: self._randint}.get(func)
        if "device" not in kwargs or torch.device(kwargs["device"]).type == "meta":
            return func(*args, **kwargs)
        if func is torch.randperm:
            return self._randperm(*args)
        if draw is None:
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype") or (torch.int64 if func is torch.randint else torch.float32)
        assert dtype in (torch.float32, torch.int32, torch.int64), f"draws of {dtype}"
        return draw(*args).to(dtype)

    def _draw(self, count: int, transform: Callable[..., Iterable[npt.NDArray[Any]]]) -> npt.NDArray[Any]:
        """Makes numbers from each thread's four words by `transform`; number i of thread t is at i * threads + t."""
        threads = BLOCK * min(MAX_BLOCKS, -(-count // BLOCK))
        thread = np.arange(threads, dtype=np.uint64)
        numbers: list[npt.NDArray[Any]] = []
        while len(numbers) * threads < count:
            numbers += islice(transform(*self._words(thread)), -(-count // threads) - len(numbers))
            self.offset += 4
        return np.concatenate(numbers)[:count] if numbers else np.empty(0, np.int64)

    def _words(self, thread: Words) -> tuple[Words, ...]:
        """Returns the next four random words of each thread."""
        call = np.full(thread.shape, self.offset // 4, np.uint64)
        return philox((call & LOW, call >> HALF_WORD, thread, thread * np.uint64(0)), self.seed)

    def _integers(self, count: int, low: int, high: int) -> npt.NDArray[np.int64]:
        size = high - low

        def of_words(*words: Words) -> Iterator[npt.NDArray[np.int64]]:
            if size >= 2**28:
                words = (words[0] << HALF_WORD | words[1], words[2] << HALF_WORD | words[3])
            return ((word % np.uint64(size)).view(np.int64) + np.int64(low) for word in words)

        return self._draw(count, of_words)

    def _randn(self, *shape: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        return torch.from_numpy(self._draw(size.numel(), _normals)).view(size)

    def _rand(self, *shape: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        numbers = self._draw(size.numel(), lambda *words: map(_uniform, words))
        return torch.from_numpy(np.where(numbers == 1, np.float32(0), numbers)).view(size)

    def _randint(self, low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._integers(math.prod(size), low, high)).view(size)

    def _randperm(self, count: int) -> Tensor:
        """Sorts the numbers by the lower bits of random keys, then shuffles the numbers that have equal keys."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        bits = math.ceil(math.log2(count - (6 * count**2 + 1) / (12 * math.log(0.9))))
        assert bits < 32, f"a permutation of {count}: keys of {bits} bits"
        keys = self._integers(count, -(2**31), 2**31 - 1) & ((1 << bits) - 1)
        order = np.argsort(keys, kind="stable")
        _, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            assert size <= 5, f"{size} equal keys; a thread draws four words at a time"
            words = self._words(np.array([start], np.uint64))
            for last, word in zip(range(size - 1, 0, -1), words, strict=False):
                other = int(word[0]) % (last + 1)
                order[[start + last, start + other]] = order[[start + other, start + last]]
        self.offset += -(-count // 4) * 4
        return torch.from_numpy(order)
