"""What the adaptive schedule remembers between rounds."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxspec.decoding import habit as habits
from jaxspec.decoding.habit import (
    KINDS,
    PATIENCE,
    UNKNOWN,
    foresee,
    init_habit,
    rested,
)
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import decoder_for, pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import (
    Adaptive,
    Batch,
    Rounds,
    cut,
    decode_rows,
    keep,
    kind_of,
    push,
)
from jaxspec.decoding.staircase import Staircase, VerifySize
from jaxspec.decoding.state import Draft
from jaxspec.trees.tree import chain
from tests import tiny
from tests.serving import engines

# Step by step they would be dozens of small programs.
learn, choose_size = jax.jit(habits.learn), jax.jit(habits.choose_size)
probe = jax.jit(habits.probe, static_argnums=1)


def habit(**changes):
    """Before the first round, but for one kind, 1."""
    first = init_habit(4, 3)
    changed = {name: getattr(first, name).at[1].set(value) for name, value in changes.items()}
    return dataclasses.replace(first, **changed)


def staircase(*seconds, rows=2):
    """The rows' roots, and twice as many nodes, four times …"""
    return Staircase.of([VerifySize(rows << i, 1 << i) for i in range(len(seconds))], seconds)


@pytest.mark.parametrize(
    ("probes", "young", "wait"),
    [(0, False, 16), (1, False, 32), (4, False, 256), (9, False, 256), (9, True, 16)],
)
def test_drafts_that_do_not_pay_are_tried_ever_less_often(probes, young, wait):
    """But for a request that began since."""

    def at(idle, kinds=(1, KINDS)):
        known = habit(idle=idle, probes=probes)
        rows = jnp.array(kinds), jnp.array([young, False])
        return int(probe(known, Adaptive().probe, *rows, staircase(1.0, 1.1)))

    assert PATIENCE == 4
    assert [at(wait - 1), at(wait)] == [0, 1]
    assert at(1000, kinds=(0, KINDS)) == 0  # none of that kind runs


def test_kinds_of_requests():
    temperatures = [0.0, 0.1, 0.4, 0.5, 0.8, 1.2, 0.0]
    batch = SimpleNamespace(
        sampling=SimpleNamespace(temperature=jnp.array(temperatures)),
        state=SimpleNamespace(done=jnp.arange(7) == 6),
    )
    assert kind_of(batch).tolist() == [0, 1, 1, 2, 2, 3, KINDS]


def test_what_a_draft_teaches():
    known = habit(idle=16, probes=2)
    fresh = jnp.array([[0.8, 0.4, 0.2], [0.1, 0.1, 0.1]])
    tokens = jnp.array([[1, 2, 3]] * 2)
    scores = jnp.log(jnp.full((2, 3), 0.5))
    tree = chain(jnp.array([0, 0]), tokens, jnp.array([2, 3]), scores, size=4)

    def after(old, chosen):
        old = jnp.array([old, [0.1] * 3])  # of a row that is done
        kinds = jnp.array([1, KINDS])
        return learn(known, tree, fresh, old, jnp.array([1, 3]), kinds, chosen)

    taught = after([1.0, 0.6, 0.5], False)
    own = jax.tree.map(lambda x: x[1], taught)
    assert own.foretold.tolist() == pytest.approx([0.5, 0.25, 0.0])  # two were verified
    assert own.happened.tolist() == [1.0, 0.0, 0.0]
    assert own.usual.tolist() == pytest.approx([0.98, 0.94, 0.92])
    assert float(own.varied) == pytest.approx(0.98 + 0.4**2 + 0.5**2)  # all were usually 1
    assert float(own.lasted) == pytest.approx(0.98 + 0.4 * 0.6 + 0.5 * 0.8)
    assert (int(own.idle), int(own.probes)) == (0, 3)
    for kind in (0, 2, 3):  # the others learn nothing
        for new, old in zip(jax.tree.leaves(taught), jax.tree.leaves(known), strict=True):
            assert new[kind].tolist() == old[kind].tolist()
    assert int(after([1.0, 0.6, 0.5], True).probes[1]) == 0
    unknown = after([UNKNOWN] * 3, True)
    assert float(unknown.varied[1]) == float(unknown.lasted[1]) == pytest.approx(0.98)


@pytest.mark.parametrize(("lasted", "size"), [(1.0, 2), (0.0, 0)])
def test_an_old_survival_counts_as_much_as_such_ones_did(lasted, size):
    known = habit(usual=0.1, lasted=lasted)
    stairs = staircase(1.0, 1.5, 1.8, rows=1)
    for old, expected in (([0.9, 0.8, 0.7], size), ([UNKNOWN] * 3, 0)):
        chosen = choose_size(jnp.array([old]), known, jnp.array([1]), stairs)
        assert int(chosen) == expected
    # Of another kind nothing is known: its first draft is expected to be accepted.
    assert int(choose_size(jnp.array([[UNKNOWN] * 3]), known, jnp.array([0]), stairs)) == 2


def test_survivals_are_forgotten_once_they_are_older_than_their_age():
    survivals = jnp.array([[[0.9], [0.8]]])  # the last round's, and the one's before
    once = push(survivals, jnp.array([[UNKNOWN]]))
    assert once.tolist() == [[[UNKNOWN], [jnp.float32(0.9)]]]
    assert push(once, jnp.array([[UNKNOWN]])).tolist() == [[[UNKNOWN], [UNKNOWN]]]


@pytest.mark.parametrize(("drafted", "wait"), [(1.1, 16), (1.5, 50), (2.0, 100)])
def test_dear_drafts_are_tried_more_seldom(drafted, wait):
    """A probe takes 0.1, 0.5 or 1 round more; 1% of the time."""

    def at(idle):
        rows = jnp.array([1, 1]), jnp.array([True, True])
        return int(probe(habit(idle=idle), Adaptive().probe, *rows, staircase(1.0, drafted)))

    assert [at(wait - 1), at(wait + 1)] == [0, 1]


DEPTH = 3


@functools.partial(jax.jit, static_argnames=("rows", "rounds"))
def run(chance, claimed, stairs, key, *, rows: int, rounds: int):
    """Tokens and seconds of rounds in which drafted tokens are accepted by `chance`, while the
    drafter claims `claimed`; requests have 64 tokens, and the next takes its row at once."""
    kind = jnp.zeros(rows, jnp.int32)
    sampling = SimpleNamespace(temperature=jnp.zeros(rows))
    claims = jnp.full((rows, DEPTH), jnp.log(claimed)).cumsum(axis=1)
    anchor = jnp.zeros(rows, jnp.int32)

    def one(carry, key):
        survivals, known, age, left = carry
        state = SimpleNamespace(rounds=age, done=kind > 0)
        batch = SimpleNamespace(state=state, sampling=sampling, survivals=survivals)
        size, pays = Rounds(None, None, stairs, Adaptive()).size(batch, known)
        length = jnp.full(rows, DEPTH)
        tree = chain(anchor, jnp.ones((rows, DEPTH), int), length, claims, size=DEPTH + 1)
        fresh = foresee(tree, known, kind)
        draft = cut(Draft(tree), keep(fresh, kind == 0, size, stairs))
        verified = draft.tree.valid[:, 1:] & (size > 0)
        agree = jax.random.uniform(key, (rows, DEPTH)) < chance
        accepted = jnp.cumprod(agree & verified, axis=1).sum(axis=1)
        learnt = learn(known, draft.tree, fresh, survivals[:, -1], accepted, kind, pays)
        known = jax.tree.map(
            lambda a, b: jnp.where(size > 0, a, b), learnt, rested(known, kind)
        )
        survivals = push(survivals, jnp.where(size > 0, fresh, UNKNOWN))
        ended = left <= accepted + 1
        survivals = jnp.where(ended[:, None, None], UNKNOWN, survivals)
        age, left = jnp.where(ended, 0, age + 1), jnp.where(ended, 64, left - accepted - 1)
        return (survivals, known, age, left), (accepted.sum() + rows, stairs.seconds[size])

    start = jnp.full((rows, Adaptive().age, DEPTH), UNKNOWN), init_habit(DEPTH + 1, DEPTH)
    start += kind, 8 * jnp.arange(1, rows + 1)
    _, (tokens, seconds) = jax.lax.scan(one, start, jax.random.split(key, rounds))
    return tokens, seconds


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("chance", "claimed", "seconds"),
    [
        (0.2, 0.9, (1.0, 1.9, 2.7)),  # drafts never pay, and the drafter boasts
        (0.5, 0.5, (1.0, 1.6, 2.2)),  # they nearly do
        (0.6, 0.9, (1.0, 1.5, 2.0)),  # both are much alike
        (0.8, 0.8, (1.0, 1.3, 1.5)),  # they pay
    ],
)
def test_it_is_as_fast_as_the_best_fixed_way(chance, claimed, seconds, rows):
    sizes = VerifySize(rows, 1), VerifySize(2 * rows, 4), VerifySize(4 * rows, 4)
    stairs = Staircase.of(sizes, seconds)
    tokens, spent = run(chance, claimed, stairs, jax.random.key(0), rows=rows, rounds=2000)
    tokens, spent = tokens[200:].sum(), spent[200:].sum()  # once it has learnt
    whole = sum(chance**i for i in range(DEPTH + 1)) / seconds[-1]
    one_each = (1 + chance) / seconds[1]
    assert tokens / spent > 0.98 * rows * max(1.0, one_each, whole)


def test_the_size_of_a_round_does_not_depend_on_its_draft():
    """A sure and a doubtful drafter, of which older rounds say the same. Chains that are drawn
    from them would be biased otherwise (`decoding.budget`)."""
    loaded = engines.DRAFTERS["survival chain"]
    sizes = VerifySize(1, 1), VerifySize(8, 8)
    seconds = Staircase.of(sizes, [1 + 0.1 * size.total for size in sizes])

    def rounds_by_size(temperature):
        drafter = dataclasses.replace(
            loaded, params=dataclasses.replace(loaded.params, temperatures=temperature)
        )
        decoder, params = decoder_for(tiny.target(), drafter, rejection=True)
        requests = pack(
            decoder,
            tiny.prompts(5),
            batch=1,
            capacity=256,
            max_new_tokens=20,
            budget=8,
            sampling=[Sampling(temperature=1.0, stop_ids=())],
            keys=request_keys(0, 1),
        )
        state = prefill(decoder, params, requests)
        batch = Batch(state, requests.sampling, jnp.full((1, 2, 7), 0.6))
        past = init_habit(8, decoder.drafter.depth)
        count = jnp.int32(1)
        schedule = Adaptive()
        _, past = decode_rows(decoder, params, batch, past, seconds, count, schedule=schedule)
        return past.rounds.tolist()

    assert rounds_by_size(jnp.float32(0.05)) == rounds_by_size(jnp.float32(50.0))
