"""A real language model, SmolLM2-135M in an InternVL3-format folder, runs through the whole engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from internvl_rt import Engine, Reply, SamplingParams
from real.smollm2 import SYSTEM_MESSAGE, write_smollm2

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Translate 'good morning' to Spanish.",
    "Why is the sky blue? Answer in 1 or 2 sentences.",
)
NUM_TOKENS = 24
PARAMS = SamplingParams(max_tokens=NUM_TOKENS)


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text" if isinstance(part, str) else "image"} for part in content]
    parts = [part | {part["type"]: value} for part, value in zip(parts, content, strict=True)]
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("smollm2")
    write_smollm2(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Loads the model into transformers as what it was before: a Llama, without biases."""
    import transformers  # the import is here because it takes seconds

    hf: Any = transformers
    decoder = json.loads((folder / "config.json").read_text())["llm_config"]
    sizes = {key: value for key, value in decoder.items() if key not in ("architectures", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": decoder["rope_theta"]}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False))
    tensors = {
        name.removeprefix("language_model."): tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("language_model.") and not name.endswith(".bias")
    }
    model.load_state_dict(tensors)
    return model.eval()


def expected_tokens(reference: Any, prompt: list[int], stop_id: int) -> list[int]:
    ids = torch.tensor([prompt])
    answer = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=stop_id,
        pad_token_id=stop_id,
    )
    tokens: list[int] = answer[0, len(prompt) :].tolist()
    return tokens


def prompt_of(question: str, engine: Engine) -> list[int]:
    """Returns the token ids of a question in SmolLM2's own template."""
    turns = (f"system\n{SYSTEM_MESSAGE}", f"user\n{question}", "assistant\n")
    return engine.tokenizer.encode("<|im_end|>\n".join(f"<|im_start|>{turn}" for turn in turns), specials=True)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, Reply]:
    return {question: engine.chat(ask(question), PARAMS) for question in QUESTIONS}


def test_the_capital_of_france_is_paris(alone: dict[str, Reply]) -> None:
    reply = alone["What is the capital of France?"]
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_those_of_transformers(
    engine: Engine, alone: dict[str, Reply], reference: Any, question: str
) -> None:
    prompt = prompt_of(question, engine)
    assert alone[question].usage.prompt_tokens == len(prompt)
    assert alone[question].token_ids == expected_tokens(reference, prompt, engine.tokenizer.token_id("<|im_end|>"))


def test_answers_in_one_batch_are_those_alone(engine: Engine, alone: dict[str, Reply]) -> None:
    together = engine.generate([ask(question) for question in QUESTIONS], PARAMS)
    assert [reply.token_ids for reply in together] == [alone[question].token_ids for question in QUESTIONS]


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_streamed_text_is_the_whole_answer(engine: Engine, alone: dict[str, Reply], question: str) -> None:
    pieces = list(engine.stream(ask(question), PARAMS))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == alone[question].text


def test_a_picture_runs_and_changes_the_answer(engine: Engine) -> None:
    question = "What is in the picture?"
    picture = np.random.default_rng(0).integers(0, 256, (120, 300, 3), dtype=np.uint8)
    seen, blind = engine.generate([ask(picture, question), ask(question)], PARAMS)
    assert seen.usage.image_tokens > 16
    assert seen.token_ids != blind.token_ids
    assert len(seen.text) > 10
