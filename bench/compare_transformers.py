"""Compares time to first token, time per token and memory with transformers, on the same weights and the same request.

    python bench/compare_transformers.py [--model InternVL3-1B] [--tiles 3] [--tokens 32] [--dtype float32]
    python bench/compare_transformers.py --quick

A random checkpoint of the model's shape is written in the original format for us and as an -hf folder for transformers.
Each side gets a process with the same number of threads, the same prompt ids and the same pixel values, and answers
greedily. transformers runs as its users run it (`from_pretrained`, sdpa, KV cache, `generate`), with a streamer that
notes when each token is there. The time to the first token includes the vision tower; the time per token is the mean of
the other tokens. Our caches of prefixes and pictures are off, since every round asks the same. The third time runs
from a uint8 picture of 12 tiles and thumbnail to visual tokens: cutting, vision tower, projector. Their image processor
uses torchvision, on the device too, if it is installed. The rounds are ours, theirs, theirs, ours; each side's best
round counts.

Peak memory is the process's (VmHWM, Linux) or, on CUDA, torch's. The last line is JSON; the exit code is 1 if the
tokens differ in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from options import count
from torch import Tensor

from internvl_rt import Engine, SamplingParams
from internvl_rt.checkpoint.config import KNOWN_MODELS, ModelConfig, load_config
from internvl_rt.checkpoint.folder import open_checkpoint
from internvl_rt.inputs.prompt import IMAGE, Turn, build_prompt
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.model.dialects import DIALECTS
from internvl_rt.model.random_checkpoint import write_random_checkpoint
from internvl_rt.model.weights import load_weights, save_weights

SIDES = ("ours", "theirs")
TURNS = (Turn("user", (IMAGE, "\nPlease describe the picture in detail.")),)
QUICK = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "use_thumbnail": True,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 320,
    },
    "vision_config": {
        "hidden_size": 64,
        "image_size": 112,
        "intermediate_size": 128,
        "norm_type": "layer_norm",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]
    first_s: float  # from the request to the first token
    total_s: float
    picture_s: float  # from a picture's pixels to its visual tokens
    picture_tokens: int


Ask = Callable[[], Answer]


def hf_config(config: ModelConfig, image_token_id: int) -> dict[str, Any]:
    """Returns the config.json of the same model for transformers."""
    v, d = config.vision, config.decoder
    model_type = "qwen3" if d.qk_norm else "qwen2" if d.qkv_bias else "llama"
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": 1 / config.downsample,
        "tie_word_embeddings": d.tie_embeddings,
        "text_config": {
            "model_type": model_type,
            "head_dim": d.head_dim,
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.max_position,
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": d.rope_theta},
            "tie_word_embeddings": d.tie_embeddings,
            "vocab_size": d.vocab_size,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": v.qkv_bias,
            "hidden_size": v.hidden_size,
            "image_size": [v.image_size, v.image_size],
            "intermediate_size": v.intermediate_size,
            "layer_norm_eps": v.norm_eps,
            "norm_type": v.norm,
            "num_attention_heads": v.num_heads,
            "num_hidden_layers": v.num_layers,
            "patch_size": [v.patch_size, v.patch_size],
            "use_qk_norm": v.qk_norm,
        },
    }


def write_folders(model: str | Mapping[str, Any], scratch: Path) -> None:
    """Writes the same random weights to the folders `ours` and `theirs`, as bfloat16."""
    ours, theirs = (scratch / side for side in SIDES)
    write_random_checkpoint(model, ours)
    theirs.mkdir()
    config = load_config(ours)
    weights = load_weights(open_checkpoint(ours), config, dtype=torch.bfloat16, device="cpu")
    save_weights(weights, config, theirs, dialect=DIALECTS["hf"])
    context_id = load_tokenizer(ours).token_id("<IMG_CONTEXT>")
    (theirs / "config.json").write_text(json.dumps(hf_config(config, context_id)))


def pixel_values(config: ModelConfig, num_tiles: int) -> Tensor:
    side = config.vision.image_size
    return torch.randn(num_tiles, 3, side, side, generator=torch.Generator().manual_seed(0))


def draw_picture(config: ModelConfig) -> NDArray[np.uint8]:
    """Draws a random picture of a size that is cut into 4 x 3 tiles."""
    side = config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (3 * side, 4 * side, 3), dtype=np.uint8)


def time_picture(encode: Callable[[], Tensor]) -> tuple[float, int]:
    start = time.perf_counter()
    num_tokens = encode().flatten(0, -2).shape[0]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, num_tokens


def load_ours(scratch: Path, args: argparse.Namespace) -> Ask:
    config = load_config(scratch / "ours")
    pixels = pixel_values(config, args.tiles).to(args.device)
    picture = draw_picture(config)
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    engine = Engine.from_pretrained(
        scratch / "ours",
        device=args.device,
        dtype=args.dtype,
        prefix_cache=False,
        visual_cache_bytes=0,
        max_num_seqs=1,
        max_model_len=1024 + args.tiles * config.tokens_per_tile + args.tokens,
    )

    def ask() -> Answer:
        start = time.perf_counter()
        (reply,) = engine.generate_prepared(iter([engine.prepare_turns(TURNS, [pixels])]), [params])
        total_s = time.perf_counter() - start
        picture_s, picture_tokens = time_picture(lambda: engine.encode_images([picture])[0])
        return Answer(reply.token_ids, reply.timings.first_token_s, total_s, picture_s, picture_tokens)

    return ask


def load_theirs(scratch: Path, args: argparse.Namespace) -> Ask:
    import transformers

    config, tokenizer = load_config(scratch / "ours"), load_tokenizer(scratch / "ours")
    hf: Any = transformers
    hf.utils.logging.disable_progress_bar()
    model = hf.InternVLForConditionalGeneration.from_pretrained(
        scratch / "theirs", dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    model = model.to(args.device).eval()
    model.generation_config.eos_token_id = None
    prompt = build_prompt(TURNS, tokenizer, [args.tiles * config.tokens_per_tile])
    ids = torch.tensor([prompt.token_ids], device=args.device)
    pixels = pixel_values(config, args.tiles).to(args.device, model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    picture, side = draw_picture(config), config.vision.image_size
    processor = hf.GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    on_device = {"device": args.device} if args.device != "cpu" and find_spec("torchvision") else {}

    @torch.inference_mode()
    def encode() -> Tensor:
        processed = processor(images=picture, crop_to_patches=True, return_tensors="pt", **on_device)
        found = model.get_image_features(pixel_values=processed.pixel_values.to(args.device, model.dtype))
        features: Tensor = getattr(found, "pooler_output", found)
        return features

    class Clock(hf.generation.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            """generate calls this on the host, with the prompt and then with each token."""
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def ask() -> Answer:
        clock, start = Clock(), time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, use_cache=True, streamer=clock)
        token_ids, total_s = output[0, ids.shape[1] :].tolist(), time.perf_counter() - start
        return Answer(token_ids, clock.times[1] - start, total_s, *time_picture(encode))

    return ask


def serve_side(args: argparse.Namespace) -> None:
    """Loads one side, then answers each line on stdin with a line of JSON."""
    torch.set_num_threads(args.threads)
    ask = (load_ours if args.side == "ours" else load_theirs)(args.scratch, args)
    print(json.dumps("loaded"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(ask()) | {"peak_bytes": _peak_bytes(args)}), flush=True)


def _peak_bytes(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Side:
    """The process of one side."""

    def __init__(self, name: str, scratch: Path, args: argparse.Namespace) -> None:
        options = {key: getattr(args, key) for key in ("tiles", "tokens", "dtype", "device", "threads")}
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
        command += [f"--side={name}", f"--scratch={scratch}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name
        self._read()

    def ask(self) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._read()
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._name} failed with exit code {self._process.wait()}")
        return json.loads(line)


def compare(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(closing(Side(name, scratch, args))) for name in SIDES}
        for side in sides.values():
            side.ask()  # a warm-up
        for _ in range(args.rounds):
            for name in (*SIDES, *reversed(SIDES)):
                answers[name].append(sides[name].ask())
    counts = {name: answers[name][0]["picture_tokens"] for name in SIDES}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the sides cut the picture in different ways: {counts} visual tokens")
    ours, theirs = (summarise(answers[name]) for name in SIDES)
    pairs = zip(*(answers[name][0]["token_ids"] for name in SIDES), strict=True)
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": {key: ours[key] / theirs[key] for key in ours},
        "equal_tokens": [*(one == other for one, other in pairs), False].index(False),
    }


def summarise(answers: list[dict[str, Any]]) -> dict[str, float]:
    each = [(a["first_s"], (a["total_s"] - a["first_s"]) / (len(a["token_ids"]) - 1)) for a in answers]
    first, per_token = (min(times) for times in zip(*each, strict=True))
    picture = min(answer["picture_s"] for answer in answers)
    return {
        "first_token_s": first,
        "per_token_s": per_token,
        "picture_s": picture,
        "peak_bytes": answers[-1]["peak_bytes"],
    }


def show(result: Mapping[str, Any]) -> None:
    rows = (
        ("time to first token, s", "first_token_s", 1),
        ("time per token, ms", "per_token_s", 1e3),
        ("picture to tokens, ms", "picture_s", 1e3),
    )
    print(f"{'':24}{'ours':>12}{'transformers':>14}{'ratio':>8}")
    for label, key, scale in (*rows, ("peak memory, MB", "peak_bytes", 1e-6)):
        ours, theirs = result["ours"][key] * scale, result["theirs"][key] * scale
        print(f"{label:24}{ours:12,.2f}{theirs:14,.2f}{result['ratio'][key]:8.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=KNOWN_MODELS, default="InternVL3-1B")
    parser.add_argument("--tiles", type=count, default=3, help="of the picture, thumbnail included")
    parser.add_argument("--tokens", type=count, default=32, help="to generate, at least 2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="on each side, in turn")
    parser.add_argument("--rounds", type=count, default=2, help="of ours, theirs, theirs, ours")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that everything works")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve_side(args)
        return 0
    if min(args.tiles, args.rounds, args.threads, args.tokens - 1) < 1:
        parser.error("--tiles, --rounds and --threads must be at least 1, --tokens at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        write_folders(QUICK if args.quick else args.model, Path(scratch))
        result = compare(Path(scratch), args)
    settings = {"model": "quick" if args.quick else args.model, "torch": torch.__version__}
    settings |= {key: getattr(args, key) for key in ("tiles", "tokens", "dtype", "device", "threads", "rounds")}
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    show(result)
    print(f"equal tokens: the first {result['equal_tokens']} of {args.tokens}")
    print(json.dumps(settings | result))
    return int(args.dtype == "float32" and result["equal_tokens"] < args.tokens)


if __name__ == "__main__":
    sys.exit(main())
