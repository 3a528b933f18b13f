"""Computes, for a request that has just arrived, the digests that the caches of its replicas know its prompt by.

The prompt is prepared as in a replica, by the same code, but pictures are hashed and not decoded, and there is no
model. What cannot be prepared here, because it is wrong, has a video or names a picture elsewhere, has no digests: a
replica finds that out again, and says it to the client.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from internvl_rt.checkpoint.config import load_config
from internvl_rt.checkpoint.find import is_random, resolve_without_weights
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.options import EngineOptions
from internvl_rt.errors import InternVLError, RequestError
from internvl_rt.inputs.prepare import Preparer, PromptSource
from internvl_rt.inputs.raw_prompt import RawPrompt
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.server.ask import Asking
from internvl_rt.server.body import Body, parse
from internvl_rt.server.completions import prompts_of
from internvl_rt.server.decisions import conversation_of
from internvl_rt.server.fault import ApiError
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import ChatRequest, CompletionRequest, DecisionsRequest, ResponsesRequest
from internvl_rt.server.remote import Fetcher
from internvl_rt.server.responses import ask_of
from internvl_rt.steps.kv_cache import PrefixDigests

MAX_WAITING = 32  # prompts that may be prepared or wait for it; further ones are routed without
NUM_THREADS = 2

Salt = Callable[[str | None], str | None]  # what a request asks for -> what separates it from others


def key_id(hash_key: bytes) -> str:
    """Returns a name for a key, from which it cannot be told. During an update there are replicas of two keys."""
    return hashlib.sha256(b"key" + hash_key).hexdigest()[:16]


def facts_of(engine: Engine, hash_key: bytes) -> dict[str, Any]:
    """Returns what `PromptKeys` must know of the engines, which all replicas of one key have in common."""
    return {
        "key_id": key_id(hash_key),
        "max_model_len": engine.max_model_len,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "block_size": engine.cache.block_size,
        "identity": engine.preparer.identity,
        "made_for": engine.preparer.made_for,
    }


class PromptKeys:
    """Computes digests for the prompts of one model."""

    def __init__(
        self, model: str, engine: EngineOptions, server: ServerOptions, facts: Mapping[str, Any], hash_key: bytes
    ) -> None:
        """Reads the model's configuration and tokenizer. Raises CheckpointError, ConfigError or RequestError."""
        if is_random(model):
            raise RequestError(f"{model} has weights, and so a tokenizer, of each engine's own; give a checkpoint")
        folder = resolve_without_weights(model, revision=engine.revision)
        config = load_config(folder)
        self._preparer = Preparer(
            config,
            load_tokenizer(folder),
            facts["max_model_len"],
            dtype=getattr(torch, facts["dtype"]),
            images=engine.images(config),
            number_images=engine.numbers_images(config),
            videos=engine.videos,
            v2pe_delta=engine.v2pe_delta,
            identity=facts["identity"],
        )
        if self._preparer.made_for != facts["made_for"]:
            raise RequestError("the ingress and a replica have different versions of the model; update both")
        self._digests = PrefixDigests(facts["block_size"], hash_key)
        self._max_prompts = server.max_prompts
        nothing_remote = Fetcher((), server.max_remote_bytes, server.remote_timeout_s)
        self._asking = Asking(server, config, nothing_remote, facts["max_model_len"])
        self._pool = ThreadPoolExecutor(NUM_THREADS, "internvl_rt digests")
        self._num_waiting = 0

    async def digests(self, path: str, body: Body, salt: Salt) -> list[bytes]:
        """Returns the digests of the prompt's whole blocks, in order; none if it cannot be prepared here."""
        if self._num_waiting >= MAX_WAITING:
            return []
        self._num_waiting += 1
        try:
            found = await self._read(path, body, salt)
            if found is None:
                return []
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._compute, *found)
        except (ApiError, InternVLError):
            return []
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compute(self, messages: PromptSource, delta: Any, salt: str | None) -> list[bytes]:
        prepared = self._preparer.prepare(messages, delta, salt)
        return self._digests.of(prepared.prompt.token_ids, prepared.pictures, prepared.identity)

    async def _read(self, path: str, body: Body, salt: Salt) -> tuple[PromptSource, Any, str | None] | None:
        """Returns a prompt, its `v2pe_delta` and its salt. Raises ApiError or InternVLError."""
        delta = None
        if path == "/v1/chat/completions":
            chat = parse(body, ChatRequest)
            ask, given = await self._asking.chat(chat), chat.cache_salt
            messages, delta = ask.conversation.messages, ask.v2pe_delta
        elif path == "/v1/responses":
            response = parse(body, ResponsesRequest)
            messages, given = (await ask_of(self._asking, response)).conversation.messages, response.cache_salt
        elif path == "/v1/decisions":
            decisions = parse(body, DecisionsRequest)
            messages, given = (await conversation_of(self._asking, decisions)).messages, decisions.cache_salt
        elif path == "/v1/completions":
            completion = parse(body, CompletionRequest)
            first: RawPrompt = prompts_of(completion.prompt, self._max_prompts)[0]
            return first, None, salt(completion.cache_salt)
        else:
            return None
        return None if _has_video(messages) else (messages, delta, salt(given))


def _has_video(messages: list[dict[str, Any]]) -> bool:
    contents = (message["content"] for message in messages)
    return any(part["type"] == "video" for content in contents if isinstance(content, list) for part in content)
