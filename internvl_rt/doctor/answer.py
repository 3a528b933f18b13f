"""Checks a whole engine: which backend it chooses here, and what the checkpoint in the package answers."""

from pathlib import Path

import torch

from internvl_rt.doctor.finding import Finding
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import load_parts
from internvl_rt.engine.options import EngineOptions
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.processor import instructions

SAMPLE = Path(__file__).parents[1] / "tiny" / "samples" / "4719.png"  # the file is named after the digits that it shows


def check_backend() -> Finding:
    """Finds the backend that `Engine.from_pretrained(model)` chooses here by default."""
    model, *_ = load_parts("tiny", EngineOptions(max_num_seqs=1))
    name, device = model.ops.name, model.device
    if device.type == "cpu":
        dtype = str(model.dtype).removeprefix("torch.")
        why = f"torch in {dtype}, for a processor with {instructions()}, as there is no GPU for the kernels"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        why = f"the kernels, as the GPU's compute capability {major}.{minor} is 8.0 or newer"
    return Finding("ok", f'"{name}": {why}', {"backend": name, "device": str(device)})


def check_answer(backend: str) -> Finding:
    """Asks the checkpoint in the package what its sample picture shows."""
    parts = [{"type": "image", "image": str(SAMPLE)}, {"type": "text", "text": "Read the digits."}]
    with Engine.from_pretrained("tiny", backend=backend, max_num_seqs=1) as engine:
        reply = engine.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=12))
        name, dtype = engine.model.ops.name, str(engine.model.dtype).removeprefix("torch.")
    facts = {"backend": name, "dtype": dtype, "answer": reply.text}
    how = f'with backend="{name}" in {dtype}'
    if reply.text == SAMPLE.stem:
        return Finding("ok", f"the checkpoint in the package reads {reply.text} in its sample picture, {how}", facts)
    what = f"the checkpoint in the package reads {reply.text!r} in its sample picture, expected {SAMPLE.stem!r}, {how}"
    other = 'try backend="torch", and report this' if name == "triton" else "report this"
    return Finding("failed", f"{what}; {other}", facts)
