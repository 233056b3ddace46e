"""The law of the target's choices: sampling against the enumerated distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding import choice
from jaxspec.decoding.choice import choose
from jaxspec.decoding.loop import decode
from jaxspec.decoding.penalties import Written
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, pack, request_keys
from jaxspec.decoding.sampling import Sampling, SamplingRows, greedy_rows
from jaxspec.decoding.state import Decoder, Params
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.trees.tree import ancestors, chain
from tests import tiny
from tests.decoding.test_filters import kept_by_sorting
from tests.drafters import cases


def rows(batch=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingRows:
    return dataclasses.replace(
        greedy_rows(jax.random.split(jax.random.key(seed), batch)),
        temperature=jnp.asarray(np.full(batch, temperature, np.float32)),
        top_k=jnp.asarray(np.full(batch, top_k, np.int32)),
        top_p=jnp.asarray(np.full(batch, top_p, np.float32)),
        min_p=jnp.asarray(np.full(batch, min_p, np.float32)),
    )


def nothing_written(logits) -> Written:
    """Before choices after the nodes of chains, in texts without a token."""
    batch, count = logits.shape[:2]
    none = jnp.zeros(batch, jnp.int32)
    tree = chain(none, jnp.zeros((batch, count - 1), jnp.int32), none, size=count)
    return Written.before(jnp.zeros((batch, 1), int), none, none, tree, ancestors(tree))


def test_choices_of_one_position_share_their_noise():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (1, 1, 64)), (1, 4, 1))
    depths = jnp.array([[0, 1, 1, 2]])
    draw = jax.jit(
        lambda length: choose(
            logits, depths, length, rows(temperature=5.0), 2, nothing_written(logits)
        )[0]
    )
    chosen = draw(jnp.array([10])).tolist()
    assert chosen[1] == chosen[2] and len(set(chosen)) == 3
    # The same positions reached from another anchor draw the same tokens.
    later = draw(jnp.array([11])).tolist()
    assert later[0] == chosen[1] and later[1] == chosen[3]


def test_a_cpu_draws_for_one_tree_at_a_time():
    logits, zeros = jnp.zeros((2, 3, 64)), jnp.zeros((2, 3), jnp.int32)
    options, written = rows(batch=2), nothing_written(logits)
    lowered = choose.lower(logits, zeros, zeros[:, 0], options, max_depth=4, written=written)
    assert "tensor<1x5x64xf32>" in lowered.as_text()  # noise of the five depths
    assert "tensor<2x5x64xf32>" not in lowered.as_text()


def test_programs_of_the_same_shapes_share_one_trace(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        return filtered(*args)

    filtered = choice.filtered
    monkeypatch.setattr(choice, "filtered", counted)
    logits, zeros = jnp.zeros((1, 1, 67)), jnp.zeros((1, 1), jnp.int32)
    options, written = rows(), nothing_written(logits)
    for _ in range(2):
        program = jax.jit(lambda x: choose(x, zeros, zeros[0], options, 0, written))
        assert "while" in program.lower(logits).as_text()
    assert len(calls) == 1


def test_temperature_zero_is_argmax_beside_sampled_rows():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 64))
    options = rows(batch=2)
    options = tiny.dataclasses.replace(options, temperature=jnp.array([0.0, 9.0]))
    chosen = choose(
        logits,
        jnp.zeros((2, 3), jnp.int32),
        jnp.array([4, 4]),
        options,
        0,
        nothing_written(logits),
    )
    best = jnp.argmax(logits, -1)
    assert chosen[0].tolist() == best[0].tolist()
    assert chosen[1].tolist() != best[1].tolist()


MATCHED = LoadedDrafter(tiny.RandomTrees(size=8, depth=2))
DRAWN = cases.loaded("dspark", TreeConfig("chain", size=8))


@pytest.mark.slow
@pytest.mark.parametrize("rejection, draws", [(True, 20_000), (False, 20_000)])
def test_three_sampled_tokens_follow_the_enumerated_distribution(rejection, draws):
    """Speculative draws against p(a) p(b | a) p(c | a, b), computed by enumeration."""
    target, prompt, drafter = tiny.target(), tiny.prompts(5)[0], DRAWN if rejection else MATCHED
    sampling = Sampling(temperature=1.5, top_k=6, top_p=0.95, stop_ids=())
    vocab = target.config.vocab_size

    def law(prompt):
        logits = tiny.logits(target, prompt)[-1].astype(np.float64) / sampling.temperature
        keep = kept_by_sorting(logits, sampling.top_k, sampling.top_p, 0.0)
        p = np.where(keep, np.exp(logits - logits.max()), 0)
        return p / p.sum()

    expected = np.zeros((vocab, vocab, vocab))
    for a, p in enumerate(law(prompt)):
        for b, q in enumerate(law([*prompt, a]) if p else ()):
            if q:
                expected[a, b] = p * q * law([*prompt, a, b])

    # Straight to the programs, for a chunk no longer than the prompt needs.
    decoder = Decoder(target.config, drafter.drafter, chunk=8, rejection=rejection)
    requests = pack(
        decoder,
        [prompt] * draws,
        batch=draws,
        capacity=capacity_for(len(prompt) + 3, decoder),
        max_new_tokens=3,
        budget=8,
        sampling=[sampling] * draws,
        keys=request_keys(0, draws),
    )
    params = Params(target.params, drafter.params)
    state = prefill(decoder, params, requests)
    state = decode(decoder, params, state, requests.sampling, np.int32(9))
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(np.asarray(state.tokens)[:, len(prompt) : len(prompt) + 3].T), 1)

    assert counts.sum() == draws and state.done.all()
    assert counts[expected == 0].sum() == 0
    committed = np.asarray(state.committed)
    assert (committed[:, 0] > 1).any()  # drafts were accepted, so their law is tested too
    often = draws * expected >= 5  # the others are pooled into one cell
    found = np.append(counts[often], counts[~often].sum())
    wanted = np.append(draws * expected[often], draws * expected[~often].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chi2 = ((found - wanted) ** 2 / wanted).sum()
    # Mean k - 1, variance twice that: six standard deviations and more would be a fault.
    freedom = len(wanted) - 1
    assert freedom > 20 and chi2 < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.slow
def test_rejection_is_greedy_at_temperature_zero():
    prompts = tiny.prompts(4, 9)
    plain = generate(tiny.target(), prompts, max_new_tokens=20)
    drawn = generate(tiny.target(), prompts, max_new_tokens=20, drafter=DRAWN, rejection=True)
    assert [c.token_ids for c in drawn] == [c.token_ids for c in plain]


@pytest.mark.parametrize(
    "drafter, message",
    [
        (MATCHED, "a drafter that samples its chains; RandomTrees does not. Use a trained"),
        (
            cases.loaded("dspark", TreeConfig("chain", size=4)),
            "needs a chain of 5 nodes .* its tree is 'chain' with 4. Use such",
        ),
        (
            cases.loaded("dspark", TreeConfig("path_conditioned", size=8)),
            "needs a chain of 5 nodes .* its tree is 'path_conditioned' with 8",
        ),
    ],
    ids=["no chains", "too short", "no chain"],
)
def test_rejection_needs_a_drafter_that_draws(drafter, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.target(), [[1]], drafter=drafter, rejection=True)
