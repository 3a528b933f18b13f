"""What bench/compare_cpu.py compares: runtimes that answer prompts, given as token ids, together and greedily.

A peer may live in another Python than internvl_rt. So nothing here imports internvl_rt but `Ours`, and each class
imports its packages when it is made; only numpy must be everywhere.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

IMAGE = "<image>"  # the picture's place in `Inputs.picture_text`


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all sides are asked. compare_cpu.py writes it to FOLDER/inputs.json.

    picture_ids: a prompt with one picture of one tile. picture_text: the same as text, with IMAGE where the picture is.
    long_ids: a text of as many tokens. text_ids: shorter ones, as many as the most sequences that decode together.
    tokens: greedy tokens of an answer that are compared. steps: that are timed. samples: of first tokens.
    threads: None where the runtime may choose; `default_threads` is for a runtime that does not choose.
    """

    picture_ids: list[int]
    picture_text: str
    long_ids: list[int]
    text_ids: list[list[int]]
    max_len: int
    rows: list[int]
    tokens: int
    steps: int
    samples: int
    threads: int | None
    default_threads: int

    @property
    def num_threads(self) -> int:
        return self.threads or self.default_threads

    @property
    def most_rows(self) -> int:
        return max(self.rows)


class Runtime(Protocol):
    """dtype: that it computes in. version: of its packages."""

    dtype: str
    version: str
    threads: int

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, *, picture: bool) -> "Generated":
        """Answers all prompts together, greedily, with `num_tokens` each; keeps nothing for the next call.

        picture: whether the only prompt is the one with the picture.
        """


@dataclass(frozen=True, slots=True)
class Generated:
    """times_s: since the call; when each prompt had its first token, then at the end of each step of all sequences."""

    times_s: list[float]
    token_ids: list[list[int]]


class Ours:
    def __init__(self, folder: Path, inputs: Inputs, dtype: str, backend: str = "auto") -> None:
        import torch
        from compare_transformers import TURNS

        from internvl_rt import Engine

        self._turns, self._tiles = TURNS, np.load(folder / "tile.npy")[None]
        self._engine = Engine.from_pretrained(
            folder / "ours",
            device="cpu",
            dtype=dtype,
            backend=backend,
            max_num_seqs=inputs.most_rows,
            max_model_len=inputs.max_len,
            prefix_cache=False,  # every round asks the same
            visual_cache_bytes=0,
        )
        self.dtype = str(self._engine.model.dtype).removeprefix("torch.")
        self.version = f"torch {torch.__version__}"
        self.threads = torch.get_num_threads()

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, *, picture: bool) -> Generated:
        from internvl_rt import RawPrompt, SamplingParams

        engine, loop = self._engine, self._engine.loop
        # Sequences whose prompts come first draw tokens while the other prompts are computed.
        params = SamplingParams(max_tokens=num_tokens + len(prompts), ignore_eos=True)
        start = time.perf_counter()
        if picture:
            prepared = [engine.prepare_turns(self._turns, [self._tiles])]
        else:
            prepared = [engine.prepare(RawPrompt(ids)) for ids in prompts]
        requests = [engine.new_request(each, params) for each in prepared]
        for request in requests:
            loop.submit(request)
        while not all(request.first_token_s for request in requests):
            loop.advance(requests[-1])
        times = [time.perf_counter() - start]
        for _ in range(num_tokens - 1):
            loop.advance(requests[-1])
            times.append(time.perf_counter() - start)
        token_ids = [list(request.answers[0].sequence.generated_ids) for request in requests]
        for request in requests:
            loop.cancel(request)
        assert all(len(ids) >= num_tokens for ids in token_ids), "each step draws a token of every sequence"
        return Generated(times, [ids[:num_tokens] for ids in token_ids])


class Transformers:
    """transformers as its users run it: `from_pretrained`, sdpa, KV cache, `generate`."""

    def __init__(self, folder: Path, inputs: Inputs, dtype: str) -> None:
        import torch
        import transformers

        hf: Any = transformers
        hf.utils.logging.disable_progress_bar()
        self.dtype = dtype
        self._model = hf.InternVLForConditionalGeneration.from_pretrained(
            folder / "theirs", dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._pixels = torch.from_numpy(np.load(folder / "pixels.npy")).to(self._model.dtype)
        self.version = f"transformers {hf.__version__}, torch {torch.__version__}"
        self.threads = torch.get_num_threads()

        class Clock(hf.generation.BaseStreamer):  # type: ignore[misc]
            def __init__(self) -> None:
                self.times: list[float] = []

            def put(self, value: Any) -> None:
                """generate calls this with the prompts and then with each step's tokens."""
                self.times.append(time.perf_counter())

            def end(self) -> None:
                pass

        self._new_clock = Clock

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, *, picture: bool) -> Generated:
        import torch

        ids = torch.tensor(prompts)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"pixel_values": self._pixels} if picture else {}
        clock, start = self._new_clock(), time.perf_counter()
        output = self._model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, streamer=clock)
        return Generated([at - start for at in clock.times[1:]], output[:, ids.shape[1] :].tolist())


class LlamaCpp:
    """llama.cpp through llama-cpp-python: its low-level calls, with one batch for a step of all sequences."""

    _BATCH = 2048  # tokens of a call, llama.cpp's default
    _ROOM = 256  # it wants contexts of a multiple of this

    def __init__(self, folder: Path, inputs: Inputs, dtype: str) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.dtype, self._inputs, self._api, self._mtmd_api = dtype, inputs, llama_cpp, mtmd_cpp
        self._tile = np.ascontiguousarray(np.load(folder / "tile.npy"))
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        self.threads = inputs.num_threads
        llama_cpp.llama_backend_init()
        file = folder / f"llama.cpp-{dtype}" / "text.gguf"
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        assert self._model, file
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = inputs.most_rows
        params.n_ctx = inputs.most_rows * -(-inputs.max_len // self._ROOM) * self._ROOM
        params.n_batch = self._BATCH
        params.n_threads = params.n_threads_batch = self.threads
        # The default is float16, of which two bytes are as many as bfloat16's.
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama_init_from_model"
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(self._BATCH, 0, 1)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.n_threads = False, False, self.threads
        file = file.with_name("vision.gguf")
        self._vision = mtmd_cpp.mtmd_init_from_file(str(file).encode(), self._model, vision)
        assert self._vision, file

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, *, picture: bool) -> Generated:
        api, start = self._api, time.perf_counter()
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        if picture:
            lens = [self._read_picture()]
            last = [self._best(-1)]
        else:
            lens = [len(ids) for ids in prompts]
            last = self._decode([(ids, 0) for ids in prompts])
        times, token_ids = [time.perf_counter() - start], [[token_id] for token_id in last]
        for step in range(num_tokens - 1):
            last = self._decode([([token_id], num + step) for token_id, num in zip(last, lens, strict=True)])
            times.append(time.perf_counter() - start)
            for ids, token_id in zip(token_ids, last, strict=True):
                ids.append(token_id)
        return Generated(times, token_ids)

    def _decode(self, chunks: Sequence[tuple[list[int], int]]) -> list[int]:
        """Computes a chunk of token ids at a position for each sequence; returns the most likely next tokens."""
        batch, ends, index = self._batch, [], 0
        for sequence, (ids, position) in enumerate(chunks):
            for offset, token_id in enumerate(ids):
                batch.token[index], batch.pos[index] = token_id, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(ids) - 1
                index += 1
            ends.append(index - 1)
        batch.n_tokens = index
        code = self._api.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode returned {code}"
        return [self._best(end) for end in ends]

    def _best(self, index: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())

    def _read_picture(self) -> int:
        """Computes the prompt with the picture; returns its number of tokens."""
        api, (height, width, _) = self._mtmd_api, self._tile.shape
        marker = api.mtmd_default_marker()
        content = self._inputs.picture_text.encode().replace(IMAGE.encode(), marker)
        text = api.mtmd_input_text(text=content, text_len=len(content), add_special=False, parse_special=True)
        pixels = self._tile.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap, chunks = api.mtmd_bitmap_init(width, height, pixels), api.mtmd_input_chunks_init()
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        code = api.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), bitmaps, 1)
        assert code == 0, f"mtmd_tokenize returned {code}"
        end = self._api.llama_pos(0)
        code = api.mtmd_helper_eval_chunks(
            self._vision, self._context, chunks, 0, 0, self._BATCH, True, ctypes.byref(end)
        )
        assert code == 0, f"mtmd_helper_eval_chunks returned {code}"
        api.mtmd_input_chunks_free(chunks)
        api.mtmd_bitmap_free(bitmap)
        assert end.value == len(self._inputs.picture_ids), f"{end.value} tokens, not {len(self._inputs.picture_ids)}"
        return end.value


class OpenVino:
    """OpenVINO GenAI's continuous batching, without compressed weights. It takes texts, and makes the ids itself."""

    def __init__(self, folder: Path, inputs: Inputs, dtype: str) -> None:
        import openvino
        import openvino_genai

        self.dtype, self._inputs, self._genai = dtype, inputs, openvino_genai
        self.version = f"openvino-genai {version('openvino-genai')}"
        self.threads = inputs.num_threads
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if dtype == "bfloat16" and "BF16" not in able:  # it would compute in float32 instead
            raise RuntimeError(f"OpenVINO has no bfloat16 on this processor, only {', '.join(able)}")
        kind = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[dtype]
        vision = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": self.threads}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # every round asks the same
        scheduler.max_num_batched_tokens = 2048  # the default, 256, would cut the prompt with the picture
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder / "openvino"), scheduler, "CPU", vision | {"KV_CACHE_PRECISION": kind}, {}, vision
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._images = [openvino.Tensor(np.load(folder / "tile.npy")[None])]

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, *, picture: bool) -> Generated:
        config = self._genai.GenerationConfig(
            max_new_tokens=num_tokens + len(prompts),
            ignore_eos=True,
            eos_token_id=0,
            do_sample=False,
            apply_chat_template=False,
        )
        if picture:
            requests: list[tuple[Any, ...]] = [(0, self._inputs.picture_text, self._images, config)]
        else:
            texts = [self._tokenizer.decode(ids) for ids in prompts]
            for text, ids in zip(texts, prompts, strict=True):
                assert self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == ids, text
            requests = [(number, text, config) for number, text in enumerate(texts)]
        start = time.perf_counter()
        handles = [self._pipeline.add_request(*request) for request in requests]
        times, token_ids = list[float](), [list[int]() for _ in prompts]
        while len(times) < num_tokens:
            self._pipeline.step()
            for ids, handle in zip(token_ids, handles, strict=True):
                while handle.can_read():
                    ids += handle.read()[0].generated_ids
            if all(token_ids):
                times.append(time.perf_counter() - start)
        for handle in handles:
            handle.stop()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return Generated(times, [ids[:num_tokens] for ids in token_ids])


RUNTIMES: dict[str, Callable[[Path, Inputs, str], Runtime]] = {
    "ours": Ours,
    "plain": lambda folder, inputs, dtype: Ours(folder, inputs, dtype, backend="torch"),
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}
