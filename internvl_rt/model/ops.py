"""The operations that the model is written against, as one frozen table.

`TORCH` holds the references: plain torch, any device. `ops_triton` makes tables of the kernels in `kernels/`. An engine
picks one table when it is built and hands it down, and nothing else asks which one it is.

Both towers are moves of the same kind. The decoder's are norm + linear (+ rotary + KV write), attention, linear +
residual, norm + linear + SwiGLU, linear + residual; a decode step runs each as one kernel, the norm in front. The ViT,
which always has a thousand rows and more, has its norms behind: linear, attention, linear + residual + norm, linear +
GELU, linear + residual + norm, so that residual, LayerScale and norm are one pass over the rows.

The dimension letters are explained in `kernels/_contract.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from internvl_rt.kernels.copy_blocks import copy_blocks_reference
from internvl_rt.kernels.embed_tokens import embed_tokens_reference
from internvl_rt.kernels.gemm_epilogue import gemm_epilogue_reference
from internvl_rt.kernels.layer_norm import layer_norm_reference
from internvl_rt.kernels.paged_attention import paged_attention_reference
from internvl_rt.kernels.patch_embed import normalise_tiles_reference, patch_embed_reference
from internvl_rt.kernels.place_visual_tokens import place_visual_tokens_reference
from internvl_rt.kernels.qkv_rope_kv import qkv_rope_kv_reference
from internvl_rt.kernels.resize_tiles import resize_tiles_reference
from internvl_rt.kernels.rms_norm import rms_norm_reference
from internvl_rt.kernels.sample import sample_reference
from internvl_rt.kernels.swiglu import swiglu_reference
from internvl_rt.kernels.unshuffle_norm import unshuffle_norm_reference
from internvl_rt.kernels.vit_attention import vit_attention_reference
from internvl_rt.model.linear import Linear, Norm, bias_of, qk_weights
from internvl_rt.model.step_inputs import Batch, LayerCache, Sampling

Activation = Literal["none", "gelu", "swiglu"]

normalise_tiles = normalise_tiles_reference  # for who wants a picture as the official code gives it to the model


@dataclass(frozen=True, eq=False, kw_only=True)
class Ops:
    """One implementation of every operation, and what it can do.

    captures_graphs: nothing waits for the device, so that CUDA graphs can be captured
    resizes_on_device: pictures are cut into tiles where the model runs; else on the CPU, to the same bits
    num_split_items(num_rows, num_kv_heads): length of the plan by which attention of so many sequences with one new
        token is split, which the KV cache fills; 0 where no plan is wanted

    The other fields are functions of plain tensors. Each is named after a file in `kernels/`, which explains it, and is
    that file's reference or its launcher. The methods unpack weights for them. Where a method adds to a `residual`, the
    memory of the residual may be the result's afterwards.
    """

    name: str
    captures_graphs: bool
    resizes_on_device: bool
    num_split_items: Callable[[int, int], int]
    resize_tiles: Callable[[Tensor, int, int, int, bool], Tensor]
    patch_embed: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    gemm_epilogue: Callable[..., Tensor]
    swiglu: Callable[[Tensor], Tensor]
    vit_attention: Callable[[Tensor, int, int, Tensor | None, Tensor | None, float], Tensor]
    unshuffle_norm: Callable[[Tensor, int, Tensor, Tensor, float, int, Literal["v1", "v2"]], Tensor]
    embed_tokens: Callable[[Tensor, Tensor, Tensor], Tensor]
    place_visual_tokens: Callable[[Tensor, Tensor, Tensor], None]
    qkv_rope_kv: Callable[[Tensor, Tensor | None, Tensor | None, float, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]

    def embed_tiles(self, tiles: Tensor, patch: Linear, class_E: Tensor, position_UE: Tensor) -> Tensor:
        """x_RE of uint8 or normalised tiles, patches first."""
        return self.patch_embed(tiles, patch.weight_NK, bias_of(patch), class_E, position_UE)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        if norm.bias_D is None:
            return self.rms_norm(x, norm.weight_D, norm.eps)
        return self.layer_norm(x, norm.weight_D, norm.bias_D, norm.eps)

    def linear(
        self,
        x: Tensor,
        linear: Linear,
        *,
        norm: Norm | None = None,
        bias: bool = True,
        activation: Activation = "none",
        residual: Tensor | None = None,
        scale_N: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """activation(norm(x) W^T + b), or residual + scale * (norm(x) W^T + b). Every product of a layer comes here.

        bias: False leaves b out
        activation: with "swiglu" the rows of W are gate, up
        scale_N: LayerScale, of a product that is added to a residual
        out: memory of the result; its rows may lie apart
        """
        if norm is not None:
            x = self.norm(x, norm)  # one name, so that what came before is freed when its successor is there
        is_gated = activation == "swiglu"
        x = self.gemm_epilogue(
            x,
            linear.weight_NK,
            linear.bias_N if bias else None,
            activation="none" if is_gated else activation,
            residual=residual,
            scale_N=scale_N,
            out=None if is_gated else out,
        )
        if is_gated:
            x = self.swiglu(x)
        return x if out is None or x is out else out.copy_(x)

    def linear_residual_norm(
        self, y: Tensor, linear: Linear, residual: Tensor, scale_N: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """The new x = residual + scale * (y W^T + b), and norm(x); without a norm x itself in its place."""
        x = self.linear(y, linear, residual=residual, scale_N=scale_N)
        return x, x if norm is None else self.norm(x, norm)

    def norm_qkv_rope_kv(
        self,
        x_TD: Tensor,
        norm: Norm,
        qkv: Linear,
        q_norm: Norm | None,
        k_norm: Norm | None,
        position_T: Tensor,
        inv_freq_C: Tensor,
        cache: LayerCache,
        slot_T: Tensor,
    ) -> Tensor:
        """q_THC, rotated; keys and values of the tokens are written into the cache."""
        where = position_T, inv_freq_C, cache.k_cache_BGPC, cache.v_cache_BGPC, slot_T
        return self.qkv_rope_kv(self.linear(self.norm(x_TD, norm), qkv), *qk_weights(q_norm, k_norm), *where)

    def attend_tiles(
        self, qkv_RK: Tensor, num_tiles: int, head_dim: int, q_norm: Norm | None, k_norm: Norm | None
    ) -> Tensor:
        """y_RE of the ViT's attention, within each tile."""
        return self.vit_attention(qkv_RK, num_tiles, head_dim, *qk_weights(q_norm, k_norm))

    def paged_attention(self, q_THC: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """y_THC of the decoder's attention, to all tokens of a sequence up to each query's own."""
        where = batch.block_table_SN, batch.query_start_S1, batch.seq_len_S
        return paged_attention_reference(q_THC, cache.k_cache_BGPC, cache.v_cache_BGPC, *where)

    def merge_patches(
        self, x_RE: Tensor, num_tiles: int, norm: Norm, factor: int, version: Literal["v1", "v2"]
    ) -> Tensor:
        """y_IMK of the ViT's patches: squares of factor * factor side by side, then a LayerNorm."""
        return self.unshuffle_norm(x_RE, num_tiles, norm.weight_D, bias_of(norm), norm.eps, factor, version)

    def sample(self, logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor) -> None:
        """Draws a token from each row of logits, into `token_id_R` (int64)."""
        token_id_R.copy_(sample_reference(logits_RV, *sampling))


TORCH = Ops(
    name="torch",
    captures_graphs=False,
    resizes_on_device=False,
    num_split_items=lambda num_rows, num_kv_heads: 0,
    resize_tiles=resize_tiles_reference,
    patch_embed=patch_embed_reference,
    layer_norm=layer_norm_reference,
    rms_norm=rms_norm_reference,
    gemm_epilogue=gemm_epilogue_reference,
    swiglu=swiglu_reference,
    vit_attention=vit_attention_reference,
    unshuffle_norm=unshuffle_norm_reference,
    embed_tokens=embed_tokens_reference,
    place_visual_tokens=place_visual_tokens_reference,
    qkv_rope_kv=qkv_rope_kv_reference,
    copy_blocks=copy_blocks_reference,
)
