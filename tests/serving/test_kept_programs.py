"""Programs of an earlier process run without being traced; others never do."""

import dataclasses
import functools
import os
import pathlib
import warnings

import jax
import numpy as np
import pytest

from jaxspec.drafters.ngram import PromptLookup
from jaxspec.serving import kept_programs
from jaxspec.serving.kept_programs import KeptPrograms

TRACED = []


@functools.partial(jax.jit, static_argnames=("power",), donate_argnames="state")
def step(weights, state, key, *, power):
    TRACED.append(power)
    noise = jax.random.normal(key, state["x"].shape)
    return {"x": jax.numpy.sort(state["x"] @ weights**power + noise), "key": state["key"]}


@pytest.fixture(autouse=True)
def fresh():
    """As in a process that has traced nothing, and knows no surroundings yet."""
    forget()
    yield
    forget()


def forget():
    step.clear_cache()
    kept_programs._surroundings.cache_clear()
    TRACED.clear()


def arguments(size=3):
    device = jax.devices()[0]
    x = np.linspace(0, 1, size * size, dtype=np.float32).reshape(size, size)
    state = {"x": x, "key": jax.random.key(7)}
    return jax.device_put((x, state, jax.random.key(1)), device)


def run(kept, power=2, size=3):
    given = arguments(size)
    return kept.call(step, (power, size), given[1], (), given, power=power), given


def next_process(folder, **options):
    forget()
    kept = KeptPrograms(folder)
    result, _ = run(kept, **options)
    return result, kept


def equal(a, b):
    return np.array_equal(a["x"], b["x"]) and a["key"] == b["key"]


def test_the_next_process_traces_nothing(tmp_path):
    folder = tmp_path / "programs"
    first = KeptPrograms(folder)
    made, _ = run(first)
    assert (first.loaded, first.compiled, TRACED) == (0, 1, [2])
    run(first)
    assert TRACED == [2]
    found, second = next_process(folder)
    assert (second.loaded, second.compiled, TRACED) == (1, 0, [])
    assert equal(found, made)
    assert equal(made, step(*arguments(), power=2))
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_is_donated_is_gone_and_the_rest_stays(tmp_path):
    for _ in range(2):  # compiled, and loaded
        result, (weights, state, key) = run(KeptPrograms(tmp_path / "programs"))
        assert state["x"].is_deleted()
        assert not weights.is_deleted() and not key.is_deleted()
        assert result["x"].committed and result["key"].dtype == state["key"].dtype


CHANGES = {
    "shape": dict(size=4),
    "static argument": dict(power=3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_call_is_another_program(tmp_path, change):
    run(KeptPrograms(tmp_path / "programs"))
    result, kept = next_process(tmp_path / "programs", **change)
    assert (kept.loaded, kept.compiled) == (0, 1)
    options = dict(power=2) | change
    assert equal(result, step(*arguments(options.pop("size", 3)), **options))


def test_other_sources_are_other_programs(tmp_path, monkeypatch):
    run(KeptPrograms(tmp_path / "programs"))
    monkeypatch.setattr(kept_programs, "_sources", lambda: "of another version")
    assert next_process(tmp_path / "programs")[1].compiled == 1


def test_sources_are_all_of_them(tmp_path, monkeypatch):
    package = tmp_path / "jaxspec/serving"
    package.mkdir(parents=True)
    monkeypatch.setattr(kept_programs, "__file__", str(package / "kept_programs.py"))
    found = [kept_programs._sources()]
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("../b.py", "x = 2")):
        (package / name).write_text(text)
        found.append(kept_programs._sources())
    assert len(set(found)) == 4


def test_other_flags_and_machines_are_other_programs(tmp_path, monkeypatch):
    run(KeptPrograms(tmp_path / "programs", "one"))
    assert KeptPrograms(tmp_path / "programs", "one")
    forget()
    other = KeptPrograms(tmp_path / "programs", "other")
    run(other)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_use_onednn=false")
    forget()
    flagged = KeptPrograms(tmp_path / "programs", "one")
    run(flagged)
    assert (other.compiled, flagged.compiled) == (1, 1)


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "changed": lambda data: data[:-9] + b"\0" + data[-8:],
    "empty": lambda data: b"",
    "foreign": lambda data: b"<html>404</html>\n" * 9,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    folder = tmp_path / "programs"
    made, _ = run(KeptPrograms(folder))
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"{file.name} is not a program .*compiled again"):
        result, kept = next_process(folder)
    assert kept.compiled == 1 and equal(result, made)
    assert next_process(folder)[1].loaded == 1


def refuse(*_, **__):
    raise PermissionError("not permitted")


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    made, _ = run(KeptPrograms(folder))
    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    result, kept = next_process(folder)
    assert kept.loaded == 1 and equal(result, made)


def test_a_file_that_cannot_be_read_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    monkeypatch.setattr(kept_programs, "_sources", lambda: "the same")
    made, _ = run(KeptPrograms(folder))
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    result, kept = next_process(folder)
    assert kept.compiled == 1 and equal(result, made)


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="holds native code and is writable by others"):
        kept = KeptPrograms(folder)
    result, (_, state, _) = run(kept)
    assert equal(result, step(*arguments(), power=2)) and state["x"].is_deleted()
    assert not list(folder.iterdir())


def test_the_least_recently_used_give_way(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    for power in (2, 3):
        run(KeptPrograms(folder), power=power)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    next_process(folder, power=2)  # used now
    monkeypatch.setattr(kept_programs, "MOST", sum(sizes) + min(sizes) // 2)
    run(KeptPrograms(folder), power=4)
    assert len(list(folder.iterdir())) == 2
    assert next_process(folder, power=2)[1].loaded == 1
    assert next_process(folder, power=4)[1].loaded == 1


@jax.jit
def unbound(x):
    return x + 1


def test_arrays_that_are_bound_to_no_device_are_not_programs_to_keep(tmp_path):
    kept = KeptPrograms(tmp_path / "programs")
    x = jax.numpy.ones(3)
    assert kept.call(unbound, (), x, (), (x,)).tolist() == [2, 2, 2]
    assert (kept.loaded, kept.compiled, list((tmp_path / "programs").iterdir())) == (0, 0, [])


@dataclasses.dataclass(frozen=True)
class Ours:
    """As a drafter of one's own, whose code is not among the sources of this package."""

    size: int = 3


def test_only_code_of_this_package_takes_part():
    own = PromptLookup(size=8, depth=5)
    assert kept_programs._of_this_package((own, 3, "chain", None))
    assert not kept_programs._of_this_package((own, Ours()))
    assert not kept_programs._of_this_package((own, (3, print)))


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path):
    (tmp_path / "programs").write_text("a file")
    with pytest.warns(UserWarning, match="compiled programs are not kept"):
        kept = KeptPrograms(tmp_path / "programs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kept)


@pytest.mark.parametrize("text", ["", "{", "3", '["no such file"]', "[[]]"])
def test_what_a_start_needed_is_a_hint(tmp_path, text):
    folder = tmp_path / "programs"
    first = KeptPrograms(folder)
    made, _ = run(first)
    first.remember("a start")
    for damaged in (False, True):
        if damaged:
            (folder / kept_programs._start_file("a start")).write_text(text)
        forget()
        kept = KeptPrograms(folder)
        kept.expect("a start")
        assert len(kept._expected) == (0 if damaged else 1)
        assert equal(run(kept)[0], made)
        assert (kept.loaded, kept.compiled, TRACED) == (1, 0, [])
