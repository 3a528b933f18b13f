"""Runs a scheduler with a cache and without a runner, for its tests."""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from internvl_rt.inputs.picture import Picture
from internvl_rt.inputs.prompt import VisualSpan
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.ops import TORCH
from internvl_rt.steps.kv_cache import KVCache
from internvl_rt.steps.scheduler import Scheduler
from internvl_rt.steps.sequence import Sequence
from internvl_rt.steps.step import StepArrays, plan_step, shape_of
from support.small_models import QWEN2

CONFIG = replace(QWEN2, max_position=1000)
BLOCK = 16
ids = itertools.count()


def make(num_prompt, *, spans=(), max_tokens=4, n=1, num_tiles=1, drafter=None, identity=None, places=None):
    pictures = tuple(
        Picture(bytes(32), num_tiles, tiles=torch.zeros(1, 3, 2, 2), span=VisualSpan(start, size))
        for start, size in spans
    )
    made = [
        Sequence(
            seq_id=next(ids),
            token_ids=[0] * num_prompt,
            position_T=np.arange(num_prompt, dtype=np.float32),
            next_position=num_prompt,
            pictures=pictures,
            params=SamplingParams(max_tokens=max_tokens),
            max_tokens=max_tokens,
            stop_ids=frozenset(),
            seed=0,
            identity=identity,
            places=places,
            drafter=drafter,
        )
        for _ in range(n)
    ]
    made[0].siblings = made[1:]
    return made[0]


class Bench:
    """A scheduler with a cache and without a runner: it counts the tokens that a runner would compute."""

    def __init__(self, *sequences, num_blocks=64, max_num_seqs=8, budget=10, tiles=1 << 30, double=math.inf):
        device = torch.device("cpu")
        self.cache = KVCache(
            CONFIG, num_blocks=num_blocks, block_size=BLOCK, dtype=torch.float32, device=device, ops=TORCH
        )
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=max_num_seqs,
            max_tokens_per_step=budget,
            max_tiles_per_step=tiles,
            double_cost_context=double,
        )
        self.names = {}
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence):
        for each in (sequence, *sequence.siblings):
            self.names[each.seq_id] = len(self.names)
        self.scheduler.add(sequence)

    def launch(self, *, in_flight=False):
        """Launches a step; returns its chunks as (name, start, stop), and the function that collects it."""
        scheduled = self.scheduler.schedule(in_flight=in_flight)
        if scheduled is None:
            return None, lambda: None
        step = plan_step(*scheduled)
        if not step.sequences:
            return [], lambda: None
        shape = shape_of(step, self.cache)
        StepArrays(shape, np.empty(shape.size, np.int32)).fill(step, self.cache)
        number = self.cache.blocks.num_steps
        draws = step.draws
        decodes = [(s, s.num_computed, s.num_computed + 1) for s in step.decodes.sequences]
        self.scheduler.launched(step)

        def collect():
            self.cache.end_step(number)
            self.scheduler.publish(step.sequences)
            for draw in draws:
                draw.sequence.token_ids.append(draw.counter)
            self.cache.blocks.check_invariants()

        chunks = [*decodes, *(chunk[:3] for chunk in step.chunks)]
        return [(self.names[sequence.seq_id], start, stop) for sequence, start, stop in chunks], collect

    def step(self):
        chunks, collect = self.launch()
        collect()
        return chunks

    def steps(self, number):
        return [self.step() for _ in range(number)]

    def end(self, sequences):
        """Ends the sequences that have drawn all their tokens; returns the others."""
        ended = [each for each in sequences if each.num_tokens - each.num_prompt >= each.max_tokens]
        for each in ended:
            self.scheduler.remove(each)
        return [each for each in sequences if each not in ended]

    def steps_to_end(self, sequences):
        """Runs steps until the sequences have ended; returns how many there were."""
        left = list(sequences)
        for number in range(1, 1000):
            self.step()
            if not (left := self.end(left)):
                return number
        raise AssertionError("they do not end")
