"""InternVL's classes under other names agree with transformers, in each layout in which they are stored.

Errors are max |ours - theirs| / max |theirs|.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.inputs.prompt import IMAGE, Turn
from support.forward import all_logits
from support.hf_models import build_reference
from support.relatives import QianfanLayout, build_qianfan_ocr, save_intern_s1, save_qianfan_ocr

NUM_TOKENS = 16
TILES = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8))
CONVERSATIONS = {
    "text": ((Turn("user", ("What is the first step?",)),), ()),
    "picture": ((Turn("user", (IMAGE, "\nParse this document to Markdown.")),), (TILES,)),
}
MODELS = {
    **{f"qianfan_ocr-{layout}": ("qianfan_ocr", partial(save_qianfan_ocr, layout=layout))
       for layout in get_args(QianfanLayout)},
    **{f"intern_s1-{kind}": (kind, save_intern_s1) for kind in ("qwen3", "qwen3_moe")},
}  # fmt: skip


@cache
def reference(kind: Any) -> Any:
    return build_qianfan_ocr() if kind == "qianfan_ocr" else build_reference(kind)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engine]]:
    kind, save = MODELS[request.param]
    folder: Path = tmp_path_factory.mktemp("relatives") / "model"
    save(reference(kind), folder)
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine:
        yield reference(kind), engine


def inputs_of(ids: tuple[int, ...], pictures: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns what transformers takes: pixel values as the official transform makes them."""
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if pictures:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = ((torch.cat(pictures) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        inputs |= {"pixel_values": pixels}
    return inputs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_and_greedy_tokens_are_those_of_transformers(loaded: tuple[Any, Engine], name: str) -> None:
    model, engine = loaded
    turns, pictures = CONVERSATIONS[name]
    prepared = engine.prepare_turns(turns, pictures)
    inputs = inputs_of(prepared.prompt.token_ids, pictures)
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
        answer = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    tiles = torch.cat([engine._uploads.load(picture).get() for picture in prepared.pictures]) if pictures else None
    context_id = engine.tokenizer.token_id("<IMG_CONTEXT>")
    ours = all_logits(engine.model, prepared.prompt.token_ids, tiles, context_id=context_id)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
    (reply,) = engine.generate_prepared(iter([prepared]), [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)])
    assert reply.token_ids == answer[len(prepared.prompt.token_ids) :].tolist()
    assert len(reply.token_ids) == NUM_TOKENS
