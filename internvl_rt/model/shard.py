"""Which part of a model each of several processes holds.

Tensor parallelism: each process is a rank. All have the vision tower, the projector, the embedding and the norms. Of
each layer of the decoder, a rank has some heads of attention and some columns of the MLP; of the output layer, some of
the vocabulary:

  qkv, gate_up   some rows: the product needs nothing from the other ranks
  o, down        the columns that belong to them: the product is one summand, and all ranks add theirs up
  lm_head        some rows: rank 0 gathers the logits

Of a layer with experts it has some columns of each expert, or some of the experts, and the whole router.

A rank has whole key/value heads. Where there are fewer of them than ranks, several ranks have the same one, and each
has some of its query heads.

Decoupled vision: other processes have the vision tower and the projector, and ranks the rest.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from internvl_rt.checkpoint.config import DecoderConfig, ExpertsConfig
from internvl_rt.errors import RequestError

MAX_RANKS = 16
_COLUMNS = 128  # of the MLP, that stay together: then a group of a quantised weight is not cut
_TOKENS = 16  # of the vocabulary, that stay together: then rows of logits are written fast


class Group(Protocol):
    """What ranks do together. Every rank calls the same method at the same point, with tensors of the same shape."""

    def add(self, x: Tensor) -> Tensor:
        """Adds the ranks' tensors up, in place of each, and returns it."""

    def largest(self, x: Tensor) -> Tensor:
        """Takes the largest of the ranks' tensors, element by element, in place of each, and returns it."""

    def gather(self, x: Tensor) -> Tensor:
        """Returns the ranks' tensors [N, *x.shape], in order. It may be void on other ranks than 0."""

    def share(self, x: Tensor) -> Tensor:
        """Copies the tensor of rank 0 into those of the others, and returns it."""


class Lead(Protocol):
    """What rank 0 does besides: it says what comes next."""

    def order(self, message: bytes) -> None:
        """Tells the other ranks what all do next."""

    def together(self) -> AbstractContextManager[None]:
        """Begins a `with` block in which orders are given and followed.

        An interrupt waits for its end. If it raises after an order, the ranks are out of step, and all are lost.
        """

    def check(self) -> None:
        """Raises EngineDeadError if another rank is lost."""

    def close(self) -> None:
        """Ends the other ranks."""


class Arriving(Protocol):
    """A tensor that is not there yet."""

    def wait(self, timeout_s: float) -> bool:
        """Waits until it is there, or that long; says whether it is."""

    def get(self) -> Tensor:
        """Waits for it, and returns it on the device, in the order of the current stream."""


class Tower(Protocol):
    """What processes that have the vision tower do for one that has not."""

    def encode(self, tiles: Tensor) -> Arriving:
        """Encodes tiles on the host, as `InternVL.encode_tiles` takes them, to visual tokens [X, D]."""

    def check(self) -> None:
        """Raises EngineDeadError if a process is lost."""

    def close(self) -> None:
        """Ends the processes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that a process holds.

    rank, size: one of how many parts of the decoder
    group: of all ranks; None: there is one. lead: of rank 0, if there are several
    vision, decoder: whether it holds the tower with its projector, and its part of the decoder
    tower: who encodes for rank 0 if it does not hold the tower
    by_expert: whether ranks share a layer's experts among them, and not the columns of each
    """

    rank: int = 0
    size: int = 1
    group: Group | None = None
    lead: Lead | None = None
    vision: bool = True
    decoder: bool = True
    tower: Tower | None = None
    by_expert: bool = False

    def holds(self, path: str) -> bool:
        """Says whether a parameter, given by its path, is here, or a part of it."""
        return self.decoder if path.startswith("decoder.") else self.vision

    def check(self) -> None:
        """Raises EngineDeadError if another process is lost, on rank 0; what takes long calls it now and then."""
        for other in (self.lead, self.tower):
            if other is not None:
                other.check()

    def close(self) -> None:
        """Ends the other processes, on rank 0."""
        for other in (self.lead, self.tower):
            if other is not None:
                other.close()


WHOLE = Shard()


class Cut(NamedTuple):
    """The rows of a parameter that a rank has, in order, and the columns of these. A vector has rows alone."""

    rows: tuple[slice, ...]
    columns: slice = slice(None)


def share_of(count: int, rank: int, size: int) -> slice:
    """Splits `count` things among ranks, in order; the first ranks have one more where they cannot have as many."""
    each, left = divmod(count, size)
    start = rank * each + min(rank, left)
    return slice(start, start + each + (rank < left))


def check_size(config: DecoderConfig, size: int, *, by_expert: bool = False) -> None:
    """Raises RequestError unless each of `size` ranks can have a query head, a column of the MLP and a token.

    by_expert: an expert in place of the column
    """
    if by_expert and config.experts is None:
        raise RequestError("expert_parallel is true, but this model has no experts; leave it out")
    parts = config.experts.num_experts if by_expert and config.experts else config.intermediate_size
    most = min(MAX_RANKS, config.num_heads, parts, config.vocab_size)
    if size > most:
        raise RequestError(
            f"tensor_parallel_size is {size}, but this model, with {config.num_heads} query heads, can be split among "
            f"at most {most} ranks; lower it"
        )


def shard_decoder(config: DecoderConfig, shard: Shard) -> DecoderConfig:
    """Returns the sizes of a rank's part of the decoder: its heads, and its columns of the MLP or its experts."""
    heads, kv_heads, columns = _heads(config, shard), _kv_heads(config, shard), _columns(config, shard)
    experts = config.experts
    if experts is not None:
        ours = _experts(experts, shard)
        experts = replace(experts, first_here=ours.start, num_here=ours.stop - ours.start)
    return replace(
        config,
        num_heads=heads.stop - heads.start,
        num_kv_heads=kv_heads.stop - kv_heads.start,
        intermediate_size=columns.stop - columns.start,
        experts=experts,
    )


def vocabulary_of(config: DecoderConfig, shard: Shard) -> slice:
    """Returns the tokens whose logits a rank computes."""
    unit = _TOKENS
    while -(-config.vocab_size // unit) < shard.size:
        unit //= 2
    part = _scaled(share_of(-(-config.vocab_size // unit), shard.rank, shard.size), unit)
    return slice(part.start, min(part.stop, config.vocab_size))


def cut_of(path: str, config: DecoderConfig, shard: Shard) -> Cut | None:
    """Returns what a rank has of a parameter of the whole model, given by its path; None: all of it.

    An output layer that is the embedding too is whole here.
    """
    if shard.size == 1 or not path.startswith("decoder."):
        return None
    linear, parameter = path.split(".")[-2:]
    if parameter == "sinks_H":
        return Cut((_heads(config, shard),))
    is_bias = parameter == "bias_N"
    c, width = config, config.head_dim
    heads, kv_heads, columns = _heads(c, shard), _kv_heads(c, shard), _columns(c, shard)
    match linear:
        case "qkv":
            first_key, first_value = c.num_heads, c.num_heads + c.num_kv_heads
            parts = heads, _moved(kv_heads, first_key), _moved(kv_heads, first_value)
            return Cut(tuple(_scaled(part, width) for part in parts))
        case "o":
            return Cut((slice(0, c.hidden_size),), slice(None) if is_bias else _scaled(heads, width))
        case "gate_up":
            return Cut((columns, _moved(columns, c.intermediate_size)))
        case "down":
            return Cut((slice(0, c.hidden_size),), columns)
        case "all_gate_up":
            assert c.experts is not None
            size = 2 * c.intermediate_size
            ours = _experts(c.experts, shard)
            if shard.by_expert:
                return Cut((_scaled(ours, size),))
            gate_up = columns, _moved(columns, c.intermediate_size)
            return Cut(tuple(_moved(part, e * size) for e in range(ours.start, ours.stop) for part in gate_up))
        case "all_down":
            assert c.experts is not None
            ours = _experts(c.experts, shard)
            return Cut((_scaled(ours, c.hidden_size),), slice(None) if is_bias or shard.by_expert else columns)
        case "lm_head":
            return Cut((vocabulary_of(c, shard),))
    return None


def _kv_heads(config: DecoderConfig, shard: Shard) -> slice:
    if shard.size <= config.num_kv_heads:
        return share_of(config.num_kv_heads, shard.rank, shard.size)
    head, _, _ = _common_head(config, shard)
    return slice(head, head + 1)


def _heads(config: DecoderConfig, shard: Shard) -> slice:
    group = config.num_heads // config.num_kv_heads
    if shard.size <= config.num_kv_heads:
        return _scaled(_kv_heads(config, shard), group)
    head, rank, size = _common_head(config, shard)
    return _moved(share_of(group, rank, size), head * group)


def _common_head(config: DecoderConfig, shard: Shard) -> tuple[int, int, int]:
    """Returns the key/value head that a rank shares with others, its number among these, and how many they are."""
    for head in range(config.num_kv_heads):
        ranks = share_of(shard.size, head, config.num_kv_heads)
        if ranks.start <= shard.rank < ranks.stop:
            return head, shard.rank - ranks.start, ranks.stop - ranks.start
    raise AssertionError("every rank has a key/value head")


def _experts(config: ExpertsConfig, shard: Shard) -> slice:
    return share_of(config.num_experts, shard.rank, shard.size) if shard.by_expert else slice(0, config.num_experts)


def _columns(config: DecoderConfig, shard: Shard) -> slice:
    unit, size = _COLUMNS, config.intermediate_size
    if shard.by_expert:
        return slice(0, size)
    while size % unit or size // unit < shard.size:
        unit //= 2
    return _scaled(share_of(size // unit, shard.rank, shard.size), unit)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _scaled(part: slice, by: int) -> slice:
    return slice(part.start * by, part.stop * by)
