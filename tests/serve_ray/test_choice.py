"""The replica that holds most of a prompt is chosen, unless others have much less to do."""

from random import Random

import pytest

from internvl_rt.serve_ray.choice import MAX_HOLDERS, advantages, draw_two, prefer


def preferred(advantage: dict[str, float], requests: dict[str, int]) -> str | None:
    return prefer(advantage, requests, load_share=0.1, max_imbalance=8, draw=Random(0))


@pytest.mark.parametrize(
    ("advantage", "requests", "expected"),
    [
        ({}, {"a": 0, "b": 0}, None),
        ({"a": 0.01}, {"a": 0, "b": 0}, "a"),
        ({"a": 0.5, "b": 0.6}, {"a": 0, "b": 0}, "b"),
        ({"b": 0.15}, {"a": 3, "b": 4}, "b"),
        ({"b": 0.15}, {"a": 3, "b": 5}, None),  # two more requests weigh more than that share
        ({"a": 0.3, "b": 0.65}, {"a": 0, "b": 4}, "a"),  # 0.3 against 0.25
        ({"b": 1.0}, {"a": 0, "b": 8}, "b"),
        ({"b": 1.0}, {"a": 0, "b": 9}, None),  # more than the imbalance that is allowed
        ({"gone": 1.0, "b": 0.1}, {"a": 0, "b": 0}, "b"),
        ({"gone": 1.0}, {"a": 0}, None),
        ({"gone": 1.0}, {}, None),
    ],
)
def test_the_prefix_and_the_load_are_weighed(
    advantage: dict[str, float], requests: dict[str, int], expected: str | None
) -> None:
    assert preferred(advantage, requests) == expected


def test_equal_worth_is_drawn_between() -> None:
    draw, held, requests = Random(0), {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0, "c": 0}
    chosen = [prefer(held, requests, load_share=0.1, max_imbalance=8, draw=draw) for _ in range(100)]
    assert 30 < chosen.count("a") < 70
    assert "c" not in chosen


def test_what_all_replicas_hold_is_no_advantage() -> None:
    assert advantages({"a": 1, "b": 1}, 8) == {}
    assert advantages({"a": 1, "b": 5, "c": 3}, 8) == {"b": 0.5, "c": 0.25}
    assert advantages({}, 0) == {}


def test_those_that_hold_most_are_told_where_many_hold_something() -> None:
    found = advantages({str(number): number for number in range(1000)}, 1000)
    assert sorted(found.values()) == [number / 1000 for number in range(1000 - MAX_HOLDERS, 1000)]


def test_two_different_replicas_are_drawn() -> None:
    draw = Random(0)
    assert draw_two([], draw) == []
    assert draw_two(["a"], draw) == ["a"]
    assert all(len(set(draw_two(["a", "b", "c"], draw))) == 2 for _ in range(100))
