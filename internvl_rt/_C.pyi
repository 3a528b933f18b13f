from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_PictureSpan = tuple[int, int, bytes]  # first token, number of tokens, 32-byte digest

class PagedKVCache:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        watermark_blocks: int = 0,
        events: bool = False,
        hash_bits: int = 128,
        hash_key: bytes | None = None,
        window: int | None = None,
    ) -> None: ...
    def match(
        self,
        token_ids: NDArray[np.int32],
        pictures: Sequence[_PictureSpan] = (),
        identity: bytes | None = b"",
        *,
        max_cached: int | None = None,
    ) -> int: ...
    def digests(
        self,
        token_ids: NDArray[np.int32],
        pictures: Sequence[_PictureSpan] = (),
        identity: bytes | None = b"",
        *,
        max_cached: int | None = None,
    ) -> list[bytes]: ...
    def admit(
        self,
        seq_id: int,
        token_ids: NDArray[np.int32],
        pictures: Sequence[_PictureSpan] = (),
        identity: bytes | None = b"",
        *,
        num_reserved: int = 0,
        max_cached: int | None = None,
    ) -> int | None: ...
    def append(self, seq_ids: NDArray[np.int32], num_tokens: NDArray[np.int32]) -> bool: ...
    def extend(self, seq_id: int, token_ids: NDArray[np.int32]) -> None: ...
    def publish(self, seq_ids: NDArray[np.int32], num_tokens: NDArray[np.int32]) -> None: ...
    def fork(self, seq_id: int, new_seq_id: int) -> None: ...
    def rollback(self, seq_id: int, num_tokens: int) -> None: ...
    def release(self, seq_id: int) -> None: ...
    def fill_step(
        self,
        seq_ids: NDArray[np.int32],
        num_new_tokens: NDArray[np.int32],
        query_start_S1: NDArray[np.int32],
        seq_len_S: NDArray[np.int32],
        block_table_SN: NDArray[np.int32],
        slot_T: NDArray[np.int32],
        split_start_S1: NDArray[np.int32] | None = None,
        split_W3: NDArray[np.int32] | None = None,
        window_table_SN: NDArray[np.int32] | None = None,
        window_slot_T: NDArray[np.int32] | None = None,
    ) -> int: ...
    def complete(self, step: int, *, failed: bool = False) -> None: ...
    def take_copies(self) -> NDArray[np.int32]: ...
    def reset(self) -> None: ...
    def drain_events(
        self,
    ) -> list[tuple[Literal["stored", "removed", "cleared"], bytes, bytes, NDArray[np.int32]]]: ...
    def stats(self) -> dict[str, int]: ...
    def check_invariants(self) -> None: ...
    @property
    def num_available_blocks(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
