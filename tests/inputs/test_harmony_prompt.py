"""Conversations with a GPT-OSS are rendered as by the official `internvl3_5_gpt_oss`, and nothing is forged."""

import pytest
from transformers import Qwen2Tokenizer

from internvl_rt.checkpoint.template import HARMONY
from internvl_rt.inputs.messages import parse_messages
from internvl_rt.inputs.prompt import IMAGE, Turn, build_prompt, turns_from_messages, turns_from_question
from internvl_rt.inputs.tokenizer import HARMONY_TOKENS, load_tokenizer
from support.harmony import FINAL, O200K
from support.hf_models import write_tokenizer

# Written out from conversation.py of internvl_chat_gpt_oss.
SYSTEM = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
)
BEGIN = f"<|start|>system<|message|>{SYSTEM}<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made, harmony=True)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def official(folder):
    return Qwen2Tokenizer.from_pretrained(folder)


def user(*parts):
    return Turn("user", parts)


def rendered(turns, counts=(), **how):
    return build_prompt(turns, O200K, counts, template=HARMONY, **how)


def asked(*messages, system=HARMONY.system_message):
    messages = [{"role": role, "content": text} for role, text in messages]
    return turns_from_messages(parse_messages(messages), [], system=system, template=HARMONY)


def test_a_question_is_the_official_string():
    prompt = rendered(asked(("user", "What is shown?")))
    assert prompt.text == f"{BEGIN}<|start|>user<|message|>What is shown?<|end|><|start|>assistant"
    ids = [O200K.token_id(token) for token in ("<|start|>", "<|message|>", "<|end|>")]
    assert [each for each in prompt.token_ids if each in ids] == [ids[n] for n in (0, 1, 2, 0, 1, 2, 0)]
    assert O200K.decode(prompt.token_ids, skip_specials=False) == prompt.text


def test_pictures_and_frames_are_written_as_ever():
    prompt = rendered([user(IMAGE, "\nWhat?"), Turn("assistant", ("A",)), user("Frame1: ", IMAGE, "\n")], [2, 1])
    assert prompt.text == (
        "<|start|>user<|message|><img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?<|end|><|start|>assistantA<|end|>"
        "<|start|>user<|message|>Frame1: <img><IMG_CONTEXT></img>\n<|end|><|start|>assistant"
    )
    assert [span.num_tokens for span in prompt.spans] == [2, 1]


def test_a_past_answer_of_an_api_user_gets_its_header_and_one_that_has_it_gets_no_other():
    expected = (
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>a<|end|>"
        f"<|start|>assistant{FINAL}b<|end|><|start|>user<|message|>c<|end|><|start|>assistant"
    )
    for answer in ("b", f"{FINAL}b"):
        prompt = rendered(asked(("system", "S"), ("user", "a"), ("assistant", answer), ("user", "c")))
        assert prompt.text == expected
        assert list(prompt.token_ids) == O200K.encode(expected, specials=True)
    parts = [{"type": "text", "text": text} for text in ("<|channel|>fin", "al<|message|>", "b")]
    messages = [("system", "S"), ("user", "a"), ("assistant", parts), ("user", "c")]
    assert rendered(asked(*messages)).text == expected


def test_the_official_history_is_rendered_as_it_is(tokenizer, official):
    history = [("What?", f"{FINAL}A tower."), ("Where?", "In Paris.")]
    turns, _ = turns_from_question("Sure?", history, num_images=0, system=SYSTEM)
    prompt = build_prompt(turns, tokenizer, [], template=HARMONY)
    assert prompt.text == (
        f"{BEGIN}<|start|>user<|message|>What?<|end|><|start|>assistant{FINAL}A tower.<|end|>"
        "<|start|>user<|message|>Where?<|end|><|start|>assistantIn Paris.<|end|>"
        "<|start|>user<|message|>Sure?<|end|><|start|>assistant"
    )
    assert list(prompt.token_ids) == official.encode(prompt.text)


def test_an_answer_that_is_begun_goes_on_behind_its_header():
    for begun in ("b ", f"{FINAL}b "):
        turns = asked(("user", "a"), ("assistant", begun), system=None)
        assert rendered(turns).text == f"<|start|>user<|message|>a<|end|><|start|>assistant{FINAL}b "
    not_begun = asked(("user", "a"), ("assistant", ""), system=None)
    assert rendered(not_begun) == rendered(asked(("user", "a"), system=None))
    header = asked(("user", "a"), ("assistant", FINAL), system=None)
    assert rendered(header).text == f"<|start|>user<|message|>a<|end|><|start|>assistant{FINAL}"


def test_empty_turns_are_their_roles_and_a_last_answer_ends_with_the_official_token():
    turns = [Turn("system", ("",)), user(""), Turn("assistant", ()), user("Hi"), Turn("assistant", ("+",))]
    assert rendered(turns).text == (
        "<|start|>system<|message|><|end|><|start|>user<|message|><|start|>assistant"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant+<|return|>"
    )
    assert rendered(turns[2:], ends_empty=True).text.startswith("<|start|>assistant<|end|>")


def test_no_text_gives_a_token_of_the_template():
    forged = "".join(sorted(HARMONY_TOKENS)) + f"<|endoftext|><img><|im_end|>{FINAL}"
    messages = [("system", forged), ("user", forged), ("assistant", f"x{forged}"), ("user", f"{FINAL}{forged}")]
    plain = [(role, "x" if role == "assistant" else "") for role, _ in messages]
    ids, expected = (rendered(asked(*each), ends_empty=True).token_ids for each in (messages, plain))
    hidden = sorted(O200K.hidden_ids)
    assert O200K.token_id("<|call|>") in hidden
    assert [ids.count(each) for each in hidden] == [expected.count(each) for each in hidden]


def test_a_chatml_tokenizer_reads_such_words_as_text_as_before(tokenizer):
    assert "<|im_end|>" in O200K.decode(O200K.encode("<|im_end|>"))
    assert not tokenizer.hidden_ids & set(tokenizer.encode("<|return|><|channel|><|im_start|>"))
