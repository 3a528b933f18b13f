"""A process that was forked after an engine was used is told so at the first call, and ends; nothing hangs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import internvl_rt
from internvl_rt import EngineDeadError
from support.calls import SHORT, ask, load

COMMON = """
import asyncio, gc, os, signal, sys, threading, time
import torch
torch.set_num_threads(2)
from internvl_rt import AsyncEngine, Engine, EngineDeadError, SamplingParams

MESSAGES = [{"role": "user", "content": "Hello"}]
PICTURE = [{"role": "user", "content": [{"type": "image", "image": torch.zeros(60, 60, 3, dtype=torch.uint8)}]}]
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=20, ignore_eos=True)

def in_child(act):
    '''Forks, and returns how the child ended: by its exit code, or -9 if it did not end by itself.'''
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        act()
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def is_refused(call):
    try:
        result = call()
        if hasattr(result, "__next__"):
            next(result)
    except EngineDeadError as error:
        assert "spawn" in str(error) and len(str(error).splitlines()) == 1, error
        return
    raise AssertionError(f"{call} was not refused")
"""

SYNC = """
CALLS = [
    lambda: engine.chat(MESSAGES), lambda: engine.chat(PICTURE), lambda: engine.stream(MESSAGES),
    lambda: engine.generate([MESSAGES]), lambda: engine.score(MESSAGES, ["x"]), lambda: engine.encode_images([]),
    lambda: engine.stats(), lambda: engine.prepare(PICTURE), lambda: engine.prepare_turns([], []),
    lambda: engine.generate_prepared(iter([prepared]), [LONG]), lambda: engine.trace(os.devnull).__enter__(),
    lambda: AsyncEngine(engine), lambda: Engine.from_pretrained("tiny"), lambda: AsyncEngine.from_pretrained("tiny"),
]

def use():
    for call in CALLS:
        is_refused(call)
    engine.close()

def leave_the_block():
    with engine:
        is_refused(engine.stats)

def forget():
    global engine, stream
    del engine, stream
    gc.collect()
    assert threading.active_count() == 1

def close_the_stream():
    stream.close()

def do_nothing():
    pass
"""

AFTER_USE = """
engine = Engine.from_pretrained("tiny", device="cpu")
prepared = engine.prepare(MESSAGES)
stream = engine.stream(MESSAGES, SHORT)
next(stream)
"""

DURING_GENERATION = (
    AFTER_USE
    + """
thread = threading.Thread(target=lambda engine: engine.chat(MESSAGES, LONG, timeout_s=20), args=(engine,), daemon=True)
thread.start()
time.sleep(0.2)
"""
)


def run(program):
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_to_spawn():
    with load(kv_cache_bytes=1 << 24) as engine:
        engine.chat(ask("Hello"), SHORT)
        child = os.fork()
        if child == 0:
            try:
                engine.chat(ask("Hello"), SHORT)
            except EngineDeadError as error:
                engine.close()
                os._exit(7 if "spawn" in str(error) else 8)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        engine.chat(ask("Hello"), SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("start", [AFTER_USE, DURING_GENERATION], ids=["after use", "during generation"])
def test_every_call_in_a_child_is_refused_and_the_child_ends(start):
    acts = "use, leave_the_block, forget, close_the_stream, do_nothing"
    program = f"{COMMON}{SYNC}{start}\nprint([in_child(act) for act in ({acts})])\nos._exit(0)"
    assert run(program) == "[7, 7, 7, 7, 7]\n"


@pytest.mark.slow
def test_the_parent_goes_on_after_its_child_has_used_and_closed_the_engine():
    program = f"{COMMON}{SYNC}{AFTER_USE}\nprint(in_child(use))\nprint(list(stream)[-1].reply.usage.completion_tokens)"
    assert run(program) == "7\n20\n"


REFUSED = """
from internvl_rt import RequestError

def is_wrong(error, **options):
    try:
        Engine.from_pretrained(**{"model": "tiny", "device": "cpu"} | options)
    except error:
        return
    raise AssertionError(f"{options} were not refused")

def load():
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        assert engine.chat(MESSAGES, SHORT).usage.completion_tokens == 20

"""


@pytest.mark.slow
def test_a_child_may_load_a_model_if_its_parent_was_refused_one(tmp_path):
    shutil.copytree(Path(internvl_rt.__file__).parent / "tiny", tmp_path / "tiny")
    next((tmp_path / "tiny").glob("*.safetensors")).unlink()
    program = f"""{COMMON}{REFUSED}
is_wrong(ValueError, model="no such folder")
is_wrong(ValueError, model={str(tmp_path / "tiny")!r})
is_wrong(RequestError, kv_cache_bytes=1)
print(in_child(load))
load()
print(in_child(lambda: is_refused(load)))
"""
    assert run(program) == "7\n7\n"


ASYNC = """
engine = AsyncEngine.from_pretrained("tiny", device="cpu")
event_loop = asyncio.new_event_loop()
stream = engine.stream(MESSAGES, LONG)
event_loop.run_until_complete(anext(stream))  # its request goes on
event_loop.run_until_complete(asyncio.sleep(0.1))  # more pieces arrive, which a child must not take

def use():
    async def main():
        is_refused(engine.stats)
        for call in (engine.chat(MESSAGES), engine.chat(PICTURE), anext(engine.stream(MESSAGES)),
                     anext(stream), engine.score(MESSAGES, ["x"]), engine.encode_images([])):
            try:
                await call
            except EngineDeadError as error:
                assert "spawn" in str(error), error
            else:
                raise AssertionError("the call was not refused")
        await engine.close()
        await engine.close()
    asyncio.run(main())

def leave_the_block():
    async def main():
        async with engine:
            pass
    asyncio.run(main())

def forget():
    global engine, stream
    del engine, stream
    gc.collect()

def do_nothing():
    pass

print([in_child(act) for act in (use, leave_the_block, forget, do_nothing)])
event_loop.run_until_complete(stream.aclose())
event_loop.run_until_complete(engine.close())
event_loop.close()
"""


@pytest.mark.slow
def test_every_call_of_asyncio_in_a_child_is_refused_and_the_child_ends():
    assert run(COMMON + ASYNC) == "[7, 7, 7, 7]\n"
