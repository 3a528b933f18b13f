"""The model's own prompts, with their pictures, as hidden states that go through the decoder layer by layer."""

import hashlib
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import InternVLError, RequestError
from internvl_rt.inputs.prepare import Prepared, Preparer
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.model.decoder import DecoderLayer, build_rotary, run_layers
from internvl_rt.model.internvl import InternVL
from internvl_rt.model.ops import TORCH, Ops
from internvl_rt.model.step_inputs import Batch, LayerCache, StepInputs
from internvl_rt.quantize.questions import Question
from internvl_rt.quantize.source import DenseSource

MAX_TOKENS = 1 << 17  # of all prompts together: 2 GiB of hidden states of an 8B
ROWS_PER_KIND = 512  # of text tokens, and of visual ones, that the search looks at
_TILES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class CalibrationPrompt:
    """A prompt, and perhaps its answer: ids and positions of its tokens, tiles of its pictures, and their places."""

    token_ids: tuple[int, ...]
    position_T: np.ndarray  # float32
    is_visual_T: np.ndarray  # bool
    tiles: tuple[np.ndarray, ...]  # uint8 [I, S, S, 3] of each picture

    def __len__(self) -> int:
        return len(self.token_ids)


def prepare_prompts(source: DenseSource, questions: Items[Question]) -> list[CalibrationPrompt]:
    """Renders questions as the engine does, and decodes all pictures. Raises MediaError or RequestError."""
    if not questions:
        return []
    config, options = source.config, EngineOptions()
    preparer = Preparer(
        config,
        load_tokenizer(source.folder),
        config.decoder.max_position,
        dtype=torch.float32,
        images=options.images(config),
        number_images=options.numbers_images(config),
        videos=options.videos,
        v2pe_delta=options.v2pe_delta,
        identity=None,
    )
    prompts, num_tokens = [], 0
    for question in questions:
        try:
            prepared = preparer.prepare(question.messages())
            if question.answer:
                prepared = preparer.prepare_score(prepared, question.answer, include_end=True)
        except InternVLError as error:
            raise type(error)(f"calibration: {question.where}: {error}") from error
        num_tokens += len(prepared.prompt.token_ids)
        if num_tokens > MAX_TOKENS:
            raise RequestError(
                f"calibration: the prompts have more than {MAX_TOKENS:,} tokens together; leave some of the "
                f"{len(questions):,} questions out"
            )
        prompts.append(_prompt_of(prepared))
    return prompts


def _prompt_of(prepared: Prepared) -> CalibrationPrompt:
    is_visual_T = np.zeros(len(prepared.prompt.token_ids), np.bool_)
    tiles = []
    for picture in prepared.pictures:
        is_visual_T[picture.span.start : picture.span.start + picture.span.num_tokens] = True
        tiles.append(picture.image.tiles() if picture.image is not None else picture.tiles.numpy())  # type: ignore[union-attr]
    return CalibrationPrompt(prepared.prompt.token_ids, prepared.position_T, is_visual_T, tuple(tiles))


def digest_of(prompts: Items[CalibrationPrompt]) -> str:
    """Returns a text that changes if any prompt or picture does."""
    digest = hashlib.blake2b(digest_size=10)
    for prompt in prompts:
        digest.update(np.array(prompt.token_ids).tobytes() + prompt.position_T.tobytes())
        for tiles in prompt.tiles:
            digest.update(tiles.tobytes())
    return digest.hexdigest()


def chosen_rows(prompts: Items[CalibrationPrompt]) -> tuple[list[np.ndarray], np.ndarray]:
    """Chooses tokens for the search, evenly among those of text and among the visual ones.

    Returns their indices in each prompt, and whether each is visual, in the order of the prompts.
    """
    is_visual = np.concatenate([np.zeros(0, np.bool_), *(prompt.is_visual_T for prompt in prompts)])
    chosen = np.zeros(len(is_visual), np.bool_)
    for kind in (is_visual, ~is_visual):
        of_kind = np.flatnonzero(kind)
        places = np.linspace(0, len(of_kind) - 1, min(len(of_kind), ROWS_PER_KIND))
        chosen[of_kind[places.round().astype(np.int64)]] = True
    ends = np.cumsum([len(prompt) for prompt in prompts])[:-1]
    return [np.flatnonzero(part) for part in np.split(chosen, ends)], is_visual[chosen]


@torch.inference_mode()
def embed_prompts(source: DenseSource, prompts: Items[CalibrationPrompt], device: torch.device) -> list[Tensor]:
    """Returns what enters the first decoder layer, float32 [T, D] of each prompt, through the dense vision tower."""
    weights = source.read("vision.", "projector.", device=device)
    model = InternVL(source.config, weights, TORCH)
    visual = []
    for prompt in prompts:
        parts = [part for tiles in prompt.tiles for part in torch.split(torch.from_numpy(tiles), _TILES_AT_ONCE)]
        visual.append([model.encode_tiles(part.to(device)).flatten(0, 1) for part in parts])
    del model, weights
    embedding_VD = source.read("decoder.embedding_VD", device=device).decoder.embedding_VD
    states = []
    for prompt, parts in zip(prompts, visual, strict=True):
        x_TD = embedding_VD[torch.tensor(prompt.token_ids, device=device)]
        if parts:
            x_TD[torch.from_numpy(prompt.is_visual_T).to(device)] = torch.cat(parts)
        states.append(x_TD)
    return states


class LayerRunner:
    """Runs one decoder layer on all prompts, each in a cache of its own that has one block."""

    def __init__(self, source: DenseSource, prompts: Items[CalibrationPrompt], device: torch.device) -> None:
        self._source, self._prompts, self._device = source, prompts, device
        self._rotary = build_rotary(source.config.decoder, device)
        self._decoder = source.shapes().decoder

    @torch.inference_mode()
    def run(self, layer: DecoderLayer, states: Items[Tensor], ops: Ops = TORCH) -> list[Tensor]:
        """Returns x_TD of each prompt behind a layer, whose given ones do not change."""
        decoder, c = replace(self._decoder, layers=(layer,)), self._source.config.decoder
        out = []
        for prompt, x_TD in zip(self._prompts, states, strict=True):
            shape = 1, c.num_kv_heads, len(prompt), c.head_dim
            k_cache, v_cache = (torch.zeros(shape, dtype=x_TD.dtype, device=self._device) for _ in range(2))
            step = self._step(prompt)
            out.append(run_layers(ops, decoder, self._rotary, (LayerCache(k_cache, v_cache),), step, x_TD.clone()))
        return out

    def _step(self, prompt: CalibrationPrompt) -> StepInputs:
        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._device)

        n = len(prompt)
        slots = torch.arange(n, dtype=torch.int32, device=self._device)
        batch = Batch(integers([n]), integers([0])[None], integers([0, n]), num_decodes=0, max_query_len=n)
        position_T = torch.from_numpy(prompt.position_T).to(self._device)
        return StepInputs(slots, torch.zeros(1, dtype=torch.int64, device=self._device), position_T, slots, batch)
