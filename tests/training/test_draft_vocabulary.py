"""Training a drafter that drafts some tokens alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.cli.train import Train
from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.drafters.head import Vocabulary, restrict
from jaxspec.drafters.teacher_forced import BlockOutput
from jaxspec.drafters.weights import bind, random_weights
from jaxspec.models.target import Target
from jaxspec.training.draft_vocabulary import coverage, most_frequent
from jaxspec.training.losses import LossConfig, drafter_loss, position_weights
from jaxspec.training.recipe import eagle_config
from jaxspec.training.start import initial_drafter
from jaxspec.training.trainer import train
from jaxspec.training.unrolled_loss import unrolled_loss
from jaxspec.training.validation import walked_tau
from jaxspec.training.vocabulary_loss import Mixture
from tests.slow import slow_but
from tests.training import tiny

KEPT = np.array([0, 2, 3, 5, 8, 13, 21, 22])
VOCAB, PROMPTS = tiny.DRAFTER.vocab_size, [[1, 2, 3]]
CONFIG = dataclasses.replace(tiny.CONFIG, draft_vocab=12, steps=4)
EOS = 23  # never in the examples


def example(tokens, supervised):
    return Example(np.array(tokens, np.int32), np.array(supervised, bool))


def target():
    plain = tiny.target()
    config = dataclasses.replace(plain.config, eos_token_ids=(EOS,))
    return Target(plain.name, config, plain.params)


EXAMPLES = [
    example([7, 7, 7, 4, 4, 1], [0, 0, 1, 1, 1, 1]),
    example([5, 1, 5, 2], [0, 1, 1, 1]),
]  # the target wrote 4 and 1 twice, 2, 5 and 7 once


@pytest.mark.parametrize(
    ("size", "always", "kept", "covered"),
    [
        (2, (), [1, 4], 4 / 7),
        (4, (), [1, 2, 4, 5], 6 / 7),
        (4, (8, 7), [1, 4, 7, 8], 5 / 7),
        (6, (), [0, 1, 2, 4, 5, 7], 1),
        (9, (), list(range(9)), 1),
    ],
)
def test_the_most_frequent_of_what_the_target_wrote(size, always, kept, covered):
    found = most_frequent(EXAMPLES, size, vocab=9, always=always)
    assert found.tolist() == kept and found.dtype == np.int32
    assert coverage(EXAMPLES, found, vocab=9) == pytest.approx(covered)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="2 tokens has no room for the 3 stop ids"):
        most_frequent(EXAMPLES, 2, vocab=9, always=(1, 2, 3))
    for size in (-1, 1, 25):
        with pytest.raises(ValueError, match=f"draft_vocab is {size}; expected 2 … 24"):
            dataclasses.replace(CONFIG, draft_vocab=size)


def test_the_command_says_so(tmp_path):
    command = Train(tmp_path, tmp_path, mask_token_id=10, target="tiny", draft_vocab=16)
    deep = dataclasses.replace(tiny.TARGET_CONFIG, num_layers=12)
    assert command._config(deep).draft_vocab == 16


@pytest.mark.parametrize("head", slow_but(["markov"], ["markov", "rnn", "mlp"]))
def test_the_loss_is_that_of_the_kept_rows_of_all_logits(head):
    config = dataclasses.replace(
        tiny.DRAFTER,
        sequential=head,
        rank=0 if head == "mlp" else 4,
        confidence="hidden" if head == "mlp" else "hidden_and_previous",
    )
    loss = LossConfig(Mixture(0.1, 0.5, 0.9, temperature=2.0, chunk=16), confidence=0.7)
    random = np.random.default_rng(0)
    shape, width = (2, 5, config.depth), config.hidden_size

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    weights = random_weights(config, jax.random.key(0))
    weights = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), weights)
    whole = Vocabulary(normal(VOCAB, width), normal(VOCAB, width))
    previous, labels = (jnp.asarray(random.integers(0, VOCAB, shape)) for _ in range(2))
    stream, teacher = normal(*shape, width), normal(*shape, width)
    supervised = jnp.ones(shape, bool).at[0, 0, 1:].set(False)
    blocks = BlockOutput(stream, previous, labels, supervised)
    known = supervised & jnp.isin(labels, KEPT)
    assert known.any() and (supervised & ~known)[..., :-1].any()

    def reduced(weights):
        weights, vocabulary = restrict(weights, whole, jnp.asarray(KEPT))
        sums = drafter_loss(
            loss, bind(config, weights), vocabulary, blocks, supervised, teacher
        )
        return sums.total / sums.weight, sums

    def plain(weights):
        head = bind(config, weights)
        logits = blocks.logits(head, whole)[..., KEPT]
        scores = (teacher @ whole.unembed.T)[..., KEPT]
        p, q = jax.nn.softmax(logits), jax.nn.softmax(scores)
        label = (labels[..., None] == KEPT).argmax(-1)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        hot, warm = jax.nn.log_softmax(scores / 2.0), jax.nn.log_softmax(logits / 2.0)
        kl = 4.0 * jnp.sum(jnp.exp(hot) * (hot - warm), -1)
        distance = jnp.abs(p - q).sum(-1)
        confidence = optax.sigmoid_binary_cross_entropy(
            head.confidence_logits(stream, previous), jax.lax.stop_gradient(1 - distance / 2)
        )
        each = 0.1 * entropy + 0.5 * kl + 0.9 * distance + 0.7 * confidence
        weight = known * jnp.exp(-jnp.arange(config.depth) / 4.0)
        return (weight * each).sum() / weight.sum(), (known * (1 - distance / 2)).sum((0, 1))

    def compiled(loss):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)

    (found, sums), slopes = compiled(reduced)
    (expected, accepted), expected_slopes = compiled(plain)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.accepted, accepted, rtol=1e-4)
    np.testing.assert_array_equal(sums.counted, supervised.sum((0, 1)))
    slopes, expected_slopes = (dict(nnx.to_flat_state(x)) for x in (slopes, expected_slopes))
    for path, slope in expected_slopes.items():
        np.testing.assert_allclose(slopes[path][...], slope[...], atol=2e-5, err_msg=str(path))
    if head != "mlp":
        moved = np.abs(slopes["sequential", "output"][...]).sum(axis=1) > 0
        assert np.flatnonzero(moved).tolist() == KEPT.tolist()


def test_a_token_that_cannot_be_drafted_is_never_accepted():
    """Of the tokens 5 and 4, both to be drafted, 5 is kept; all laws are uniform."""
    options = dict(weighting="uniform", confidence=0.0, truth="target")
    loss, width = LossConfig(Mixture(0, 1, 0), **options), tiny.DRAFTER.hidden_size
    plain = dataclasses.replace(tiny.DRAFTER, sequential=None, rank=0, confidence=None)
    eagle = eagle_config(tiny.TARGET_CONFIG, steps=1)
    table = jnp.zeros((VOCAB, width))
    kept = Vocabulary(table, table[: len(KEPT)], jnp.asarray(KEPT))
    blocks = BlockOutput(
        stream=jnp.zeros((1, 1, 2, width)),
        previous=jnp.array([[[1, 5]]]),
        labels=jnp.array([[[5, 4]]]),
        inside=jnp.ones((1, 1, 2), bool),
    )

    @jax.jit
    def losses():
        block, unrolled = (
            bind(c, random_weights(c, jax.random.key(0))) for c in (plain, eagle)
        )
        teacher, tokens = blocks.stream, jnp.array([[1, 1, 5, 4]])
        rows = teacher, tokens, jnp.ones((1, 4), bool), jnp.zeros((1, 4, width))
        return (
            drafter_loss(loss, block, kept, blocks, blocks.inside, teacher),
            unrolled_loss(loss, unrolled, kept, *rows, at=jnp.array([[0, 1]])),
        )

    of_blocks, of_steps = losses()
    assert (of_blocks.accepted.tolist(), of_blocks.counted.tolist()) == ([1, 0], [1, 1])
    assert (of_steps.accepted.tolist(), of_steps.counted.tolist()) == ([1], [2])


def test_a_token_that_cannot_be_drafted_is_never_reached_beyond_by_dpace():
    known = jnp.array([[[True, False, True]]])
    probability = jnp.array([[[1.0, 0.9, 0.5]]])  # the second means nothing
    config, supervised = LossConfig(weighting="dpace"), jnp.ones((1, 1, 3), bool)
    weights, blocks = position_weights(config, supervised, probability, known)
    # Smoothed 1, .5, .75: reached 1, -, .375
    np.testing.assert_allclose(weights, [[[1.375, 0, 0.375]]], rtol=1e-6)
    assert blocks == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(CONFIG, target(), tiny.examples(), folder)
    return folder


def load(folder):
    return load_drafter(folder / "drafter", target(), TreeConfig("chain", size=4))


def ids_of(folder):
    return np.asarray(load(folder).params.vocabulary.kept).tolist()


@pytest.mark.slow
def test_the_drafter_is_exported_with_its_tokens(tmp_path):
    train(CONFIG, target(), tiny.examples(), tmp_path, prompts=PROMPTS)
    written = json.loads((tmp_path / "draft_vocabulary.json").read_text())
    ids = most_frequent(tiny.examples(), 12, vocab=VOCAB, always=(EOS,))
    assert EOS in ids and ids.tolist() == written["token_ids"] == ids_of(tmp_path)
    assert written["size"] == 12
    assert written["coverage"] == coverage(tiny.examples(), ids, vocab=VOCAB)
    assert 0.4 < written["coverage"] < 1

    steps = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == {"step": 4, "tau": walked_tau(target(), load(tmp_path), PROMPTS)}


def test_a_run_that_goes_on_ends_the_same(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for done in (folder / "drafter", folder / "checkpoints" / "4"):
        shutil.rmtree(done)
    other = [Example(x.tokens[::-1] // 2, x.supervised) for x in tiny.examples()]
    with pytest.raises(ValueError, match="holds a run on other data"):
        train(CONFIG, target(), other, folder)
    train(CONFIG, target(), tiny.examples(), folder)
    assert tiny.metrics(folder) == tiny.metrics(run)
    for name in ("drafter/model.safetensors", "draft_vocabulary.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name


def test_training_that_goes_on_from_a_drafter_keeps_its_tokens(run, tmp_path):
    first = shutil.copytree(run / "drafter", tmp_path / "first")
    config = dataclasses.replace(CONFIG, initial=str(first), draft_vocab=0)
    folder, other = tmp_path / "again", tiny.examples(8)
    weights, kept = initial_drafter(config, target())
    jax.tree.map(np.testing.assert_array_equal, weights, load(run).params.whole_head)
    assert kept.tolist() == ids_of(run)
    train(config, target(), other, folder)
    shutil.rmtree(first)  # no longer needed
    for done in (folder / "drafter", folder / "checkpoints" / "4"):
        shutil.rmtree(done)
    train(config, target(), other, folder)
    assert ids_of(folder) == ids_of(run)

    twice = dataclasses.replace(config, initial=str(run / "drafter"), draft_vocab=8)
    with pytest.raises(ValueError, match="keeps its draft vocabulary of 12 tokens"):
        train(twice, target(), other, tmp_path / "never")
