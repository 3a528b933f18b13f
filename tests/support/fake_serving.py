"""Runs engines on the stand-in for CUDA, in the environment that `fake_driver.fake_environment` makes.

    python tests/support/fake_serving.py OPTIONS [MISTAKE]     OPTIONS: the engine's, as JSON; MISTAKE: one of MISTAKES

Prints one JSON object: the host's waits, the uses of memory without an order, the steps, launches and graph replays.
"""

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import internvl_rt
from internvl_rt import Engine, RequestError, SamplingParams
from internvl_rt.engine.loop import StepLoop
from internvl_rt.kernels._launch import Launch
from internvl_rt.steps import device_stream, executor, kv_pool, logprobs, runner, sampler, step, uploads
from internvl_rt.steps.device_stream import Arriving, DeviceStream
from internvl_rt.steps.runner import Runner
from support.fake_cuda import CudaMode, DeviceTensor, use_fake_cuda
from support.fake_device import MACHINE
from support.fake_driver import use_fake_driver
from support.fake_ranks import follow, use_fake_ranks

SAMPLE = Path(internvl_rt.__file__).parent / "tiny" / "samples" / "4719.png"
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "kv_cache_bytes": 4 << 20,
    "max_num_seqs": 4,
    "max_model_len": 1024,
    "max_tokens_per_step": 200,
}


def copy_and_wait(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.to(device)


def replace_everywhere(name: str, value: object) -> None:
    for module in (device_stream, executor, kv_pool, logprobs, runner, sampler, step, uploads):
        if hasattr(module, name):
            setattr(module, name, value)


MISTAKES: dict[str, Callable[[], None]] = {
    "copies from pageable memory": lambda: replace_everywhere("to_device", copy_and_wait),
    "results copied to pageable memory": lambda: replace_everywhere("to_host", lambda tensor: tensor.to("cpu")),
    "no stream of its own": lambda: setattr(DeviceStream, "use", lambda self: torch.cuda.stream(MACHINE.stream)),
    "pictures not waited for": lambda: setattr(Arriving, "get", lambda self: self.tensor),
    "results handed over in no order": lambda: setattr(DeviceStream, "hand_over", lambda self, tensor: tensor),
    "memory used elsewhere forgotten": lambda: setattr(DeviceTensor, "record_stream", lambda self, stream: None),
    "weights taken in no order": lambda: setattr(DeviceStream, "adopt", lambda self, tensors: None),
}


def watch() -> Counter[str]:
    """Names the phases of a step; counts the launched steps, and those launched while another step was in flight."""
    counts: Counter[str] = Counter()

    def during(owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            with MACHINE.during(phase):
                return original(self, *args, **kwargs)

        setattr(owner, name, watched)

    during(StepLoop, "_step", "between launches")
    during(Runner, "launch", "launch")
    during(Runner, "collect", "collect")
    launch = StepLoop._launch

    def counted(self: StepLoop, *scheduled: Any) -> None:
        counts["launches"] += 1
        counts["ahead"] += bool(self._launched)
        counts["mixed"] += all(scheduled)  # sequences decode beside prompts
        launch(self, *scheduled)

    StepLoop._launch = counted  # type: ignore[method-assign]
    return counts


def ask(engine: Engine, rng: random.Random) -> None:
    """Sends requests of every kind, alone and together, from a thread that changes its CUDA stream."""

    def message(*parts: dict[str, Any], words: int = 20) -> list[dict[str, Any]]:
        text = {"type": "text", "text": "a " * rng.randint(1, words)}
        return [{"role": "user", "content": [*parts, text]}]

    picture = {"type": "image", "image": str(SAMPLE)}

    def noise() -> dict[str, Any]:
        side = rng.choice((30, 90))
        pixels = np.random.default_rng(rng.randint(0, 99)).integers(0, 256, (side, 70, 3), dtype=np.uint8)
        return {"type": "image", "image": pixels}

    some = {"max_tokens": 6, "ignore_eos": True}
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_k": 5, "n": 2},
        {"logprobs": 2, "prompt_logprobs": 1, "logit_bias": {3: 1.0, 5: -1.0}},
        {"temperature": 0.7, "repetition_penalty": 1.1, "min_tokens": 2},
    ]
    params = [SamplingParams(**some | kind) for kind in kinds]
    for each in params:
        engine.chat(message(picture), each)
    with torch.cuda.stream(torch.cuda.Stream()):
        engine.generate([message(noise(), words=200) for _ in range(12)], params * 3)
        embeds = engine.encode_images([SAMPLE, noise()["image"]])
        changed = [each * 2 for each in embeds]  # the caller computes this on its own stream
        parts = [{"type": "image_embeds", "image_embeds": each} for each in changed]
        parts.append({"type": "image_embeds", "image_embeds": changed[0].float().cpu()})
        del changed
        engine.chat(message(*parts), params[0])
        del parts, embeds
        pictures = engine.preparer.open_images([noise()["image"] for _ in range(3)])
        noises = [engine.loop.encode(each, "nobody else's") for each in pictures]  # nothing waits for these
        sums = [each.sum() for each in noises]
        del noises  # the caller's stream may still read them now
        engine.visual_cache._entries.clear()
    del sums
    engine.generate([message(noise(), noise(), words=400) for _ in range(5)], params[0])
    begun = engine.stream(message(picture), params[0])
    next(begun)
    with torch.cuda.stream(torch.cuda.Stream()):  # a step that was launched from the other stream is still under way
        engine.chat(message(), params[0])
    engine.score(message(picture), ["a b", "c " * rng.randint(1, 200), "d", "e"])  # the prompt forks, and forks wait
    engine.best_of(message(noise()), 3, critic=lambda *_: 0.5, params=SamplingParams(**some, temperature=1.0))
    for _ in begun:
        pass
    with suppress(RequestError):  # nothing is computed, so each draw gives the same token, which breaks the grammar
        engine.chat(message(), SamplingParams(**some, regex="[0-9]+"))


def switched_on(launch: Launch) -> list[str]:
    """Returns what an engine's experiments turned on in a launch."""
    on = [name for name in ("EARLY", "PREFETCH_KEYS") if launch.constexprs.get(name)]
    return on + [name for name in ("next_weight", "later_weight") if name in launch.args]


def serve(options: dict[str, Any]) -> None:
    with Engine.from_pretrained("tiny", **options) as engine:
        MACHINE.waits.clear()
        MACHINE.launches.clear()
        ask(engine, random.Random(0))


def serve_while_another_is_built(options: dict[str, Any]) -> None:
    """Serves with one engine in its own thread while a second engine is built, then sends requests to both in turn."""
    first = Engine.from_pretrained("tiny", **options)
    built = threading.Event()

    def go_on() -> None:
        with CudaMode():
            rng = random.Random(2)
            while not built.is_set():
                ask(first, rng)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        second = Engine.from_pretrained("tiny", **options)
    finally:
        built.set()
        thread.join()
    for engine in (first, second, first):
        ask(engine, random.Random(3))


if __name__ == "__main__":
    use_fake_driver()
    mode = use_fake_cuda()
    counts = watch()
    options = OPTIONS | json.loads(sys.argv[1])
    if (size := options.get("tensor_parallel_size", 1)) > 1:
        use_fake_ranks(size)
    for mistake in sys.argv[2:]:
        MISTAKES[mistake]()
    followed: dict[str, Any] = {}
    with mode:
        serve(options)
        waits = Counter(f"{wait['what']}, {wait['phase']}" for wait in MACHINE.waits)
        launches = Counter(launch.kernel.__name__ for launch in MACHINE.launches)
        early = Counter(launch.kernel.__name__ for launch in MACHINE.launches if launch.pdl)
        on = Counter(f"{launch.kernel.__name__}: {name}" for launch in MACHINE.launches for name in switched_on(launch))
        graphs = MACHINE.num_replays
        if size > 1:  # what was found so far is of rank 0
            MACHINE.waits.clear()
            MACHINE.launches.clear()
            followed = {"orders": follow(options), "replays": MACHINE.num_replays - graphs}
            followed["launches"] = Counter(launch.kernel.__name__ for launch in MACHINE.launches)
            waits |= Counter(f"{wait['what']}, {wait['phase']}" for wait in MACHINE.waits)
        if not sys.argv[2:] and options == OPTIONS:
            serve_while_another_is_built(options)
    found = {"waits": waits, "races": Counter(MACHINE.races), "steps": counts, "followed": followed}
    print(json.dumps(found | {"launches": launches, "early": early, "on": on, "replays": graphs}))
