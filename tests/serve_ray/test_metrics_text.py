"""The metrics of several replicas are one text, in which each number says whose it is."""

from prometheus_client.parser import text_string_to_metric_families

from internvl_rt.serve_ray.metrics_text import join_metrics
from internvl_rt.server.metrics import Metrics


def test_each_number_of_each_replica_is_there_once_with_its_name() -> None:
    texts = {}
    for replica, failures in (("one", 2), ("two", 5)):
        metrics = Metrics("tiny", lambda: {"alive": 1, "kv_blocks": 8, "kv_blocks_used": 4})
        for _ in range(failures):
            metrics.failed("timeout")
        metrics.used(10, 0, 0, 3)
        texts[replica] = metrics.render()
    joined = join_metrics(texts).decode()
    families = list(text_string_to_metric_families(joined))
    assert len({family.name for family in families}) == len(families), "a family stands in one place"
    samples = {
        (sample.name, sample.labels["replica"], sample.labels.get("le")): sample.value
        for family in families
        for sample in family.samples
    }
    assert len(samples) == sum(len(family.samples) for family in families)
    assert samples["internvl_rt:request_failure_total", "one", None] == 2
    assert samples["internvl_rt:request_failure_total", "two", None] == 5
    assert samples["internvl_rt:kv_cache_usage_perc", "two", None] == 0.5
    assert all(sample.labels["model_name"] == "tiny" for family in families for sample in family.samples)


def test_without_replicas_there_are_no_metrics() -> None:
    assert join_metrics({}) == b""
