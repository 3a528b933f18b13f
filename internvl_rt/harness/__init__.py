"""Adapters that evaluate a model in the common harnesses, lmms-eval and VLMEvalKit; neither needs a fork.

This module is imported by every program that lists the models of lmms-eval, so it imports nothing of the engine.
"""

from typing import Any

__all__ = ["lmms_eval_models"]


def lmms_eval_models() -> Any:
    """Describes the model `internvl_rt` to lmms-eval, which finds this function by its entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__name__}.lmms_eval"
    return ModelManifest(
        model_id="internvl_rt", chat_class_path=f"{module}.ChatModel", simple_class_path=f"{module}.SimpleModel"
    )
