"""Options of the pool, the server and the engine are read by their names, from Python and from a command line."""

import pytest

from internvl_rt.errors import RequestError
from internvl_rt.serve_ray.options import read_plan


def test_options_go_where_they_belong() -> None:
    plan = read_plan({"model": "tiny", "num_replicas": 3, "max_n": 4, "max_num_seqs": 8})
    assert (plan.model, plan.pool.num_replicas, plan.server.max_n, plan.engine.max_num_seqs) == ("tiny", 3, 4, 8)


def test_texts_of_a_command_line_are_read_as_what_is_expected() -> None:
    plan = read_plan(
        {
            "model": "org/tiny",
            "num_replicas": "2",
            "num_cpus": "0.5",
            "prefix_routing": "False",
            "max_replicas": "4",
            "served_model_name": "a,b",
            "v2pe_delta": "0.25",
            "device": "cpu",
        }
    )
    assert (plan.pool.num_replicas, plan.pool.num_cpus, plan.pool.max_replicas) == (2, 0.5, 4)
    assert not plan.pool.prefix_routing
    assert (plan.names, plan.engine.v2pe_delta, plan.engine.device) == (("a", "b"), 0.25, "cpu")


def test_a_model_has_the_names_that_the_server_gives_it() -> None:
    assert read_plan({"model": "OpenGVLab/InternVL3-8B"}).names == ("InternVL3-8B", "OpenGVLab/InternVL3-8B")
    assert read_plan({"model": "tiny"}).names == ("tiny",)


def test_requests_may_end_before_their_replica_does_unless_a_shorter_time_is_given() -> None:
    assert read_plan({"model": "tiny"}).drain_s == 600
    assert read_plan({"model": "tiny", "request_timeout_s": 60}).drain_s == 60
    assert read_plan({"model": "tiny", "drain_s": "5"}).drain_s == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model must be a string"),
        ({"model": "tiny", "num_replica": 2}, "unknown option 'num_replica'; expected one of model, access_log"),
        ({"model": "tiny", "num_replicas": 0}, "num_replicas must be an integer from 1 to 10000, got 0"),
        ({"model": "tiny", "num_replicas": "two"}, "num_replicas must be an integer from 1 to 10000, got 'two'"),
        ({"model": "tiny", "prefix_routing": "perhaps"}, "prefix_routing must be True or False, got 'perhaps'"),
        ({"model": "tiny", "num_replicas": 3, "max_replicas": 2}, "max_replicas: expected at least num_replicas, 3"),
        ({"model": "tiny", "port": 80}, "port has no effect under Ray Serve"),
        ({"model": "tiny", "block_size": 17}, "block_size must be one of"),
        ({"model": "tiny", "target_kv_use": 0}, "target_kv_use must be a number above 0"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_plan(options)
