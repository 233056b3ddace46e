"""DFlash2 against what z-lab's implementation computed (../shared/golden)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.choice import log_law
from jaxspec.decoding.rejection import residual, scatter_law
from jaxspec.drafters.rollout import tempered
from jaxspec.drafters.selector import lattice, pick, walk
from jaxspec.drafters.weights import bind
from tests import tiny
from tests.decoding.test_choice import nothing_written, rows
from tests.drafters import goldens
from tests.drafters.goldens import TOLERANCE, observed
from tests.slow import slow_but

TREE = TreeConfig("chain", size=8)
LAWS = dict(atol=1e-4, rtol=1e-4)
NAMES = ("dflash2_a", "dflash2_window_a")
names = pytest.mark.parametrize("name", slow_but(["dflash2_a"], NAMES))


@pytest.fixture(scope="module")
def load(golden):
    return functools.cache(lambda name: goldens.load(golden(name)[0], TREE))


@functools.partial(jax.jit, static_argnames="drafter")
def draft(drafter, params, tokens, features, position):
    """What a golden round records, after positions 0 … position - 1 of one sequence."""
    state, anchor = observed(drafter, params, tokens, features, position)
    head, vocabulary = bind(drafter.config, params.head), params.vocabulary
    stream = drafter.stream(params, state, anchor, position[None])
    base = head.logits(vocabulary, stream)
    table = lattice(head, vocabulary, stream, base, anchor)

    def greedy(slot, scores):
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), scores

    chosen, scores = walk(table.scores, greedy)
    found = {
        "hidden": head.normed(stream),
        "unary_logits": base,
        "candidates": table.tokens,
        "lattice": table.scores,
        "scores": scores,
        "path": pick(table.tokens, chosen),
        "q": jnp.exp(tempered(scores, jnp.array([0.8]))),
    }
    return jax.tree.map(lambda x: x[0], found)


def rounds(golden, load, name):
    """The first four rounds of every prompt: (round, recorded, what we compute, sequence)."""
    target, loaded = load(name)
    drafter, params = loaded.drafter, loaded.params
    for r, recorded, inputs in goldens.rounds(golden(name), target, drafter.taps, 4):
        tokens, _, position = inputs
        sequence = np.asarray(tokens)[0, : int(position) + 1].tolist()
        yield r, recorded, draft(drafter, params, *inputs), sequence


@names
def test_a_round(golden, load, name):
    for _, recorded, found, _ in rounds(golden, load, name):
        for key in ("hidden", "unary_logits", "lattice", "scores"):
            np.testing.assert_allclose(found[key], recorded[key], **TOLERANCE)
        np.testing.assert_array_equal(found["candidates"], recorded["candidates"])
        np.testing.assert_array_equal(found["path"], recorded["path"])


@names
def test_laws_of_rejection_sampling(golden, load, name):
    """Of the drafter, the target and what is left after a rejection, along the greedy path."""
    _, trace = golden(name)
    how = trace["config"]
    sampling = rows(**{key: how[key] for key in ("temperature", "top_p", "top_k")})
    target, _ = load(name)

    @jax.jit
    def laws(logits, q, candidates):
        written = nothing_written(logits[None])
        log_p = log_law(logits[None], jnp.zeros(1, int), sampling, written)[0]
        rest = residual(log_p[:-1], scatter_law(jnp.log(q), candidates, log_p.shape[-1]))
        return jnp.exp(log_p), rest / rest.sum(axis=-1, keepdims=True)

    for r, recorded, found, sequence in rounds(golden, load, name):
        if r:
            continue
        np.testing.assert_allclose(found["q"], recorded["q"], **LAWS)
        path = [*sequence, *recorded["path"]]
        logits = tiny.logits(target, [int(x) for x in path])[len(sequence) - 1 :]
        p, rest = laws(logits, found["q"], jnp.asarray(recorded["candidates"]))
        np.testing.assert_allclose(p, recorded["target_probs"], **LAWS)
        np.testing.assert_allclose(rest, recorded["residual"][:-1], **LAWS)
        np.testing.assert_allclose(p[-1], recorded["residual"][-1], **LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_decoding(golden, load, name):
    """The target's own output, and as many tokens committed in every round."""
    _, trace = golden(name)
    target, loaded = load(name)
    prompts = trace["prompts"]
    done = generate(target, [p["prompt"] for p in prompts], drafter=loaded, max_new_tokens=48)
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == prompt["ar"]
        full = sum(size == loaded.drafter.config.block_size for size in prompt["block_sizes"])
        assert list(completion.stats.committed)[:full] == prompt["accept"][:full]
