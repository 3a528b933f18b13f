"""Messages are one short printable line, whatever they quote."""

import copy
import pickle
import time

import numpy as np
import pytest

from internvl_rt import MediaError, RequestError
from internvl_rt.errors import EngineDeadError, quoted
from support.hostile import HOSTILE, Unprintable


@pytest.mark.parametrize("name", HOSTILE)
def test_any_value_is_quoted_in_one_short_line_at_once(name):
    value = HOSTILE[name]
    start_s = time.perf_counter()
    line = quoted(value)
    assert time.perf_counter() - start_s < 1  # a garbage collection may take 0.4 s in a process of all tests
    assert line.isprintable()
    assert 0 < len(line) <= 300


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("it's", '"it\'s"'),
        ("a\n\x1b[31m\u202e\ud800", r"'a\n\x1b[31m\u202e\ud800'"),
        ("a" * 201, f"'{'a' * 200}...'"),
        (b"\x00", r"b'\x00'"),
        (None, "None"),
        (-3.5, "-3.5"),
        (10**30, "1" + "0" * 30),
        (1 << 600, "an integer of 601 bits"),
        (("a",), "('a',)"),
        ([1, 2, 3, 4, 5, 6], "[1, 2, 3, 4, 5, 6]"),
        (range(10**9), "range(0, 1000000000)"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, ...]"),
        ({"a": ("b", {"c": [1]})}, "{'a': ('b', {'c': [...]})}"),
        (np.zeros((100, 100)), "a value of type ndarray"),
        (print, "<built-in function print>"),
        (lambda: 0, "a value of type function"),  # its repr holds an address
        ([Unprintable()], "[a value of type Unprintable]"),
    ],
)
def test_a_value_is_quoted_as_python_writes_it_or_else_by_its_type(value, shown):
    assert quoted(value) == shown


def test_a_message_that_quotes_anything_as_it_is_stays_one_line_with_its_beginning_and_its_remedy():
    text = "role \n\x1b[2J" * 10**6
    message = str(RequestError(f"messages[0].role: got {text}; use one of these"))
    assert message.startswith(r"messages[0].role: got role \n\x1b[2Jrole")
    assert message.endswith("; use one of these")
    assert message.isprintable()
    assert len(message) <= 2000
    assert str(RequestError(message)) == message, "a message that is put into another stays as it is"


def test_an_error_can_be_copied_and_sent_to_another_process():
    for error in (RequestError("a\nb"), MediaError("a"), EngineDeadError()):
        for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert (type(same), str(same)) == (type(error), str(error))
