import math
from fractions import Fraction

import numpy as np
import pytest

from internvl_rt.errors import RequestError
from internvl_rt.values import Integer, Seconds, Text, read


def test_a_span_of_time_is_two_numbers_of_any_kind_with_the_start_first():
    for given in ([0, 2.5], (np.int64(0), np.float32(2.5)), [Fraction(0), Fraction(5, 2)]):
        span = read("bound", given, Seconds(1e5))
        assert span == (0.0, 2.5)
        assert [type(second) for second in span] == [float, float]
    assert read("bound", (-100_000, 100_000), Seconds(1e5)) == (-1e5, 1e5)
    assert read("bound", (3, 3), Seconds(1e5)) == (3.0, 3.0)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        "01",
        b"01",
        [],
        [1],
        [0, 1, 2],
        {0: 1, 1: 2},
        [2, 1],
        [0, math.nan],
        [-math.inf, 0],
        [0, 1e308],
        [0, 10**400],
        [-(10**400), 0],
        [0, 100_001],
        [False, True],
        ["0", "1"],
        [None, 2],
        [0, 1j],
        [[0], [1]],
    ],
)
def test_what_is_no_span_of_time_is_refused_in_the_packages_own_words(wrong):
    with pytest.raises(RequestError, match=r"^bound must be \[start, end\] in seconds, start first, .* 100000, got "):
        read("bound", wrong, Seconds(1e5))


def test_an_integer_may_have_no_upper_limit():
    assert read("count", 10**400, Integer(1)) == 10**400
    with pytest.raises(RequestError, match=r"^count must be an integer of at least 1, got np.int8\(0\)$"):
        read("count", np.int8(0), Integer(1))


def test_a_text_may_have_to_be_printable():
    assert read("name", "naïve 1", Text(0, 8, printable=True)) == "naïve 1"
    for wrong in ("a\n", "\x1b[0m", "\u2028", "a" * 9, b"a", None):
        with pytest.raises(RequestError, match=r"^name must be a string of 0 to 8 printable characters, got "):
            read("name", wrong, Text(0, 8, printable=True))
