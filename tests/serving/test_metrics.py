"""What a server counts of the requests that have ended."""

from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.metrics import ServerMetrics
from jaxspec.serving.requests import Update


def test_counts():
    """Rounds of 1, 4, 2 and 1 tokens, the last of each not drafted; one that ends twice."""
    engine = SimpleNamespace(waiting=0, running=0, burst_seconds=0.25, prefix_pages=(3, 8))
    runner = SimpleNamespace(engine=engine, healthy=True, on_step=None)
    metrics = ServerMetrics(runner)
    runner.on_step(0.02, 6)
    runner.on_step(0.3, 4)
    stats = DecodeStats((1, 4, 2, 1), nodes=20)
    metrics.follow().see(Update(0, (1, 2), "length", stats, cached=32, waited=0.3))
    further = metrics.follow(counts_prompt=False)
    further.see(Update(2, (), "cancelled", cached=32))  # another choice of the same prompt
    watch = metrics.follow()
    watch.see(Update(1, (), "cancelled"))
    watch.end("stop")
    watch.end("disconnected")  # of an answer that had been given
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    found = {
        (s.name, s.labels.get("depth") or s.labels.get("finish")): s.value for s in samples
    }
    assert found["jaxspec_requests_total", "stop"] == 1
    assert ("jaxspec_requests_total", "disconnected") not in found
    assert found["jaxspec_rounds_total", None] == 4
    assert found["jaxspec_nodes_verified_total", None] == 20
    assert found["jaxspec_burst_seconds", None] == 0.25
    assert found["jaxspec_tokens_per_second", None] == 1.0  # ten, of the last ten seconds
    assert found["jaxspec_step_seconds_count", None] == 2
    assert found["jaxspec_step_seconds_sum", None] == 0.32
    assert found["jaxspec_prompt_tokens_cached_total", None] == 32
    pages = [found[f"jaxspec_prefix_pages_{name}", None] for name in ("used", "room")]
    assert pages == [3, 8]
    assert found["jaxspec_queue_seconds_count", None] == 1
    assert found["jaxspec_queue_seconds_sum", None] == 0.3
    assert [found["jaxspec_accepted_total", depth] for depth in "123"] == [2, 1, 1]
    assert ("jaxspec_accepted_total", "4") not in found
