"""What one step hands to the model: tokens and their places, the memory of their keys and values, how to draw the next.

Every value is frozen, and nothing about a step reaches the model any other way.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Which tokens belong to which of S sequences, and where the keys and values of each sequence are.

    The first sequences decode: token s is the one new token of sequence s. The tokens of the other R follow. All
    tensors are int32.
    """

    seq_len_S: Tensor  # tokens of each sequence, this step's included; 0 for a row that pads the batch
    block_table_SN: Tensor  # -1 beyond a sequence's blocks, and before its window
    query_start_R1: Tensor  # the first new token of each sequence that does not decode, and the end of the last one's
    num_decodes: int  # how many sequences decode, those that pad the batch included
    max_query_len: int  # most new tokens of one of the others
    # How attention of the first num_decodes sequences is split (see csrc/paged_kv_cache.h). None where the table of
    # operations wants no plan (`Ops.num_split_items` is 0).
    split_start_S1: Tensor | None = None
    split_W3: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The new tokens of S sequences, one sequence after another: one token of each that decodes, then the others'."""

    token_id_T: Tensor  # int32; -1 - r: what the step before drew as its r-th; FIRST_VISUAL_ID + x: visual token x
    drawn_R: Tensor  # int64, the tokens that the step before drew
    position_T: Tensor  # float32 rotary positions, fractions allowed
    slot_T: Tensor  # int32, place of each token's key and value in the pool
    batch: Batch
    visual_XD: Tensor | None = None  # visual tokens of this step
    # The same for layers with a window, which have blocks of their own; None: they have the same as the other layers.
    window_slot_T: Tensor | None = None
    window_batch: Batch | None = None

    def places(self, window: int | None) -> tuple[Tensor, Batch]:
        """Returns the slots and the batch of a layer, given by its window."""
        if window is None or self.window_slot_T is None or self.window_batch is None:
            return self.slot_T, self.batch
        return self.window_slot_T, self.window_batch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys (rotated) and values of one decoder layer, by block, head, place in the block and channel.

    scale_BGP2: bfloat16, where they are numbers in 8 bits: the scales of a token's key and value (_kv_numbers.py)
    static_scale_2: float32, a checkpoint's scales for all keys and for all values, in place of those of each token
    """

    k_cache_BGPC: Tensor
    v_cache_BGPC: Tensor
    scale_BGP2: Tensor | None = None
    static_scale_2: Tensor | None = None


class Rotary(NamedTuple):
    """How positions turn heads: by the angles position * inv_freq[j] for j < C / 2; and what is turned is scaled."""

    inv_freq_C: Tensor  # float32 [C / 2]
    scale: float = 1.0


class Sampling(NamedTuple):
    """How a token is drawn from each of R rows of logits: the arguments of `kernels/sample.py`, which explains them."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    penalty_R3: Tensor
    listed_start_R1: Tensor
    listed_id: Tensor
    listed_count: Tensor
    seed_R: Tensor
    counter_R: Tensor


class HostTokens(NamedTuple):
    """Memory on the host to which a device writes the tokens that it draws, in addition to its own.

    Steps write to different rows, so that the host can read those of one step while the next one runs.
    """

    token_id_KR: Tensor  # int64, pinned
    row_1: Tensor  # int32, on the device: the row that this step writes
