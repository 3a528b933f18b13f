"""The model `internvl_rt` of lmms-eval (0.7): all requests of a task are one continuous batch of an engine.

    python -m lmms_eval --model internvl_rt --model_args pretrained=OpenGVLab/InternVL3-1B --tasks mmmu_val

lmms-eval gives a model its requests in one of two forms. `ChatModel` takes messages, in which a task may put its
pictures between its sentences; lmms-eval prefers it. `SimpleModel`, for `--force_simple`, takes a text with pictures
before it, and is the only one that gets tasks of multiple choice by likelihood.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from internvl_rt.critic.pairing import load_with_critic
from internvl_rt.engine.best_of import OFFICIAL
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.options import ENGINE_KINDS
from internvl_rt.errors import InternVLError, RequestError, quoted
from internvl_rt.harness.answers import AnswerFile, digest_of
from internvl_rt.inputs.sampling_params import MAX_ANSWERS, SamplingParams
from internvl_rt.values import Integer, OrNone, read

LOG = logging.getLogger("internvl_rt")

T = TypeVar("T")
Message = dict[str, Any]
BuildMessages = Callable[[], list[Message]]

# Sampling parameters by the names of lmms-eval, and of transformers, from which tasks have them.
NAMES = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
FILTERS = {"top_p": "top_p", "top_k": "top_k", "seed": "seed"}  # of draws alone


class ChatModel(lmms):  # type: ignore[misc]  # lmms-eval ships no types
    """A model that is asked in messages."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        *,
        resume: str | None = None,
        num_frames: int | None = None,
        best_of: int | None = None,
        critic: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        """Loads a model.

        pretrained: a folder, a hub id, or "tiny".
        resume: a file that answers are kept in as they finish; a later run with it asks for the missing ones alone.
        num_frames: how many frames are taken from a video; None is the engine's default.
        best_of, critic: each answer is the best of so many, as a VisualPRM (a folder or a hub id) scores them. Where a
            task asks for greedy answers, the first is greedy, and the others are drawn as in the official evaluation.
        batch_size, max_batch_size: lmms-eval always gives them; the engine's `max_num_seqs` has their meaning here.
        options: any of `internvl_rt.EngineOptions`, such as max_tiles.

        Raises RequestError for an unknown option or a wrong value, and what `Engine.from_pretrained` raises.
        """
        super().__init__()
        if not pretrained:
            raise RequestError("model_args: pretrained is missing; give a folder or a hub id: pretrained=MODEL")
        if unknown := [name for name in options if name not in ENGINE_KINDS]:
            raise RequestError(
                f"model_args: {quoted(unknown[0])} is no option; expected pretrained, resume, num_frames, best_of, "
                f"critic, or one of internvl_rt.EngineOptions: {', '.join(ENGINE_KINDS)}"
            )
        if (best_of is None) != (critic is None):
            raise RequestError("model_args: best_of and critic go together; give best_of=8,critic=MODEL, or neither")
        read("best_of", best_of, OrNone(Integer(1, MAX_ANSWERS)))
        read("num_frames", num_frames, OrNone(Integer(1)))
        self._file = AnswerFile(resume) if resume else None
        self._of_all = pretrained, options, best_of, critic  # all that every answer depends on
        self._of_video = {} if num_frames is None else {"num_frames": num_frames}
        self._best_of, self._critic = best_of or 1, None
        if critic is None:
            self.engine = Engine.from_pretrained(pretrained, **options)
        else:
            shared = ("device", "dtype", "max_tiles", "v2pe_delta")
            of_both = {name: value for name, value in options.items() if name in shared}
            self.engine, self._critic = load_with_critic(pretrained, critic, options=options, critic_options=of_both)
        self.device = self.engine.device

    def generate_until(self, requests: Items[Any]) -> list[str]:
        """Answers the requests of all tasks, in order. Raises what `Engine.generate` raises."""
        asked = [self._read(request.args) for request in requests]
        return self._answer([build for build, _ in asked], [sampling_params(kwargs) for _, kwargs in asked])

    def generate_until_multi_round(self, requests: Items[Any]) -> list[list[str]]:
        """Answers requests that go on for several rounds; returns each one's answers, a round after the other.

        After a round the task says, by the answers so far, what it asks next, or that it has ended. The requests that
        go on are one batch in each round.
        """
        if self.is_simple:
            raise RequestError("tasks of several rounds are asked in messages; leave --force_simple out")
        if self._critic is not None:
            raise RequestError(
                "a critic judges answers to one question, not those of several rounds; leave best_of out"
            )
        answers: list[list[str]] = [[] for _ in requests]
        ask_next = [request.args[1] for request in requests]
        infos: list[Any] = [None] * len(requests)
        asked = {index: self._read(request.args) for index, request in enumerate(requests)}
        while asked:
            builds, kwargs = zip(*asked.values(), strict=True)
            texts = self._answer(builds, [sampling_params(each) for each in kwargs])
            going_on: dict[int, tuple[BuildMessages, Mapping[str, Any]]] = {}
            for (index, (_, each)), text in zip(asked.items(), texts, strict=True):
                answers[index].append(text)
                following = ask_next[index](
                    self._document(*requests[index].args[3:]),
                    round_idx=len(answers[index]),
                    previous_output=list(answers[index]),
                    previous_round_info=infos[index],
                )
                if isinstance(following, tuple) and len(following) == 4 and not following[1]:
                    messages, infos[index] = following[0], following[3]
                    going_on[index] = partial(self._messages, messages), each
            asked = going_on
        return answers

    def loglikelihood(self, requests: Items[Any]) -> list[Any]:
        """Returns, for each request, how unlikely its continuation is, and whether greedy sampling would give it.

        As of all models of lmms-eval, the number is the mean loss of the continuation's tokens: its tasks take the
        choice with the least. Raises what `Engine.score` raises.
        """
        groups: dict[Any, list[int]] = {}  # of requests that have all but the continuation in common
        for index, (context, _, *place) in enumerate(request.args for request in requests):
            groups.setdefault((context, *place), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._progress(len(requests)) as progress:
            size = 4 * self.engine.options.max_num_seqs
            for first in range(0, len(groups), size):
                some = list(groups.items())[first : first + size]
                prompts = [self._visuals_and_text(*group) for group, _ in some]
                texts = [[self._continuation(*requests[index].args[1:]) for index in indices] for _, indices in some]
                scored = self.engine.score_batch(list(zip(prompts, texts, strict=True)), num_top=1)
                for (_, indices), scores in zip(some, scored, strict=True):
                    for index, score in zip(indices, scores, strict=True):
                        is_greedy = all(token.top[0][0] == token.token_id for token in score.tokens)
                        results[index] = -score.total / len(score.tokens), is_greedy
                        progress.update()
        # lmms-eval 0.7.3 makes a text of a pair of numbers, for which its tasks fail, but leaves what this class holds.
        return [GenerationResult(result) for result in results]

    def _answer(self, builds: Items[BuildMessages], params: Items[SamplingParams]) -> list[str]:
        """Answers prompts in one continuous batch; a prompt's messages are built when there is room for its request."""
        keys = self._keys(builds, params)
        known = self._file.answers if self._file else {}
        answers = {index: known[key] for index, key in enumerate(keys) if key in known}
        left = [index for index in range(len(builds)) if index not in answers]
        prompts = Lazy(lambda build: build(), [builds[index] for index in left])
        with self._progress(len(builds), len(answers)) as progress:
            for place, text in self._as_completed(prompts, [params[index] for index in left]):
                answers[left[place]] = text
                if self._file:
                    self._file.add(keys[left[place]], text)
                progress.update()
        return [answers[index] for index in range(len(builds))]

    def _as_completed(self, prompts: Items[list[Message]], params: Items[SamplingParams]) -> Iterator[tuple[int, str]]:
        """Yields the text of each answer as soon as it is there, with the index of its prompt."""
        if self._critic is None:
            for place, reply in self.engine.generate_as_completed(prompts, params):
                yield place, reply.text
            return
        with ThreadPoolExecutor(max(1, self.engine.options.max_num_seqs // self._best_of)) as threads:
            asked = {threads.submit(self._best, prompts, params, place): place for place in range(len(prompts))}
            try:
                for answer in as_completed(asked):
                    yield asked[answer], answer.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _best(self, prompts: Items[list[Message]], params: Items[SamplingParams], place: int) -> str:
        """Returns the best of several answers to a prompt, or a single one where the critic takes none of them."""
        assert self._critic is not None
        given, is_greedy = params[place], params[place].temperature == 0
        if is_greedy:
            given = replace(given, temperature=OFFICIAL.temperature, top_p=OFFICIAL.top_p)
        messages = prompts[place]
        try:
            return self.engine.best_of(
                messages, self._best_of, critic=self._critic, params=given, greedy_first=is_greedy
            ).text
        except InternVLError as error:  # one question of many must not end the run
            LOG.warning("no answer to question %d could be scored: %s", place, error)
            return self.engine.chat(messages, params[place]).text  # raises what is wrong with the question itself

    def _progress(self, num_requests: int, num_known: int = 0) -> tqdm:
        """Shows a bar in the process that lmms-eval reports from."""
        return tqdm(total=num_requests, initial=num_known, desc="internvl_rt", unit="request", disable=self.rank != 0)

    def _keys(self, builds: Items[BuildMessages], params: Items[SamplingParams]) -> list[str]:
        """Returns what answers are kept under, if they are. Equal requests, for several draws, have different keys."""
        if self._file is None:
            return []
        seen: Counter[str] = Counter()
        keys = []
        for build, each in zip(builds, params, strict=True):
            key = digest_of(self._of_all, build(), repr(each))
            seen[key] += 1
            keys.append(f"{key}-{seen[key]}")
        return keys

    def _read(self, args: tuple[Any, ...]) -> tuple[BuildMessages, Mapping[str, Any]]:
        """Reads a request: how its messages are built, and its parameters in lmms-eval's terms."""
        if self.is_simple:
            context, kwargs, *visuals = args
            return lambda: self._visuals_and_text(context, *visuals), kwargs
        _, to_messages, kwargs, *place = args
        return lambda: self._messages(to_messages(self._document(*place))), kwargs

    def _visuals_and_text(self, context: str, to_visuals: Any = None, *place: Any) -> list[Message]:
        """Builds the message of a request in the simple form: pictures and videos in their order, then the text."""
        visuals = (to_visuals(self._document(*place)) if to_visuals else None) or []
        content = [self._part({"type": _kind_of(visual), "url": visual}) for visual in visuals]
        return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]

    def _messages(self, messages: Items[Message]) -> list[Message]:
        """Writes the messages of a task as the engine takes them."""
        return [
            {**message, "content": content if isinstance(content, str) else [self._part(part) for part in content]}
            for message in messages
            for content in [message["content"]]
        ]

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind == "text":
            return {"type": "text", "text": part["text"]}
        if kind == "image":
            return {"type": "image", "image": part["url"]}
        if kind != "video":
            raise RequestError(f"a task asks about {quoted(kind)}; expected text, image or video; leave that task out")
        video, bound = part["url"], [part.get("start_time"), part.get("end_time")]
        if isinstance(video, Mapping):  # as tasks give a part of a video
            bound = [video.get("video_start"), video.get("video_end")]
            video = video.get("url") or video.get("path") or video.get("video")
        taken: dict[str, Any] = {"type": "video", "video": video, **self._of_video}
        return taken if None in bound else {**taken, "bound": bound}

    def _continuation(self, target: Any, _: Any = None, *place: Any) -> str:
        return str(target(self._document(*place)) if callable(target) else target)

    def _document(self, document_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][document_id]


class SimpleModel(ChatModel):
    """A model that is asked in texts, each with the pictures and videos that stand before it."""

    is_simple = True


class Lazy(Items[T]):
    """A sequence whose items are made when they are asked for, since the pictures of a task may not fit in memory."""

    def __init__(self, make: Callable[[Any], T], sources: Items[Any]) -> None:
        self._make, self._sources = make, sources

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, place: Any) -> Any:
        found = self._sources[place]
        return Lazy(self._make, found) if isinstance(place, slice) else self._make(found)


def sampling_params(kwargs: Mapping[str, Any]) -> SamplingParams:
    """Reads the parameters of a task. Those that say nothing about the answer, such as image_aspect_ratio, are ignored.

    An answer is drawn if do_sample says so, or says nothing and there is a temperature; else it is greedy. Raises
    RequestError for a wrong value, or for a search with beams, which the engine does not have.
    """
    temperature, draws = kwargs.get("temperature"), kwargs.get("do_sample")
    if (kwargs.get("num_beams") or 1) != 1:
        raise RequestError(f"num_beams must be 1, got {quoted(kwargs['num_beams'])}; pass --gen_kwargs num_beams=1")
    if draws is False or not (draws or temperature):
        temperature = 0.0
    given: dict[str, Any] = {"temperature": 1.0 if temperature is None else temperature}
    names = NAMES | (FILTERS if given["temperature"] else {})  # a greedy task may name a top_p of 0
    given |= {ours: kwargs[theirs] for theirs, ours in names.items() if kwargs.get(theirs) is not None}
    until = kwargs.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return SamplingParams(stop=stop, **given)


def _kind_of(visual: Any) -> str:
    """Says what one of a task's `visuals` is: a text is the path of a video, unless it names a picture."""
    if isinstance(visual, Mapping):
        return str(visual.get("type", "video"))
    pictures = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
    return "video" if isinstance(visual, str) and not visual.lower().endswith(pictures) else "image"
