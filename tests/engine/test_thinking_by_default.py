"""An Intern-S1 reasons before its answers unless a call says that it shall not, as its chat template asks for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_rt import Engine, RawPrompt, RequestError, SamplingParams
from support.hf_models import build_reference
from support.relatives import save_intern_s1
from support.scripted_text import script

TEMPLATE = (
    "{% set expert %}Think within <think>...</think> tags.{% endset %}"
    "{% set asked = enable_thinking is not defined or enable_thinking %}"
    "{% if asked and messages[0].role != 'system' %}<|im_start|>system\n{{ expert }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role ~ '\n' }}{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}{{ '<IMG_CONTEXT>\n' if part.type == 'image' else '<video>\n' }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
    "{% if asked %}<think>{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Why?"}]
PLAIN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
THINKING = f"<|im_start|>system\nThink within <think>...</think> tags.<|im_end|>\n{PLAIN}<think>"
SIX = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder: Path = tmp_path_factory.mktemp("intern_s1") / "model"
    save_intern_s1(build_reference("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with Engine.from_pretrained(folder, device="cpu") as engine:
        yield engine


@pytest.mark.parametrize(("think", "text"), [(None, THINKING), (True, THINKING), (False, PLAIN)])
def test_the_prompt_is_that_of_the_template(engine: Engine, think: bool | None, text: str) -> None:
    assert engine.describe(QUESTION, think=think).prompt.text == text
    assert engine.prepare(QUESTION, think=think).thinks is (text is THINKING)


def test_what_is_thought_comes_apart_from_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, ["\nso", ".</think>", "\n\n", "4", "2", ""])
    for reply in (
        engine.chat(QUESTION, SIX),
        *engine.generate([QUESTION], SIX),
        engine.chat(QUESTION, SIX, think=True),
    ):
        assert (reply.reasoning, reply.text) == ("so.", "42")
    late = engine.chat(QUESTION, SIX, timeout_s=1e-9)
    assert (late.reasoning, late.text) == ("", "")


def test_an_answer_without_it_is_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, ["4", "2", "", "", "", ""])
    begun = [*QUESTION, {"role": "assistant", "content": "It is "}]
    for reply in (
        engine.chat(QUESTION, SIX, think=False),
        engine.chat(begun, SIX),
        engine.chat(RawPrompt("Why?"), SIX),
    ):
        assert (reply.reasoning, reply.text) == (None, "42")
    with pytest.raises(RequestError, match=r"messages\[1\]: an answer that is begun cannot be thought about"):
        engine.chat(begun, think=True)


def test_a_response_is_scored_as_an_answer_without_reasoning(engine: Engine) -> None:
    (score,) = engine.score(QUESTION, ["So."])
    prompt = engine.describe(QUESTION, think=False).prompt
    (same,) = engine.score(RawPrompt(list(prompt.token_ids)), ["So."])
    assert score.logprobs == pytest.approx(same.logprobs, abs=1e-5)
