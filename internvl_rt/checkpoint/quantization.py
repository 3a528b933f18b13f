"""How a checkpoint is quantised, as its config.json says: which linears are, in which layout, and the KV cache.

Read are compressed-tensors (as llm-compressor and `internvl-rt quantize` write), AWQ (as lmdeploy and AutoAWQ do),
GPTQ, and the fine-grained FP8 of transformers. Whatever else a config asks for is refused with its key and value. A
`cast` is the quantisation of a dense checkpoint, which is done when it is loaded.
"""

import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from internvl_rt.checkpoint.json_section import Section
from internvl_rt.errors import ConfigError, quoted

Layout = Literal["cast", "compressed", "packed", "awq", "gptq", "gptq_v2"]
_GROUPS = (32, 64, 128)
_BLOCK = 128
_REMEDY = "use another quantisation of this model, or its unquantised weights"
_LAYERS = ("decoder.layers.",)
_PARTS = ("vision.layers.", "projector.", *_LAYERS)
# Of an untrusted file: how many groups, patterns of a list and parts of names, and in how many ways the patterns of all
# lists may be tried on a name, so that all names of a large model take a second at most.
_MAX_GROUPS, _MAX_PATTERNS, _MAX_PARTS, _MAX_WAYS, _NAME_LEN = 16, 64, 4096, 300_000, 60
_BY_NAME, _BY_PART, _AS_ANY, _NOT_MEANT = range(4)  # how closely a module is meant


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight of one linear is stored.

    layout: how its numbers and scales lie in the file; "cast": dense there, and quantised when it is loaded
    group: columns that share a scale; None: all of a row
    block_rows: rows that share a scale; None: all
    inputs: how a product may round its inputs: see `Linear8`
    symmetric: whether the zero of 4-bit numbers is 8 everywhere
    scale_name: what the scale is called beside the weight
    is_reordered: whether columns may be in another order than their groups, so that the file must say of which each is
    """

    layout: Layout
    bits: Literal[4, 8]
    is_float: bool = False
    group: int | None = None
    block_rows: int | None = 1
    symmetric: bool = True
    inputs: Literal["full", "token", "static"] = "full"
    scale_name: str = "weight_scale"
    is_reordered: bool = False

    def __str__(self) -> str:
        name = "FP8" if self.is_float else f"int{self.bits}"
        return name if self.group is None else f"{name}, groups of {self.group}"


@dataclass(frozen=True, slots=True)
class Names:
    """Names of modules: whole ones, patterns, parts of names, or those of all linears."""

    whole: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    parts: tuple[str, ...] = ()
    every: bool = False

    def rank(self, names: Collection[str]) -> int:
        """Returns how closely a module is meant, given its names in the dialects: the less, the closer."""
        if not self.whole.isdisjoint(names):
            return _BY_NAME
        if any(pattern.match(name) for pattern in self.patterns for name in names):
            return _BY_PART
        if any(part in name for part in self.parts for name in names):
            return _BY_PART
        return _AS_ANY if self.every else _NOT_MEANT


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which linears of a checkpoint are quantised, and how.

    source: who asks for it, for messages
    groups: targets and their scheme; the group that names a linear most closely says how it is stored, else the first
    where: the parts of the model in which it may be: paths of parameters begin so
    kv_cache: the format of keys and values, if static scales of each layer are stored
    """

    method: str
    source: str
    groups: tuple[tuple[Names, Scheme], ...]
    ignored: Names = Names()
    where: tuple[str, ...] = (*_PARTS, "decoder.lm_head")
    kv_cache: Literal["fp8", "int8"] | None = None

    def scheme_of(self, path: str, names: Collection[str]) -> Scheme | None:
        """Returns how a linear is stored, given its path and its names in all dialects; None: dense."""
        if not path.startswith(self.where) or self.ignored.rank(names) != _NOT_MEANT:
            return None
        targets, scheme = min(self.groups, key=lambda group: group[0].rank(names))
        return None if targets.rank(names) == _NOT_MEANT else scheme


EVERY = Names(every=True)


def cast(to: Literal["fp8", "int8"], *, vision: bool) -> Quantization:
    """Returns the quantisation of a dense checkpoint at load: the layers' products of the language model.

    vision: those of the vision tower too.
    """
    is_float = to == "fp8"
    scheme = Scheme("cast", 8, is_float, inputs="token" if is_float else "full")
    return Quantization(
        to, f"quantization={to!r}", ((EVERY, scheme),), where=(*_LAYERS, "vision.layers.") if vision else _LAYERS
    )


# As `internvl-rt quantize --scheme w4a16` writes it.
FOUR_BITS = Quantization("4 bits", "w4a16", ((EVERY, Scheme("packed", 4, group=_BLOCK)),), where=_LAYERS)


def read_quantization(*sections: Section, mxfp4: bool = False) -> Quantization | None:
    """Reads the quantization_config of the top level or of the language model's section.

    mxfp4: whether experts may be stored in MXFP4, which is multiplied out while it is loaded, so that it is none here.

    Returns None where there is none. Raises ConfigError for one that is not supported, and for two that differ.
    """
    found = [section for section in sections if section.has("quantization_config")]
    if not found:
        return None
    config = found[0].section("quantization_config")
    for other in found[1:]:
        if other.values["quantization_config"] != found[0].values["quantization_config"]:
            raise other.refusal("quantization_config", f"none beside that of {found[0].path or 'the top level'}")
    readers = {"compressed-tensors": _read_compressed, "awq": _read_awq, "gptq": _read_gptq, "fp8": _read_fp8}
    if mxfp4 and config.values.get("quant_method") == "mxfp4":
        return None
    method = config.choice("quant_method", tuple(readers), remedy=_REMEDY)
    source = f"{config.file}: {config.path.removesuffix('.')}"
    quantization = readers[method](config, source)
    lists = (*(targets for targets, _ in quantization.groups), quantization.ignored)
    ways = sum(_ways(pattern.pattern) for names in lists for pattern in names.patterns)
    if ways > _MAX_WAYS or sum(len(names.parts) for names in lists) > _MAX_PARTS:
        raise ConfigError(f"{source} holds so many patterns and names that they may take long to match; simplify them")
    return quantization


def _read_compressed(config: Section, source: str) -> Quantization:
    """Reads what compressed-tensors writes (its quantization/quant_config.py, quant_scheme.py, quant_args.py)."""
    config.support("quantization_status", "compressed", None, "frozen", remedy=_REMEDY)
    for key in ("sparsity_config", "transform_config"):
        config.support(key, None, {}, remedy=_REMEDY)
    groups = config.section("config_groups")
    if not 1 <= len(groups.values) <= _MAX_GROUPS:
        raise config.refusal("config_groups", f"1 to {_MAX_GROUPS} groups")
    read = tuple(_read_group(groups.section(name, remedy=_REMEDY), config) for name in groups.values)
    ignored = _read_names(config, "ignore")
    return Quantization("compressed-tensors", source, read, ignored, kv_cache=_read_kv_cache(config))


def _read_group(group: Section, config: Section) -> tuple[Names, Scheme]:
    group.support("output_activations", None, remedy=_REMEDY)
    formats = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized")
    holder = group if group.has("format") else config
    form = holder.choice("format", formats, remedy=_REMEDY)
    weights = group.section("weights")
    weights.support("dynamic", False, remedy=_REMEDY)
    weights.support("actorder", None, False, "static", "weight", remedy=_REMEDY)
    is_float = weights.choice("type", ("int", "float"), "int", remedy=_REMEDY) == "float"
    strategies = ("tensor", "channel", "group", "block")
    strategy = weights.choice("strategy", strategies, _default_strategy(weights), remedy=_REMEDY)
    symmetric = weights.flag("symmetric", True)
    bits = weights.integer("num_bits", 8)
    if bits not in (4, 8) or (is_float and bits == 4):
        raise weights.refusal("num_bits", "8, or 4 for integers", _REMEDY)
    if form == "pack-quantized" and is_float:
        raise weights.refusal("type", "'int' with pack-quantized", _REMEDY)
    if form != "pack-quantized" and bits == 4:
        raise weights.refusal("num_bits", f"8 with {form}", _REMEDY)
    if bits == 8 and not symmetric:
        raise weights.refusal("symmetric", "true with 8 bits", _REMEDY)
    columns = None
    if strategy == "group":
        supported = _GROUPS if bits == 4 else (_BLOCK,)
        columns = weights.integer("group_size")
        if columns not in supported:
            raise weights.refusal("group_size", " or ".join(map(str, supported)), _REMEDY)
    if strategy == "block":
        weights.support("block_structure", [_BLOCK, _BLOCK], remedy=_REMEDY)
        columns = _BLOCK
    if bits == 4 and strategy in ("tensor", "block"):
        raise weights.refusal("strategy", "'group' or 'channel' with 4 bits", _REMEDY)
    rows = {"tensor": None, "block": _BLOCK}.get(strategy, 1)
    layout: Layout = "packed" if form == "pack-quantized" else "compressed"
    scheme = Scheme(layout, 4 if bits == 4 else 8, is_float, columns, rows, symmetric, _read_inputs(group, is_float))
    return _read_names(group, "targets"), scheme


def _default_strategy(weights: Section) -> Literal["tensor", "group", "channel"]:
    """Returns what a missing strategy means: it follows from the group's size."""
    size = weights.values.get("group_size")
    return "tensor" if size is None else "channel" if type(size) is int and size == -1 else "group"


def _read_inputs(group: Section, is_float: bool) -> Literal["full", "token", "static"]:
    """Reads how a product may round its inputs."""
    if not group.has("input_activations"):
        return "full"
    inputs = group.section("input_activations")
    inputs.support("num_bits", 8, remedy=_REMEDY)
    if is_float:
        inputs.support("type", "float", remedy=_REMEDY)
    inputs.support("actorder", None, remedy=_REMEDY)
    inputs.support("dynamic", False, True, "local", remedy=_REMEDY)
    if not inputs.values.get("dynamic", False):
        inputs.support("strategy", "tensor", None, remedy=_REMEDY)
        inputs.support("symmetric", True, remedy=_REMEDY)
        return "static"
    return "token" if is_float else "full"


def _read_kv_cache(config: Section) -> Literal["fp8", "int8"] | None:
    if not config.has("kv_cache_scheme"):
        return None
    scheme = config.section("kv_cache_scheme")
    scheme.support("num_bits", 8, remedy=_REMEDY)
    scheme.support("symmetric", True, remedy=_REMEDY)
    scheme.support("dynamic", False, remedy=_REMEDY)
    scheme.support("strategy", "tensor", None, remedy=_REMEDY)
    return "fp8" if scheme.choice("type", ("float", "int"), "int", remedy=_REMEDY) == "float" else "int8"


def _read_awq(config: Section, source: str) -> Quantization:
    """Reads what lmdeploy and AutoAWQ write. They quantise the layers of the language model, whatever else is there."""
    for key in ("bits", "w_bit"):
        if config.has(key):
            config.support(key, 4, remedy=_REMEDY)
    config.support("zero_point", True, remedy=_REMEDY)
    config.support("version", "gemm", "GEMM", None, remedy=_REMEDY)
    scheme = Scheme("awq", 4, group=_read_group_size(config, "q_group_size"), symmetric=False)
    return Quantization("awq", source, ((EVERY, scheme),), _not_converted(config), _LAYERS)


def _read_gptq(config: Section, source: str) -> Quantization:
    config.support("bits", 4, remedy=_REMEDY)
    config.support("lm_head", False, remedy=_REMEDY)
    config.support("dynamic", None, {}, remedy=_REMEDY)
    config.support("is_marlin_format", False, None, remedy=_REMEDY)
    keys = [key for key in ("checkpoint_format", "format") if config.has(key)]
    forms = {config.choice(key, ("gptq", "gptq_v2"), remedy=_REMEDY) for key in keys}
    if len(forms) > 1:
        raise config.refusal("format", "what checkpoint_format says", _REMEDY)
    scheme = Scheme(
        layout="gptq_v2" if "gptq_v2" in forms else "gptq",
        bits=4,
        group=_read_group_size(config, "group_size"),
        symmetric=config.has("sym") and config.flag("sym", False),
        is_reordered=config.has("desc_act") and config.flag("desc_act", False),
    )
    return Quantization("gptq", source, ((EVERY, scheme),), _not_converted(config), _LAYERS)


def _read_fp8(config: Section, source: str) -> Quantization:
    """Reads the fine-grained FP8 of transformers (DeepSeek's layout): blocks of 128 x 128."""
    if not config.has("weight_block_size"):
        raise config.refusal("weight_block_size", f"[{_BLOCK}, {_BLOCK}]", _REMEDY)
    config.support("weight_block_size", [_BLOCK, _BLOCK], remedy=_REMEDY)
    config.support("activation_scheme", "dynamic", remedy=_REMEDY)
    config.support("fmt", "e4m3", None, remedy=_REMEDY)
    scheme = Scheme(
        "compressed", 8, is_float=True, group=_BLOCK, block_rows=_BLOCK, inputs="token", scale_name="weight_scale_inv"
    )
    return Quantization("fp8", source, ((EVERY, scheme),), _not_converted(config), _PARTS)


def _read_group_size(config: Section, other_key: str) -> int | None:
    key = "group_size" if config.has("group_size") else other_key
    size = config.values.get(key)
    if config.has(other_key) and config.values[other_key] != size:
        raise config.refusal(other_key, f"what {key} says", _REMEDY)
    if type(size) is int and size == -1:
        return None
    size = config.integer(key, _BLOCK)
    if size not in _GROUPS:
        raise config.refusal(key, " or ".join(map(str, _GROUPS)) + ", or -1", _REMEDY)
    return size


def _not_converted(config: Section) -> Names:
    """Reads modules that stay dense; a module is one of them if its name contains one of these."""
    names = Names()
    for key in ("modules_to_not_convert", "ignored_layers"):
        read = _read_names(config, key)
        names = replace(names, parts=names.parts + tuple(read.whole), patterns=names.patterns + read.patterns)
    return names


def _read_names(section: Section, key: str) -> Names:
    """Reads a list of names, of "re:" and a pattern, or of "Linear", which is every linear."""
    values = section.values.get(key)
    if values is None:
        return Names()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise section.refusal(key, "a list of names")
    patterns = [value.removeprefix("re:") for value in values if value.startswith("re:")]
    if len(patterns) > _MAX_PATTERNS:
        raise section.refusal(key, f"at most {_MAX_PATTERNS} patterns", _REMEDY)
    whole = frozenset(value for value in values if not value.startswith("re:"))
    compiled = tuple(_compile(section, key, pattern) for pattern in patterns)
    return Names(whole - {"Linear"}, compiled, every="Linear" in whole)


def _compile(section: Section, key: str, pattern: str) -> re.Pattern[str]:
    """Compiles a pattern of an untrusted file. Raises ConfigError for one that could take long to match."""
    if _ways(pattern) > _MAX_WAYS:
        raise ConfigError(
            f"{section.file}: {section.path}{key} holds the pattern {quoted(pattern)}, which may take long to match; "
            "expected few repetitions and alternatives, and no repetition of a group; simplify it"
        )
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):  # of what Python will read otherwise
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise section.refusal(key, f"regular expressions after re:, not {quoted(pattern)} ({error})") from error


def _ways(pattern: str) -> float:
    """Returns a bound of the ways in which a name can be split among a pattern's repetitions and alternatives."""
    plain = re.sub(r"\\.|\[[^]]*\]", "x", pattern)  # without escapes and classes of characters
    repetitions = re.findall(r"(?<!\()[*+?{]", plain)
    # With the flag x, or a comment, a repetition of a group may stand anywhere behind it.
    if len(pattern) > 500 or re.search(r"\)[*+?{]|\(\?([a-zA-Z]*x|#)", plain):
        return math.inf
    ways, bars = float(math.comb(_NAME_LEN + len(repetitions), len(repetitions))), [1]
    for character in plain:
        if character == "(":
            bars.append(1)
        elif character == "|":
            bars[-1] += 1
        elif character == ")" and len(bars) > 1:
            ways *= bars.pop()
    return ways * math.prod(bars)
