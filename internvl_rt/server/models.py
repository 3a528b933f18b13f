"""`GET /v1/models`, and what tells machines how the server is: /health, /ready, /version, /metrics."""

from importlib.metadata import version

import torch

from internvl_rt.inputs.thinking import can_think
from internvl_rt.server.answer import Json
from internvl_rt.server.call import Call
from internvl_rt.server.fault import ENGINE_DEAD, ApiError
from internvl_rt.server.metrics import CONTENT_TYPE
from internvl_rt.server.service import Service


async def models(service: Service, call: Call) -> None:
    """Lists the model under each of its names."""
    await call.send_json({"object": "list", "data": [_entry(service, name) for name in service.names]})


async def model(service: Service, call: Call) -> None:
    """Describes one model; its name may hold slashes, and stands in the path."""
    name = call.path.removeprefix("/v1/models/")
    service.check_model(name)
    await call.send_json(_entry(service, name))


async def health(service: Service, call: Call) -> None:
    """Says whether the engine lives: 200, or 503 when the process has to be started again."""
    if not service.is_alive:
        raise ApiError(503, ENGINE_DEAD, "engine_dead")
    await call.send_json({"status": "ok"})


async def ready(service: Service, call: Call) -> None:
    """Says whether new requests are taken: 503 while the server ends."""
    if service.draining:
        raise ApiError(503, "the server is being stopped", "shutting_down", headers={"retry-after": "5"})
    await health(service, call)


async def show_version(service: Service, call: Call) -> None:
    await call.send_json({"version": version("internvl-rt")})


async def metrics(service: Service, call: Call) -> None:
    await call.answer(service.metrics.render(), CONTENT_TYPE)


def _entry(service: Service, name: str) -> Json:
    core, options = service.core, service.options
    device = torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else "cpu"
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "internvl_rt",
        "root": service.names[0],
        "max_model_len": core.max_model_len,
        "device": device,
        "dtype": str(core.model.dtype).removeprefix("torch."),
        "thinking": can_think(core.config),
        "sampling_defaults": {
            "temperature": options.default_temperature,
            "top_p": options.default_top_p,
            "max_tokens": options.default_max_tokens,
        },
        "limits": {
            "max_tokens": options.max_tokens or core.max_model_len,
            "max_images": options.max_media,
            "max_image_bytes": core.options.max_image_bytes,
            "max_body_bytes": options.max_body_bytes,
            "max_n": options.max_n,
        },
    }
