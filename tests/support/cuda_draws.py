"""The random numbers that CUDA gives for a seed, without CUDA: what a test case holds on a GPU, it holds here.

torch's generator on a GPU is Philox4x32-10 (Salmon and others 2011, "Parallel random numbers: as easy as 1, 2, 3"): each
thread has a sequence of its own, and each call begins where the one before it ended. Layout and transformations follow
ATen/native/cuda/DistributionTemplates.h, Randperm.cu and cuRAND's device functions. Numbers of `rand`, `randint` and
`randperm` are the same; of `randn`, the logarithm, sine and cosine may differ in the last bit.

Not reproduced: keys of `randperm` that are equal (1 call in 10 of the worst size) are left in order, where CUDA shuffles
them. `randn` of more than 270,336 numbers depends on the number of multiprocessors; here it is that of an H100 or H200.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    """Four words of each counter of four words, in ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key) & LOW, np.uint64(key) >> HALF_WORD
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = second >> HALF_WORD ^ c1 ^ k0, second & LOW, first >> HALF_WORD ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def _uniform(word: Words) -> npt.NDArray[np.float32]:
    """In (0, 1]."""
    return (word.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)


def _normal_pair(first: Words, second: Words) -> tuple[npt.NDArray[np.float32], ...]:
    """By Box and Muller."""
    turn = np.float64(np.float32(2 * math.pi * 2.0**-32))
    angle = (second.astype(np.float32).astype(np.float64) * turn + turn / 2).astype(np.float32).astype(np.float64)
    radius = np.sqrt((-2 * np.log(_uniform(first).astype(np.float64))).astype(np.float32))
    return tuple((radius * turned(angle)).astype(np.float32) for turned in (np.sin, np.cos))


class CudaDraws(TorchFunctionMode):
    """Within it `torch.randn` and the like with a `device` give what CUDA's generator gives, on the CPU.

    Calls without a device draw from the CPU's generator, as everywhere.
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

    def _draw(self, count: int, transform: Callable[..., Sequence[npt.NDArray[Any]]]) -> npt.NDArray[Any]:
        """`transform` makes a few numbers of four words; they go to places a grid apart."""
        if count == 0:
            return transform(*np.zeros((4, 1), np.uint64))[0][:0]
        threads = BLOCK * min(MAX_BLOCKS, -(-count // BLOCK))
        thread = np.arange(threads, dtype=np.uint64)
        numbers: list[npt.NDArray[Any]] = []
        while len(numbers) * threads < count:
            call = np.full(threads, self.offset // 4, np.uint64)
            numbers += transform(*philox((call & LOW, call >> HALF_WORD, thread, thread * 0), self.seed))
            self.offset += 4
        return np.concatenate(numbers)[:count]

    def _integers(self, count: int, low: int, high: int) -> npt.NDArray[np.int64]:
        size = high - low

        def of_words(*words: Words) -> list[npt.NDArray[np.int64]]:
            if size >= 2**28:
                words = (words[0] << HALF_WORD | words[1], words[2] << HALF_WORD | words[3])
            return [(word % np.uint64(size)).view(np.int64) + np.int64(low) for word in words]

        return self._draw(count, of_words)

    def _randn(self, *shape: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        numbers = self._draw(size.numel(), lambda *words: [*_normal_pair(*words[:2]), *_normal_pair(*words[2:])])
        return torch.from_numpy(numbers).view(size)

    def _rand(self, *shape: Any) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        numbers = self._draw(size.numel(), lambda *words: [_uniform(word) for word in words])
        return torch.from_numpy(np.where(numbers == 1, np.float32(0), numbers)).view(size)

    def _randint(self, low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._integers(math.prod(size), low, high)).view(size)

    def _randperm(self, count: int) -> Tensor:
        """Numbers in the order of random keys, of which the lower bits count."""
        keys = self._integers(count, -(2**31), 2**31 - 1)
        bits = math.ceil(math.log2(count - (6 * count**2 + 1) / (12 * math.log(0.9)))) if count else 0
        assert bits <= 32, f"a permutation of {count}"
        self.offset += -(-count // 4) * 4  # taken for equal keys
        return torch.from_numpy(np.argsort(keys & ((1 << bits) - 1), kind="stable"))
