"""The dtype that "auto" is, and what the cache keeps of it."""

import json

import pytest

from jaxspec import dtypes

SLOW = {"float32": 2.0, "bfloat16": 1.0}
EVEN = {"float32": 1.0, "bfloat16": 1.25}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    return tmp_path / "speeds.json"


@pytest.mark.parametrize(
    "seconds, dtype, reason",
    [
        (SLOW, "bfloat16", "2.0x as fast as float32 on this CPU"),
        (EVEN, "float32", "1.2x as fast as bfloat16 on this CPU"),
        ({"float32": 1.05, "bfloat16": 1.0}, "float32", "1.0x as fast as bfloat16 on this CPU"),
    ],
)
def test_a_cpu_is_measured(cache, monkeypatch, seconds, dtype, reason):
    monkeypatch.setattr(dtypes, "product_seconds", lambda: seconds)
    assert dtypes.fastest() == dtypes.Fastest(dtype, reason)


def test_a_cpu_is_measured_once(cache, monkeypatch):
    monkeypatch.setattr(dtypes, "product_seconds", lambda: SLOW)
    first = dtypes.fastest()
    monkeypatch.setattr(dtypes, "product_seconds", pytest.fail)
    assert dtypes.fastest() == first
    monkeypatch.setattr(dtypes, "product_seconds", lambda: EVEN)
    monkeypatch.setattr(dtypes, "cpu_id", lambda: "another")
    assert dtypes.fastest().dtype == "float32"
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"%s": {"float32": 1.0}}', '{"%s": 3}'])
def test_a_damaged_cache_is_written_anew(cache, monkeypatch, content):
    cache.write_text(content.replace("%s", dtypes.cpu_id()))
    monkeypatch.setattr(dtypes, "product_seconds", lambda: SLOW)
    assert dtypes.fastest().dtype == "bfloat16"
    assert json.loads(cache.read_text()) == {dtypes.cpu_id(): SLOW}


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    monkeypatch.setenv("JAXSPEC_CACHE", "/dev/null")
    monkeypatch.setattr(dtypes, "product_seconds", lambda: SLOW)
    assert dtypes.fastest().dtype == "bfloat16"


def test_accelerators_and_processes_that_must_agree_are_not_measured(monkeypatch):
    monkeypatch.delattr(dtypes, "kept_seconds")
    monkeypatch.setattr(dtypes.jax, "process_count", lambda: 2)
    assert dtypes.fastest().dtype == "float32"
    monkeypatch.setattr(dtypes.jax, "default_backend", lambda: "gpu")
    assert dtypes.fastest().dtype == "bfloat16"


def test_products_are_timed():
    assert {name: x > 0 for name, x in dtypes.product_seconds().items()} == {
        "float32": True,
        "bfloat16": True,
    }
