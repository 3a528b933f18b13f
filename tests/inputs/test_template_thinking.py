"""Models whose chat template asks for reasoning, such as Intern-S1, are prompted as by transformers, asked or not."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Tokenizer

from internvl_rt.checkpoint.chat_template import read_chat_template
from internvl_rt.checkpoint.config import ModelConfig
from internvl_rt.checkpoint.template import CHATML, Thinking
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.prompt import build_prompt, turns_from_messages
from internvl_rt.inputs.thinking import shall_think, with_thinking, without_thinking
from internvl_rt.inputs.tokenizer import load_tokenizer
from support.configs import HF, parse

DATA = Path(__file__).parents[1] / "data" / "tokenizer"
OFFICIAL: Any = Qwen2Tokenizer.from_pretrained(DATA)
TOKENIZER, CONFIG = load_tokenizer(DATA), parse(HF)

PARTS = (
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- 'PICTURE\n' }}{%- elif part.type == 'video' %}{{- '<video>\n' }}"
    "{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
)
TURNS = (
    "{%- for message in messages %}{%- if not (loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\n' }}" + PARTS + "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}END{%- endif %}"
)
ASKED = "{%- if enable_thinking is not defined or enable_thinking %}"
EXPERT = "You are an expert.\nThink within <think>...</think> tags."
BEGIN_EXPERT = "{%- set expert %}" + EXPERT + "{%- endset %}"
OWN = "{%- set own = messages[0].content if messages[0].role == 'system' else '' %}"
SYSTEM = "{{- '<|im_start|>system\n' + PLACE + '<|im_end|>\n' }}"
HAS_OWN = "{%- if messages[0].role == 'system' %}"

# Thinking is on unless it is switched off; a system message of the conversation's own takes the place of the default.
INTERN_S1 = (
    BEGIN_EXPERT
    + OWN
    + HAS_OWN
    + SYSTEM.replace("PLACE", "own")
    + "{%- else %}"
    + ASKED
    + SYSTEM.replace("PLACE", "expert")
    + "{%- endif %}{%- endif %}"
    + TURNS.replace("END", ASKED + "{{- '<think>' }}{%- endif %}").replace("PICTURE", "<IMG_CONTEXT>")
)
# The same, but the default stands in front of the conversation's own.
AND_OWN = (
    BEGIN_EXPERT
    + OWN
    + ASKED
    + "{%- if own %}"
    + SYSTEM.replace("PLACE", "expert + '\n\n' + own")
    + "{%- else %}"
    + SYSTEM.replace("PLACE", "expert")
    + "{%- endif %}{%- elif own %}"
    + SYSTEM.replace("PLACE", "own")
    + "{%- endif %}"
    + TURNS.replace("END", ASKED + "{{- '<think>' }}{%- endif %}").replace("PICTURE", "<IMG_CONTEXT>")
)
PLAIN_SYSTEM = HAS_OWN + SYSTEM.replace("PLACE", "messages[0].content") + "{%- endif %}"
# Thinking is off unless it is switched on.
QIANFAN_OCR = PLAIN_SYSTEM + TURNS.replace(
    "END", "{%- if enable_thinking is defined and enable_thinking %}{{- '<think>\n' }}{%- endif %}"
).replace("PICTURE", "<image>")
# An empty thought is written where thinking is switched off; else the model is free.
QWEN3 = PLAIN_SYSTEM + TURNS.replace(
    "END",
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
).replace("PICTURE", "<IMG_CONTEXT>")
NO = ("", "")
TEMPLATES = {
    "intern_s1": (INTERN_S1, None, Thinking(EXPERT, NO, "<think>", "", by_default=True)),
    "and_own": (AND_OWN, None, Thinking(EXPERT, (f"{EXPERT}\n\n", ""), "<think>", "", by_default=True)),
    "qianfan_ocr": (QIANFAN_OCR, None, Thinking(None, NO, "<think>\n", "", by_default=False)),
    "qwen3": (QWEN3, None, Thinking(None, NO, "<think>\n", "", by_default=False)),
    "qwen3_off": (
        QWEN3.replace("enable_thinking is defined and enable_thinking is false", "not enable_thinking"),
        None,
        Thinking(None, NO, "<think>\n", "<think>\n\n</think>\n\n", by_default=False),
    ),
    "system_for_both": (
        INTERN_S1.replace("{%- else %}" + ASKED, "{%- else %}" + SYSTEM.replace("PLACE", "'Hm.'") + "{%- if false %}"),
        "Hm.",
        Thinking("Hm.", NO, "<think>", "", by_default=True),
    ),
}
PICTURE = {"type": "image", "image": None}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "  How many?\n"}],
    "own system message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A tower."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, PICTURE]},
    ],
}


def folder_with(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, newline="")
    return folder


def picture_of(name: str) -> str:
    return "<image>" if name == "qianfan_ocr" else "<IMG_CONTEXT>"


def read_into(config: ModelConfig, folder: Path, name: str) -> ModelConfig:
    read = read_chat_template(folder_with(folder, TEMPLATES[name][0]), CHATML, picture=picture_of(name))
    return replace(config, system_message=read.system_message, thinking=read.thinking, can_think=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_adds_is_read_from_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    config = read_into(CONFIG, tmp_path, name)
    assert (config.system_message, config.thinking) == TEMPLATES[name][1:]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("think", [True, False, None])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(tmp_path: Path, name: str, conversation: str, think: bool | None) -> None:
    config, template = read_into(CONFIG, tmp_path, name), TEMPLATES[name][0]
    messages = CONVERSATIONS[conversation]
    thinks = shall_think(think, config)
    parsed = (with_thinking if thinks else without_thinking)(parse_messages(messages), config)
    turns = turns_from_messages(parsed, [], system=config.system_message, number_images=False)
    num_images = sum(part is PICTURE for message in messages for part in message["content"])
    prompt = build_prompt(turns, TOKENIZER, [1] * num_images, ends_empty=True)
    switch = {} if think is None else {"enable_thinking": think}
    theirs = OFFICIAL.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **switch
    )
    if thinks and "<think>" not in theirs.rpartition("<|im_start|>")[2]:
        theirs += "<think>\n"  # the template leaves it to the model, and the call does not
    if name == "qwen3" and think is False:
        theirs = theirs.removesuffix("<think>\n\n</think>\n\n")  # as the template does by default
    assert prompt.text.replace("<img><IMG_CONTEXT></img>", picture_of(name)) == theirs
    if not num_images:
        assert list(prompt.token_ids) == OFFICIAL(theirs).input_ids


def test_a_model_without_such_a_template_does_not_think_by_default(tmp_path: Path) -> None:
    config = CONFIG
    assert read_chat_template(tmp_path).thinking is None
    assert (shall_think(None, config), shall_think(True, config), shall_think(False, config)) == (False, True, False)
    messages = parse_messages(CONVERSATIONS["question"])
    assert without_thinking(messages, config) == messages


def test_an_answer_that_is_begun_is_not_begun_again(tmp_path: Path) -> None:
    config = read_into(CONFIG, tmp_path, "qwen3_off")
    begun = parse_messages([*CONVERSATIONS["question"], {"role": "assistant", "content": "So"}])
    assert without_thinking(begun, config) == begun
    (*_, opening) = without_thinking(begun[:1], config)
    assert opening.parts == ("<think>\n\n</think>\n\n",)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (INTERN_S1.replace("own + '<|im_end|>", "'Mind. ' + own + '<|im_end|>"), "own system message"),
        (INTERN_S1.replace("<IMG_CONTEXT>", "<image>"), "renders pictures and videos as"),
        (INTERN_S1.replace("{{- '<think>' }}", "{{- '<|im_end|>' }}"), "renders a question as"),
        (
            PLAIN_SYSTEM + TURNS.replace("END", "{{- '<think>\n' }}").replace("PICTURE", "<IMG_CONTEXT>"),
            "renders a question as",
        ),
    ],
    ids=["adds to the system message", "another mark of pictures", "a token of turns", "always thinks"],
)
def test_a_template_that_does_more_is_said_at_load_and_thinks_as_internvl_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, problem: str
) -> None:
    assert read_chat_template(folder_with(tmp_path, template)).thinking is None
    assert problem in caplog.text
