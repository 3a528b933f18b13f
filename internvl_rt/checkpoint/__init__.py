"""What lies in a checkpoint folder: its configuration, and its tensors, which are checked before they are read.

What reads tensors loads on first use, so that a configuration is read, and a wrong name told, without torch.
"""

from typing import TYPE_CHECKING, Any

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig, VisionConfig, load_config
from internvl_rt.checkpoint.find import find_config, resolve_model

if TYPE_CHECKING:
    from internvl_rt.checkpoint.folder import Checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "DecoderConfig",
    "ModelConfig",
    "VisionConfig",
    "find_config",
    "load_config",
    "open_checkpoint",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'internvl_rt.checkpoint' has no attribute {name!r}")
    from internvl_rt.checkpoint import folder

    return getattr(folder, name)
