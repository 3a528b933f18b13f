"""A sequence: the tokens of one answer, from its prompt on, and how far steps have computed them."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.inputs.grammar import Matcher
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.places import Places
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.steps.speculation import PromptLookup

FinishReason = Literal["stop", "length", "timeout"]


class Bias(NamedTuple):
    """What is added to the logits of some tokens; B numbers of them."""

    token_id_B: NDArray[np.int64]
    value_B: NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Sequence:
    """A running answer. Steps compute its tokens in order; a step that computes the last one draws the next.

    A drawn token may still be on the device when the next step, which computes it, is launched: `num_tokens` counts it
    at once, `token_ids` gets it later. Counts are plain fields, since a step reads each of them often.
    """

    seq_id: int
    token_ids: list[int]  # the prompt, then the generated tokens
    position_T: np.ndarray  # float32 positions of the prompt
    next_position: int  # position of the first generated token; each later token adds 1
    pictures: tuple[Picture, ...]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, cut to the room in the context window; 0: only the prompt is computed
    stop_ids: frozenset[int]
    seed: int
    identity: bytes | None = None  # what keys and values depend on besides tokens; None: no prefix is shared
    salt: str | None = None  # only requests of equal salt share visual tokens
    matcher: Matcher | None = None  # the place in the grammar that the answer has reached
    mask_W: NDArray[np.int32] | None = None  # one bit for each token: whether the grammar allows it next
    places: Places | None = None  # where in the prompt scores are requested
    # Sequences that fork off when this one's prompt is computed: answers to it, or prompts that go on where it ends.
    siblings: list["Sequence"] = field(default_factory=list)
    drafter: PromptLookup | None = None  # guesses draft tokens, which a step then checks
    first_id: int = field(init=False)  # seq_id of the first answer to the same prompt
    num_prompt: int = field(init=False)
    num_tokens: int = field(init=False)  # prompt and drawn tokens
    bias: Bias | None = field(init=False)
    # Only a drawn token's id matters, and its logits are drawn from as they are: there are no stop strings,
    # log-probabilities, grammar or bias.
    is_plain: bool = field(init=False)
    lists_tokens: bool = field(init=False)  # penalties or min_tokens change the logits of some tokens
    needs_tokens: bool = field(init=False)  # the next draw needs all earlier ids on the host, so no step runs ahead
    num_computed: int = 0  # tokens that steps have computed or are computing
    unread_row: int = 0  # row, in the latest step's draws, of the token whose id the host does not know yet
    num_told: int = 0  # token ids that the KV cache knows
    num_published_blocks: int = 0  # blocks that other sequences may reuse
    num_cached: int = 0  # tokens that were cached when the sequence was first admitted
    num_expected: int = 0  # tokens that a step must compute after admission, as they are not cached; an estimate
    num_overtaken: int = 0  # how often later sequences were admitted before this one
    was_admitted: bool = False
    has_room: bool = True  # False: a fork of a shorter sequence, whose further tokens have no blocks yet
    finish_reason: FinishReason | None = None
    visual: dict[int, Tensor] = field(default_factory=dict)  # picture index -> its visual tokens, while needed

    def __post_init__(self) -> None:
        self.first_id = self.seq_id
        self.num_prompt = self.num_tokens = len(self.token_ids)
        ids, values = zip(*self.params.biases, strict=True) if self.params.biases else ((), ())
        self.bias = Bias(np.array(ids, np.int64), np.array(values, np.float32)) if ids else None
        params = self.params
        self.is_plain = not (params.stop or params.logprobs is not None or self.matcher or self.bias)
        self.lists_tokens = self.params.has_penalties or self.params.min_tokens > 0
        self.needs_tokens = self.matcher is not None or self.drafter is not None or self.params.has_penalties

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_unread(self) -> int:
        return self.num_tokens - len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def max_cached(self) -> int | None:
        """How many leading tokens may come from the cache, if scores need the output for the one after them."""
        return None if self.places is None else int(self.places.index_P[0])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """float32 rotary positions of tokens [start, stop)."""
        prompt = self.position_T[start:stop]
        first, last = max(start, self.num_prompt) - self.num_prompt, stop - self.num_prompt
        generated = self.next_position + np.arange(first, last, dtype=np.float32)
        return np.concatenate((prompt, generated), dtype=np.float32) if last > first else prompt

    def pictures_within(self, start: int, stop: int) -> list[int]:
        """Indices of the pictures with a visual token in [start, stop)."""
        if start >= self.num_prompt:
            return []
        spans = (picture.span for picture in self.pictures)
        return [i for i, span in enumerate(spans) if span.start < stop and span.start + span.num_tokens > start]
