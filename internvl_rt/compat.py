"""The official interface: a model card's quick start runs with its import lines changed (README.md says what does not).

Semantics are those of InternVLChatModel (InternVL, modeling_internvl_chat.py), with three deliberate differences: no
code of the checkpoint runs, arguments that cannot be honoured raise instead of being ignored, and neither the caller's
generation_config nor the caller's history list is written to.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt.checkpoint.find import resolve_model
from internvl_rt.engine.engine import Engine
from internvl_rt.errors import RequestError
from internvl_rt.inputs.image import ImageSource, open_image
from internvl_rt.inputs.prompt import tiles_per_image, turns_from_question
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.inputs.tokenizer import load_tokenizer as read_tokenizer
from internvl_rt.inputs.video import load_video as read_video
from internvl_rt.model.ops import normalise_tiles

History = list[tuple[str, str]]

# Arguments of the official calls that are accepted and need no action in this runtime.
_NO_EFFECT = frozenset({"trust_remote_code", "low_cpu_mem_usage", "use_flash_attn", "use_fast"})


def load_image(image_file: ImageSource, input_size: int = 448, max_num: int = 12) -> Tensor:
    """Returns normalised tiles, float32 [I, 3, input_size, input_size], thumbnail last, as in the model card."""
    options = ImageOptions(image_size=input_size, max_tiles=max_num)
    return normalise_tiles(torch.from_numpy(open_image(image_file, options).tiles()))


def load_video(
    video_path: str | Path | bytes,
    bound: tuple[float, float] | None = None,
    input_size: int = 448,
    max_num: int = 1,
    num_segments: int = 32,
) -> tuple[Tensor, list[int]]:
    """Returns normalised tiles of `num_segments` frames, and each frame's number of tiles, as in the model card."""
    frames = read_video(video_path, num_segments=num_segments, bound=bound)
    tiles = [load_image(frame, input_size, max_num) for frame in frames]
    return torch.cat(tiles), [len(frame) for frame in tiles]


class AutoTokenizer:
    @staticmethod
    def from_pretrained(model: str | Path, *, revision: str | None = None, **official: Any) -> Tokenizer:
        _check_arguments("AutoTokenizer.from_pretrained", official)
        return read_tokenizer(resolve_model(model, revision=revision))


class AutoModel:
    @staticmethod
    def from_pretrained(
        model: str | Path,
        *,
        torch_dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        **official: Any,
    ) -> "ChatModel":
        """Loads a checkpoint, onto the GPU if there is one; `torch_dtype` and `device` are those of `Engine`."""
        _check_arguments("AutoModel.from_pretrained", official)
        return ChatModel(Engine.from_pretrained(model, dtype=torch_dtype, device=device, revision=revision))


class ChatModel:
    """Gives an engine the official method names. `system_message` may be set, as the model cards do."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.system_message = engine.config.system_message

    def eval(self) -> "ChatModel":
        return self

    def cuda(self) -> "ChatModel":
        if self.engine.device.type != "cuda":
            raise RequestError("the model is on the CPU and torch sees no CUDA device; leave out .cuda()")
        return self

    def chat(
        self,
        tokenizer: Tokenizer,
        pixel_values: Tensor | None,
        question: str,
        generation_config: Mapping[str, Any],
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        verbose: bool = False,
    ) -> str | tuple[str, History]:
        """Answers a question. `pixel_values` holds the tiles of every picture in the conversation, in order.

        Raises RequestError where the official code asserts: tile counts that do not add up, pictures without a place.
        """
        tiles = _split(pixel_values, num_patches_list)
        turns, asked = turns_from_question(question, history, num_images=len(tiles), system=self.system_message)
        prepared = self.engine.prepare_turns(turns, tiles)
        response = self.engine.generate_prepared(iter([prepared]), [_sampling_params(generation_config)])[0].text
        if verbose:
            print(prepared.prompt.text, response, sep="")
        return (response, [*(history or []), (asked, response)]) if return_history else response

    def batch_chat(
        self,
        tokenizer: Tokenizer,
        pixel_values: Tensor | None,
        questions: Items[str],
        generation_config: Mapping[str, Any],
        num_patches_list: list[int] | None = None,
    ) -> list[str]:
        """Answers independent questions, each about its own picture of `num_patches_list[i]` tiles."""
        tiles = _split(pixel_values, num_patches_list)
        if pixel_values is not None and len(tiles) != len(questions):
            raise RequestError(
                f"num_patches_list must have one entry for each of {len(questions)} questions, got {len(tiles)}"
            )
        prepared = []
        for index, question in enumerate(questions):
            own = tiles[index : index + 1]
            turns, _ = turns_from_question(question, None, num_images=len(own), system=self.system_message)
            prepared.append(self.engine.prepare_turns(turns, own))
        params = _sampling_params(generation_config)
        return [reply.text for reply in self.engine.generate_prepared(iter(prepared), [params] * len(prepared))]


def _check_arguments(call: str, official: Mapping[str, Any]) -> None:
    unknown = sorted(official.keys() - _NO_EFFECT)
    if unknown:
        raise RequestError(
            f"{call} does not take {', '.join(unknown)}; without effect are {', '.join(sorted(_NO_EFFECT))}"
        )


def _split(pixel_values: Tensor | None, num_patches_list: list[int] | None) -> list[Tensor]:
    if pixel_values is None:
        return []
    return list(torch.split(pixel_values, tiles_per_image(len(pixel_values), num_patches_list)))


def _sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Maps transformers' names and defaults: sampling draws from the 50 best tokens unless top_k is given."""
    given = dict(generation_config)
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    names |= {name: name for name in ("repetition_penalty", "skip_special_tokens")}
    params = {ours: given.pop(theirs) for theirs, ours in names.items() if given.get(theirs) is not None}
    sampling = {name: given.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in given}
    if given.pop("do_sample", False):
        params |= {"temperature": 1.0, "top_k": 50} | {k: v for k, v in sampling.items() if v is not None}
    for name in ("num_beams", "num_return_sequences"):
        if given.pop(name, 1) != 1:
            raise RequestError(f"generation_config: {name} must be 1; beam search is not supported")
    for name in ("pad_token_id", "eos_token_id", "use_cache"):  # of no effect: answers end at <|im_end|>
        given.pop(name, None)
    if given:
        raise RequestError(f"generation_config: {', '.join(sorted(given))} not supported")
    return SamplingParams(**params)
