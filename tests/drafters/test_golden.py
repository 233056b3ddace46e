"""Drafters against what the original implementations computed (../shared/golden)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.drafters.rollout import rollout
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.transitions import transition_table
from jaxspec.drafters.weights import bind
from jaxspec.trees.tree import NO_PARENT
from tests.drafters import goldens
from tests.drafters.goldens import TOLERANCE, accepted, observed, tapped
from tests.slow import slow_but

TREES = {
    "jetspec_a": TreeConfig("best_first", size=60, width=7),
    "dflash_a": TreeConfig("best_first", size=40, width=6),
    "dspark_vanilla": TreeConfig("chain", size=8),
    "dspark_rnn": TreeConfig("chain", size=8),
    "treeflash_a": TreeConfig("transitions", size=40, width=6, candidates=5),
}


@pytest.fixture(scope="module")
def load(golden):
    return functools.cache(lambda name: goldens.load(golden(name)[0], TREES[name]))


@functools.partial(jax.jit, static_argnames="drafter")
def draft(drafter, params, tokens, features, position):
    """Everything a golden round records, after positions 0 … position - 1 of one sequence."""
    state, anchor = observed(drafter, params, tokens, features, position)
    at = position[None]
    head = bind(drafter.config, params.head)
    stream = drafter.stream(params, state, anchor, at)
    base = head.logits(params.vocabulary, stream)

    def greedy(slot, logits):
        return jnp.argmax(logits, axis=-1), logits

    own, corrected = rollout(head, params.vocabulary, stream, base, anchor, greedy)
    tree, _ = drafter.draft(params, state, anchor, at, jnp.array([drafter.size]))
    found = {"base": base, "tokens": own, "corrected": corrected, "tree": tree}
    if drafter.config.confidence:
        previous = jnp.concatenate([anchor[:, None], own[:, :-1]], axis=1)
        found["confidence"] = head.confidence_logits(stream, previous)
    if drafter.tree.kind == "transitions":
        found["transitions"] = transition_table(
            head,
            params.vocabulary,
            stream,
            base,
            jnp.zeros((1, base.shape[1], 1)),
            anchor,
            parents=drafter.tree.candidates,
            children=drafter.tree.width,
        )
    return jax.tree.map(lambda x: x[0], found)


@functools.partial(jax.jit, static_argnames="config")
def teacher_forced(config, params, tokens, features, anchors):
    head = bind(config, params.head)
    blocks = run_blocks(head, params.vocabulary, tokens, features, anchors)
    confidence = head.confidence_logits(blocks.stream, blocks.previous)
    return blocks.logits(head, params.vocabulary), confidence, blocks.inside


def rounds(golden, load, name):
    """Prompt by prompt the first three rounds: (recorded arrays, what we compute)."""
    target, loaded = load(name)
    drafter, params = loaded.drafter, loaded.params
    for _, recorded, inputs in goldens.rounds(golden(name), target, drafter.taps, 3):
        assert recorded
        yield recorded, draft(drafter, params, *inputs)


@pytest.mark.parametrize("name", slow_but(["jetspec_a"], ["jetspec_a", "dflash_a"]))
def test_marginal_trees(golden, load, name):
    for recorded, found in rounds(golden, load, name):
        np.testing.assert_allclose(found["base"], recorded["draft_logits"], **TOLERANCE)
        tree = found["tree"]
        np.testing.assert_array_equal(tree.tokens, recorded["tree_tokens"])
        np.testing.assert_array_equal(tree.parents, recorded["tree_parents"])
        np.testing.assert_allclose(tree.scores, recorded["tree_logp"], **TOLERANCE)


@pytest.mark.parametrize("name", slow_but(["dspark_rnn"], ["dspark_vanilla", "dspark_rnn"]))
def test_sequential_chains(golden, load, name):
    for recorded, found in rounds(golden, load, name):
        np.testing.assert_allclose(found["base"], recorded["base_logits"], **TOLERANCE)
        np.testing.assert_allclose(
            found["corrected"], recorded["corrected_logits"], **TOLERANCE
        )
        np.testing.assert_allclose(
            found["confidence"], recorded["confidence_logits"], **TOLERANCE
        )
        np.testing.assert_array_equal(found["tokens"], recorded["tokens"])
        np.testing.assert_array_equal(found["tree"].tokens[1:], recorded["tokens"])


def test_transition_trees(golden, load):
    for recorded, found in rounds(golden, load, "treeflash_a"):
        tokens, log_probs, following = found["transitions"]
        np.testing.assert_array_equal(tokens, recorded["transition_tokens"])
        np.testing.assert_allclose(log_probs, recorded["transition_logp"], **TOLERANCE)
        np.testing.assert_array_equal(following, recorded["transition_next"])
        assert own_paths(found["tree"]) == recorded_paths(recorded)


def own_paths(tree):
    paths = []
    for token, parent, valid in zip(tree.tokens, tree.parents, tree.valid, strict=True):
        if valid:
            above = () if parent == NO_PARENT else (*paths[parent], int(token))
            paths.append(above)
    return set(paths)


def recorded_paths(recorded):
    """Nodes there are ordered otherwise; a path says which node is meant."""
    paths = set()
    for line in recorded["tree_ancestors"]:
        nodes = np.flatnonzero(line)
        nodes = nodes[np.argsort(recorded["tree_depths"][nodes])]
        if len(nodes):
            paths.add(tuple(int(recorded["tree_tokens"][node]) for node in nodes[1:]))
    return paths


@pytest.mark.parametrize("name", slow_but(["dspark_rnn"], ["dspark_vanilla", "dspark_rnn"]))
def test_teacher_forced_blocks(golden, load, name):
    folder, _ = golden(name)
    recorded = np.load(folder / "train.npz")
    target, loaded = load(name)
    tokens = jnp.asarray(recorded["input_ids"], jnp.int32)
    features = tapped(target.params, target.config, tokens, loaded.drafter.taps)
    anchors = jnp.asarray(recorded["anchors"], jnp.int32)
    logits, confidence, inside = teacher_forced(
        loaded.drafter.config, loaded.params, tokens, features, anchors
    )
    kept = recorded["keep"]
    assert kept.sum() >= 6
    np.testing.assert_allclose(logits[kept], recorded["draft_logits"][kept], **TOLERANCE)
    np.testing.assert_allclose(
        confidence[kept], recorded["confidence_logits"][kept], **TOLERANCE
    )
    supervised = np.asarray(inside) & kept[..., None]
    assert not (recorded["eval_mask"] & ~supervised).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_decoding(golden, load, name):
    """The target's own output, and as many tokens committed in every round."""
    _, trace = golden(name)
    target, loaded = load(name)
    prompts = trace["prompts"]
    done = generate(target, [p["prompt"] for p in prompts], drafter=loaded, max_new_tokens=48)
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == prompt["ar"]
        committed, recorded = list(completion.stats.committed), accepted(prompt)
        assert committed == recorded[: len(committed)]
        # DSpark's and TreeFlash's loops run one more round when the last filled the output.
        extra = len(recorded) - len(committed)
        assert extra == 0 or (extra == 1 and 1 + sum(committed) == 48)
