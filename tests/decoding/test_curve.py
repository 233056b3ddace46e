"""Step times: measured, stored, and refused when they say nothing."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxspec.decoding.curve import Curve, least, setup_of, time_sizes
from jaxspec.decoding.requests import decoder_for
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.small_model import SmallModel
from tests import tiny

SETUP = {
    "target": "tiny",
    "capacity": 256,
    "totals": {"1": [1, 2], "2": [2, 4]},
    "per_row": {"1": [1, 2], "2": [1, 2]},
}
CURVE = Curve(SETUP, {1: [0.01, 0.02], 2: [0.011, 0.025]})


def test_it_is_stored_and_loaded(tmp_path):
    CURVE.save(tmp_path / "curve.json")
    found = Curve.load(tmp_path / "curve.json")
    assert found == CURVE
    found.check(SETUP)
    stairs = found.staircase(2)
    assert stairs.sizes == (VerifySize(2, 1), VerifySize(4, 2))
    assert stairs.totals.tolist() == [2, 4] and stairs.per_row.tolist() == [1, 2]
    assert stairs.seconds.tolist() == pytest.approx([0.011, 0.025])


def test_a_curve_that_is_half_written_is_not_there(tmp_path, monkeypatch):
    def full(path, text, **options):
        path.write_bytes(text[:9].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        CURVE.save(tmp_path / "curve.json")
    assert not (tmp_path / "curve.json").exists()


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({1: [0.01, 0.02]}, "for 2 rows has None; expected 2 times"),
        ({1: [0.01, 0.02], 2: [0.01]}, "for 2 rows has .*; expected 2 times"),
        ({1: [0.01, 0.02], 2: [0.0, 0.02]}, "expected positive seconds"),
        ({1: [0.01, 0.02], 2: [float("nan"), 0.02]}, "expected positive seconds"),
        ({1: [1.0, 1.0], 2: [1.0, 1.01]}, "is flat .* measure it again"),
        ({1: [1.0, 1.0], 2: [2.0, 2.01]}, "is flat .* measure it again"),
    ],
)
def test_a_curve_that_says_nothing_is_refused(seconds, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        dataclasses.replace(CURVE, seconds=seconds).check(SETUP)


def test_one_number_of_rows_may_have_no_step():
    dataclasses.replace(CURVE, seconds={1: [1.0, 1.0], 2: [1.0, 1.5]}).check(SETUP)


def test_a_curve_of_something_else_is_refused():
    with pytest.raises(ValueError, match="for target = 'tiny', but this engine has 'big'"):
        CURVE.check(SETUP | {"target": "big"})


def test_a_setup_is_another_by_all_that_its_times_depend_on():
    drafter = LoadedDrafter(SmallModel(tiny.QWEN3), tiny.target().params)
    decoder, params = decoder_for(tiny.target(), drafter)
    setup = setup_of(tiny.target(), decoder, params, {}, 256)

    def changed(decoder=decoder, params=params):
        other = setup_of(tiny.target(), decoder, params, {}, 256)
        return {name for name in setup if setup[name] != other[name]}

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.drafter)
    head = dataclasses.replace(
        params.target, lm_head=params.target.lm_head.astype(jnp.float8_e4m3fn)
    )
    windows = dataclasses.replace(tiny.QWEN3, windows=(None, 5, None))
    assert changed() == set()
    assert changed(params=dataclasses.replace(params, drafter=half)) == {"weights"}
    assert changed(params=dataclasses.replace(params, target=head)) == {"weights"}
    # Of the same name, but another model.
    assert changed(dataclasses.replace(decoder, config=windows)) == {"decoder"}
    assert changed(dataclasses.replace(decoder, implementation="xla")) == {
        "decoder",
        "implementation",
    }


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"setup": {}, "seconds": {"one": [1]}}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "curve.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a step-time curve"):
        Curve.load(path)
    with pytest.raises(ValueError, match="is not a step-time curve"):
        Curve.load(tmp_path / "absent.json")


STAIRS = Staircase.of([VerifySize(1, 1), VerifySize(2, 2), VerifySize(4, 4)], [1, 2, 3])


def test_parts_of_a_staircase():
    assert Staircase.guessed(STAIRS.sizes).seconds.tolist() == [1.0625, 1.125, 1.25]
    assert STAIRS.only(1).seconds.tolist() == [float("inf"), 1.0, float("inf")]
    ends = STAIRS.ends()
    assert ends.sizes == (VerifySize(1, 1), VerifySize(4, 4))
    assert ends.seconds.tolist() == [1.0, 3.0]


def test_every_size_is_timed_in_turn():
    ran = []

    def decode(batch, habit, staircase, rounds):
        ran.append((batch, int(staircase.seconds.argmin()), rounds))
        return batch + 1, habit

    seconds = time_sizes(decode, 5, (), STAIRS)
    assert ran == [(5, 0, 1), (6, 1, 1), (7, 2, 1)]
    assert len(seconds) == 3 and min(seconds) > 0


def test_the_fastest_of_several_times_counts():
    repeats = [{1: [3.0, 5.0], 2: [7.0]}, {1: [4.0, 2.0], 2: [6.0]}]
    assert least(repeats) == {1: [3.0, 2.0], 2: [6.0]}
