"""The official interface gives the official text of a GPT-OSS, headers included, and takes it back in a history."""

import pytest
import torch

from internvl_rt.compat import AutoModel, AutoTokenizer
from internvl_rt.inputs.channels import end_ids
from support.harmony import ANALYSIS, FINAL, NEXT, write_small
from support.scripted_tokens import script_tokens

CONFIG = {"max_new_tokens": 64, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("harmony") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, torch_dtype=torch.float32, device="cpu").eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_history_of_official_answers_gives_the_official_prompt(model, tokenizer, monkeypatch, capsys):
    script_tokens(monkeypatch, tokenizer, f"{FINAL} A tower. <|return|>", f"{FINAL}Paris<|end|>")
    response, history = model.chat(tokenizer, None, "What?", CONFIG, return_history=True)
    assert response == f"{FINAL} A tower."
    assert history == [("What?", response)]
    again, _ = model.chat(tokenizer, None, "Where?", CONFIG, history=history, return_history=True, verbose=True)
    assert again == f"{FINAL}Paris"
    prompt = (
        f"<|start|>system<|message|>{model.system_message}<|end|><|start|>user<|message|>What?<|end|>"
        f"<|start|>assistant{FINAL} A tower.<|end|><|start|>user<|message|>Where?<|end|><|start|>assistant"
    )
    assert capsys.readouterr().out == f"{prompt}{again}\n"
    turns, _ = model._turns("Where?", history, 0)
    assert list(model.engine.prepare_turns(turns, []).prompt.token_ids) == tokenizer.encode(prompt, specials=True)


def test_an_analysis_is_a_part_of_the_official_text(model, tokenizer, monkeypatch):
    written = f"{ANALYSIS}So.{NEXT}{FINAL}42<|return|>"
    script_tokens(monkeypatch, tokenizer, written)
    assert model.chat(tokenizer, None, "?", CONFIG) == written.removesuffix("<|return|>")
    assert model.batch_chat(tokenizer, None, ["?"], CONFIG) == [written.removesuffix("<|return|>")]
    assert model.chat(tokenizer, None, "?", CONFIG | {"skip_special_tokens": True}) == "42"


def test_a_streamer_gets_all_tokens_up_to_the_end(model, tokenizer, monkeypatch):
    class Listener:
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    script_tokens(monkeypatch, tokenizer, f"{FINAL}x<|return|>")
    listener = Listener()
    model.chat(tokenizer, None, "?", CONFIG | {"streamer": listener})
    assert listener.ended
    assert listener.ids == tokenizer.encode(f"{FINAL}x<|return|>", specials=True)
    assert listener.ids[-1] == end_ids(model.engine.config, tokenizer)[0]
    template = model.conv_template
    assert (template.name, template.sep, template.sep2) == ("internvl3_5_gpt_oss", "<|end|>", "<|return|>")
