"""The check of a drafter: what it compares, and what it says of the usual mistakes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.api import generate
from jaxspec.check.report import (
    Alternative,
    Report,
    _alternative,
    check,
    check_answers,
    judge,
)
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.cli import main
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.plain import Plain
from jaxspec.drafters.rollout import greedy
from jaxspec.evaluation import walk as w
from tests import tiny
from tests.drafters import cases

CHAIN = TreeConfig("chain", size=8)
MORE = Alternative(tau=3.0, gain=1.2, low=0.9, high=1.5)
LESS = Alternative(tau=1.05, gain=-0.2, low=-0.3, high=-0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dflash", "rnn"])
def test_training_and_decoding_agree(kind):
    drafter, prompts = cases.loaded(kind, CHAIN), tiny.prompts(9, 20)
    done = generate(tiny.target(), prompts, drafter=drafter, max_new_tokens=24)
    texts = [
        w.RecordedAnswer((*prompt, *completion.token_ids), len(prompt), 24)
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    report = check(tiny.target(), drafter, texts, diagnose=False)
    assert len(report.differences) == len(report.accepted) == cases.KINDS[kind].depth
    assert max(report.differences) < 1e-4
    assert not any("disagree" in finding for finding in report.findings)
    # The tau that decoding gets, up to how the last round is counted.
    rounds = sum(completion.stats.rounds for completion in done)
    assert abs(report.rounds - rounds) <= 2
    assert report.tau == pytest.approx(2 * 23 / report.rounds, abs=0.2)
    assert f"tau {report.tau:.2f} over {report.rounds} rounds" in str(report)


class Shifted(BlockDrafter):
    """Decodes every block one position too early."""

    def stream(self, params, state, anchor, position):
        return super().stream(params, state, anchor, position - 1)


@pytest.mark.slow
def test_a_drafter_that_decodes_otherwise_than_it_trains_is_found():
    loaded = cases.loaded("dflash", CHAIN)
    shifted = LoadedDrafter(Shifted(loaded.drafter.config, CHAIN), loaded.params)
    text = w.RecordedAnswer(tuple(range(1, 11)), start=1, limit=10)
    report = check(tiny.target(), shifted, [text], diagnose=False)
    assert min(report.differences) > report.tolerance
    assert report.findings[0].startswith("training and decoding disagree in slots [1, 2, 3, 4]")


def test_it_must_be_a_block_drafter_and_a_long_text():
    text = w.RecordedAnswer(tuple(range(8)), start=1, limit=8)
    with pytest.raises(ValueError, match="Plain.* cannot be checked"):
        check(tiny.target(), LoadedDrafter(Plain()), [text])
    with pytest.raises(ValueError, match="a text of 8 tokens from position 4 on is too short"):
        check(
            tiny.target(), cases.loaded("dflash", CHAIN), [dataclasses.replace(text, start=4)]
        )


@pytest.mark.slow
def test_a_wrong_configuration_is_named(golden):
    """JetSpec's golden drafter, on texts of its own choices, told to read other layers."""
    folder, trace = golden("jetspec_a")
    target = checkpoints.load(folder / "target")
    loaded = load_drafter(folder / "draft", target, CHAIN)
    drafter, params = loaded.drafter, loaded.params
    prompts = [prompt["prompt"] for prompt in trace["prompts"][:4]]
    texts = [favourable(target, drafter, params, prompt) for prompt in prompts]
    right = check(target, loaded, texts, diagnose=False)
    assert right.tau == 8 and right.findings == ()

    shifted = dataclasses.replace(drafter.config, taps=(2, 4))
    wrong = dataclasses.replace(drafter, config=shifted)
    report = check(target, LoadedDrafter(wrong, params), texts)
    assert report.alternatives["taps [1, 3]"].tau == 8
    assert report.findings[0].startswith("with taps [1, 3] tau is 8.00 instead of")
    assert str(report).endswith(report.findings[0])


def test_thinking_is_an_alternative():
    """Answers in the other mode are accepted more: the text is not what it was trained on."""
    report = Report(9, 1.1, (0.1,), (0.0,), 1e-3, {"thinking turned on": MORE}, ())
    (finding,) = judge(report).findings
    assert finding.startswith("with thinking turned on tau is 3.00 instead of 1.10")


@pytest.fixture
def answering(monkeypatch):
    """Answers of given lengths by thinking mode; a text's accepted drafts are its tokens."""

    def use(lengths):
        modes = [None, True, False]
        checked = []

        def as_token_ids(target, prompts, *, raw, thinking):
            return [[modes.index(thinking)]] * len(prompts)

        def record(target, rows, *, max_new_tokens, spare):
            counts = lengths[modes[rows[0][0]]]
            return [w.RecordedAnswer((0, *(1,) * n), 1, max_new_tokens) for n in counts]

        def accepted(target, drafters, texts):
            checked.append([len(text.tokens) - text.start for text in texts])
            return [[np.full(2, len(text.tokens)) for text in texts]]

        def checks(target, drafter, texts, *, diagnose):
            report = Report(9, 2.0, (0.5,), (0.0,), 1e-3, {}, ())
            return report, *accepted(target, [drafter], texts)

        fakes = dict(as_token_ids=as_token_ids, record=record, _check=checks)
        fakes |= dict(accepted_everywhere=accepted, _can_think=lambda target: True)
        for name, fake in fakes.items():
            monkeypatch.setattr(f"jaxspec.check.report.{name}", fake)
        drafter = cases.loaded("dflash", CHAIN)
        return lambda: check_answers(tiny.target(), drafter, ["x"] * 4), checked

    return use


def test_short_answers_are_left_out_in_pairs(answering):
    assert cases.KINDS["dflash"].depth == 4
    lengths = {None: [5, 4, 6, 7], True: [8, 9, 1, 5], False: [1, 2, 3, 4]}
    run, checked = answering(lengths)
    with pytest.warns(UserWarning, match=r"1 of 4 answers are shorter than a block \(5 tokens"):
        report = run()
    assert checked == [[5, 6, 7], [8, 5]]
    assert list(report.alternatives) == ["thinking turned on"]
    assert report.alternatives["thinking turned on"].gain == 0.5  # of 3 and -2


def test_only_short_answers(answering):
    run, _ = answering({None: [4, 4, 1, 0]})
    with pytest.raises(
        ValueError, match=r"every answer is shorter than a block \(5 tokens\); exp"
    ):
        run()


def test_few_anchors_of_a_single_text_are_no_empty_parts():
    found = _alternative([np.array([0, 1, 1])], [np.array([1, 2, 2])])
    assert (found.gain, found.low, found.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("tau", "difference", "expected"),
    [
        (2.0, 1e-5, []),
        (2.0, 0.5, ["training and decoding disagree in slots [1]"]),
        (2.0, float("nan"), ["training and decoding disagree in slots [1]"]),
        (1.0, 1e-5, ["almost nothing is accepted"]),
    ],
)
def test_findings(tau, difference, expected):
    report = judge(Report(9, tau, (0.5,), (difference,), 1e-3, {"causal blocks": LESS}, ()))
    assert len(report.findings) == len(expected)
    for finding, beginning in zip(report.findings, expected, strict=True):
        assert finding.startswith(beginning)


def test_an_alternative_is_judged_by_what_each_text_gains():
    """Texts differ by more than the alternative gains, which is a little on each."""
    own = [np.full(4, count) for count in (0, 2, 5, 1)]
    other = [counts + [0, 0, 0, 1] for counts in own]
    found = _alternative(own, other)
    assert (found.gain, found.low, found.high) == (0.25, 0.25, 0.25) and found.wins
    # Rounds accept 0 0 0 1, then 2 3, then 5, then 1 1 tokens.
    assert found.tau == pytest.approx(1 + (1 + 2 + 3 + 5 + 1 + 1) / 9)


@pytest.mark.parametrize(
    ("gains", "low", "wins"),
    [
        ([0.2, 0.3, 0.4, 0.3], 0.170, True),  # t of 3 degrees: 3.182 standard errors of 0.0408
        ([0.3, -0.1, 0.9, 0.1], -0.387, False),
        ([0.0, 0.0, 0.0, 0.0], 0.0, False),
        ([0.05, 0.05, 0.05, 0.05], 0.05, False),  # certain, and not worth a word
    ],
)
def test_chance_is_not_a_finding(gains, low, wins):
    own = [np.ones(100, int) for _ in gains]
    some = [np.arange(100) < round(100 * abs(gain)) for gain in gains]
    other = [np.where(x, 2 if gain > 0 else 0, 1) for x, gain in zip(some, gains, strict=True)]
    found = _alternative(own, other)
    assert found.low == pytest.approx(low, abs=0.001) and found.wins == wins
    findings = judge(Report(9, 2.0, (0.5,), (0.0,), 1e-3, {"another": found}, ())).findings
    assert len(findings) == wins


def test_what_would_be_gained_is_said():
    other = Alternative(tau=2.44, gain=0.31, low=0.12, high=0.5)
    report = judge(Report(9, 2.1, (0.5,), (0.0,), 1e-3, {"causal blocks": other}, ()))
    assert "tau 2.44, gain +0.31 [+0.12, +0.50] with causal blocks" in str(report)
    assert report.findings[0].startswith(
        "with causal blocks tau is 2.44 instead of 2.10 (gain per anchor 0.31 tokens, "
        "at least 0.12)"
    )


def favourable(target, drafter, params, prompt) -> w.RecordedAnswer:
    """The text in which every round of this drafter accepts its whole chain."""
    loaded, tokens = LoadedDrafter(drafter, params), list(prompt)
    for _ in range(4):
        text = w.RecordedAnswer(tuple(tokens), len(tokens) - 1, limit=1)
        observed = w.observe(target, [loaded], [text], batch=1)
        chains = w.at_every_anchor(chain, observed, [text], loaded, *observed.states)
        tokens += [*chains[0, 0].tolist(), 0]
    return w.RecordedAnswer(tuple(tokens), len(prompt) - 1, len(tokens))


def chain(drafter, params, state, anchor, position, path, noise):
    return drafter.rollout(params, state, anchor, position, greedy)[0]


def test_another_target_is_shown_beside(monkeypatch, capsys):
    reports = {
        "fp8": Report(40, 2.75, (), (), 1e-3, {}, ()),
        "whole": Report(35, 3.0, (), (), 1e-3, {}, ()),
    }
    monkeypatch.setattr(
        "jaxspec.cli.check.Check._report", lambda self, name, text: reports[name]
    )
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: None)
    monkeypatch.setattr("jaxspec.checkpoints.target_path", lambda name: name)
    command = ["check", "--target", "fp8", "--beside", "whole", "--drafter", "ngram"]
    assert main(command) == 0
    assert "tau 3.00 over 35 rounds on whole: -0.25 here" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tau"] == 2.75 and found["beside"] == {"target": "whole", "tau": 3.0}
