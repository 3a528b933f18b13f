"""The chat template of a -hf folder: its default system message is found, and what else it does is said at load.

transformers' own `apply_chat_template` is the reference.
"""

import json
import logging
import re
import time
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer

from internvl_rt.checkpoint.chat_template import read_chat_template
from internvl_rt.errors import ConfigError
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.prompt import build_prompt, turns_from_messages
from internvl_rt.inputs.tokenizer import load_tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizer"
OFFICIAL, TOKENIZER = Qwen2Tokenizer.from_pretrained(DATA), load_tokenizer(DATA)

CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TURN = "{{'<|im_start|>' + message['role'] + '\n'}}" + CONTENT + "{{'<|im_end|>\n'}}"
END = "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
INTERNVL = "{% for message in messages %}" + TURN + END
TRIMMED = INTERNVL.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")

# Ways to write the same system message that occur in the templates of fine-tunes.
WITH_SYSTEM = {
    "in_the_loop": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Ada.<|im_end|>\n' }}{% endif %}" + TURN + END,
    "before_the_loop": "{%- if not messages or messages[0].role != 'system' -%}\n<|im_start|>system\nYou are Ada."
    "<|im_end|>{{ '\n' }}\n{%- endif -%}\n" + INTERNVL,
    "as_a_variable": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = 'You are Ada.' %}{% set rest = messages %}{% endif %}"
    "{{ '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}{% for message in rest %}" + TURN + END,
    "with_eos_token_and_tools": "{%- if tools %}{{ tools | map('tojson') | join }}{%- else %}{%- if messages[0].role in"
    " ['user', 'assistant'] %}{{- '<|im_start|>system\nYou are Ada.' + eos_token + '\n' }}{%- endif %}{%- endif %}"
    + INTERNVL.replace("'<|im_end|>\n'", "eos_token + '\n'"),
    "with_marks_for_training": "{% if tools is not none or documents %}{{ tools[0] }}{% endif %}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Ada.<|im_end|>\n' }}{% endif %}"
    + INTERNVL.replace(CONTENT, "{% generation %}" + CONTENT + "{% endgeneration %}"),
    "with_a_namespace": "{%- set ns = namespace(last=-1) %}{%- for m in messages[::-1] %}"
    "{%- if m.role == 'user' and ns.last < 0 %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- if ns.last >= 0 and not messages[0].role.startswith('sys') %}"
    "{{ '<|im_start|>system\nYou are Ada.<|im_end|>\n' }}{%- endif %}" + INTERNVL,
    "with_a_block": "{% set system %}You are {{ 'Ada' }}.{% endset %}{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}{% endif %}" + INTERNVL,
    "with_macros": "{% macro turn(role, text='You are Ada.') %}{{ '<|im_start|>' ~ role ~ '\n' ~ text }}{{ end() }}"
    "{% endmacro %}{% macro end() %}{{ '<|im_end|>\n' }}{% endmacro %}"
    "{% if messages[0].role != 'system' %}{{ turn('system') }}{% endif %}" + INTERNVL,
    "with_parts_of_a_text": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' ~ "
    "'So.</think>You are Ada.'.split('</think>')[-1] ~ '<|im_end|>\n' }}{% endif %}" + INTERNVL,
    "with_an_error_for_bad_orders": "{% for message in messages if message.role != 'system' %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    "{% if messages[0]['role'] == 'system' %}{% else %}"
    "{{ '<|im_start|>system\nYou are Ada.<|im_end|>\n' }}{% endif %}" + INTERNVL,
}


def user(*parts):
    kinds = {"<image>": {"type": "image", "image": None}}
    content = [kinds.get(part, {"type": "text", "text": part}) for part in parts]
    return {"role": "user", "content": content}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "  How many?\n"}],
    "own_system_message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "empty_system_message": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
    "pictures_between_texts": [user("First ", "<image>", "and", "<image>", "<image>", " last\n")],
    "turns": [user("<image>", "What?"), {"role": "assistant", "content": " A tower. "}, user("Where?", "<image>")],
    "empty_answer": [user("Hi"), {"role": "assistant", "content": ""}, user("Hello?")],
    "empty_question": [user(""), {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": ""}],
}


def folder_with(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template, newline="")
    (tmp_path / "tokenizer_config.json").write_text((DATA / "tokenizer_config.json").read_text())
    return tmp_path


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", [INTERNVL, *WITH_SYSTEM.values()], ids=["internvl", *WITH_SYSTEM])
def test_prompts_of_hf_folders_are_those_of_their_templates(tmp_path, caplog, template, name):
    system = read_chat_template(folder_with(tmp_path, template)).system_message
    assert system == (None if template == INTERNVL else "You are Ada.")
    assert not warnings(caplog)
    messages = parse_messages(CONVERSATIONS[name])
    turns = turns_from_messages(messages, [], system=system, number_images=False)
    num_images = sum(not isinstance(part, str) for message in messages for part in message.parts)
    ours = build_prompt(turns, TOKENIZER, [1] * num_images, ends_empty=True).text
    theirs = OFFICIAL.apply_chat_template(
        CONVERSATIONS[name], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ours.replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>") == theirs


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TRIMMED, r"renders a question as .*Why\?<\|im_end"),
        (INTERNVL.replace("assistant\n' }}", "assistant\n<think>\n' }}"), "renders a question as"),
        (INTERNVL.replace("<IMG_CONTEXT>\n", "<image>\n"), "renders pictures and videos as"),
        (INTERNVL.replace("{{ content['text'] }}", ""), "renders pictures and videos as"),
        (INTERNVL.replace("{{'<|im_end|>\n'}}", "{% if message.content %}{{'<|im_end|>\n'}}{% endif %}"), "an empty"),
        ("{% generation %}", "cannot be parsed"),
        ("{% for message in messages %}{% break %}{% endfor %}", "break in line"),
        ("{{ messages", "cannot be parsed"),
        ("{% for i in range(9) %}" + INTERNVL + "{% endfor %}", "call of range in line 1 is not followed"),
        (INTERNVL + "{{ raise_exception('no') }}", "call of raise_exception in line"),
        (INTERNVL + "{{ messages | tojson }}", "filter in line"),
        (INTERNVL + "{{ strftime_now('%Y') }}", "call of strftime_now"),
        (INTERNVL + "{% include 'a' %}", "include in line"),
        (INTERNVL + "{{ messages }}", "cannot be followed"),
        (INTERNVL + "{{ messages.append(1) }}", "call in line"),
        ("{{ 'a'.__class__.__mro__ }}", "cannot be followed"),
        ("", "renders a question as '' and not as"),
    ],
)
def test_a_template_that_renders_otherwise_is_said_at_load(tmp_path, caplog, template, problem):
    assert read_chat_template(folder_with(tmp_path, template)).system_message is None
    (text,) = warnings(caplog)
    assert "chat_template.jinja" in text
    assert re.search(problem, text)
    assert text.isprintable()
    assert len(text) < 1500


def test_a_default_system_message_is_taken_over_from_a_template_that_differs_elsewhere(tmp_path, caplog):
    template = WITH_SYSTEM["before_the_loop"].replace("<IMG_CONTEXT>\n", "<image>\n")
    assert read_chat_template(folder_with(tmp_path, template)).system_message == "You are Ada."
    assert "with the default system message 'You are Ada.'" in warnings(caplog)[0]


MANY = 40
LONG_LIST = f"{{% set x = {[0] * 5000} %}}"
HOSTILE_TEMPLATES = {
    "nested_loops": "{% for a in messages %}" * MANY + "x" + "{% endfor %}" * MANY,
    "loops": LONG_LIST + "{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "filtered_loops": LONG_LIST + "{% for a in x %}{% for b in x if 0 %}{% endfor %}{% endfor %}",
    "searches": LONG_LIST + "{% for a in x %}{{ '' if 1 in x }}{% endfor %}",
    "range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubled_text": "{% set ns = namespace(x='aaaaaaaa') %}" + "{% set ns.x = ns.x + ns.x %}" * 1000,
    "joined_text": "{% set x='aaaaaaaa' %}" + "{% set x = x ~ x %}" * 1000,
    "doubled_number": "{% set x = 9 %}" + "{% set x = x + x %}" * 1000 + "{{ x }}",
    "repeated_text": "{{ 'a' * 10000000000 }}",
    "padded_text": "{{ '%9999999999d' % 1 }}",
    "list_of_lists": "{% set x = [1] %}{% set y = [1] %}"
    + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
    + "{{ x == y }}",
    "brackets": "{{ " + "(" * 15_000 + "1" + ")" * 15_000 + " }}",
    "lists": "{{ " + "[" * 15_000 + "]" * 15_000 + " }}",
    "ifs": "{% if 1 %}" * 1500 + "{% endif %}" * 1500,
    "long_sum": "{{ " + "1 + " * 8_000 + "1 }}",
    "long_number": "{{ " + "9" * 30_000 + " }}",
    "self": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns == ns.x }}{{ ns }}",
    "doubled_block": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 800,
    "macros": "".join(f"{{% macro f{i}() %}}{{{{ f{i - 1}() ~ f{i - 1}() }}}}{{% endmacro %}}" for i in range(1, MANY))
    + "{{ f39() }}",
    "too_many_arguments": "{% macro f() %}{% endmacro %}{{ f(1) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "bad_escape": "{{ '\\x' }}",
    "nul": "\0{{ '\0' }}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_hostile_template_is_given_up_at_once(tmp_path, caplog, name):
    start_s = time.process_time()  # other processes may take the processor
    assert read_chat_template(folder_with(tmp_path, HOSTILE_TEMPLATES[name])).system_message is None
    assert time.process_time() - start_s < 2
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"eos_token": "a"}}, None),
        ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag"}, {"name": "default", "template": "N"}]}}, "N"),
        ({"tokenizer_config.json": {"chat_template": "T"}, "chat_template.jinja": "J"}, "J"),
        ({"chat_template.jinja": "J", "chat_template.json": {"chat_template": "L"}}, "L"),
        ({"chat_template.json": {"chat_template": "L"}, "processor_config.json": {"chat_template": "P"}}, "P"),
        ({"processor_config.json": {"image_processor": {}}, "chat_template.jinja": "J"}, "J"),
    ],
)
def test_the_template_comes_from_the_file_that_transformers_takes(tmp_path, caplog, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_chat_template(tmp_path).system_message is None
    assert [f"renders a question as '{expected}'" in text for text in warnings(caplog)] == [True] * (
        expected is not None
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.json", b'{"chat_template": 5}'),
        ("chat_template.json", b'{"chat_template": {"default": ["a"]}}'),
        ("chat_template.json", b"{"),
        ("processor_config.json", json.dumps({"chat_template": "a" * 70_000}).encode()),
        ("chat_template.jinja", b"a" * 70_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_template_that_is_no_text_or_too_long_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_chat_template(tmp_path)
