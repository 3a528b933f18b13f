"""InternVL3.5-Flash as its official code computes it, from the tensors of a checkpoint alone, for a model like `tiny`.

Nothing of the package is used: the vision tower and the router are written out, the language model is transformers'.
`write_flash` makes a checkpoint of the one in the package and random weights of what Flash has besides.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import internvl_rt

TINY = Path(internvl_rt.__file__).parent / "tiny"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CONTEXT = "<IMG_CONTEXT>"


class CrossAttentionPooling(nn.Module):
    def __init__(self, width: int, num_heads: int = 16) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width))
        for number in (1, 2, 3, 4):
            self.add_module(f"attn{number}", nn.MultiheadAttention(width, num_heads, batch_first=True))
            self.add_module(f"norm{number}", nn.LayerNorm(width))

    def forward(self, x_ILE: Tensor) -> Tensor:
        query = self.query_token.unsqueeze(0).expand(len(x_ILE), -1, -1)
        query = self.norm1(self.attn1(query, x_ILE, x_ILE)[0])
        for _ in range(3):
            query = self.norm2(self.attn2(query, x_ILE, x_ILE)[0])
        return query.squeeze(1)


class Gating(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for number in (1, 2, 3, 4):
            block = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(4 * width, width),
                nn.Dropout(0.1),
                nn.LayerNorm(width),
            )
            self.add_module(f"block{number}", block)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x_IE: Tensor) -> Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            x_IE = x_IE + block(x_IE)
        return self.gate(x_IE).softmax(-1)


def second_projector(merged: int, visual: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(merged),
        nn.Linear(merged, 2 * visual),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(2 * visual, 2 * visual),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(2 * visual, visual),
    )


def pixel_shuffle(x: Tensor, scale: float, version: str) -> Tensor:
    n, w, h, c = x.shape
    x = x.view(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale), int(w * scale), int(c / scale**2))
    return x if version == "v1" else x.permute(0, 2, 1, 3).contiguous()


def decide(odds_I: Tensor, relative: float, absolute: float) -> Tensor:
    """Compares as torch does a tensor of the model's dtype with one number, which does not change the dtype."""
    threshold = torch.quantile(odds_I.to(torch.float32), relative)
    return (odds_I > threshold) & (odds_I >= absolute)


class OfficialFlash:
    """A checkpoint of a model like `tiny` with Flash, in the dtype given."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.tensors = {name: tensor.to(dtype) for name, tensor in stored.items()}
        vision, text = self.config["vision_config"], self.config["llm_config"]
        width, visual = vision["hidden_size"], text["hidden_size"]
        self.num_heads, self.num_layers = vision["num_attention_heads"], vision["num_hidden_layers"]
        self.pooling = self._filled(CrossAttentionPooling(width), "pooling_before_gating.", dtype)
        self.gating = self._filled(Gating(width), "gating.", dtype)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * width), nn.Linear(4 * width, visual), nn.GELU(), nn.Linear(visual, visual)
        )
        self.mlp1 = self._filled(self.mlp1, "mlp1.", dtype)
        self.mlp2 = self._filled(second_projector(16 * width, visual), "mlp2.", dtype)
        self.language = self._filled(Qwen2ForCausalLM(Qwen2Config(**text)), "language_model.", dtype)

    def _filled(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> nn.Module:
        found = {n.removeprefix(prefix): tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}
        module.to(dtype).eval().load_state_dict(found)
        return module

    @torch.inference_mode()
    def features(self, tiles: Tensor) -> Tensor:
        """Returns the patches [I, side, side, E] behind the vision tower, for uint8 tiles [I, S, S, 3]."""
        t, prefix = self.tensors, "vision_model.embeddings."
        pixels = ((tiles.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).to(t["mlp1.1.weight"].dtype)
        patch = self.config["vision_config"]["patch_size"]
        x = F.conv2d(pixels, t[f"{prefix}patch_embedding.weight"], t[f"{prefix}patch_embedding.bias"], stride=patch)
        side, x = x.shape[-1], x.flatten(2).transpose(1, 2)
        x = torch.cat((t[f"{prefix}class_embedding"].expand(len(x), -1, -1), x), 1) + t[f"{prefix}position_embedding"]
        eps = self.config["vision_config"]["layer_norm_eps"]
        for index in range(self.num_layers):
            layer = f"vision_model.encoder.layers.{index}."

            def of(name: str, layer: str = layer) -> tuple[Tensor, Tensor]:
                return t[f"{layer}{name}.weight"], t[f"{layer}{name}.bias"]

            y = F.layer_norm(x, x.shape[-1:], *of("norm1"), eps)
            q, k, v = F.linear(y, *of("attn.qkv")).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
            x = x + F.linear(y.transpose(1, 2).flatten(2), *of("attn.proj")) * t[f"{layer}ls1"]
            y = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *of("norm2"), eps), *of("mlp.fc1")))
            x = x + F.linear(y, *of("mlp.fc2")) * t[f"{layer}ls2"]
        return x[:, 1:].unflatten(1, (side, side))

    @torch.inference_mode()
    def odds(self, features: Tensor) -> Tensor:
        """Returns p [I] of the patches [I, side, side, E]."""
        return self.gating(self.pooling(features.flatten(1, 2)))[:, 0]

    @torch.inference_mode()
    def visual_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the visual tokens of each tile as it is kept [I, M, D], and as it is compressed."""
        version = self.config["ps_version"]
        kept = self.mlp1(pixel_shuffle(features, 0.5, version).flatten(1, 2))
        return kept, self.mlp2(pixel_shuffle(features, 0.25, version).flatten(1, 2))

    def thresholds(self) -> tuple[float, float]:
        return self.config["flash_relative_threshold"], self.config["flash_absolute_threshold"]

    @torch.inference_mode()
    def logits(self, token_ids: list[int], visual_XD: Tensor, context_id: int, answer: list[int]) -> Tensor:
        """Returns the logits of every token of a prompt, whose placeholders get `visual_XD`, and of an answer."""
        ids = torch.tensor([*token_ids, *answer])
        x_TD = self.language.get_input_embeddings()(ids).clone()
        x_TD[(ids == context_id).nonzero().view(-1)[: len(visual_XD)]] = visual_XD
        return self.language(inputs_embeds=x_TD[None], use_cache=False).logits[0]

    def greedy(self, token_ids: list[int], visual_XD: Tensor, context_id: int, num_tokens: int) -> list[int]:
        answer: list[int] = []
        for _ in range(num_tokens):
            answer.append(int(self.logits(token_ids, visual_XD, context_id, answer)[-1].argmax()))
        return answer


def shorten(token_ids: list[int], compressed: list[bool], context_id: int, kept: int, left: int) -> list[int]:
    """Removes from a prompt with `kept` placeholders for each tile all but the first `left` of each compressed one."""
    out, place = [], 0
    for token_id in token_ids:
        if token_id == context_id:
            tile, index = divmod(place, kept)
            place += 1
            if compressed[tile] and index >= left:
                continue
        out.append(token_id)
    return out


def write_flash(
    folder: Path,
    *,
    relative: float = 0.4,
    absolute: float = 0.05,
    version: str = "v2",
    unused: bool = True,
    seed: int = 4,
) -> Path:
    """Writes the checkpoint of the package as a Flash model. unused: whether it has the rounds that are never computed.

    The numbers are large enough for the odds of tiles to differ.
    """
    folder.mkdir(parents=True)
    config = json.loads((TINY / "config.json").read_text())
    config |= {"flash_mode": True, "flash_relative_threshold": relative, "flash_absolute_threshold": absolute}
    config["ps_version"] = version
    for file in TINY.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(TINY / "model.safetensors")
    width, visual = config["vision_config"]["hidden_size"], config["llm_config"]["hidden_size"]
    torch.manual_seed(seed)
    modules = {
        "pooling_before_gating.": CrossAttentionPooling(width),
        "gating.": Gating(width),
        "mlp2.": second_projector(16 * width, visual),
    }
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not unused and any(f"{part}{number}." in name for part in ("attn", "norm") for number in (3, 4)):
                continue
            scale = 2 / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 0.1
            is_norm = tensor.ndim == 1 and name.endswith("weight")
            numbers = scale * torch.randn(tensor.shape) + is_norm
            tensors[prefix + name] = numbers.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
