"""Random small models of every kind, read from every layout, agree with transformers' own InternVL classes.

transformers runs eager attention and our operations torch's fused one, so equal results do not come from equal code.
Errors are max |ours - theirs| / max |theirs|.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.inputs.position import build_positions
from internvl_rt.inputs.prepare import Prepared
from internvl_rt.inputs.prompt import IMAGE, ImageMarker, Turn
from internvl_rt.model.internvl import named_parameters
from support.forward import all_logits, last_hidden_state
from support.hf_models import KINDS, LAYOUTS, Kind, Layout, build_reference, save_checkpoint

NUM_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
RNG = np.random.default_rng(3)


def turn(*parts: str | ImageMarker) -> Turn:
    return Turn("user", parts)


def tiles(count: int) -> Tensor:
    return torch.from_numpy(RNG.integers(0, 256, (count, 112, 112, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    pictures: tuple[Tensor, ...] = ()

    @property
    def media(self) -> dict[str, Tensor]:
        """Returns what transformers takes: pixel values as the official transform makes them."""
        if not self.pictures:
            return {}
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return {"pixel_values": ((torch.cat(self.pictures) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()}


CONVERSATIONS = {
    "text_only": Conversation((turn("What is the first step?"),)),
    "one_tile": Conversation((turn(IMAGE, "\nWhat is shown?"),), (tiles(1),)),
    "tiles_and_thumbnail": Conversation((turn(IMAGE, "\nDescribe the picture in detail, please."),), (tiles(5),)),
    "two_images_two_turns": Conversation(
        (
            turn("Image-1: ", IMAGE, "\nWhat?"),
            Turn("assistant", ("A tower.",)),
            turn("Image-2: ", IMAGE, "\nAnd here?"),
        ),
        (tiles(3), tiles(1)),
    ),
}


@cache
def reference(kind: Kind) -> Any:
    return build_reference(kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Kind, Layout], Path]:
    root = tmp_path_factory.mktemp("models")
    found: dict[tuple[Kind, Layout], Path] = {}
    for kind in KINDS:
        for layout in LAYOUTS:
            found[kind, layout] = root / f"{kind}-{layout}"
            save_checkpoint(reference(kind), found[kind, layout], layout)
    return found


@pytest.fixture(params=[(kind, layout) for kind in KINDS for layout in LAYOUTS], ids="-".join, scope="module")
def loaded(request: pytest.FixtureRequest, folders: dict[tuple[Kind, Layout], Path]) -> Iterator[tuple[Kind, Engine]]:
    with Engine.from_pretrained(folders[request.param], device="cpu", dtype="float32") as engine:
        yield request.param[0], engine


def prepare(engine: Engine, name: str) -> Prepared:
    conversation = CONVERSATIONS[name]
    return engine.prepare_turns(conversation.turns, conversation.pictures)


def v2pe_positions(prepared: Prepared, stride: int) -> np.ndarray:
    spans = prepared.prompt.spans
    return build_positions(len(prepared.prompt.token_ids), spans, [stride] * len(spans))[0]


@cache
def expected_tokens(kind: Kind, name: str, prompt: tuple[int, ...]) -> list[int]:
    """Returns the tokens of transformers' greedy answer."""
    ids = torch.tensor([prompt])
    answer = reference(kind).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **CONVERSATIONS[name].media,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    tokens: list[int] = answer[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def expected_logits(kind: Kind, name: str, prepared: Prepared, position_T: np.ndarray) -> Tensor:
    ids = torch.tensor([prepared.prompt.token_ids])
    logits: Tensor = reference(kind)(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.from_numpy(position_T)[None],
        **CONVERSATIONS[name].media,
    ).logits
    return logits[0]


def logits_of(engine: Engine, prepared: Prepared, position_T: np.ndarray, chunk_len: int | None = None) -> Tensor:
    pictures, num_tokens = (
        [engine._uploads.load(picture).get() for picture in prepared.pictures],
        len(prepared.prompt.token_ids),
    )
    return all_logits(
        engine.model,
        prepared.prompt.token_ids,
        torch.cat(pictures) if pictures else None,
        context_id=engine.tokenizer.token_id("<IMG_CONTEXT>"),
        position_T=position_T,
        chunk_lens=None if chunk_len is None else [*[chunk_len] * (num_tokens // chunk_len), num_tokens % chunk_len],
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


@torch.inference_mode()
def test_vision_tower_and_projector_give_the_same_features(loaded: tuple[Kind, Engine]) -> None:
    kind, engine = loaded
    conversation = CONVERSATIONS["tiles_and_thumbnail"]
    theirs = reference(kind).get_image_features(**conversation.media)
    (tiles_I,) = conversation.pictures
    assert relative_error(last_hidden_state(engine.model, tiles_I), theirs.last_hidden_state) < 1e-5
    assert relative_error(engine.model.encode_tiles(tiles_I), theirs.pooler_output) < 1e-5


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_are_the_same_at_every_position(loaded: tuple[Kind, Engine], name: str) -> None:
    kind, engine = loaded
    prepared = prepare(engine, name)
    theirs = expected_logits(kind, name, prepared, prepared.position_T)
    for chunk_len in (None, 7):
        assert relative_error(logits_of(engine, prepared, prepared.position_T, chunk_len), theirs) < 1e-4


@pytest.mark.parametrize("stride", [64, 1])  # delta 1/4 and 1/256
def test_logits_are_the_same_at_fractional_positions(loaded: tuple[Kind, Engine], stride: int) -> None:
    kind, engine = loaded
    name = "two_images_two_turns"
    prepared = prepare(engine, name)
    position_T = v2pe_positions(prepared, stride)
    assert not np.array_equal(position_T, np.round(position_T))
    theirs = expected_logits(kind, name, prepared, position_T)
    assert relative_error(logits_of(engine, prepared, position_T), theirs) < 1e-4


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_greedy_tokens_are_the_same(loaded: tuple[Kind, Engine], name: str) -> None:
    kind, engine = loaded
    prepared = prepare(engine, name)
    (reply,) = engine.generate_prepared(iter([prepared]), [GREEDY])
    assert reply.token_ids == expected_tokens(kind, name, prepared.prompt.token_ids)
    assert len(reply.token_ids) == NUM_TOKENS


def test_greedy_tokens_are_the_same_in_a_batch_of_unequal_lengths(loaded: tuple[Kind, Engine]) -> None:
    kind, engine = loaded
    prepared = {name: prepare(engine, name) for name in CONVERSATIONS}
    assert len({len(each.prompt.token_ids) for each in prepared.values()}) == len(prepared)
    replies = engine.generate_prepared(iter(prepared.values()), [GREEDY] * len(prepared))
    for reply, (name, each) in zip(replies, prepared.items(), strict=True):
        assert reply.token_ids == expected_tokens(kind, name, each.prompt.token_ids)


def test_a_folder_with_its_own_template_is_prompted_as_by_transformers(tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    save_checkpoint(reference("qwen2"), folder, "hf_hub")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Ada.<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role ~ '\n' }}{% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        "{{ '<IMG_CONTEXT>\n' }}{% elif part.type == 'video' %}{{ '<video>\n' }}{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    hf: Any = transformers.Qwen2Tokenizer.from_pretrained(folder)
    question = {"role": "user", "content": "  What is the first step?\n"}
    empty, begun = {"role": "assistant", "content": ""}, {"role": "assistant", "content": "The first"}
    with Engine.from_pretrained(folder, device="cpu") as engine:
        for messages in ([question], [{"role": "system", "content": ""}, question], [question, empty, question]):
            theirs = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert list(engine.prepare(messages).prompt.token_ids) == theirs
        theirs = hf.apply_chat_template([question, begun], continue_final_message=True, return_dict=False)
        assert list(engine.prepare([question, begun]).prompt.token_ids) == theirs


def test_an_answer_ends_with_any_of_the_folders_end_tokens(tmp_path: Path) -> None:
    import transformers

    folder, name = tmp_path / "model", "two_images_two_turns"
    save_checkpoint(reference("qwen2"), folder, "hf_hub")
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine:
        whole = engine.generate_prepared(iter([prepare(engine, name)]), [GREEDY])[0].token_ids
    for ids in ([whole[9], whole[4]], whole[6]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        hf: Any = transformers.InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine:
            prepared = prepare(engine, name)
            prompt = torch.tensor([prepared.prompt.token_ids])
            media = CONVERSATIONS[name].media
            answer = hf.generate(
                prompt, attention_mask=torch.ones_like(prompt), **media, max_new_tokens=NUM_TOKENS, do_sample=False
            )
            params = [SamplingParams(max_tokens=NUM_TOKENS), GREEDY]
            ended, ignoring = engine.generate_prepared(iter([prepared] * 2), params)
        assert ended.token_ids == answer[0, prompt.shape[1] :].tolist()
        assert len(ended.token_ids) < NUM_TOKENS
        assert ended.finish_reason == "stop"
        assert ignoring.token_ids == whole


@pytest.mark.fast(*(f"{kind}-7" for kind in KINDS))
@pytest.mark.parametrize("max_tokens_per_step", [1, 7, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same_for_any_prefill_chunk(
    folders: dict[tuple[Kind, Layout], Path], kind: Kind, max_tokens_per_step: int
) -> None:
    with Engine.from_pretrained(
        folders[kind, "original"], device="cpu", max_tokens_per_step=max_tokens_per_step, block_size=16
    ) as engine:
        for name in CONVERSATIONS:
            prepared = prepare(engine, name)
            (reply,) = engine.generate_prepared(iter([prepared]), [GREEDY])
            assert reply.token_ids == expected_tokens(kind, name, prepared.prompt.token_ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_delta_one_gives_the_logits_of_integer_positions_bit_for_bit(loaded: tuple[Kind, Engine], name: str) -> None:
    _, engine = loaded
    prepared = prepare(engine, name)
    integers = np.arange(len(prepared.prompt.token_ids), dtype=np.float32)
    delta_1 = v2pe_positions(prepared, stride=256)
    assert torch.equal(logits_of(engine, prepared, delta_1), logits_of(engine, prepared, integers))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_models_shows_in_the_logits(folders: dict[tuple[Kind, Layout], Path], kind: Kind) -> None:
    """Otherwise a tensor that is loaded wrongly could hide from the tests above."""
    # The table of references leaves weights as they are, so that their rows can be changed.
    with Engine.from_pretrained(folders[kind, "original"], device="cpu", backend="torch") as engine:
        prepared = prepare(engine, "two_images_two_turns")
        untouched = logits_of(engine, prepared, prepared.position_T)
        for path, parameter in named_parameters(engine.model.weights).items():
            saved = parameter.clone()
            parameter.copy_(saved.flip(0).roll(1, -1))
            change = relative_error(logits_of(engine, prepared, prepared.position_T), untouched)
            parameter.copy_(saved)
            assert change > 1e-3, path
