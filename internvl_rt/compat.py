"""The official interface: a model card's quick start runs with its import lines changed (README.md says what does not).

Semantics are those of InternVLChatModel (InternVL, modeling_internvl_chat.py), with three deliberate differences: no
code of the checkpoint runs, arguments that cannot be honoured raise instead of being ignored, and neither the caller's
generation_config nor the caller's history list is written to.
"""

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import fields, replace
from itertools import accumulate, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from internvl_rt.checkpoint.find import find_config_file, resolve_model
from internvl_rt.checkpoint.json_section import read_json
from internvl_rt.checkpoint.template import TEMPLATES, spelt
from internvl_rt.critic.official import RewardMethods
from internvl_rt.engine.engine import Engine
from internvl_rt.errors import RequestError, check_list, quoted
from internvl_rt.inputs.image import ImageSource, open_image
from internvl_rt.inputs.picture import count_tiles
from internvl_rt.inputs.prepare import Conversation, Prepared
from internvl_rt.inputs.prompt import Turn, tiles_per_image, turns_from_question
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.tokenizer import Tokenizer
from internvl_rt.inputs.tokenizer import load_tokenizer as read_tokenizer
from internvl_rt.inputs.video import LIMIT_KINDS, VideoLimits
from internvl_rt.inputs.video import load_video as read_video
from internvl_rt.model.ops import normalise_tiles
from internvl_rt.values import Flag, read

History = list[tuple[str, str]]

# Arguments of the official calls that are accepted and need no action in this runtime.
_NO_EFFECT = frozenset({"trust_remote_code", "low_cpu_mem_usage", "use_flash_attn", "use_fast", "attn_implementation"})
_QUANTISED = ("load_in_8bit", "load_in_4bit")  # accepted as long as they ask for nothing


class Streamer(Protocol):
    """Takes token ids as they come, as transformers' `TextIteratorStreamer` does."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def load_image(image_file: ImageSource, input_size: int = 448, max_num: int = 12, **options: Any) -> Tensor:
    """Returns normalised tiles, float32 [I, 3, input_size, input_size], thumbnail last, as in the model card.

    options: an engine's options of pictures, such as `max_pixels`. Raises RequestError or MediaError.
    """
    try:
        chosen = ImageOptions(image_size=input_size, max_tiles=max_num, **options)
    except RequestError as error:
        raise _renamed(error, {"image_size": "input_size", "max_tiles": "max_num"}) from None
    return normalise_tiles(torch.from_numpy(open_image(image_file, chosen).tiles()))


def load_video(
    video_path: str | Path | bytes,
    bound: tuple[float, float] | None = None,
    input_size: int = 448,
    max_num: int = 1,
    num_segments: int = 32,
    **options: Any,
) -> tuple[Tensor, list[int]]:
    """Returns normalised tiles of `num_segments` frames, and each frame's number of tiles, as in the model card.

    options: an engine's options of videos and pictures, such as `max_video_frames`. Raises RequestError or MediaError.
    """
    limits = VideoLimits(**{name: options.pop(name) for name in LIMIT_KINDS.keys() & options.keys()})
    tiles = read_video(
        video_path,
        make=lambda frame: load_image(frame, input_size, max_num, **options),
        num_segments=num_segments,
        bound=bound,
        limits=limits,
    )
    return torch.cat(tiles), [len(frame) for frame in tiles]


class AutoConfig:
    @staticmethod
    def from_pretrained(model: str | Path, *, revision: str | None = None, **official: Any) -> SimpleNamespace:
        """Returns config.json as attributes, such as `.llm_config.num_hidden_layers`. Downloads no weights."""
        _check_arguments("AutoConfig.from_pretrained", model, revision, official)
        values = read_json(find_config_file(model, revision=revision)).values
        config: SimpleNamespace = json.loads(json.dumps(values), object_hook=lambda keys: SimpleNamespace(**keys))
        return config


class ChatTokenizer(Tokenizer):
    """A tokenizer that also takes an argument by its official name, as transformers' streamers give it."""

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True, skip_special_tokens: bool | None = None) -> str:
        skips = skip_specials if skip_special_tokens is None else skip_special_tokens
        return Tokenizer.decode(self, ids, skip_specials=skips)


class AutoTokenizer:
    @staticmethod
    def from_pretrained(model: str | Path, *, revision: str | None = None, **official: Any) -> ChatTokenizer:
        _check_arguments("AutoTokenizer.from_pretrained", model, revision, official)
        plain = read_tokenizer(resolve_model(model, revision=revision))
        return ChatTokenizer(**{field.name: getattr(plain, field.name) for field in fields(plain) if field.init})


class AutoModel:
    @staticmethod
    def from_pretrained(
        model: str | Path,
        *,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        device_map: object = None,
        revision: str | None = None,
        **official: Any,
    ) -> "ChatModel":
        """Loads a checkpoint, onto the GPU if there is one.

        torch_dtype, dtype: two names for the `dtype` of `Engine`; None is "auto".
        device: that of `Engine`.
        device_map: the same in transformers' forms, such as "auto", 0, "cuda:1" or {"": 0}. If the entries of a map
            name several GPUs in a row, as the cards' `split_model` does, every layer is split among all of them
            (`tensor_parallel_size`), whichever the map says.
        """
        _check_arguments("AutoModel.from_pretrained", model, revision, official)
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise RequestError(f"torch_dtype is {quoted(torch_dtype)} but dtype is {quoted(dtype)}; give one of them")
        if device_map is not None and device != "auto":
            raise RequestError(f"device is {quoted(device)} but device_map was given too; give one of them")
        chosen = dtype if torch_dtype is None else torch_dtype
        first, number = (device, 1) if device_map is None else _devices_of(device_map)
        return ChatModel(
            Engine.from_pretrained(
                model,
                dtype="auto" if chosen is None else chosen,
                device=first,
                tensor_parallel_size=number,
                revision=revision,
            )
        )


class ChatModel(RewardMethods):
    """Gives an engine the official method names. `system_message` may be set, as the model cards do."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._template = engine, TEMPLATES[engine.config.template]
        self.conv_template = SimpleNamespace(  # the cards' streaming code reads `sep`
            name=self._template.name, sep=spelt(self._template.ends), sep2=spelt(self._template.ends_last)
        )
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

        A `streamer` in generation_config gets the answer's ids, one at a time, and is told the end in any case. Raises
        RequestError where the official code asserts: tile counts that do not add up, pictures without a place.
        """
        streamer = _find_streamer(generation_config)
        try:
            params = self._params(generation_config)
            read("return_history", return_history, Flag())
            read("verbose", verbose, Flag())
            tiles = self._split(pixel_values, num_patches_list)
            turns, asked = self._turns(question, _check_history(history), len(tiles))
            prepared = self.engine.prepare_turns(turns, tiles)
            response = self._answer(prepared, params, streamer)
        finally:  # whoever reads the streamer would wait for ever
            if streamer is not None:
                streamer.end()
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
        check_list("questions", questions, "texts")
        params = self._params(generation_config)
        if _find_streamer(generation_config) is not None:
            raise RequestError("generation_config: a streamer takes one answer; use chat, or leave it out")
        tiles = self._split(pixel_values, num_patches_list)
        if pixel_values is not None and len(tiles) != len(questions):
            raise RequestError(
                f"num_patches_list must have one entry for each of {len(questions)} questions, got {len(tiles)}"
            )
        prepared = []
        for index, question in enumerate(questions):
            own = tiles[index : index + 1]
            turns, _ = self._turns(question, None, len(own))
            prepared.append(self.engine.prepare_turns(turns, own))
        return [reply.text for reply in self.engine.generate_prepared(iter(prepared), [params] * len(prepared))]

    def conversation(
        self, question: str, pixel_values: Tensor | None, num_patches_list: list[int] | None
    ) -> Conversation:
        tiles = self._split(pixel_values, num_patches_list)
        turns, _ = self._turns(question, None, len(tiles))
        return self.engine.preparer.read_turns(turns, tiles)

    def _params(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Reads a generation_config. The official text of an answer in channels has their headers in it."""
        params = _read_generation_config(generation_config)
        if self._template.channels is not None and generation_config.get("skip_special_tokens") is None:
            return replace(params, skip_special_tokens=False)
        return params

    def _turns(self, question: str, history: History | None, num_images: int) -> tuple[tuple[Turn, ...], str]:
        _check_text("question", question)
        if self.system_message is not None:
            _check_text("system_message", self.system_message)
        return turns_from_question(question, history, num_images=num_images, system=self.system_message)

    def _split(self, pixel_values: Tensor | None, num_patches_list: list[int] | None) -> list[Tensor]:
        """Returns the tiles of each picture."""
        counts = num_patches_list
        if counts is not None:
            check_list("num_patches_list", counts, "numbers of tiles")
            least = 0 if pixel_values is None else 1  # of questions about no picture, as the official code counts them
            wrong = [n for n in counts if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < least]
            if wrong:
                raise RequestError(f"num_patches_list: expected integers of at least {least}, got {quoted(wrong[0])}")
        if pixel_values is None:
            if counts and any(counts):
                raise RequestError(f"num_patches_list: {quoted(counts)} tiles, but no pixel_values; give both or none")
            return []
        counts = tiles_per_image(count_tiles(pixel_values, self.engine.config), counts)
        return [pixel_values[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]

    def _answer(self, prepared: Prepared, params: SamplingParams, streamer: Streamer | None) -> str:
        if streamer is None:
            return self.engine.generate_prepared(iter([prepared]), [params])[0].text
        request, num_put = self.engine.new_request(prepared, params), 0
        try:
            self.engine.loop.submit(request)
            streamer.put(torch.empty(1, 0, dtype=torch.int64))  # the prompt, which the official code gives no ids of
            while request.reply is None:
                self.engine.loop.advance(request)
                token_ids = request.answers[0].sequence.generated_ids
                for token_id in token_ids[num_put:]:
                    streamer.put(torch.tensor([token_id]))
                num_put = len(token_ids)
        finally:
            self.engine.loop.cancel(request)
        return request.reply.text


def _check_arguments(call: str, model: object, revision: object, official: Mapping[str, Any]) -> None:
    if not isinstance(model, str | Path):
        raise RequestError(f"{call}: expected a folder or a hub id, got {quoted(model)}")
    if not isinstance(revision, str | None):
        raise RequestError(f"{call}: revision must be a text or None, got {quoted(revision)}")
    for name in _QUANTISED:
        if official.get(name):
            raise RequestError(
                f"{call}: {name} is not supported; leave it out, or load the model by "
                "Engine.from_pretrained(..., quantization='int8')"
            )
    unknown = sorted(official.keys() - _NO_EFFECT - set(_QUANTISED))
    if unknown:
        raise RequestError(
            f"{call} does not take {', '.join(unknown)}; without effect are {', '.join(sorted(_NO_EFFECT))}"
        )


def _devices_of(device_map: object) -> tuple[str, int]:
    """Returns the first device of a `device_map`, as `Engine` takes it, and how many there are in a row."""
    names = set()
    for place in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
        if isinstance(place, bool) or not isinstance(place, int | str | torch.device):
            raise RequestError(f"device_map: expected a device or a map to devices, got {quoted(place)}; try 'auto'")
        name = f"cuda:{place}" if isinstance(place, int) else str(place)
        name = "auto" if name in ("balanced", "balanced_low_0", "sequential") else name
        names.add("cuda:0" if name == "cuda" else name)
    if len(names) == 1:
        return names.pop(), 1
    numbers = sorted(int(name.removeprefix("cuda:")) for name in names if name.removeprefix("cuda:").isdecimal())
    if not names or len(numbers) < len(names) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise RequestError(
            f"device_map: expected one device, or GPUs in a row, got {quoted(sorted(names))}; leave device_map out, or "
            "give {'': 0}"
        )
    return f"cuda:{numbers[0]}", len(numbers)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name}: expected a text, got {quoted(value)}")


def _check_history(history: History | None) -> History | None:
    if history is not None:
        check_list("history", history, "pairs (question, answer)")
        for pair in history:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise RequestError(f"history: expected pairs (question, answer) of texts, got {quoted(pair)}")
    return history


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """Returns an error that calls our arguments by the caller's names."""
    return RequestError(re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error)))


def _find_streamer(generation_config: Mapping[str, Any]) -> Streamer | None:
    if not isinstance(generation_config, Mapping):
        raise RequestError(f"generation_config: expected a dict, got {quoted(generation_config)}; give at least dict()")
    streamer: Streamer | None = generation_config.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, method, None)) for method in ("put", "end")):
        raise RequestError(f"generation_config: streamer must have the methods put and end, got {quoted(streamer)}")
    return streamer


def _read_generation_config(generation_config: Mapping[str, Any]) -> SamplingParams:
    """Maps transformers' names and defaults: sampling draws from the 50 best tokens unless top_k is given."""
    given = {name: value for name, value in generation_config.items() if value is not None}  # None: the default
    given.pop("streamer", None)
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    names |= {name: name for name in ("repetition_penalty", "skip_special_tokens")}
    params = {ours: given.pop(theirs) for ours, theirs in names.items() if theirs in given}
    sampling = {name: given.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in given}
    if read("generation_config: do_sample", given.pop("do_sample", False), Flag()):
        params |= {"temperature": 1.0, "top_k": 50} | sampling
    elif not all(map(_is_number, sampling.values())):
        raise RequestError(f"generation_config: expected numbers, got {quoted(sampling)}")
    for only_one in ("num_beams", "num_return_sequences"):
        if not _is_number(value := given.pop(only_one, 1)) or value != 1:
            raise RequestError(
                f"generation_config: {only_one} must be 1, got {quoted(value)}; beam search is not supported"
            )
    for no_effect in ("pad_token_id", "eos_token_id", "use_cache"):  # answers end at the template's token
        given.pop(no_effect, None)
    if given:
        unknown = ", ".join(sorted(quoted(name).strip("'") for name in islice(given, 12)))
        raise RequestError(f"generation_config: {unknown} not supported; leave it out")
    try:
        return SamplingParams(**params)
    except RequestError as error:
        raise _renamed(RequestError(f"generation_config: {error}"), names) from None
