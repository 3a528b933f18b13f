"""Loads a model and its critic, on a device each, or both on one whose memory they share by a plan."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from internvl_rt.critic.visual_prm import VisualPRM
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.loading import choose_device, load_parts, plan_parts
from internvl_rt.engine.memory import split_cache
from internvl_rt.engine.options import EngineOptions


def load_with_critic(
    model: str | Path,
    critic: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    critic_options: Mapping[str, Any] | None = None,
) -> tuple[Engine, VisualPRM]:
    """Loads a model and a VisualPRM. Raises what `Engine.from_pretrained` and `VisualPRM` raise.

    options, critic_options: keyword arguments of `Engine.from_pretrained` for each. If neither names a device and there
    are several GPUs, the critic gets the second one. On one device, each `kv_cache_bytes` that is not given is planned:
    both caches hold as many tokens, in what the two models leave.
    """
    first, second = EngineOptions(**options or {}), EngineOptions(**critic_options or {})
    if first.device == second.device == "auto" and torch.cuda.device_count() > 1:
        first, second = replace(first, device="cuda:0"), replace(second, device="cuda:1")
    device = choose_device(first.device)
    if _place(device) == _place(choose_device(second.device)):
        plans = plan_parts(model, first), plan_parts(critic, second)
        given = first.kv_cache_bytes is not None, second.kv_cache_bytes is not None
        shares = split_cache(plans, given, device)
        first, second = (
            replace(each, kv_cache_bytes=share) for each, share in zip((first, second), shares, strict=True)
        )
        # Raises here, where nothing is loaded, if a share does not hold a sequence of `max_model_len`.
        plan_parts(model, first), plan_parts(critic, second)
    engine = Engine(*load_parts(model, first), first)
    try:
        return engine, VisualPRM(Engine(*load_parts(critic, second), second))
    except BaseException:
        engine.close()
        raise


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0
