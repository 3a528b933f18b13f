"""Trains the checkpoint that ships in the package as model `tiny`, on the CPU, and measures it.

    .venv/bin/python tests/train_tiny.py --out /tmp/tiny

Everything but the loss is the package's own: tiles, prompts, V2PE positions, the model and its reference operations.
Each picture's V2PE delta is drawn anew for every step from 1, 1/2, ..., 1/256, as in native V2PE pre-training.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from support.digits import COMPARE, COUNT, MAX_DIGITS, READ, Exercise, draw_comparison, draw_reading, load_glyphs
from support.tiny_files import CONFIG, write_config, write_tokenizer, write_weights
from torch import Tensor

from internvl_rt.config import ModelConfig, load_config
from internvl_rt.image import ImageOptions, tile_image
from internvl_rt.kv_cache import LayerCache
from internvl_rt.model.internvl import InternVL, ModelWeights, build_weights, named_parameters
from internvl_rt.ops import TORCH
from internvl_rt.position import STRIDES, build_positions
from internvl_rt.prompt import VisualSpan, build_prompt, parse_messages, turns_from_messages
from internvl_rt.step import StepInputs
from internvl_rt.tokenizer import Tokenizer, load_tokenizer
