"""Rejection sampling, counted out: two tokens, every draft, exact laws; and what biases it."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxspec.decoding.rejection import (
    accept_by_rejection,
    accept_chain,
    acceptance_probability,
    residual,
    round_keys,
    scatter_law,
)
from jaxspec.drafters.confidence import confident_prefix, surviving_prefix

chance_of, rest_of = jax.jit(acceptance_probability), jax.jit(residual)
scattered = jax.jit(scatter_law, static_argnums=2)
rejected = jax.jit(accept_by_rejection)

DEPTH = 3
PREFIXES = [p for n in range(DEPTH + 1) for p in itertools.product((0, 1), repeat=n)]
EXACT = 1e-6  # float32


def laws(random, sharp=1.0):
    """A law over two tokens after every prefix of up to DEPTH of them."""
    chance = 1 / (1 + np.exp(-sharp * random.standard_normal(len(PREFIXES))))
    return {prefix: np.array([c, 1 - c]) for prefix, c in zip(PREFIXES, chance, strict=True)}


def emitted(p, q, lengths, draft_law=None):
    """The exact law of the first DEPTH + 1 tokens when every round drafts from the anchor on.

    Args:
      p, q: laws by prefix, of the target and of the drafter.
      lengths: draft -> tokens verified.
      draft_law: what drafts are really drawn from; q unless a test cheats.
    """
    draft_law = draft_law or q
    result = dict.fromkeys(itertools.product((0, 1), repeat=DEPTH + 1), 0.0)
    for draft in itertools.product((0, 1), repeat=DEPTH):
        chance = np.prod([draft_law[draft[:i]][draft[i]] for i in range(DEPTH)])
        verified, passed = lengths(draft), 1.0
        for i in range(verified + 1):
            prefix = draft[:i]
            log_p = np.log(np.float32(p[prefix]))
            if i < verified:
                log_q = np.log(np.maximum(np.float32(q[prefix]), np.float32(1e-30)))
                token = np.int32(draft[i])
                accept = float(chance_of(log_p, log_q, token))
                rest = np.asarray(rest_of(log_p, log_q))
            else:
                accept, rest = 0.0, p[prefix]
            for token in (0, 1):
                mass = chance * passed * (1 - accept) * rest[token] / rest.sum()
                spread(result, (*prefix, token), mass, p)
            passed *= accept
    return result


def spread(result, prefix, mass, p):
    """What follows the tokens of this round is the target's own; its first tokens count."""
    if len(prefix) == DEPTH + 1:
        result[prefix] += mass
        return
    for token in (0, 1):
        spread(result, (*prefix, token), mass * p[prefix][token], p)


def bias(p, found):
    """Largest difference from the target's own law of DEPTH + 1 tokens."""
    return max(
        abs(mass - np.prod([p[path[:i]][path[i]] for i in range(DEPTH + 1)]))
        for path, mass in found.items()
    )


def confidences(draft, table):
    """Confidence of each slot, which knows the tokens before it."""
    return np.array([table[draft[:i]][0] for i in range(DEPTH)], np.float32)


def full(draft):
    return DEPTH


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_chain_is_exact(seed):
    random = np.random.default_rng(seed)
    p, q = laws(random), laws(random)
    assert bias(p, emitted(p, q, full)) < EXACT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["threshold", "survival"])
def test_confidence_rules_are_exact(rule, seed):
    random = np.random.default_rng(seed)
    p, q, table = laws(random), laws(random), laws(random)
    table[()] = np.array([0.99, 0.01])
    bar = 0.99 * (table[0,][0] + table[1,][0]) / 2  # the first token decides the second slot
    seen = set()

    def lengths(draft):
        confidence = jnp.asarray(confidences(draft, table))[None]
        prefix = confident_prefix if rule == "threshold" else surviving_prefix
        kept = prefix(confidence, jnp.float32(bar))
        seen.add(int(kept[0]))
        return int(kept[0])

    assert bias(p, emitted(p, q, lengths)) < EXACT
    assert len(seen) > 1


def test_a_rule_that_looks_at_the_token_itself_is_biased():
    random = np.random.default_rng(0)
    p, q = laws(random), laws(random)
    assert bias(p, emitted(p, q, lambda draft: int(np.argmin((*draft, 0))))) > 0.01


def test_argmax_drafts_are_biased():
    """min(1, p / q) with q the drafter's law, but drafts its argmax."""
    random = np.random.default_rng(0)
    p, q = laws(random), laws(random)
    argmax = {prefix: np.eye(2)[np.argmax(law)] for prefix, law in q.items()}
    assert bias(p, emitted(p, q, full, argmax)) > 0.01
    # The same drafts with the law they were really drawn from, which has one outcome:
    assert bias(p, emitted(p, argmax, full)) < EXACT


def test_top_p_on_one_side_is_biased():
    """Drafts drawn from a filtered law but verified against the unfiltered one."""
    random = np.random.default_rng(0)
    p, q = laws(random), laws(random)
    filtered = {
        prefix: np.where(law >= 0.4, law, 0) / law[law >= 0.4].sum()
        for prefix, law in q.items()
    }
    assert any((law == 0).any() for law in filtered.values())
    assert bias(p, emitted(p, q, full, filtered)) > 0.01
    assert bias(p, emitted(p, filtered, full)) < EXACT


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.lists(st.floats(-8, 8), min_size=5, max_size=5),
    st.lists(st.floats(-8, 8), min_size=5, max_size=5),
)
def test_one_slot_emits_the_target_law(target, drafter):
    """q(x) accept(x) + (rejected mass) residual(x) = p(x), for any two laws."""
    log_p = jax.nn.log_softmax(jnp.float32(jnp.array(target)))
    log_q = jax.nn.log_softmax(jnp.float32(jnp.array(drafter)))
    token = jnp.arange(5)
    spread = jnp.broadcast_to(log_p, (5, 5)), jnp.broadcast_to(log_q, (5, 5))
    taken = jnp.exp(log_q) * chance_of(*spread, token)
    rest = rest_of(log_p, log_q)
    found = taken + (1 - taken.sum()) * rest / rest.sum()
    np.testing.assert_allclose(found, jnp.exp(log_p), atol=2e-6)


def test_draws_follow_the_counted_law():
    """100 000 rounds of one batch row each, lengths 0 … 3, against the enumeration."""
    random = np.random.default_rng(5)
    p, q = laws(random), laws(random)
    rounds = 100_000
    drafts = np.zeros((rounds, DEPTH), int)
    for i in range(DEPTH):
        law = np.array([q[tuple(row)][1] for row in drafts[:, :i]])
        drafts[:, i] = random.random(rounds) < law
    log_p = np.log([[p[tuple(row[:i])] for i in range(DEPTH + 1)] for row in drafts])
    log_q = np.log([[q[tuple(row[:i])] for i in range(DEPTH)] for row in drafts])
    lengths = np.where(drafts[:, 0] == 0, 2, 3)  # slot 2 looks at slot 0's token: allowed
    keys = jax.random.split(jax.random.key(0), rounds)
    accepted, token = rejected(
        jnp.float32(log_p), jnp.asarray(drafts), jnp.float32(log_q), jnp.asarray(lengths), keys
    )
    accepted, token = np.asarray(accepted), np.asarray(token)
    assert set(accepted.tolist()) == {0, 1, 2, 3} and not (accepted > lengths).any()

    # The first two tokens, where the round decided them: the target's law given that.
    first = np.where(accepted > 0, drafts[:, 0], token)
    assert abs(first.mean() - p[()][1]) < 5 * 0.5 / np.sqrt(rounds)
    for prefix in (0, 1):
        rows = (accepted > 0) & (first == prefix)
        second = np.where(accepted > 1, drafts[:, 1], token)[rows]
        assert abs(second.mean() - p[prefix,][1]) < 5 * 0.5 / np.sqrt(rows.sum())


def test_greedy_laws_reduce_to_matching():
    """One-hot p and q: accept while equal, then emit the target's token."""
    one_hot = jnp.log(jnp.eye(4))
    target = one_hot[jnp.array([[1, 2, 3, 0], [1, 2, 3, 0], [1, 2, 3, 0]])]
    drafted = jnp.array([[1, 2, 3], [1, 0, 3], [1, 2, 3]])
    keys = jax.random.split(jax.random.key(0), 3)
    accept = jax.jit(accept_chain)
    found = accept(target, drafted, one_hot[drafted], jnp.array([3, 3, 1]), keys)
    assert found.count.tolist() == [4, 2, 2]
    assert found.tokens[0].tolist() == [1, 2, 3, 0]
    assert found.tokens[1, :2].tolist() == [1, 2]
    assert found.tokens[2, :2].tolist() == [1, 2]
    assert found.path.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 0, 0]]


def test_streams_of_random_numbers_are_distinct():
    keys = jax.random.split(jax.random.key(0), 2)
    seen = [np.asarray(jax.random.key_data(keys)).tolist()]
    for position in (0, 1, 7):
        at = jnp.array([position, position])
        plain = jax.vmap(jax.random.fold_in)(keys, at)  # what the target's choices consume
        for stream in (plain, *round_keys(keys, at)):
            seen.append(np.asarray(jax.random.key_data(stream)).tolist())
    flat = [tuple(key) for stream in seen for key in stream]
    assert len(set(flat)) == len(flat)


# Three tokens of which a drafter considers two, slot by slot (DFlash2's selector).
SUPPORT = [[0, 2], [2, 1]]
SLOTS = list(itertools.product(range(2), repeat=2))  # which candidate in either slot


def candidate_laws(seed):
    """p[path] over 3 tokens after every path; q[slot][path of tokens] over 2 candidates."""
    random = np.random.default_rng(seed)
    paths = [p for n in range(3) for p in itertools.product(range(3), repeat=n)]
    p = {path: random.dirichlet(np.ones(3)) for path in paths}
    p[()] = np.array([0.0, 0.4, 0.6])  # top-p removed token 0, the drafter's first candidate
    q = {(): np.array([0.7, 0.3])} | {(x,): random.dirichlet(np.ones(2)) for x in (0, 2)}
    return p, q


def first_two(p, q, verified_against=None):
    """The exact law of two tokens, a chain of two candidates drafted.

    Args:
      verified_against: laws the round believes the drafts were drawn from; q.
    """
    believed, result = verified_against or q, np.zeros((3, 3))
    for choice in SLOTS:
        drafted = [SUPPORT[slot][choice[slot]] for slot in range(2)]
        chance = q[()][choice[0]] * q[drafted[0],][choice[1]]
        passed = 1.0
        for slot in range(3):
            prefix = tuple(drafted[:slot])
            if slot == 2:
                result[prefix] += chance * passed
                break
            with np.errstate(divide="ignore"):
                log_p = np.log(p[prefix]).astype(np.float32)
                log_q = np.log(believed[prefix]).astype(np.float32)
            support = np.array(SUPPORT[slot], np.int32)
            accept = float(chance_of(log_p, log_q, np.int32(drafted[slot]), support))
            rest = rest_of(log_p, scattered(log_q[None], support[None], 3)[0])
            rest = chance * passed * (1 - accept) * np.asarray(rest / rest.sum())
            if slot == 0:  # what follows is the target's own
                result += rest[:, None] * np.array([p[x,] for x in range(3)])
            else:
                result[drafted[0]] += rest
            passed *= accept
    return result


def own_law(p):
    return np.array([p[()][x] * p[x,] for x in range(3)])


@pytest.mark.parametrize("seed", range(3))
def test_drafts_among_candidates_are_exact(seed):
    p, q = candidate_laws(seed)
    assert np.abs(first_two(p, q) - own_law(p)).max() < EXACT


def test_greedy_walks_among_candidates_are_biased():
    """The best candidate is taken, but verified as if drawn from the law over candidates."""
    p, q = candidate_laws(0)
    greedy = {path: np.eye(2)[np.argmax(law)] for path, law in q.items()}
    assert np.abs(first_two(p, greedy, q) - own_law(p)).max() > 0.01


def test_a_law_over_candidates_is_the_law_over_all_tokens():
    """The same draws from the same keys, whichever way the laws are written down."""
    random = np.random.default_rng(3)
    batch, depth, vocab, k = 64, 3, 9, 4
    log_p = jax.nn.log_softmax(jnp.asarray(random.standard_normal((batch, depth + 1, vocab))))
    support = jnp.asarray(
        [[random.permutation(vocab)[:k] for _ in range(depth)] for _ in range(batch)]
    )
    log_q = jax.nn.log_softmax(jnp.asarray(random.standard_normal((batch, depth, k))))
    drafted = support[..., 0]
    lengths = jnp.asarray(random.integers(0, depth + 1, batch))
    keys = jax.random.split(jax.random.key(0), batch)
    found = rejected(log_p, drafted, log_q, lengths, keys, support=support)
    flat = scatter_law(log_q.reshape(-1, k), support.reshape(-1, k), vocab)
    whole = flat.reshape(batch, depth, vocab)
    expected = rejected(log_p, drafted, whole, lengths, keys)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert set(np.asarray(found[0]).tolist()) == {0, 1, 2, 3}
