"""What one step hands to the model: tokens and their places, the memory of their keys and values, how to draw the next.

Every value is frozen, and nothing about a step reaches the model any other way.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Which tokens belong to which of S sequences, and where the keys and values of each sequence are.

    The sequences with one new token come first. All tensors are int32.
    """

    query_start_S1: Tensor  # first row of each sequence, and T
    seq_len_S: Tensor  # tokens of each sequence, this step's included
    block_table_SN: Tensor  # -1 beyond a sequence's blocks
    num_decodes: int  # how many sequences have one new token
    max_query_len: int  # most new tokens of a sequence
    # How attention of the first num_decodes sequences is split (see csrc/paged_kv_cache.h). None where the table of
    # operations wants no plan (`Ops.num_split_items` is 0).
    split_start_S1: Tensor | None = None
    split_W3: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The new tokens of S sequences, one sequence after another; some are prefill chunks, others one token long."""

    token_id_T: Tensor  # int32; -1 - r: what the step before drew as its r-th; any id where visual tokens go
    drawn_R: Tensor  # int64, the tokens that the step before drew
    position_T: Tensor  # float32 rotary positions, fractions allowed
    slot_T: Tensor  # int32, place of each token's key and value in the pool
    batch: Batch
    logit_row_R: Tensor | None  # int64, rows of the last layer's output whose logits are wanted; None: all of them
    visual_XD: Tensor | None = None  # visual tokens of this step
    visual_row_X: Tensor | None = None  # int64, the rows that the visual tokens overwrite


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys (rotated) and values of one decoder layer, by block, head, place in the block and channel."""

    k_cache_BGPC: Tensor
    v_cache_BGPC: Tensor


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
