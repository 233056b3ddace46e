"""Ctrl-C while something is worth keeping."""

import os
import signal
import threading

import pytest

from jaxspec import api
from jaxspec.interrupts import bounded, postponed
from tests import tiny


def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_the_first_is_noted_and_the_second_interrupts():
    with postponed() as asked:
        assert asked == []
        press()
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_inside_another_it_is_the_same_list():
    with postponed(signal.SIGTERM, signal.SIGINT) as outer:
        with postponed() as inner:
            assert inner is outer
            press(signal.SIGTERM)
        assert outer == [signal.SIGTERM]
    with postponed() as fresh:
        assert fresh == []


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with postponed() as asked:
            press()
        assert asked == []
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_has_no_signals():
    seen = []

    def run():
        with postponed() as asked, bounded():
            seen.append(asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_it_is_said(capfd):
    with postponed(says="saving"):
        press()
    assert capfd.readouterr().err == "\nsaving\n"


def test_bounded_says_that_one_was_raised():
    with bounded() as raised:
        assert raised == []
        with pytest.raises(KeyboardInterrupt):
            press()
        assert raised == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


PROMPTS, OPTIONS = [[1, 2, 3], [4], [5, 6]], dict(max_new_tokens=40, batch_size=1)


def test_generate_hands_over_what_it_has(monkeypatch):
    whole = api.generate(tiny.target(), PROMPTS, **OPTIONS)
    calls, decode = [], api.decode

    def pressed(*arguments):
        calls.append(int(arguments[-1]))
        state = decode(*arguments)
        if sum(calls) > 50:  # rounds: in the second prompt
            press()
        return state

    monkeypatch.setattr(api, "decode", pressed)
    monkeypatch.setattr(api, "CALL_SECONDS", 1e-9)  # one round each
    with pytest.raises(api.Interrupted) as caught:
        api.generate(tiny.target(), PROMPTS, **OPTIONS)
    first, second = (completion.token_ids for completion in caught.value.completions)
    assert first == whole[0].token_ids
    assert second == whole[1].token_ids[: len(second)] and 1 < len(second) < 40
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("step", "lengths"), [("prefill", [40, 1]), ("unpack", [40, 40])])
def test_generate_loses_nothing_outside_its_rounds(step, lengths, monkeypatch):
    calls, function = [], getattr(api, step)

    def pressed(*arguments):
        calls.append(step)
        if len(calls) == 2:
            press()
        return function(*arguments)

    monkeypatch.setattr(api, step, pressed)
    with pytest.raises(api.Interrupted) as caught:
        api.generate(tiny.target(), PROMPTS, **OPTIONS, progress=lambda count: None)
    assert [len(found.token_ids) for found in caught.value.completions] == lengths
