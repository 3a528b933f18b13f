"""The repository keeps its shape: one order of modules, named importers of each library, small files, no `utils`."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "internvl_rt"

# The modules from leaf to top, package by package: a module imports only modules before it in this list.
ORDER = """
: errors values
checkpoint: files json_section classes template template_walk chat_template quantization decoder_config config find
  tensor_file stored_zip torch_file folder __init__
inputs: grammar_source sampling_params identity proceed tiles media jpeg_scans decoding pil_picture foreign image mp4
  video snapshot slices tokenizer_files molecules segments tokenizer channels grammar_limits grammar marks messages
  thinking prompt position places picture flash raw_prompt prepared prepare __init__
kernels: _launch _contract _kv_numbers layer_norm rms_norm add_norm swiglu _fp8_rows quantise_rows rms_norm_fp8
  swiglu_fp8 _numbers_8bit _int4 dequantise _plans _gemm_epilogue_body gemm_epilogue resize_tiles patch_embed
  embed_tokens unshuffle_norm _unshuffle_project_body unshuffle_project _rope qkv_rope_kv _gemv_pipelined _gemv_body
  _gemv_qkv_body _gemv_plan gemv _gemv_4bit_body gemv_4bit gemv_8bit _gemm_fp8_body gemm_fp8 gemv_qkv copy_blocks
  _sample_numbers _sample_body sample _route_experts_body route_experts _expert_product_body _expert_4bit_body
  _expert_plan _expert_cases expert_gate_up expert_down _softmax _vit_attention_body vit_attention
  _paged_attention _split_plan _split_combine _decode_attention_body _decode_attention_cases decode_attention
  _prefill_plan _prefill_attention_body _prefill_attention_cases prefill_attention
  _check _probes catalogue
: operators
model: work shard linear step_inputs ops processor products_cpu products_cpu_quantised attention_cpu ops_cpu ops_triton
  ops_invariant vision projector flash decoder internvl sharded dialects placement stored_linear weights
  random_checkpoint card __init__
steps: speculation device_stream cpu_threads sequence visual_cache uploads decodes kv_pool kv_cache step orders
  scheduler sampler logprobs cuda_graph step_graph tile_encoder executor graph_steps runner follower __init__
engine: failures options host_memory memory children child_process one_shot rank_group ranks towers loading
  rank_process vision_process reply channel_text trace request sequences in_flight loop encoding flash pictures batch
  worker preparing core scoring voting best_of engine async_engine __init__
critic: engine_critic visual_prm judge pairing preference pair_file rollouts official __init__
: compat arguments terminal
harness: answers lmms_eval vlmevalkit __init__
server: options arguments fault protocol body remote media tools thinking reader ask answer items call keys log
  metrics gate service chat completions responses decisions tokens models page app receiving connection life command
  __init__
serve_ray: choice holdings in_process metrics_text options prompts front autoscaling router replica ingress deployments
  __init__
bench: document roofs plots record timing roofline kernel_cases attention_baselines kernel_baselines kernels prompts
  vision prefill decode pictures arrivals client loopback serve command arguments __init__
quantize: options questions rounding search source section calibration layer layer_file unfinished agreement
  quantising command __init__
doctor: finding machine kernels answer checks process command __init__
: kernel_list completion chat best_of cli __init__ __main__
"""


def _read_order() -> Iterator[str]:
    for block in re.split(r"\n(?! )", ORDER.strip()):
        package, _, names = block.partition(":")
        yield from (f"{package}.{name}".lstrip(".") for name in names.split())


MODULES = list(_read_order())

SERVER = [name for name in MODULES if name.startswith("server.")]

# The modules that may import each library. Any module may import a library that is not listed here.
HOMES = {
    "internvl_rt._C": ["steps.kv_cache", "doctor.machine"],
    "PIL": ["inputs.tiles", "inputs.decoding", "inputs.pil_picture", "inputs.image", "inputs.video", "inputs.snapshot"],
    "av": ["inputs.video"],
    "httptools": ["server.remote"],
    "huggingface_hub": ["checkpoint.find"],
    "jinja2": ["checkpoint.template_walk"],
    "lmms_eval": ["harness.lmms_eval", "harness.__init__"],
    "llguidance": ["inputs.grammar"],
    **dict.fromkeys(("msgspec", "prometheus_client", "pybase64", "starlette"), SERVER),
    "pickle": [],
    "pickletools": ["checkpoint.torch_file"],
    "ray": [f"serve_ray.{name}" for name in ("autoscaling", "router", "replica", "ingress", "deployments")],
    "safetensors": ["checkpoint.tensor_file"],
    "shtab": ["completion"],
    "sentencepiece": ["inputs.tokenizer_files"],
    "tokenizers": ["inputs.tokenizer_files", "inputs.tokenizer"],
    "torch.distributed": ["engine.one_shot", "engine.rank_group"],
    "transformers": [],
    "vlmeval": ["harness.vlmevalkit"],
    "uvicorn": ["server.connection", "server.life", "server.receiving"],
    "triton": [*(name for name in MODULES if name.startswith("kernels.")), "doctor.machine"],
}
# What quantised weights are, the tables of operations, torch's operators, the catalogue, the checks, the benches.
CALLERS_OF_KERNELS = {
    *(f"model.{name}" for name in ("linear", "stored_linear", "attention_cpu", "products_cpu_quantised")),
    *(f"model.ops{name}" for name in ("", "_cpu", "_triton", "_invariant")),
    *("doctor.kernels", "operators", "kernel_list"),
    *(f"bench.{name}" for name in ("roofline", "kernel_cases", "attention_baselines", "kernel_baselines", "kernels")),
}
JUNK_DRAWERS = {"base", "common", "helper", "helpers", "misc", "util", "utils"}
MAX_LINES = 400


def module_path(name: str) -> Path:
    return PACKAGE / Path(*name.split(".")).with_suffix(".py")


@cache
def imported_names(name: str) -> tuple[str, ...]:
    """Lists the dotted names of all that a module imports, inside functions too; `from a import b` gives `a.b`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(module_path(name).read_text())):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write the import in full, from internvl_rt"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(found)


def internal_module(dotted: str) -> str | None:
    """Returns the package's module of an imported name, `model.ops` for `internvl_rt.model.ops.TORCH`, or None."""
    package, *parts = dotted.split(".")
    if package != "internvl_rt" or parts[:1] == ["_C"]:
        return None
    known = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    known += [f"{parts[0]}.__init__"] if parts else []
    return next((name for name in known if name in MODULES), "__init__")


def test_the_modules_of_a_package_stand_together() -> None:
    packages = [package for package, _ in groupby(name.rpartition(".")[0] for name in MODULES) if package]
    assert len(packages) == len(set(packages))


def test_every_module_is_in_the_list_once() -> None:
    walk = os.walk(PACKAGE, followlinks=True)
    files = [(Path(folder) / file).relative_to(PACKAGE) for folder, _, names in walk for file in names]
    modules = {".".join(file.with_suffix("").parts) for file in files if file.suffix == ".py"}
    assert modules ^ set(MODULES) == set()
    assert len(MODULES) == len(modules)


def test_a_module_imports_only_modules_above_it_in_the_list() -> None:
    strays = {
        name: sorted(below)
        for place, name in enumerate(MODULES)
        if (below := set(map(internal_module, imported_names(name))) - {None, *MODULES[:place]})
    }
    assert strays == {}


def test_a_library_is_imported_only_in_its_home() -> None:
    strays = {
        (name, library)
        for name in MODULES
        for dotted in imported_names(name)
        for library, homes in HOMES.items()
        if name not in homes and f"{dotted}.".startswith(f"{library}.")
    }
    assert strays == set()


def test_a_kernel_is_called_through_the_table_of_operations() -> None:
    others = {name for name in MODULES if not name.startswith("kernels.")} - CALLERS_OF_KERNELS
    imported = [(name, internal_module(dotted) or "") for name in others for dotted in imported_names(name)]
    assert {name for name, module in imported if module.startswith("kernels.")} == set()


def test_no_module_reads_the_environment() -> None:
    readers = []
    for name in MODULES:
        nodes = ast.walk(ast.parse(module_path(name).read_text()))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {dotted.rpartition(".")[2] for dotted in imported_names(name)}
        readers += [name] if names & {"environ", "environb", "getenv", "putenv"} else []
    assert readers == []


def test_the_model_can_be_imported_without_what_requests_and_the_scheduler_need() -> None:
    others = ("internvl_rt._C", "internvl_rt.inputs", "internvl_rt.steps", "internvl_rt.engine")
    others += ("PIL", "av", "llguidance", "tokenizers", "transformers")
    code = f"import sys, internvl_rt.model; print([name for name in {others} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_kernels_are_a_link_and_not_a_package_of_their_own() -> None:
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_files_are_small_and_say_what_they_hold() -> None:
    folders = ["internvl_rt", "kernels", "csrc", "tests", "bench"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".h", ".cpp"}]
    assert len(files) > len(MODULES)
    assert not [path for path in files if path.stem in JUNK_DRAWERS]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert not {str(path): length for path, length in lengths.items() if length >= MAX_LINES}
