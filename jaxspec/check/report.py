"""Does a drafter fit its target, and does decoding run it as training did?

Replays known texts as decoding would write them, compares the logits with training's slot by
slot, and tries the usual causes of low acceptance.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.special import stdtrit

from jaxspec.check.known_texts import accepted_everywhere, differences
from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation.metrics import conditional, survival_by_depth
from jaxspec.evaluation.walk import RecordedAnswer, record, rounds_along
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt, as_token_ids

PARTS = 8  # parts that a single text is cut into, for confidence intervals
LEVEL = 0.95  # of confidence intervals
WORTH = 0.1  # least gain, in tokens per anchor, that counts as a finding
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}  # of logits, relative to the largest


@dataclasses.dataclass(frozen=True)
class Alternative:
    """How the drafter does under another configuration, or on other texts.

    Attributes:
      tau: tokens per round, as `Report.tau`.
      gain: additional drafted tokens accepted, mean over all anchors of all texts.
      low, high: 95% confidence interval of the gain over texts (Student's t).
    """

    tau: float
    gain: float
    low: float
    high: float

    @property
    def wins(self) -> bool:
        return self.low > 0 and self.gain > WORTH

    def __str__(self) -> str:
        return f"tau {self.tau:.2f}, gain {self.gain:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a check.

    Attributes:
      rounds: blocks that decoding would draft.
      tau: tokens per round of greedy chains, bonus included, if the target wrote the texts.
      accepted: per slot, the share of rounds that accepted it, given that they accepted the
        slots before it.
      differences: per slot, the largest difference of logits between training and decoding,
        relative to the largest logit.
      tolerance: largest acceptable difference.
      alternatives: results under other configurations or texts, by name.
      findings: problems found, one sentence each; empty if there are none.
    """

    rounds: int
    tau: float
    accepted: tuple[float, ...]
    differences: tuple[float, ...]
    tolerance: float
    alternatives: dict[str, Alternative]
    findings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"tau {self.tau:.2f} over {self.rounds} rounds",
            "slot  accepted  largest difference between training and decoding",
        ]
        for slot, row in enumerate(zip(self.accepted, self.differences, strict=True)):
            lines.append("{:>4}  {:>8.2f}  {:.1e}".format(slot + 1, *row))
        lines += [f"{other} with {name}" for name, other in self.alternatives.items()]
        return "\n".join([*lines, *(self.findings or ("nothing looks wrong",))])


def check_answers(
    target: Target,
    drafter: LoadedDrafter,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 48,
    thinking: bool | None = None,
) -> Report:
    """`check` on the target's own greedy answers; also tries the other thinking mode.

    Answers shorter than a block are left out, with a warning.

    Raises:
      ValueError: the drafter is not a block drafter, or all answers are shorter than a block.
    """
    config = _block_config(drafter)

    def answers(thinking) -> dict[int, RecordedAnswer]:
        """The answers that are long enough, by the number of their prompt."""
        rows = as_token_ids(target, prompts, raw=False, thinking=thinking)
        texts = record(target, rows, max_new_tokens=max_new_tokens, spare=0)
        found = {i: text for i, text in enumerate(texts) if _is_long(text, config)}
        if found and len(found) < len(texts):
            warnings.warn(
                f"{len(texts) - len(found)} of {len(texts)} answers are shorter than a block "
                f"({config.depth + 1} tokens) and left out",
                stacklevel=3,
            )
        return found

    texts = answers(thinking)
    if not texts:
        raise ValueError(
            f"every answer is shorter than a block ({config.depth + 1} tokens); expected at "
            f"least one that is not: max_new_tokens is {max_new_tokens}, and other prompts may "
            "have longer answers"
        )
    report, accepted = _check(target, drafter, list(texts.values()), diagnose=True)
    if not _can_think(target):
        return report
    own, found = dict(zip(texts, accepted, strict=True)), {}
    for on in (True, False):
        other = answers(on) if on != thinking else {}
        both = [i for i in own if i in other]
        if both:
            name = f"thinking turned {'on' if on else 'off'}"
            (there,) = accepted_everywhere(target, [drafter], [other[i] for i in both])
            found[name] = _alternative([own[i] for i in both], there)
    return judge(dataclasses.replace(report, alternatives=report.alternatives | found))


def check(
    target: Target,
    drafter: LoadedDrafter,
    texts: Sequence[RecordedAnswer],
    *,
    diagnose: bool = True,
) -> Report:
    """Checks a block drafter on texts, best written by the target.

    Args:
      diagnose: try alternative configurations; each compiles a program.

    Raises:
      ValueError: the drafter is not a block drafter, or a text is shorter than a block.
    """
    return _check(target, drafter, texts, diagnose=diagnose)[0]


def _check(
    target: Target, drafter: LoadedDrafter, texts: Sequence[RecordedAnswer], *, diagnose: bool
) -> tuple[Report, list[np.ndarray]]:
    """The report, and the drafts accepted at every anchor of every text."""
    config, params = _block_config(drafter), drafter.params
    for text in texts:
        if not _is_long(text, config):
            raise ValueError(
                f"a text of {len(text.tokens)} tokens from position {text.start} on is too "
                f"short; expected at least {config.depth + 1} after it"
            )
    others = dict(_alternatives(drafter, target.config)) if diagnose else {}
    own, *found = accepted_everywhere(target, [drafter, *others.values()], texts)
    accepted = _rounds(own)
    survival = survival_by_depth(np.bincount(accepted + 1, minlength=config.depth + 2))
    report = judge(
        Report(
            rounds=len(accepted),
            tau=float(np.mean(accepted + 1)),
            accepted=tuple(np.nan_to_num(conditional(survival)).tolist()),
            differences=tuple(differences(target, drafter, texts).tolist()),
            tolerance=max(
                TOLERANCE.get(str(x.dtype), TOLERANCE["bfloat16"])
                for x in (params.head.fc, target.params.embed)
            ),
            alternatives={
                name: _alternative(own, other)
                for name, other in zip(others, found, strict=True)
            },
            findings=(),
        )
    )
    return report, own


def _block_config(drafter: LoadedDrafter) -> DrafterConfig:
    config = drafter.drafter.head_config
    if config is None:
        raise ValueError(
            f"{type(drafter.drafter).__name__} cannot be checked; expected a trained block "
            "drafter, without +ngram"
        )
    return config


def _is_long(text: RecordedAnswer, config: DrafterConfig) -> bool:
    """Whether a block's drafts can all be compared with the text."""
    return len(text.tokens) > text.start + config.depth


def judge(report: Report) -> Report:
    """Adds the findings to a report."""
    findings = []
    wrong = [i + 1 for i, d in enumerate(report.differences) if not d <= report.tolerance]
    if wrong:
        findings.append(
            f"training and decoding disagree in slots {wrong}: decoding does not run the "
            "drafter as it was trained"
        )
    better = {name: other for name, other in report.alternatives.items() if other.wins}
    if better:
        name, other = max(better.items(), key=lambda pair: pair[1].gain)
        findings.append(
            f"with {name} tau is {other.tau:.2f} instead of {report.tau:.2f} (gain per anchor "
            f"{other.gain:.2f} tokens, at least {other.low:.2f}): the configuration or the "
            "text is probably not what the drafter was trained with"
        )
    elif report.tau < 1.1:
        findings.append(
            "almost nothing is accepted and no alternative helps: was the drafter trained for "
            "this target, on answers of this kind?"
        )
    return dataclasses.replace(report, findings=tuple(findings))


def _can_think(target: Target) -> bool:
    try:
        return bool(target.tokenizer and target.tokenizer.chat("", thinking=True))
    except ValueError:  # no chat template, or none with this switch
        return False


def _alternatives(
    drafter: LoadedDrafter, target: TargetConfig
) -> Iterator[tuple[str, LoadedDrafter]]:
    """The drafter under likely wrong configurations: those that leave its weights' shapes."""
    config: DrafterConfig = drafter.drafter.config

    def other(**changes) -> LoadedDrafter:
        changed = dataclasses.replace(config, **changes)
        return dataclasses.replace(
            drafter, drafter=dataclasses.replace(drafter.drafter, config=changed)
        )

    for shift in (1, -1):
        taps = tuple(tap + shift for tap in config.taps)
        if min(taps) >= -1 and max(taps) < target.num_layers:
            yield f"taps {list(taps)}", other(taps=taps)
    if config.predict_next or config.block_size > 1:
        layout = "predict_own" if config.predict_next else "predict_next"
        swapped = other(predict_next=not config.predict_next)
        if swapped.drafter.depth:
            yield f"slot layout {layout}", swapped
    causal = any(config.causal)
    visibility = "bidirectional" if causal else "causal"
    yield f"{visibility} blocks", other(causal=not causal)
    mask, last = config.mask_token_id, config.vocab_size - 1
    for token in dict.fromkeys((mask - 1, mask + 1, last, *target.eos_token_ids)):
        if token != mask and 0 <= token <= last:
            yield f"mask id {token}", other(mask_token_id=token)


def _alternative(own: list[np.ndarray], other: list[np.ndarray]) -> Alternative:
    """Args: own, other: `accepted_everywhere` of the same texts, paired."""
    tau = float(np.mean(_rounds(other))) + 1
    if len(own) == 1:
        parts = min(PARTS, len(own[0]), len(other[0]))  # none empty
        own, other = (np.array_split(counts[0], parts) for counts in (own, other))
    gains = [b.mean() - a.mean() for a, b in zip(own, other, strict=True)]
    gain = float(np.mean(gains))
    error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    reach = float(stdtrit(len(gains) - 1, (1 + LEVEL) / 2)) * error
    return Alternative(tau, gain, gain - reach, gain + reach)


def _rounds(accepted: list[np.ndarray]) -> np.ndarray:
    """Drafts accepted in each round of replays, from those at every anchor of each text."""
    replays = (rounds_along(counts.item, 0, len(counts) + 1) for counts in accepted)
    return np.array([count for replay in replays for _, count in replay])
