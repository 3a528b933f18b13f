"""The sequences of a step that decode, as arrays whose rows advance by one token from step to step."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internvl_rt.steps.sequence import Sequence


@dataclass(slots=True, eq=False)  # not frozen, because that takes three times as long to make
class Decodes:
    """The sequences whose last token a step computes, to draw the next one; row s of each array is of sequence s.

    From step to step the same sequences mostly decode again. Then the arrays are not made anew from the sequences.
    """

    sequences: tuple[Sequence, ...]
    seq_id_S: NDArray[np.int32]
    one_S: NDArray[np.int32]  # how many tokens the step computes of each
    token_id_S: NDArray[np.int32]  # -1 - r: what the step before drew as its r-th
    position_S: NDArray[np.float32]
    counter_S: NDArray[np.int64]  # how many tokens were drawn before
    num_context: int  # tokens of all sequences, this step's included
    num_repeats: int  # how many more steps may decode these sequences without a look at any of them
    is_plain: bool  # only the ids of the drawn tokens matter: no grammar, no bias, no log-probabilities
    lists_tokens: bool  # penalties or min_tokens change the logits of some tokens

    def __len__(self) -> int:
        return len(self.sequences)

    def following(self) -> "Decodes":
        """Returns these sequences one token further, when this step has been launched and no other since."""
        return Decodes(
            self.sequences,
            self.seq_id_S,
            self.one_S,
            _DRAWN[: len(self.sequences)],
            self.position_S + _ONE,
            self.counter_S + 1,
            self.num_context + len(self.sequences),
            self.num_repeats - 1,
            self.is_plain,
            self.lists_tokens,
        )


_ONE = np.float32(1)
_DRAWN = -1 - np.arange(1 << 16, dtype=np.int32)


def build_decodes(sequences: Items[Sequence]) -> Decodes:
    """Builds rows of sequences that have computed all their tokens but the last."""
    token_ids: list[int] = []
    positions: list[float] = []
    counters: list[int] = []
    num_context, num_repeats = 0, math.inf
    is_plain, lists_tokens = True, False
    for sequence in sequences:
        index, known = sequence.num_computed, sequence.token_ids
        ahead = index - sequence.num_prompt
        token_ids.append(known[index] if index < len(known) else -1 - sequence.unread_row)
        positions.append(sequence.next_position + ahead)
        counters.append(ahead + 1)
        num_context += index + 1
        num_repeats = min(num_repeats, 0 if sequence.needs_tokens else sequence.max_tokens - ahead - 2)
        is_plain = is_plain and sequence.is_plain
        lists_tokens = lists_tokens or sequence.lists_tokens
    return Decodes(
        tuple(sequences),
        np.array([sequence.seq_id for sequence in sequences], np.int32),
        np.ones(len(sequences), np.int32),
        np.array(token_ids, np.int32),
        np.array(positions, np.float32),
        np.array(counters, np.int64),
        num_context,
        int(num_repeats) if sequences else 0,
        is_plain,
        lists_tokens,
    )


NO_DECODES = build_decodes(())
