"""Lets hypothesis choose the driver's operations.

    python tests/paged_kv_cache/machine.py

looks for a failure and shrinks it to few operations, which takes minutes; the test stops at the first failure.
"""

import sys
from functools import cache
from pathlib import Path

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent.parent))
from paged_kv_cache.driver import OPERATIONS, Driver, perform

integers = cache(st.integers)


class HypothesisDraw:
    data: st.DataObject

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(integers(low, high))


class PagedKVCacheMachine(RuleBasedStateMachine):
    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.draw = HypothesisDraw()
        self.draw.data = data
        self.driver = Driver(self.draw)

    @rule(operation=st.sampled_from(OPERATIONS), data=st.data())
    def perform(self, operation: str, data: st.DataObject) -> None:
        self.draw.data = data
        try:
            perform(self.driver, operation)
        except BaseException:
            note(self.driver.history())
            raise


if __name__ == "__main__":
    run_state_machine_as_test(
        PagedKVCacheMachine, settings=settings(max_examples=1000, stateful_step_count=40, deadline=None)
    )
