"""The methods by which the official reward model of VisualPRM is called, for `internvl_rt.compat`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from typing import Any

from torch import Tensor

from internvl_rt.critic.visual_prm import StepScores, VisualPRM
from internvl_rt.engine.engine import Engine
from internvl_rt.inputs.prepare import Conversation


class RewardMethods(ABC):
    """Scores answers by the official names. Source: the remote code of OpenGVLab/VisualPRM-8B-v1_1.

    The official code rounds pixels to bfloat16; an engine of that dtype does so too, one of float32 does not.
    """

    engine: Engine
    system_message: str | None

    @abstractmethod
    def conversation(
        self, question: str, pixel_values: Tensor | None, num_patches_list: list[int] | None
    ) -> Conversation:
        """Reads a question about pictures, as the official `chat` does."""

    def generate_steps_with_soft_score(
        self,
        tokenizer: object,
        question: str,
        response: str,
        pixel_values: Tensor | None,
        num_patches_list: list[int] | None = None,
        max_steps: int | None = None,
    ) -> list[dict[str, Any]]:
        """Returns {"step": text, "score": probability} of each step of an answer."""
        found = self._score(question, [response], pixel_values, num_patches_list, max_steps)[0]
        return [{"step": step, "score": score} for step, score in zip(found.steps, found.scores, strict=True)]

    def select_best_response(
        self,
        tokenizer: object,
        question: str,
        response_list: Items[str],
        pixel_values: Tensor | None,
        num_patches_list: list[int] | None = None,
        max_steps: int | None = 12,
        return_scores: bool = False,
    ) -> list[str] | list[tuple[str, float]]:
        """Returns the answers, the best first; return_scores: each with its score, the mean of its steps'."""
        found = self._score(question, response_list, pixel_values, num_patches_list, max_steps)
        best = sorted(found, key=lambda each: -each.score)
        return [(each.response, each.score) for each in best] if return_scores else [each.response for each in best]

    def _score(
        self,
        question: str,
        responses: Items[str],
        pixel_values: Tensor | None,
        num_patches_list: list[int] | None,
        max_steps: int | None,
    ) -> list[StepScores]:
        conversation = self.conversation(question, pixel_values, num_patches_list)
        critic = VisualPRM(self.engine, system=self.system_message, max_steps=max_steps)
        return critic.score_conversation(conversation, responses)
