"""How the turns of a conversation are written: the two templates that models of the family were trained with.

Source: `conversation.py` of internvl_chat and internvl_chat_gpt_oss in OpenGVLab/InternVL. A template is plain data;
`inputs.prompt` renders by it, and `chat_template` compares those of `-hf` folders with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TemplateName = Literal["internvl2_5", "internvl3_5_gpt_oss"]


@dataclass(frozen=True, slots=True)
class Special:
    """A special token of a template, which no text can give."""

    token: str


Pieces = tuple[str | Special, ...]


@dataclass(frozen=True, slots=True)
class Channels:
    """Marks of an answer that is written in parts, each behind a header: a channel's name between two tokens."""

    name: Special  # begins a header, the channel's name follows
    text: Special  # ends it, the text follows
    final: str  # the channel of what the user is to read
    analysis: str  # the channel of the reasoning before it


@dataclass(frozen=True, slots=True)
class Template:
    """How turns are written, each as what begins one of its role, its text, and what ends it."""

    name: TemplateName
    system_message: str  # of a conversation without its own
    begins: Mapping[str, Pieces]  # what begins a turn, by its role; the answer begins as an assistant's turn does
    ends: Pieces  # what ends a turn
    ends_last: Pieces  # what ends an assistant's turn that is the last one
    stop: Special  # ends an answer
    guard: Special | None = None  # ends one too, which the model may write instead
    channels: Channels | None = None  # None: an answer is one text

    @property
    def turn(self) -> Special:
        """The token that begins every turn."""
        first = self.begins["user"][0]
        assert isinstance(first, Special)
        return first

    @property
    def header(self) -> Pieces:
        """What the model writes before the text of an answer."""
        marks = self.channels
        return () if marks is None else (marks.name, marks.final, marks.text)


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a folder's chat template asks for reasoning before an answer, and for none, by its `enable_thinking`."""

    system_message: str | None  # of a conversation without its own, if the answer reasons
    around_system: tuple[str, str]  # what stands before and behind a conversation's own one then
    opening: str  # begins an answer that reasons; <think> is in it
    plain_opening: str  # begins one that does not: as by default, unless that reasons
    by_default: bool  # whether an answer reasons if nobody says whether it shall


def spelt(pieces: Pieces) -> str:
    """Returns pieces as text."""
    return "".join(piece.token if isinstance(piece, Special) else piece for piece in pieces)


_IM_START, _IM_END = Special("<|im_start|>"), Special("<|im_end|>")
CHATML = Template(
    name="internvl2_5",
    system_message=(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
    ),
    begins={role: (_IM_START, f"{role}\n") for role in ("system", "user", "assistant")},
    ends=(_IM_END, "\n"),
    ends_last=(_IM_END, "\n"),
    stop=_IM_END,
)

_START, _MESSAGE, _END, _RETURN = map(Special, ("<|start|>", "<|message|>", "<|end|>", "<|return|>"))
HARMONY = Template(
    name="internvl3_5_gpt_oss",
    system_message=(
        "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
        "# Valid channels: final. Channel must be included for every message."
    ),
    begins={
        "system": (_START, "system", _MESSAGE),
        "user": (_START, "user", _MESSAGE),
        "assistant": (_START, "assistant"),
    },
    ends=(_END,),
    ends_last=(_RETURN,),
    stop=_RETURN,
    guard=_END,
    channels=Channels(Special("<|channel|>"), _MESSAGE, final="final", analysis="analysis"),
)

TEMPLATES: Mapping[TemplateName, Template] = {each.name: each for each in (CHATML, HARMONY)}
