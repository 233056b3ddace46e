"""The check of a drafter: what it compares, and what it says of the usual mistakes."""

import dataclasses

import numpy as np
import pytest

from jaxspec.check import Report, Text, check, draft_everywhere, judge, padded
from jaxspec.checkpoints import huggingface
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.drafters.plain import Plain
from jaxspec.generation import LoadedDrafter, Target, generate
from tests import tiny
from tests.drafters import cases

CHAIN = TreeConfig("chain", size=8)


@pytest.mark.parametrize("kind", ["dflash", "rnn"])
def test_training_and_decoding_agree(kind):
    drafter, prompts = cases.loaded(kind, CHAIN), tiny.prompts(9, 20)
    done = generate(tiny.target(), prompts, drafter=drafter, max_new_tokens=24)
    texts = [
        Text((*prompt, *completion.token_ids), len(prompt))
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


def test_it_must_be_a_block_drafter_and_a_long_text():
    text = Text(tuple(range(8)))
    with pytest.raises(ValueError, match="Plain.* cannot be checked"):
        check(tiny.target(), LoadedDrafter(Plain()), [text])
    with pytest.raises(ValueError, match="a text of 8 tokens from position 4 on is too short"):
        check(
            tiny.target(), cases.loaded("dflash", CHAIN), [dataclasses.replace(text, start=4)]
        )


def test_a_wrong_configuration_is_named(golden):
    """JetSpec's golden drafter, on a text of its own choices, told to read other layers."""
    folder, trace = golden("jetspec_a")
    config = huggingface.read_config(folder / "target")
    target = Target("golden", config, huggingface.load_params(folder / "target", config))
    drafter, params = load_drafter(folder / "draft", config, target.params, CHAIN)
    text = favourable(target, drafter, params, trace["prompts"][0]["prompt"])
    right = check(target, LoadedDrafter(drafter, params), [text], diagnose=False)
    assert right.tau == 8 and right.findings == ()

    shifted = dataclasses.replace(drafter.config, taps=(2, 4))
    wrong = dataclasses.replace(drafter, config=shifted)
    report = check(target, LoadedDrafter(wrong, params), [text])
    assert report.alternatives["taps [1, 3]"] == 8
    assert report.findings[0].startswith("with taps [1, 3] tau is 8.00 instead of")
    assert str(report).endswith(report.findings[0])


def test_thinking_is_an_alternative():
    """Answers in the other mode are accepted more: the text is not what it was trained on."""
    report = Report(9, 1.1, (0.1,), (0.0,), 1e-3, {"thinking turned on": 3.0}, ())
    (finding,) = judge(report).findings
    assert finding.startswith("with thinking turned on tau is 3.00 instead of 1.10")


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
    report = judge(Report(9, tau, (0.5,), (difference,), 1e-3, {"causal blocks": 1.05}, ()))
    assert len(report.findings) == len(expected)
    for finding, beginning in zip(report.findings, expected, strict=True):
        assert finding.startswith(beginning)


def favourable(target, drafter, params, prompt) -> Text:
    """The text in which every round of this drafter accepts its whole chain."""
    tokens = list(prompt)
    for _ in range(4):
        chains, _ = draft_everywhere(
            drafter.config, target.config, target.params, params, padded(tokens, drafter.config)
        )
        tokens += [*np.asarray(chains)[len(tokens) - 1].tolist(), 0]
    return Text(tuple(tokens), len(prompt) - 1)
