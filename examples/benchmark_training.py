"""The chunked losses against the straightforward ones that hold all logits.

Time and memory of one value and gradient, DSpark's losses, as anchors and vocabulary grow.
Memory is what the compiled program needs beside arguments and results. Sizes whose logits do
not fit are compiled and not run.

  python examples/benchmark_training.py
"""

import argparse
import time

import jax
import jax.numpy as jnp

from jaxspec.training.vocabulary_loss import Factors, Mixture, vocabulary_loss

DEPTH, WIDTH, RANK = 7, 576, 128
MIXTURE = Mixture()
SIZES = [(16, 8_192), (64, 8_192), (16, 49_152), (64, 49_152), (512, 49_152), (512, 151_936)]


def chunked(drafter, unembed, target, labels, weights):
    return vocabulary_loss(MIXTURE, drafter, unembed, target, labels, weights)[0]


def full(drafter, unembed, target, labels, weights):
    logits = drafter.hidden @ unembed.T + drafter.latent @ drafter.output.T
    log_p = jax.nn.log_softmax(logits)
    q = jax.nn.softmax(target @ unembed.T)
    cross_entropy = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    distance = jnp.abs(jnp.exp(log_p) - q).sum(-1)
    mixed = MIXTURE.cross_entropy * cross_entropy + MIXTURE.total_variation * distance
    return (weights * mixed).sum()


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
    """The fastest of some runs, after one that does not count."""
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run-below", type=int, default=30_000_000, help="logits")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, depth {DEPTH}, width {WIDTH}, rank {RANK}, float32")
    print("anchors  vocabulary  losses    memory MB  seconds")
    for anchors, vocab in SIZES:
        positions = anchors * DEPTH
        shapes = specs(positions, vocab)
        for name, loss in (("full", full), ("chunked", chunked)):
            compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
            took = "-"
            if positions * vocab < options.run_below:
                arguments = jax.tree.map(filled, shapes)
                took = f"{seconds(compiled, arguments, options.repeats):.3f}"
            print(f"{anchors:7}  {vocab:10,}  {name:8}  {memory:9,.0f}  {took}", flush=True)


if __name__ == "__main__":
    main()
