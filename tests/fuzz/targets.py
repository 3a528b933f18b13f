"""The kinds of input that are fuzzed: how input number n is made, and what the package is asked to do with it."""

import base64
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import sentencepiece
import torch
from PIL import Image

from fuzz.mutations import damage_bytes, damage_object, odd_value
from internvl_rt import Engine, EngineOptions, SamplingParams
from internvl_rt.checkpoint import load_config, open_checkpoint
from internvl_rt.inputs.image import open_image
from internvl_rt.inputs.tiles import ImageOptions
from internvl_rt.inputs.tokenizer import load_tokenizer
from internvl_rt.inputs.video import load_video
from internvl_rt.model.card import model_card
from internvl_rt.model.weights import load_weights

TINY = Path(__file__).parents[2] / "internvl_rt/tiny"
SAMPLE = (TINY / "samples/4719.png").read_bytes()
SAMPLE_URL = f"data:image/png;base64,{base64.b64encode(SAMPLE).decode()}"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Target:
    """`use` does what a user would do with what `make` made; it may raise nothing but the package's own errors."""

    make: Callable[[Random], Any]
    use: Callable[[Any, Path], None]  # gets a folder that is empty, for inputs that are files


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def _pictures() -> list[bytes]:
    """A picture in every format and in the variants that other code decodes."""
    gradient = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3) * 7 % 256
    rgb = Image.fromarray(gradient.astype(np.uint8))
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 40}
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        _encoded(rgb, "JPEG", exif=exif), _encoded(rgb, "JPEG", progressive=True),
        _encoded(rgb.convert("CMYK"), "JPEG"), _encoded(rgb, "PNG"),
        _encoded(rgb.convert("P"), "PNG"), _encoded(rgb.convert("I;16"), "PNG"),
        _encoded(rgb, "PNG", **frames), _encoded(rgb, "WEBP"), _encoded(rgb, "WEBP", lossless=True),
        _encoded(rgb, "WEBP", **frames), _encoded(rgb, "GIF"), _encoded(rgb, "GIF", **frames), _encoded(rgb, "BMP"),
        *(_encoded(rgb, "TIFF", compression=name) for name in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        _encoded(rgb.convert("F"), "TIFF"), _encoded(rgb, "AVIF"), _encoded(rgb, "AVIF", **frames),
    ]  # fmt: skip


def _make_picture(random: Random) -> tuple[bytes, ImageOptions]:
    options = ImageOptions(
        image_size=56, exif=random.choice(("ignore", "apply")), alpha=random.choice(("drop", "white"))
    )
    return damage_bytes(random.choice(_pictures()), _pictures(), random), options


def _use_picture(given: tuple[bytes, ImageOptions], folder: Path) -> None:
    image = open_image(*given)
    tiles = image.tiles()
    assert tiles.shape == (image.layout.num_tiles, 56, 56, 3)


@cache
def _videos() -> list[bytes]:
    made = []
    kinds = (("mp4", "mpeg4"), ("matroska", "mjpeg"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("gif", "gif"))
    for container, codec in kinds:
        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            stream = output.add_stream(codec, rate=10)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            for level in range(12):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * level, np.uint8), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        made.append(file.getvalue())
    return made


def _use_video(data: bytes, folder: Path) -> None:
    assert len(load_video(data, num_segments=4)) == 4


def _json_text(value: Any, random: Random) -> bytes:
    """Writes JSON as a careless program would, sometimes damaged."""
    try:
        text = json.dumps(value, default=str).encode()
    except (TypeError, ValueError, RecursionError):
        text = b"{}"
    return damage_bytes(text, [text], random) if random.random() < 0.2 else text


@cache
def _configs() -> list[Any]:
    return [json.loads(file.read_bytes()) for file in (TINY / "config.json", TINY.parent / "configs/InternVL3-1B.json")]


def _make_config(random: Random) -> bytes:
    return _json_text(damage_object(random.choice(_configs()), random), random)


def _use_config(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    model_card(load_config(folder), "fuzzed")


@cache
def _tokenizers() -> list[dict[str, bytes]]:
    """The files of a byte-level tokenizer in both forms, and of a sentencepiece model."""
    import tokenizers

    files = {name: (TINY / name).read_bytes() for name in TOKENIZER_FILES}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(files["vocab.json"]), [], fuse_unk=False))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{N}|\s+|\p{L}+"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = tokenizers.decoders.ByteLevel()
    whole = {name: text for name, text in files.items() if name not in ("vocab.json", "merges.txt")}
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the boat lies on the lake", "how many boats"] * 9), model_writer=pieces,
        vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    return [files, {**whole, "tokenizer.json": built.to_str().encode()}, {"tokenizer.model": pieces.getvalue()}]


def _make_tokenizer(random: Random) -> dict[str, bytes]:
    files = dict(random.choice(_tokenizers()))
    name = random.choice(list(files))
    if name.endswith(".json") and random.random() < 0.7:
        files[name] = _json_text(damage_object(json.loads(files[name]), random), random)
    else:
        files[name] = damage_bytes(files[name], list(files.values()), random)
    return files


def _use_tokenizer(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = load_tokenizer(folder)
    for text in ("", "Read the digits.", " a  b\n\n1234", "你好 \U0001f600 e\u0301\0", "<|im_end|><img>"):
        ids = tokenizer.encode(text)
        assert isinstance(tokenizer.decode(ids), str)


@cache
def _checkpoint() -> tuple[dict[str, Any], bytes]:
    data = (TINY / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _make_checkpoint(random: Random) -> bytes:
    header, data = _checkpoint()
    text = _json_text(damage_object(header, random), random)
    length = len(text) if random.random() < 0.9 else random.choice((0, 1, len(text) - 1, 1 << 40, (1 << 64) - 1))
    return length.to_bytes(8, "little") + text + data[: random.choice((len(data), len(data), len(data) - 1, 0))]


def _use_checkpoint(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    load_weights(open_checkpoint(folder), load_config(TINY), dtype=torch.float32, device=torch.device("cpu"))


@cache
def _torch_entries() -> list[dict[str, bytes]]:
    """The entries of files of `torch.save`: of every kind of tensor, of a module, and one that would run a command."""
    made = []
    kinds = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2)}
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    for value, protocol in ((kinds, 2), (kinds, 4), (module.state_dict(), 2), (dict(module.named_parameters()), 2)):
        file = io.BytesIO()
        torch.save(value, file, pickle_protocol=protocol)
        with zipfile.ZipFile(file) as archive:
            made.append({name: archive.read(name) for name in archive.namelist()})
    command = b"\x80\x02cposix\n_exit\nK\1\x85R."
    return [*made, {**made[0], "archive/data.pkl": command}]


def _make_torch_file(random: Random) -> bytes:
    entries = dict(random.choice(_torch_entries()))
    if random.random() < 0.7:
        others = [one["archive/data.pkl"] for one in _torch_entries()]
        entries["archive/data.pkl"] = damage_bytes(entries["archive/data.pkl"], others, random)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    whole = file.getvalue()
    return damage_bytes(whole, [whole], random) if random.random() < 0.5 else whole


def _use_torch_file(content: bytes, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    checkpoint = open_checkpoint(folder)
    for name, entry in checkpoint.entries.items():
        checkpoint.read_into(name, torch.empty(entry.shape, dtype=entry.dtype))


@cache
def _engine() -> Engine:
    return Engine.from_pretrained("tiny", device="cpu", kv_cache_bytes=8 << 20, max_model_len=2048)


def _make_conversation(random: Random) -> Any:
    picture = random.choice((SAMPLE, np.zeros((30, 60, 3), np.uint8), Image.new("LA", (30, 20))))
    visual = torch.zeros(4, 128)
    parts = [
        {"type": "text", "text": "Read the digits."},
        {"type": "image", "image": picture, "max_tiles": 2},
        {"type": "image_url", "image_url": {"url": SAMPLE_URL, "detail": "low"}},
        {"type": "image_embeds", "image_embeds": random.choice((visual, visual.numpy()))},
        {"type": "video", "video": _videos()[0], "num_frames": 2},
    ]
    conversation = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": parts[:2]},
        {"role": "assistant", "content": "4719"},
        {"role": "user", "content": random.sample(parts, 3), "name": "someone"},
    ]
    return damage_object(conversation, random)


def _use_conversation(messages: Any, folder: Path) -> None:
    engine = _engine()
    reply = engine.chat(messages, SamplingParams(max_tokens=2))
    assert reply.finish_reason in ("stop", "length")
    assert engine.stats()["running"] == 0


def _make_options(random: Random) -> tuple[type, dict[str, Any]]:
    kind = random.choice((SamplingParams, EngineOptions, ImageOptions))
    names = list(kind.__dataclass_fields__)
    return kind, {random.choice(names): odd_value(random) for _ in range(random.choice((1, 1, 2)))}


def _use_options(given: tuple[type, dict[str, Any]], folder: Path) -> None:
    kind, values = given
    made = kind(**values)
    if isinstance(made, SamplingParams):
        _engine().chat([{"role": "user", "content": "a"}], _few_tokens(made))


def _few_tokens(params: SamplingParams) -> SamplingParams:
    from dataclasses import replace

    return replace(params, max_tokens=max(params.min_tokens, 2)) if params.min_tokens < 100 else SamplingParams()


TARGETS = {
    "picture": Target(_make_picture, _use_picture),
    "video": Target(lambda random: damage_bytes(random.choice(_videos()), _videos(), random), _use_video),
    "config": Target(_make_config, _use_config),
    "tokenizer": Target(_make_tokenizer, _use_tokenizer),
    "checkpoint": Target(_make_checkpoint, _use_checkpoint),
    "torch_file": Target(_make_torch_file, _use_torch_file),
    "conversation": Target(_make_conversation, _use_conversation),
    "options": Target(_make_options, _use_options),
}
