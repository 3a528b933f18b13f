"""Finds out what the chat template of a `-hf` folder adds to conversations, and says where it is unlike ours.

Prompts are rendered by `inputs.prompt` alone, as InternVL's own template in transformers does. Another model's template
may add a system message, and ask for reasoning or for none, which is taken over; that it does nothing else is checked
with a few short conversations when the model is loaded.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from internvl_rt.checkpoint.files import read_file
from internvl_rt.checkpoint.json_section import read_json
from internvl_rt.checkpoint.template import CHATML, Special, Template, Thinking, spelt
from internvl_rt.checkpoint.template_walk import TemplateWalkError, parse_template, render_template
from internvl_rt.errors import ConfigError, quoted

LOG = logging.getLogger("internvl_rt")
_MAX_BYTES = 1 << 15  # of a template: InternVL's has 600, those with tools have up to 10,000

Messages = list[dict[str, Any]]

_SYSTEM = {"role": "system", "content": " Be brief. "}
_QUESTION = {"role": "user", "content": "\n Why? "}
_ANSWER = {"role": "assistant", "content": " So.\n"}
_PICTURE, _VIDEO, _TEXT = {"type": "image"}, {"type": "video"}, {"type": "text", "text": " It\n"}
_PICTURES = {"role": "user", "content": [_PICTURE, _TEXT, _PICTURE, _VIDEO, _TEXT, _TEXT]}
_CONVERSATIONS: dict[str, Messages] = {
    "a question": [_QUESTION],
    "a system message": [_SYSTEM, _QUESTION],
    "several turns": [_SYSTEM, _QUESTION, _ANSWER, _QUESTION],
    "an empty answer": [_QUESTION, {"role": "assistant", "content": ""}, _QUESTION],
    "pictures and videos": [_PICTURES, _ANSWER, _PICTURES],
}


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What a folder's chat template adds to the conversations that `inputs.prompt` renders."""

    system_message: str | None  # of a conversation without its own, if the answer does not reason; None: it has none
    thinking: Thinking | None = None  # None: the template does not ask for reasoning


def read_chat_template(folder: Path, known: Template = CHATML, *, picture: str = "<IMG_CONTEXT>") -> ChatTemplate:
    """Reads the folder's chat template, if it has one.

    known: the template that conversations are rendered by. picture: what stands for a picture in the folder's template.
    Logs a warning if that renders conversations otherwise. Raises ConfigError if it is no text or too long.
    """
    file, template = _find_template(folder)
    system = None if known is CHATML else known.system_message
    if template is None:
        return ChatTemplate(system)
    try:
        rendering = _Rendering(parse_template(template), _special_tokens(folder), known, picture)
        system = rendering.manner({}, own=False).system
        default, asked, unasked = (rendering.manner(each) for each in ({}, _ASKED, _UNASKED))
        if known is not CHATML or asked == unasked:
            rendering.check(default._replace(opening=""), {})
            return ChatTemplate(system)
        # An answer that reasons begins with <think>: with a template that leaves it to the model, that is added here.
        plain = unasked if default.reasons else default
        system = plain.system
        if asked.system is None and system is not None:
            raise TemplateWalkError("it has a system message for answers without reasoning alone")
        rendering.check(asked, _ASKED)
        rendering.check(plain, _UNASKED if plain is unasked else {})
        opening = asked.opening if asked.reasons else "<think>\n"
        thinking = Thinking(asked.system, asked.around, opening, plain.opening, by_default=plain is not default)
        return ChatTemplate(system, thinking)
    except TemplateWalkError as problem:
        LOG.warning(
            "%s: this chat template is not InternVL's: %s; conversations are rendered by InternVL's template with the "
            "default system message %s: compare the prompts, or put InternVL's template there",
            *(quoted(str(file)), quoted(str(problem)), quoted(system)),
        )
    return ChatTemplate(system)


_ASKED, _UNASKED = {"enable_thinking": True}, {"enable_thinking": False}


class _Manner(NamedTuple):
    """What a template adds to a conversation, for one value of `enable_thinking`."""

    system: str | None  # of a conversation without its own
    around: tuple[str, str]  # what stands before and behind a conversation's own
    opening: str  # begins the answer

    @property
    def reasons(self) -> bool:
        """Whether the answer begins inside <think>."""
        return self.opening.rfind("<think>") > self.opening.rfind("</think>")


class _Rendering:
    """Renders short conversations by a folder's template and by the known one."""

    def __init__(self, body: list[Any], tokens: dict[str, str], known: Template, picture: str) -> None:
        self._body, self._known, self._picture = body, known, picture
        self._names = {"add_generation_prompt": True, "tools": None, "documents": None, **tokens}
        # A template that calls a picture otherwise is that of a model without videos.
        self._with_videos = picture == "<IMG_CONTEXT>"

    def manner(self, switch: dict[str, bool], *, own: bool = True) -> _Manner:
        """Finds out what the template adds. Raises TemplateWalkError if that is more than a manner can say.

        own: whether to look at a conversation with a system message too.
        """
        system, opening = self._split("a question", switch)
        its_own = self._split("a system message", switch)[0] if own else None
        before, found, behind = (its_own or "").partition(_SYSTEM["content"])
        return _Manner(system, (before, behind) if found else ("", ""), opening)

    def check(self, manner: _Manner, switch: dict[str, bool]) -> None:
        """Raises TemplateWalkError if the template renders conversations otherwise than the manner says."""
        for name, messages in _CONVERSATIONS.items():
            before, behind = manner.around
            if messages[0] is _SYSTEM:
                ours = [{"role": "system", "content": before + _SYSTEM["content"] + behind}, *messages[1:]]
            else:
                ours = [*self._turn(manner.system), *self._shown(messages)]
            expected = self._standard(ours) + manner.opening
            theirs = self._theirs(self._shown(messages), switch)
            if theirs != expected:
                raise TemplateWalkError(f"it renders {name} as {quoted(theirs)} and not as {quoted(expected)}")
        if switch != _ASKED and manner.around != ("", ""):
            raise TemplateWalkError("it adds to a conversation's own system message")

    def _split(self, name: str, switch: dict[str, bool]) -> tuple[str | None, str]:
        """Returns the content of the system turn before a rendered question, or None, and what stands behind it."""
        theirs, ours = self._theirs(_CONVERSATIONS[name], switch), self._standard([_QUESTION])
        before, found, opening = theirs.rpartition(ours)
        begin, end = spelt(self._known.begins["system"]), spelt(self._known.ends)
        system = before.removeprefix(begin).removesuffix(end)
        marks = {each.token for each in (*self._known.begins["system"], *self._known.ends) if isinstance(each, Special)}
        is_turn = before == begin + system + end and not any(mark in system for mark in marks)
        if not found or (before and not is_turn) or any(mark in opening for mark in marks):
            expected = self._standard(_CONVERSATIONS[name])
            raise TemplateWalkError(f"it renders {name} as {quoted(theirs)} and not as {quoted(expected)}")
        return system if before else None, opening

    def _theirs(self, messages: Messages, switch: dict[str, bool]) -> str:
        return render_template(self._body, self._names | switch | {"messages": messages})

    def _turn(self, system: str | None) -> Messages:
        return [] if system is None else [{"role": "system", "content": system}]

    def _shown(self, messages: Messages) -> Messages:
        if self._with_videos:
            return messages
        shown = []
        for message in messages:
            content = message["content"]
            parts = content if isinstance(content, str) else [part for part in content if part is not _VIDEO]
            shown.append({**message, "content": parts})
        return shown

    def _standard(self, messages: Messages) -> str:
        """Renders as the template of transformers' convert_internvl_weights_to_hf.py does, or as GPT-OSS is asked."""
        places, known, text = {"image": f"{self._picture}\n", "video": "<video>\n"}, self._known, ""
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(places.get(part["type"]) or part["text"] for part in content)
            header = known.header if message["role"] == "assistant" and content else ()
            text += spelt((*known.begins[message["role"]], *header, content, *known.ends))
        return text + spelt(known.begins["assistant"])


def _find_template(folder: Path) -> tuple[Path, str | None]:
    """Returns the file and the text of the template that transformers takes: a processor's before the tokenizer's.

    The order is that of `ProcessorMixin.get_processor_dict`.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if not os.path.lexists(file):
            continue
        if name.endswith(".jinja"):
            return file, _read_text(file)
        section = read_json(file)
        value = section.values.get("chat_template")
        if isinstance(value, list):  # of named templates
            value = next((each for each in value if isinstance(each, dict) and each.get("name") == "default"), None)
            value = value and value.get("template")
        if isinstance(value, dict):
            value = value.get("default")
        if value is not None:
            if not isinstance(value, str) or len(value) > _MAX_BYTES:
                raise section.refusal("chat_template", f"a text of at most {_MAX_BYTES} characters")
            return file, value
    return folder, None


def _read_text(file: Path) -> str:
    try:
        return read_file(file, ConfigError, max_bytes=_MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected UTF-8 text; download the file again") from error


def _special_tokens(folder: Path) -> dict[str, str]:
    """Returns eos_token and so on from tokenizer_config.json, which a template may name."""
    file = folder / "tokenizer_config.json"
    tokens = (
        {key: value for key, value in read_json(file).values.items() if key.endswith("_token")}
        if os.path.lexists(file)
        else {}
    )
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}
