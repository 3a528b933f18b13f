"""One answer's tokens on their way through the engine: prompt, pictures, positions, progress."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from internvl_rt.inputs.grammar import Matcher
from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.steps.speculation import PromptLookup

FinishReason = Literal["stop", "length", "timeout"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A running answer. Steps compute its tokens in order; each that reaches the last one draws the next.

    A drawn token may still be on the device while the next step, which computes it, is launched: it counts in
    `num_tokens`, but `token_ids` has it only later. Counts are plain fields, since a step looks at each of them often.
    """

    seq_id: int
    token_ids: list[int]  # the prompt, then what was generated
    position_T: np.ndarray  # float32 positions of the prompt
    next_position: int  # of the first generated token; each later one adds 1
    pictures: tuple[Picture, ...]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, cut to the room in the context window; 0: only the prompt is computed
    stop_ids: frozenset[int]
    seed: int
    identity: bytes | None = None  # what else its keys and values depend on; None: shares no prefix with others
    salt: str | None = None  # only requests of equal salt share visual tokens
    matcher: Matcher | None = None  # of the grammar that the answer follows, where the answer is
    mask_W: NDArray[np.int32] | None = None  # the tokens that the grammar allows next, a bit each
    score_from: int | None = None  # log-probabilities are wanted from this token of the prompt on
    siblings: list["Sequence"] = field(default_factory=list)  # fork off when the prompt is computed
    drafter: PromptLookup | None = None  # guesses next tokens, which a step then checks together
    num_prompt: int = field(init=False)
    num_tokens: int = field(init=False)  # prompt and all that was drawn
    is_plain: bool = field(init=False)  # a drawn token has to be looked at only by its id
    lists_tokens: bool = field(init=False)  # penalties or min_tokens act on some tokens
    needs_tokens: bool = field(init=False)  # its earlier tokens must be known to draw the next: it never runs ahead
    num_computed: int = 0  # tokens that steps have computed or are computing
    unread_row: int = 0  # where the token whose id the host does not know yet is, among those that the latest step drew
    num_told: int = 0  # ids that the cache's books know
    num_published_blocks: int = 0  # that others may reuse
    num_cached: int = 0  # tokens whose keys and values were in the cache when it was first admitted
    num_overtaken: int = 0  # how often others were admitted although this one came first
    was_admitted: bool = False
    finish_reason: FinishReason | None = None
    visual: dict[int, Tensor] = field(default_factory=dict)  # picture index -> its visual tokens, while needed

    def __post_init__(self) -> None:
        self.num_prompt = self.num_tokens = len(self.token_ids)
        asks_more = self.params.stop or self.params.logprobs is not None or self.matcher is not None
        self.is_plain = not asks_more
        self.lists_tokens = self.params.has_penalties or self.params.min_tokens > 0
        self.needs_tokens = self.matcher is not None or self.drafter is not None or self.params.has_penalties

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_unread(self) -> int:
        return self.num_tokens - len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

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
