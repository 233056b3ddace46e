"""Does a drafter fit its target, and does decoding run it as training did?

Runs the drafter over known texts twice, once as training does (all blocks in one pass) and once
as decoding does (caches, round by round), and compares the logits slot by slot. Then tries the
usual causes of low acceptance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from jaxspec.api import generate
from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.base import Committed, LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, BlockParams
from jaxspec.drafters.rollout import greedy, rollout
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.evaluation.walk import rounds_along
from jaxspec.models.decoder import forward
from jaxspec.models.params import TargetParams
from jaxspec.models.state import LayerStates, init_states
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt, as_token_ids
from jaxspec.training.features import target_features
from jaxspec.trees.tree import causal_bits

CHUNK = 128  # texts are padded to a multiple of this
PARTS = 8  # parts that a single text is cut into, for confidence intervals
ANCHORS = 32  # anchors drafted from at a time
LEVEL = 0.95  # of confidence intervals
WORTH = 0.1  # least gain, in tokens per anchor, that counts as a finding
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}  # of logits, relative to the largest


@dataclasses.dataclass(frozen=True)
class Text:
    """Known tokens to replay.

    Attributes:
      tokens: ids.
      start: position of the first anchor, at least 1. For an answer this is its first token,
        which prefill decides.
    """

    tokens: tuple[int, ...]
    start: int = 1


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
      rounds: blocks that decoding drafted.
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
    """`check` on the target's own greedy answers; also tries the other thinking mode."""

    def answers(thinking):
        rows = as_token_ids(target, prompts, raw=False, thinking=thinking)
        done = generate(target, rows, max_new_tokens=max_new_tokens)
        pairs = zip(rows, done, strict=True)
        return [Text((*row, *answer.token_ids), len(row)) for row, answer in pairs]

    report, own = _check(target, drafter, answers(thinking), diagnose=True)
    if not _can_think(target):
        return report
    config, params = drafter.drafter.config, drafter.params
    found = {
        f"thinking turned {'on' if on else 'off'}": _alternative(
            own, _accepted(config, target, params, answers(on))
        )
        for on in (True, False)
        if on != thinking
    }
    return judge(dataclasses.replace(report, alternatives=report.alternatives | found))


def check(
    target: Target, drafter: LoadedDrafter, texts: Sequence[Text], *, diagnose: bool = True
) -> Report:
    """Checks a block drafter on texts, best written by the target.

    Args:
      diagnose: try alternative configurations; each compiles a program.

    Raises:
      ValueError: the drafter is not a block drafter, or a text is shorter than a block.
    """
    return _check(target, drafter, texts, diagnose=diagnose)[0]


def _check(
    target: Target, drafter: LoadedDrafter, texts: Sequence[Text], *, diagnose: bool
) -> tuple[Report, list[np.ndarray]]:
    """The report, and the drafts accepted at every anchor of every text."""
    config, params = drafter.drafter.head_config, drafter.params
    if config is None:
        raise ValueError(
            f"{type(drafter.drafter).__name__} cannot be checked; expected a trained block "
            "drafter, without +ngram"
        )
    for text in texts:
        if len(text.tokens) < text.start + config.depth + 1:
            raise ValueError(
                f"a text of {len(text.tokens)} tokens from position {text.start} on is too "
                f"short; expected at least {config.depth + 1} after it"
            )
    rounds = [r for text in texts for r in _decode(target, drafter.drafter, params, text)]
    own = _accepted(config, target, params, texts)
    accepted = np.array([count for count, _ in rounds])
    reached = [(accepted >= slot).sum() for slot in range(config.depth + 1)]
    others = _alternatives(config, target.config) if diagnose else ()
    found = {
        name: _alternative(own, _accepted(other, target, params, texts))
        for name, other in others
    }
    report = judge(
        Report(
            rounds=len(rounds),
            tau=float(np.mean(accepted + 1)),
            accepted=tuple(
                float(n / max(before, 1))
                for before, n in zip(reached, reached[1:], strict=False)
            ),
            differences=tuple(np.max([d for _, d in rounds], axis=0).tolist()),
            tolerance=max(
                TOLERANCE.get(str(x.dtype), TOLERANCE["bfloat16"])
                for x in (params.head.fc, target.params.embed)
            ),
            alternatives=found,
            findings=(),
        )
    )
    return report, own


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
    config: DrafterConfig, target: TargetConfig
) -> Iterator[tuple[str, DrafterConfig]]:
    """Likely wrong configurations: those that leave every weight's shape the same."""
    for shift in (1, -1):
        taps = tuple(tap + shift for tap in config.taps)
        if min(taps) >= -1 and max(taps) < target.num_layers:
            yield f"taps {list(taps)}", dataclasses.replace(config, taps=taps)
    if config.predict_next or config.block_size > 1:
        layout = "predict_own" if config.predict_next else "predict_next"
        other = dataclasses.replace(config, predict_next=not config.predict_next)
        if other.depth:
            yield f"slot layout {layout}", other
    causal = any(config.causal)
    visibility = "bidirectional" if causal else "causal"
    yield f"{visibility} blocks", dataclasses.replace(config, causal=not causal)
    mask, last = config.mask_token_id, config.vocab_size - 1
    for token in dict.fromkeys((mask - 1, mask + 1, last, *target.eos_token_ids)):
        if token != mask and 0 <= token <= last:
            yield f"mask id {token}", dataclasses.replace(config, mask_token_id=token)


def padded(tokens: Sequence[int], config: DrafterConfig) -> jax.Array:
    """Pads tokens to [1, T], a multiple of CHUNK and more than a block longer."""
    length = -(-(len(tokens) + config.depth + 1) // CHUNK) * CHUNK
    return jnp.asarray(np.pad(tokens, (0, length - len(tokens)))[None], jnp.int32)


def _accepted(
    config: DrafterConfig, target: Target, params: BlockParams, texts: Sequence[Text]
) -> list[np.ndarray]:
    """Drafts accepted at every anchor of every text, all blocks run as in training."""
    found = []
    for text in texts:
        tokens = padded(text.tokens, config)
        anchors = np.arange(text.start, len(text.tokens) - 1)
        count = -(-len(anchors) // ANCHORS) * ANCHORS  # few programs
        places = np.minimum(text.start + np.arange(count), tokens.shape[1] - 1)
        chains, _ = draft_everywhere(
            config, target.config, target.params, params, tokens, places
        )
        pairs = zip(anchors, np.asarray(chains), strict=False)
        found.append(np.array([_matches(text, at, chain) for at, chain in pairs]))
    return found


def _alternative(own: list[np.ndarray], other: list[np.ndarray]) -> Alternative:
    """Args: own, other: `_accepted` of the same texts, paired."""
    rounds = [count for counts in other for count in _rounds(counts)]
    if len(own) == 1:
        own, other = (np.array_split(counts[0], PARTS) for counts in (own, other))
    gains = [b.mean() - a.mean() for a, b in zip(own, other, strict=True)]
    gain = float(np.mean(gains))
    error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    reach = float(stdtrit(len(gains) - 1, (1 + LEVEL) / 2)) * error
    return Alternative(float(np.mean(rounds)) + 1, gain, gain - reach, gain + reach)


def _rounds(counts: np.ndarray) -> Iterator[int]:
    """Drafts accepted in each round of a replay, from the counts at every anchor."""
    at = 0
    while at < len(counts):
        yield int(counts[at])
        at += int(counts[at]) + 1


def _matches(text: Text, anchor: int, drafted: np.ndarray) -> int:
    """Number of leading drafts that equal the text after an anchor."""
    known = np.array(text.tokens[anchor + 1 : anchor + 1 + len(drafted)])
    return int(np.cumprod(drafted[: len(known)] == known).sum())


@functools.partial(jax.jit, static_argnames=("config", "target_config"))
def draft_everywhere(
    config: DrafterConfig,
    target_config: TargetConfig,
    target: TargetParams,
    params: BlockParams,
    tokens: jax.Array,
    anchors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Drafts as training does: greedy chains [A, P] after anchors, and hidden states [A, P, M].

    Args:
      tokens: [1, T], see `padded`.
      anchors: [A] int32 positions in `tokens`; all of them by default.
    """
    features = target_features(target, target_config, tokens, taps=config.taps, chunk=CHUNK)
    head = bind(config, params.head)
    anchors = jnp.arange(tokens.shape[1]) if anchors is None else anchors
    blocks = run_blocks(head, params.vocabulary, tokens, features.taps, anchors[None])

    def chain(block):
        stream, anchor = block[0][None], block[1][None]
        base = head.logits(params.vocabulary, stream)
        return rollout(head, params.vocabulary, stream, base, anchor, greedy)[0][0]

    stream = blocks.stream[0]
    return jax.lax.map(chain, (stream, tokens[0, anchors]), batch_size=8), stream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Caches:
    target: LayerStates
    drafter: Any


def _decode(
    target: Target, drafter: BlockDrafter, params: BlockParams, text: Text
) -> list[tuple[int, np.ndarray]]:
    """Every round as decoding runs it: drafts accepted, and differences [P] from training."""
    config = drafter.config
    tokens = padded(text.tokens, config)
    _, streams = draft_everywhere(config, target.config, target.params, params, tokens)
    c, capacity = target.config, tokens.shape[1]
    dtype = target.params.embed.dtype
    caches = _Caches(
        init_states(c, 1, capacity, dtype),
        drafter.init(params, 1, capacity),
    )
    width, differences, at = config.depth + 1, [], 0

    def draft(anchor):
        nonlocal caches, at
        while at < anchor:
            count = min(width, anchor - at)
            rows = tokens[:, at : at + width]
            caches = _commit(drafter, c, target.params, params, caches, rows, at, count)
            at += count
        own, difference = _draft_cached(
            drafter, params, caches.drafter, tokens[:, anchor], anchor, streams[anchor]
        )
        differences.append(np.asarray(difference))
        return np.asarray(own)

    def accepted_at(anchor):
        return _matches(text, anchor, draft(anchor))

    walked = rounds_along(accepted_at, text.start, len(text.tokens))
    counts = [count for _, count in walked]
    return list(zip(counts, differences, strict=True))


@functools.partial(
    jax.jit, static_argnames=("drafter", "target_config"), donate_argnames="caches"
)
def _commit(drafter, target_config, target, params, caches, tokens, start, count) -> _Caches:
    """Runs the target on C tokens from position `start` and commits the first `count`."""
    width, starts = tokens.shape[1], jnp.full(1, start)
    output = forward(
        target,
        target_config,
        tokens,
        jnp.arange(width)[None],
        causal_bits(width)[None],
        caches.target,
        starts,
        taps=drafter.taps,
    )
    committed = Committed(tokens, output.taps, starts, jnp.full(1, count))
    return _Caches(
        caches.target.write(output.rows, starts, committed.count),
        drafter.observe(params, caches.drafter, committed),
    )


@functools.partial(jax.jit, static_argnames="drafter")
def _draft_cached(drafter, params, state, anchor, position, trained):
    """The greedy chain [P], and its logits' distance from those of training's hidden states."""
    head, vocabulary = bind(drafter.config, params.head), params.vocabulary
    stream = drafter.stream(params, state, anchor, jnp.full(1, position))
    base = head.logits(vocabulary, stream)
    own, logits = rollout(head, vocabulary, stream, base, anchor, greedy)

    expected = head.logits(vocabulary, trained[None])
    if head.sequential is not None:
        previous = jnp.concatenate([anchor[:, None], own[:, :-1]], axis=1)
        latent = head.teacher_forced(vocabulary, trained[None], previous)
        expected = head.correct(vocabulary, expected, latent)
    # A bilinear head's logits are -inf outside its candidates.
    scale = jnp.max(jnp.abs(jnp.where(jnp.isfinite(expected), expected, 0)))
    same = logits == expected
    difference = jnp.max(jnp.where(same, 0, jnp.abs(logits - expected)), axis=-1) / scale
    return own[0], difference[0]
