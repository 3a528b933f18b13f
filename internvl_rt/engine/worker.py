"""The thread that runs the steps of an AsyncEngine: what it does, and how it is woken up and ended."""

import logging
import threading
from queue import SimpleQueue

from internvl_rt.engine.loop import StepLoop

LOG = logging.getLogger("internvl_rt")


class WakeUps:
    """Wakes the worker thread up, and tells it when to stop.

    The garbage collector may call it in the middle of any other call, even of one to this object. In the standard
    library only SimpleQueue is made for that.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._queue: SimpleQueue[None] = SimpleQueue()

    def wake(self) -> None:
        self._queue.put(None)

    def stop(self) -> None:
        self.stopped = True
        self.wake()

    def wait(self) -> None:
        """Waits for work; returns once for each call of `wake`."""
        self._queue.get()


def run_steps(steps: StepLoop, wake_ups: WakeUps) -> None:
    try:
        while not wake_ups.stopped:
            if not steps.step():
                wake_ups.wait()
        steps.close()
    except BaseException as error:
        LOG.exception("the thread that runs the engine's steps has died")
        steps.fail_worker(error)


def stop_worker(wake_ups: WakeUps, thread: threading.Thread) -> None:
    """Runs when an AsyncEngine is closed or collected as garbage, or when the interpreter ends."""
    wake_ups.stop()
    if not threading.main_thread().is_alive():  # the interpreter ends, and would cut the thread off within a step
        thread.join()
