"""The block drafter against its equations, and cached decoding against a full pass."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.rollout import draw, rollout
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from tests.drafters import cases
from tests.drafters.oracle import Oracle
from tests.slow import slow_but

LENGTH, ROWS = 12, 5  # tokens per sequence, rows per `observe`
CHAIN = TreeConfig("chain", size=8)
QUICK = ["jetspec", "rnn", "treeflash", "dflash2"]  # each part of a head is in one of them
kinds = pytest.mark.parametrize("kind", slow_but(QUICK, cases.KINDS))


@functools.partial(jax.jit, static_argnames="kind")
def observe(kind, state, committed):
    return BlockDrafter(cases.KINDS[kind], CHAIN).observe(cases.params(kind), state, committed)


@functools.partial(jax.jit, static_argnames="kind")
def decode(kind, state, anchor, position, choices):
    """Logits [B, P, V] and confidences [B, P] along given choices [B, P]."""
    params = cases.params(kind)
    drafter = BlockDrafter(cases.KINDS[kind], CHAIN)
    head = bind(drafter.config, params.head)
    stream = drafter.stream(params, state, anchor, position)
    base = head.logits(params.vocabulary, stream)

    def choose(slot, logits):
        return choices[:, slot], logits

    _, logits = rollout(head, params.vocabulary, stream, base, anchor, choose)
    previous = jnp.concatenate([anchor[:, None], choices[:, :-1]], axis=1)
    confident = head.confidence is not None
    return logits, head.confidence_logits(stream, previous) if confident else logits[..., 0]


@functools.partial(jax.jit, static_argnames="kind")
def teacher_forced(kind, tokens, features, anchors):
    """The same of blocks at anchors [B, A], in one pass over whole sequences."""
    params = cases.params(kind)
    head = bind(cases.KINDS[kind], params.head)
    blocks = run_blocks(head, params.vocabulary, tokens, features, anchors)
    logits = blocks.logits(head, params.vocabulary)
    if head.confidence is None:
        return logits, logits[..., 0]
    return logits, head.confidence_logits(blocks.stream, blocks.previous)


def fill(kind, tokens, features, lengths, steps=None):
    """A drafter's state after its rows were committed `steps` [n, B] at a time."""
    batch = len(lengths)
    state = BlockDrafter(cases.KINDS[kind], CHAIN).init(
        cases.params(kind), batch, LENGTH + ROWS
    )
    at = np.zeros(batch, int)
    for count in [[ROWS] * batch] * 3 if steps is None else steps:
        count = np.minimum(count, np.minimum(lengths - at, ROWS))
        index = np.minimum(at[:, None] + np.arange(ROWS), LENGTH - 1)
        rows = np.arange(batch)[:, None]
        # Rows past the count are real numbers of later positions, which must not be seen.
        committed = Committed(
            jnp.asarray(tokens[rows, index]),
            features[rows, index],
            jnp.asarray(at, jnp.int32),
            jnp.asarray(count, jnp.int32),
        )
        state = observe(kind, state, committed)
        at = at + count
    assert np.array_equal(at, lengths)
    return state


def sequences(kind, batch, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 10, (batch, LENGTH)).astype(np.int32)
    return tokens, cases.features(kind, batch, LENGTH, seed)


@kinds
def test_draft_follows_the_equations(kind):
    tokens, features = sequences(kind, 2)
    lengths = np.array([7, 3])
    state = fill(kind, tokens, features, lengths)
    params, config = cases.params(kind), cases.KINDS[kind]
    oracle = Oracle(config, params.head, params.vocabulary.embed, params.vocabulary.unembed)
    anchors = tokens[[0, 1], lengths]

    drafter = BlockDrafter(config, TreeConfig("chain", size=config.depth + 1))
    budget = jnp.array([config.depth + 1] * 2)
    tree = cases.draft(
        drafter, params, state, jnp.asarray(anchors), jnp.asarray(lengths), budget
    )
    for row in range(2):
        own, laws, confidences = oracle.chain(features[row, : lengths[row]], anchors[row])
        assert tree.tokens[row].tolist() == [anchors[row], *own]
        chosen = laws[range(config.depth), own] - np.log(np.exp(laws).sum(axis=1))
        np.testing.assert_allclose(tree.scores[row, 1:], np.cumsum(chosen), atol=2e-4)

        choices = jnp.asarray([own] * 2)
        logits, found = decode(kind, state, jnp.asarray(anchors), jnp.asarray(lengths), choices)
        np.testing.assert_allclose(logits[row], laws, atol=2e-4)
        if config.confidence:
            np.testing.assert_allclose(found[row], confidences, atol=2e-4)


@kinds
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(
    lengths=st.tuples(st.integers(0, LENGTH - 1), st.integers(0, LENGTH - 1)),
    steps=st.lists(st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)), max_size=4),
    seed=st.integers(0, 9),
)
def test_cached_decoding_is_the_full_pass(kind, lengths, steps, seed):
    """Whatever the rounds committed, row by row unequally."""
    tokens, features = sequences(kind, 2, seed)
    lengths = np.array(lengths)
    state = fill(kind, tokens, features, lengths, [*steps, *[(ROWS, ROWS)] * 3])
    anchors = tokens[[0, 1], lengths]
    depth = cases.KINDS[kind].depth
    after = np.minimum(lengths[:, None] + 1 + np.arange(depth), LENGTH - 1)
    known = jnp.asarray(tokens[np.arange(2)[:, None], after])

    found = decode(kind, state, jnp.asarray(anchors), jnp.asarray(lengths), known)
    full = teacher_forced(kind, jnp.asarray(tokens), features, jnp.asarray(lengths)[:, None])
    np.testing.assert_allclose(found[0], full[0][:, 0], atol=2e-5)
    np.testing.assert_allclose(found[1], full[1][:, 0], atol=2e-5)


@kinds
def test_a_block_sees_nothing_from_its_anchor_on(kind):
    tokens, features = sequences(kind, 1)
    anchors = jnp.array([[5, 8]])
    logits, _ = teacher_forced(kind, jnp.asarray(tokens), features, anchors)

    later = features.at[:, 5:].add(1.0)  # the anchor's own feature and all after it
    changed, _ = teacher_forced(kind, jnp.asarray(tokens), later, anchors)
    np.testing.assert_array_equal(changed[:, 0], logits[:, 0])
    assert not np.allclose(changed[:, 1], logits[:, 1])

    other = jnp.asarray(tokens).at[:, 8].add(1)  # the other block's anchor, a label of this one
    changed, _ = teacher_forced(kind, other, features, anchors)
    np.testing.assert_array_equal(changed[:, 0, :3], logits[:, 0, :3])
    assert not np.allclose(changed[:, 1], logits[:, 1])

    earlier = features.at[:, 4].add(1.0)  # the last feature before the first anchor
    changed, _ = teacher_forced(kind, jnp.asarray(tokens), earlier, anchors)
    assert not np.allclose(changed[:, 0], logits[:, 0])


def test_a_window_forgets():
    """The anchor at position 8 sees 5 … 8; later slots forget more, and see the anchor."""
    tokens, features = sequences("window", 1)

    def logits(features):
        return teacher_forced("window", jnp.asarray(tokens), features, jnp.array([[8]]))[0]

    np.testing.assert_array_equal(logits(features.at[:, 4].add(1.0)), logits(features))
    assert not np.allclose(logits(features.at[:, 5].add(1.0)), logits(features))


@pytest.mark.parametrize(
    ("kind", "changed"), [("jetspec", []), ("dspark", [2]), ("gated", [2]), ("rnn", [2, 3])]
)
def test_what_a_choice_changes(kind, changed):
    """The slot after it, with a sequential head; all later ones, if the head remembers."""
    tokens, features = sequences(kind, 1)
    state = fill(kind, tokens, features, np.array([6]))
    anchor, position = jnp.asarray(tokens[:, 6]), jnp.array([6])
    one, _ = decode(kind, state, anchor, position, jnp.array([[1, 2, 3, 4]]))
    two, _ = decode(kind, state, anchor, position, jnp.array([[1, 5, 3, 4]]))
    assert [slot for slot in range(4) if not np.allclose(one[0, slot], two[0, slot])] == changed


def test_a_sampled_chain_comes_with_its_own_law():
    """Row 0 at temperature 0.7, row 1 greedy; each slot's law given the tokens drawn before."""
    features, params = cases.features("rnn", 2, 6), cases.params("rnn")
    drafter = BlockDrafter(cases.KINDS["rnn"], CHAIN)
    chain = cases.draft_sampled(
        drafter,
        params,
        cases.observed("rnn", features),
        jnp.array([4, 4]),
        jnp.array([6, 6]),
        jnp.array([0.7, 0.0]),
        jax.random.split(jax.random.key(0), 2),
    )
    target = params.vocabulary
    oracle = Oracle(drafter.config, params.head, target.embed, target.unembed)
    drawn = chain.tokens[0].tolist()
    _, logits, _ = oracle.chain(features[0], 4, lambda slot, _: drawn[slot])
    scaled = logits / 0.7
    law = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(chain.log_q[0], law, atol=5e-4)

    own, _, _ = oracle.chain(features[1], 4)
    assert chain.tokens[1].tolist() == own
    np.testing.assert_array_equal(np.exp(chain.log_q[1]), np.eye(11)[own])
    assert chain.lengths.tolist() == [4, 4]


def test_drafts_are_drawn_from_the_law():
    """20 000 requests whose context is the same: the first slot's frequencies."""
    requests = 20_000
    log_q = jax.nn.log_softmax(jnp.array([0.5, -1.0, 1.5]))
    keys = jax.random.split(jax.random.key(1), requests)
    drawn = jax.vmap(lambda key: draw(key, 0, log_q))(keys)
    found = np.bincount(drawn, minlength=3) / requests
    np.testing.assert_allclose(found, np.exp(log_q), atol=5 * 0.5 / np.sqrt(requests))
