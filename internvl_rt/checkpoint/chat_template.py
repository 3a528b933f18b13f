"""Finds the default system message in the chat template of a `-hf` folder, and says where the template is unlike ours.

Prompts are rendered by `inputs.prompt` alone, as InternVL's own template in transformers does. A fine-tune's template
may add a system message, which is taken over; that it does nothing else is checked with a few short conversations when
the model is loaded.
"""

import logging
import os
from pathlib import Path
from typing import Any

from internvl_rt.checkpoint.files import read_file
from internvl_rt.checkpoint.json_section import read_json
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


def find_system_message(folder: Path) -> str | None:
    """Returns what the folder's chat template says for a conversation without a system message; None: it says nothing.

    Logs a warning if the template renders conversations otherwise than `inputs.prompt`. Raises ConfigError if it is no
    text or too long.
    """
    file, template = _find_template(folder)
    if template is None:
        return None
    system = None
    try:
        body = parse_template(template)
        names = {"add_generation_prompt": True, "tools": None, "documents": None, **_special_tokens(folder)}
        system = _system_before(render_template(body, names | {"messages": [_QUESTION]}))
        for name, messages in _CONVERSATIONS.items():
            added = [] if system is None or messages[0] is _SYSTEM else [{"role": "system", "content": system}]
            ours, theirs = _standard([*added, *messages]), render_template(body, names | {"messages": messages})
            if theirs != ours:
                raise TemplateWalkError(f"it renders {name} as {quoted(theirs)} and not as {quoted(ours)}")
    except TemplateWalkError as problem:
        LOG.warning(
            "%s: this chat template is not InternVL's: %s; conversations are rendered by InternVL's template with the "
            "default system message %s: compare the prompts, or put InternVL's template there",
            *(quoted(str(file)), quoted(str(problem)), quoted(system)),
        )
    return system


def _standard(messages: Messages) -> str:
    """Renders as the template of transformers' convert_internvl_weights_to_hf.py does."""
    places, text = {"image": "<IMG_CONTEXT>\n", "video": "<video>\n"}, ""
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(places.get(part["type"]) or part["text"] for part in content)
        text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
    return f"{text}<|im_start|>assistant\n"


def _system_before(theirs: str) -> str | None:
    """Returns the content of the system turn before a rendered question, or None. Raises TemplateWalkError."""
    ours, begin, end = _standard([_QUESTION]), "<|im_start|>system\n", "<|im_end|>\n"
    before = theirs.removesuffix(ours)
    system = before.removeprefix(begin).removesuffix(end)
    if theirs == ours:
        return None
    if theirs != begin + system + end + ours or "<|im_" in system:
        raise TemplateWalkError(f"it renders a question as {quoted(theirs)} and not as {quoted(ours)}")
    return system


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
