"""The repository keeps its shape: one order of modules, named importers of each library, small files, no `utils`."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "internvl_rt"

# The modules from leaf to top: a module imports only modules above it in this list.
MODULES = [
    "errors",
    "values",
    "checkpoint.files",
    "checkpoint.json_section",
    "checkpoint.template_walk",
    "checkpoint.chat_template",
    "checkpoint.quantization",
    "checkpoint.config",
    "checkpoint.find",
    "checkpoint.tensor_file",
    "checkpoint.stored_zip",
    "checkpoint.torch_file",
    "checkpoint.folder",
    "checkpoint.__init__",
    "inputs.grammar_source",
    "inputs.sampling_params",
    "inputs.identity",
    "inputs.proceed",
    "inputs.tiles",
    "inputs.media",
    "inputs.jpeg_scans",
    "inputs.decoding",
    "inputs.pil_picture",
    "inputs.foreign",
    "inputs.image",
    "inputs.mp4",
    "inputs.video",
    "inputs.snapshot",
    "inputs.slices",
    "inputs.tokenizer_files",
    "inputs.tokenizer",
    "inputs.grammar_limits",
    "inputs.grammar",
    "inputs.messages",
    "inputs.prompt",
    "inputs.position",
    "inputs.places",
    "inputs.picture",
    "inputs.raw_prompt",
    "inputs.prepare",
    "inputs.__init__",
    "kernels._launch",
    "kernels._contract",
    "kernels._kv_numbers",
    "kernels.layer_norm",
    "kernels.rms_norm",
    "kernels.add_norm",
    "kernels.swiglu",
    "kernels._fp8_rows",
    "kernels.quantise_rows",
    "kernels.rms_norm_fp8",
    "kernels.swiglu_fp8",
    "kernels._numbers_8bit",
    "kernels._int4",
    "kernels.dequantise",
    "kernels._plans",
    "kernels._gemm_epilogue_body",
    "kernels.gemm_epilogue",
    "kernels.resize_tiles",
    "kernels.patch_embed",
    "kernels.embed_tokens",
    "kernels.unshuffle_norm",
    "kernels._unshuffle_project_body",
    "kernels.unshuffle_project",
    "kernels._rope",
    "kernels.qkv_rope_kv",
    "kernels._gemv_pipelined",
    "kernels._gemv_body",
    "kernels._gemv_qkv_body",
    "kernels._gemv_plan",
    "kernels.gemv",
    "kernels._gemv_4bit_body",
    "kernels.gemv_4bit",
    "kernels.gemv_8bit",
    "kernels._gemm_fp8_body",
    "kernels.gemm_fp8",
    "kernels.gemv_qkv",
    "kernels.copy_blocks",
    "kernels._sample_numbers",
    "kernels._sample_body",
    "kernels.sample",
    "kernels._softmax",
    "kernels._vit_attention_body",
    "kernels.vit_attention",
    "kernels._paged_attention",
    "kernels._split_plan",
    "kernels._split_combine",
    "kernels._decode_attention_body",
    "kernels.decode_attention",
    "kernels._prefill_plan",
    "kernels._prefill_attention_body",
    "kernels.prefill_attention",
    "kernels._check",
    "kernels._probes",
    "kernels.catalogue",
    "operators",
    "model.linear",
    "model.step_inputs",
    "model.ops",
    "model.processor",
    "model.products_cpu",
    "model.products_cpu_quantised",
    "model.attention_cpu",
    "model.ops_cpu",
    "model.ops_triton",
    "model.ops_invariant",
    "model.vision",
    "model.projector",
    "model.decoder",
    "model.internvl",
    "model.dialects",
    "model.stored_linear",
    "model.work",
    "model.weights",
    "model.random_checkpoint",
    "model.card",
    "model.__init__",
    "steps.speculation",
    "steps.device_stream",
    "steps.cpu_threads",
    "steps.sequence",
    "steps.visual_cache",
    "steps.uploads",
    "steps.decodes",
    "steps.kv_cache",
    "steps.step",
    "steps.scheduler",
    "steps.sampler",
    "steps.logprobs",
    "steps.cuda_graph",
    "steps.step_graph",
    "steps.runner",
    "steps.__init__",
    "engine.failures",
    "engine.options",
    "engine.host_memory",
    "engine.memory",
    "engine.loading",
    "engine.reply",
    "engine.trace",
    "engine.request",
    "engine.sequences",
    "engine.in_flight",
    "engine.loop",
    "engine.pictures",
    "engine.batch",
    "engine.worker",
    "engine.preparing",
    "engine.core",
    "engine.scoring",
    "engine.voting",
    "engine.best_of",
    "engine.engine",
    "engine.async_engine",
    "engine.__init__",
    "critic.engine_critic",
    "critic.visual_prm",
    "critic.judge",
    "critic.pairing",
    "critic.preference",
    "critic.pair_file",
    "critic.rollouts",
    "critic.official",
    "critic.__init__",
    "compat",
    "arguments",
    "terminal",
    "harness.answers",
    "harness.lmms_eval",
    "harness.vlmevalkit",
    "harness.__init__",
    "server.options",
    "server.arguments",
    "server.fault",
    "server.protocol",
    "server.body",
    "server.remote",
    "server.media",
    "server.tools",
    "server.thinking",
    "server.reader",
    "server.ask",
    "server.answer",
    "server.items",
    "server.call",
    "server.keys",
    "server.log",
    "server.metrics",
    "server.service",
    "server.chat",
    "server.completions",
    "server.responses",
    "server.decisions",
    "server.tokens",
    "server.models",
    "server.page",
    "server.app",
    "server.receiving",
    "server.connection",
    "server.life",
    "server.command",
    "server.__init__",
    "bench.document",
    "bench.roofs",
    "bench.plots",
    "bench.record",
    "bench.timing",
    "bench.roofline",
    "bench.kernel_cases",
    "bench.attention_baselines",
    "bench.kernel_baselines",
    "bench.kernels",
    "bench.prompts",
    "bench.vision",
    "bench.prefill",
    "bench.decode",
    "bench.pictures",
    "bench.arrivals",
    "bench.client",
    "bench.loopback",
    "bench.serve",
    "bench.command",
    "bench.arguments",
    "bench.__init__",
    "quantize.options",
    "quantize.questions",
    "quantize.rounding",
    "quantize.search",
    "quantize.source",
    "quantize.section",
    "quantize.calibration",
    "quantize.layer",
    "quantize.layer_file",
    "quantize.unfinished",
    "quantize.agreement",
    "quantize.quantising",
    "quantize.command",
    "quantize.__init__",
    "doctor.finding",
    "doctor.machine",
    "doctor.kernels",
    "doctor.answer",
    "doctor.checks",
    "doctor.process",
    "doctor.command",
    "doctor.__init__",
    "kernel_list",
    "completion",
    "chat",
    "best_of",
    "cli",
    "__init__",
    "__main__",
]

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
    "safetensors": ["checkpoint.tensor_file"],
    "shtab": ["completion"],
    "sentencepiece": ["inputs.tokenizer"],
    "tokenizers": ["inputs.tokenizer_files", "inputs.tokenizer"],
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


def imported_names(name: str) -> Iterator[str]:
    """Yields the dotted names of all that a module imports, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(module_path(name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: write the import in full, from internvl_rt"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_above_it_in_the_list(name: str) -> None:
    internal = {module for module in map(internal_module, imported_names(name)) if module}
    assert internal <= set(MODULES[: MODULES.index(name)])


@pytest.mark.parametrize("name", MODULES)
def test_a_library_is_imported_only_in_its_home(name: str) -> None:
    strays = {
        library
        for dotted in imported_names(name)
        for library, homes in HOMES.items()
        if name not in homes and f"{dotted}.".startswith(f"{library}.")
    }
    assert not strays


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_is_called_through_the_table_of_operations(name: str) -> None:
    packages = {(internal_module(dotted) or "").partition(".")[0] for dotted in imported_names(name)}
    assert "kernels" not in packages or name.startswith("kernels.") or name in CALLERS_OF_KERNELS


@pytest.mark.parametrize("name", MODULES)
def test_no_module_reads_the_environment(name: str) -> None:
    nodes = ast.walk(ast.parse(module_path(name).read_text()))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {dotted.rpartition(".")[2] for dotted in imported_names(name)}
    assert not names & {"environ", "environb", "getenv", "putenv"}


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
