"""Lets long work end early, when nobody waits for it any more or its time is over."""

import time
from collections.abc import Callable

Proceed = Callable[[], None]  # called now and then by work; raises if the work should end


class LateError(Exception):
    """A call's time was over before it was prepared."""


def go_on() -> None:
    """Lets work proceed, whoever waits for it."""


def until(deadline_s: float) -> Proceed:
    """Lets work proceed up to a time by `perf_counter`, and raises LateError after it."""

    def proceed() -> None:
        if time.perf_counter() >= deadline_s:
            raise LateError

    return proceed


def both(first: Proceed, second: Proceed) -> Proceed:
    """Lets work proceed as long as two functions do."""

    def proceed() -> None:
        first()
        second()

    return proceed
