"""The program of a vision process: it loads the tower, and encodes tiles until the engine is gone."""

import json
from functools import partial

import torch

from internvl_rt.engine.child_process import Parent, run_child
from internvl_rt.engine.loading import load_tower
from internvl_rt.engine.options import read_facts
from internvl_rt.engine.ranks import device_of
from internvl_rt.engine.towers import Arena
from internvl_rt.steps.cpu_threads import CpuThreads
from internvl_rt.steps.cuda_graph import cuda_capture
from internvl_rt.steps.device_stream import DeviceStream, to_device
from internvl_rt.steps.tile_encoder import TileEncoder


def main(socket: int, number: int, file: int) -> None:
    """number: of this process among the vision processes. file: the open file of the memory for tiles."""
    run_child(socket, partial(_encode, number, file))


def _encode(number: int, file: int, parent: Parent) -> None:
    model, options = read_facts(parent.hear_facts())
    device = device_of(torch.device(options.vision_device), number)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else some memory of GPU 0 is taken as well
    tower = load_tower(model, options, device)
    arena, encoder, stream = Arena(tower.config, tower.dtype, file), TileEncoder(tower), DeviceStream(device)
    threads = CpuThreads(options.threads_of_rank) if device.type == "cpu" else None
    with stream.use():
        if tower.ops.captures_graphs and options.cuda_graphs and device.type == "cuda":
            jobs = encoder.prepare_graphs(tower.cut(2), cuda_capture(), everything=options.capture_all)
            for job in (*jobs[0], *jobs[1]):
                torch.inference_mode()(job.run)()
    parent.answer(None)
    while True:
        order = json.loads(parent.hear())
        place, num_tiles = order["place"], order["num_tiles"]
        tiles = arena.tiles(place, num_tiles, is_uint8=order["is_uint8"])
        with stream.use() if threads is None else threads.use():
            visual_IMD = encoder.encode(to_device(tiles, device))
            arena.visual(place, num_tiles).copy_(visual_IMD)  # waits for the device
        parent.answer(place)
