"""Compares training with a straightforward implementation that holds all logits.

First the losses alone, then the whole gradient of a step on the small target: its forward, the
drafter's, DSpark's losses and the backward pass, without the optimizer, which is the same for
both. Reports time and memory as anchors and vocabulary grow. Memory is the compiled program's
temporaries. Sizes whose logits do not fit are compiled but not run.

    python examples/benchmark_training.py
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxspec
from jaxspec.cli import exits
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.models.decoder import unembed
from jaxspec.training.blocks import before_labels, sample_anchors, supervised_slots
from jaxspec.training.features import target_features
from jaxspec.training.loading import Rows
from jaxspec.training.losses import position_weights
from jaxspec.training.recipe import PRESETS, TrainConfig, drafter_config
from jaxspec.training.step import batch_loss, init_state
from jaxspec.training.vocabulary_loss import Factors, Mixture, vocabulary_loss

DEPTH, WIDTH, RANK = 7, 576, 128
MIXTURE = Mixture()
SIZES = [(16, 8_192), (64, 8_192), (16, 49_152), (64, 49_152), (512, 49_152), (512, 151_936)]
ROWS, LENGTH = 2, 256  # of a step
STEP_ANCHORS = (16, 64, 128, 512)


def chunked(drafter, unembed, target, labels, weights):
    return vocabulary_loss(MIXTURE, drafter, unembed, target, labels, weights)[0]


def full(drafter, unembed, target, labels, weights):
    logits = drafter.hidden @ unembed.T + drafter.latent @ drafter.output.T
    mixed, _ = mixture(logits, target @ unembed.T, labels)
    return (weights * mixed).sum()


def mixture(logits, teacher, labels):
    """DSpark's losses of every position by definition, and their L1 distance."""
    log_p = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    distance = jnp.abs(jnp.exp(log_p) - jax.nn.softmax(teacher)).sum(-1)
    return MIXTURE.cross_entropy * cross_entropy + MIXTURE.total_variation * distance, distance


def full_batch_loss(config, target_config, target, weights, rows, key):
    """What `batch_loss` computes, for DSpark's losses."""
    depth = config.drafter.depth
    features = target_features(
        target, target_config, rows.tokens, taps=config.drafter.taps, chunk=128
    )
    anchors, kept = sample_anchors(key, rows.supervised, config.anchors)
    head, vocabulary = bind(config.drafter, weights), Vocabulary(target.embed, target.unembed)
    blocks = run_blocks(head, vocabulary, rows.tokens, features.taps, anchors)
    teacher = unembed(target, before_labels(features.hidden, anchors, depth))
    mixed, distance = mixture(blocks.logits(head, vocabulary), teacher, blocks.labels)
    sure = head.confidence_logits(blocks.stream, blocks.previous)
    accepted = jax.lax.stop_gradient(1 - distance / 2)
    mixed += config.loss.confidence * optax.sigmoid_binary_cross_entropy(sure, accepted)
    supervised = supervised_slots(rows.supervised, anchors, kept, depth)
    return (position_weights(config.loss, supervised)[0] * mixed).sum(), None


def specs(positions, vocab):
    """Shapes and types of the arguments."""
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    drafter = Factors(array(1, positions, WIDTH), array(1, positions, RANK), array(vocab, RANK))
    labels = array(1, positions, dtype=jnp.int32)
    return (
        drafter, array(vocab, WIDTH), array(1, positions, WIDTH), labels, array(1, positions)
    )  # fmt: skip


def filled(spec):
    return jnp.full(spec.shape, 0.02).astype(spec.dtype)


def seconds(compiled, arguments, repeats):
    """The fastest of some runs after a warm-up, and their result."""
    out = jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - began)
    return min(times), out


def megabytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def losses(options):
    print(f"losses: depth {DEPTH}, width {WIDTH}, rank {RANK}")
    print("anchors  vocabulary  logits    memory MB  seconds")
    for anchors, vocab in SIZES:
        positions = anchors * DEPTH
        shapes = specs(positions, vocab)
        for name, loss in (("all", full), ("chunked", chunked)):
            compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
            took = "-"
            if positions * vocab < options.run_below:
                arguments = jax.tree.map(filled, shapes)
                took = f"{seconds(compiled, arguments, options.repeats)[0]:.3f}"
            memory = megabytes(compiled)
            print(f"{anchors:7}  {vocab:10,}  {name:8}  {memory:9,.0f}  {took}", flush=True)


def steps(options):
    target = jaxspec.load_target()
    drafter = drafter_config("dspark", target.config, PRESETS[target.name])
    weights = init_state(TrainConfig(drafter), target.params).weights
    tokens = np.random.default_rng(0).integers(0, target.config.vocab_size, (ROWS, LENGTH))
    rows = Rows(tokens.astype(np.int32), np.broadcast_to(np.arange(LENGTH) >= 16, tokens.shape))
    arguments = (target.params, weights, rows, jax.random.key(0))
    vocab = target.config.vocab_size
    print(f"steps: {target.name}, {ROWS} sequences of {LENGTH} tokens")
    print("anchors  vocabulary  logits    memory MB  steps per second")
    for anchors in STEP_ANCHORS:
        config = dataclasses.replace(TrainConfig(drafter), anchors=anchors)
        values = []
        for name, loss in (("all", full_batch_loss), ("chunked", batch_loss)):
            of_arrays = functools.partial(loss, config, target.config)
            gradient = jax.value_and_grad(of_arrays, argnums=1, has_aux=True)
            compiled = jax.jit(gradient).lower(*arguments).compile()
            rate = "-"
            if ROWS * anchors * DEPTH * vocab < options.run_below:
                took, ((value, _), _) = seconds(compiled, arguments, options.repeats)
                values.append(float(value))
                rate = f"{1 / took:.2f}"
            memory = megabytes(compiled)
            print(f"{anchors:7}  {vocab:10,}  {name:8}  {memory:9,.0f}  {rate}", flush=True)
        np.testing.assert_allclose(values, values[:1] * len(values), rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    repeats: int = 3
    """Timed runs of each program; the fastest counts."""
    run_below: int = 50_000_000
    """Logits from which on a program is only compiled."""


def main(options: Options) -> None:
    print(f"{jax.devices()[0].device_kind}, float32")
    losses(options)
    steps(options)


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
