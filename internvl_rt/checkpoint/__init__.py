"""What lies in a checkpoint folder: its configuration, and its tensors, which are checked before they are read."""

from internvl_rt.checkpoint.config import DecoderConfig, ModelConfig, VisionConfig, load_config
from internvl_rt.checkpoint.folder import Checkpoint, find_config, open_checkpoint, resolve_model

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
