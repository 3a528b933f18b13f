"""Makes a rank's table of operations from another one, and says which of its weights are joined with other ranks'.

The model's text knows nothing of ranks: a layer's `o` and `down` say that their products are summands, and the table
adds them up. The residual is added afterwards, so that every rank goes on from the same numbers, to the bit.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig
from internvl_rt.model.internvl import ModelWeights, map_weights
from internvl_rt.model.linear import AnyLinear, Experts, Linear, Norm
from internvl_rt.model.ops import Activation, Ops
from internvl_rt.model.shard import Group, Shard, vocabulary_of
from internvl_rt.model.step_inputs import HostTokens, Sampling


class ShardedOps(Ops):
    """The methods that differ among ranks; `shard_ops` puts them in front of those of a table.

    group: what ranks do together. parts: the tokens whose logits each rank computes.
    """

    group: Group
    rank: int
    parts: tuple[slice, ...]

    def linear(
        self,
        x: Tensor,
        linear: AnyLinear,
        *,
        norm: Norm | None = None,
        bias: bool = True,
        activation: Activation = "none",
        residual: Tensor | None = None,
        scale_N: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Computes `Ops.linear`. Logits that are gathered are void on other ranks than 0."""
        if linear.join is None:
            how: dict[str, Any] = {"activation": activation, "residual": residual, "scale_N": scale_N, "out": out}
            return super().linear(x, linear, norm=norm, bias=bias, **how)
        assert activation == "none", "only o, down and lm_head are joined"
        if linear.join == "add":
            y = self.group.add(super().linear(x, linear, norm=norm, bias=bias))
            if residual is not None:
                y = y.add_(residual)
            return y if out is None else out.copy_(y)
        if out is None:
            out = x.new_empty(len(x), self.parts[-1].stop)
        if len(x):
            widest = x.new_empty(len(x), max(part.stop - part.start for part in self.parts))
            super().linear(x, linear, norm=norm, bias=bias, out=widest[:, : linear.num_outputs])
            for part, logits_RV in zip(self.parts, self.group.gather(widest), strict=True):
                out[:, part] = logits_RV[:, : part.stop - part.start]
        return out

    def mix_experts(self, x_TD: Tensor, experts: Experts, residual_TD: Tensor | None = None) -> Tensor:
        """Computes `Ops.mix_experts`, of which each rank has a summand."""
        y_TD = self.group.add(super().mix_experts(x_TD, experts))
        return y_TD if residual_TD is None else y_TD.add_(residual_TD)

    def sample(
        self, logits_RV: Tensor, sampling: Sampling, token_id_R: Tensor, on_host: HostTokens | None = None
    ) -> None:
        """Draws tokens on rank 0, as `Ops.sample` does, and copies them to all ranks."""
        if self.rank == 0:
            super().sample(logits_RV, sampling, token_id_R, on_host)
        self.group.share(token_id_R)


def shard_ops(ops: Ops, config: DecoderConfig, shard: Shard) -> Ops:
    """Returns the table with which a rank computes its part of a model. config: of the whole model."""
    if shard.group is None:
        return ops
    kind: type[Ops] = type(f"Sharded{type(ops).__name__}", (ShardedOps, type(ops)), {})
    made = kind.__new__(kind)
    parts = tuple(vocabulary_of(config, replace(shard, rank=rank)) for rank in range(shard.size))
    vars(made).update({**vars(ops), "group": shard.group, "rank": shard.rank, "parts": parts})
    return made


def join_shards(weights: ModelWeights, config: DecoderConfig, shard: Shard) -> ModelWeights:
    """Returns a rank's weights, once they are loaded, of which those say so that are joined with other ranks'.

    An output layer that is the embedding too becomes the rank's rows of it.
    """
    if shard.group is None:
        return weights

    def join(path: str, linear: AnyLinear) -> AnyLinear:
        if path == "decoder.lm_head":
            tied = isinstance(linear, Linear) and linear.weight_NK is weights.decoder.embedding_VD
            return replace(linear.take_rows(vocabulary_of(config, shard)) if tied else linear, join="gather")
        bias_N = linear.bias_N if shard.rank == 0 else None  # the sum has it once
        if path.startswith("decoder.layers.") and path.endswith((".o", ".down")):
            return replace(linear, join="add", bias_N=bias_N)
        if path.endswith(".all_down") and not shard.by_expert:
            return replace(linear, bias_N=bias_N)
        return linear

    return map_weights(weights, lambda _, tensor: tensor, join)
