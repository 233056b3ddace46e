"""Generation that verifies what pays: the same tokens, whatever the measured times say."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jaxspec
from jaxspec import pace as paces
from jaxspec.decoding.curve import Curve
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.pace import Pace
from tests import tiny

LOOKUP = LoadedDrafter(PromptLookup(size=4, depth=3))
PROMPTS = tiny.prompts(9, 5, 7)
OPTIONS = dict(max_new_tokens=60, sampling=jaxspec.Sampling(stop_ids=()))


@functools.cache
def target():
    """Bound to a device, as weights that are read from files."""
    params = jax.device_put(tiny.target().params, jax.devices()[0])
    return dataclasses.replace(tiny.target(), params=params)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    compiled, ran = paces._measured, []

    def timed(*args):  # runs every size, and says times that no busy machine changes
        ran.append(compiled(*args))
        return dataclasses.replace(ran[-1], seconds={2: [1.0, 1.5]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(paces, "_measured", timed)
        options = dict(drafter=LOOKUP, max_new_tokens=60, batch_size=2)
        found = jaxspec.measure_pace(target(), PROMPTS, **options)
        again = jaxspec.measure_pace(target(), PROMPTS, **options)
    assert again.curve == found.curve and len(ran) == 1  # the second time it is kept
    assert all(seconds > 0 for seconds in ran[0].seconds[2])
    return found


def test_what_was_measured_is_what_runs(measured):
    """In a process that measured, generation compiles no second program of rounds."""
    compiled = []

    def note(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        pace = Pace(measured.decoder, 2, measured.capacity, 4, measured.curve)
        jaxspec.generate(target(), PROMPTS, drafter=LOOKUP, budget=pace, **OPTIONS)
        jax.jit(lambda x: x + 1)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled and not [name for name in compiled if "decode_rows" in name]


def with_seconds(measured: Pace, *seconds: float, budget: int = 4) -> Pace:
    """The same, as if rounds of 1 and 4 nodes a row took so long."""
    curve = Curve(measured.curve.setup, {2: seconds})
    return Pace(measured.decoder, 2, measured.capacity, budget, curve)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_plain_decodings(measured, temperature):
    options = OPTIONS | dict(sampling=jaxspec.Sampling(temperature=temperature, stop_ids=()))
    plain = jaxspec.generate(target(), PROMPTS, **options)
    pace = with_seconds(measured, 1.0, 1.2)
    found = jaxspec.generate(target(), PROMPTS, drafter=LOOKUP, budget=pace, **options)
    assert [x.token_ids for x in found] == [x.token_ids for x in plain]
    assert pace.tokens == 59 + 59  # two batches, of two rows and of one
    assert pace.rounds.sum() >= max(x.stats.rounds for x in found)


def rounds_of(pace: Pace) -> np.ndarray:
    jaxspec.generate(target(), PROMPTS[:2], drafter=LOOKUP, budget=pace, **OPTIONS)
    return pace.rounds


def test_rounds_verify_what_pays(measured):
    cheap = rounds_of(with_seconds(measured, 1.0, 1.001))
    assert cheap[0] < cheap[1:].sum()
    few = with_seconds(measured, 1.0, 1.001, budget=2)
    found = jaxspec.generate(target(), PROMPTS, drafter=LOOKUP, budget=few, **OPTIONS)
    assert all(x.stats.nodes <= 2 * x.stats.rounds for x in found)
    dear = rounds_of(with_seconds(measured, 1.0, 100.0))
    assert dear[0] > 5 * dear[1:].sum()


def test_what_it_says(measured):
    pace = with_seconds(measured, 0.010, 0.015)
    assert str(pace) == "no round of decoding ran"
    assert repr(pace) == "Pace(2 rows of 256 tokens, budget 4)"
    pace.rounds, pace.tokens = np.array([10, 40]), 130
    assert pace.gain == pytest.approx(130 * 0.010 / (10 * 0.010 + 40 * 0.015))
    assert str(pace) == (
        "speculation pays: 1.86x plain decoding (2.60 tokens a round; a round of 4 nodes takes "
        "1.50 times a plain one)"
    )
    pace.rounds, pace.tokens = np.array([90, 10]), 100
    assert str(pace) == (
        "speculation does not pay here: 0.95x plain decoding (a round of 4 nodes takes 1.50 "
        "times a plain one, and too few drafts were accepted); 90% of the rounds were plain"
    )


def test_it_serves_what_it_was_measured_for(measured):
    other = LoadedDrafter(dataclasses.replace(LOOKUP.drafter, min_match=2))
    with pytest.raises(ValueError, match="measured for another target, dtype, drafter or acc"):
        jaxspec.generate(target(), [[1]], drafter=other, budget=measured)
    message = "measured for rows of 256 tokens, but .* need 768; measure it again with them"
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(
            target(), [[1] * 450], drafter=LOOKUP, budget=measured, max_new_tokens=60
        )
    for drafter in (PLAIN, "none"):
        with pytest.raises(ValueError, match="drafts nothing, so there is no budget to choose"):
            jaxspec.measure_pace(target(), [[1]], drafter=drafter)
