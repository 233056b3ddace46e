"""Anchors, labels and the blocks' forward pass, against literal cases and golden ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import checkpoints
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.checkpoints.head_tensors import block_parts
from jaxspec.config import DrafterConfig
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind, random_weights
from jaxspec.training.blocks import before_labels, sample_anchors, supervised_slots
from jaxspec.training.features import target_features
from jaxspec.training.losses import LossConfig, drafter_loss
from jaxspec.training.vocabulary_loss import Mixture
from tests.slow import slow_but


def row(text):
    return jnp.array([[letter == "a" for letter in text]])


def test_anchors_are_all_candidates_when_there_are_few():
    #                 0123456789
    supervised = row("..aaa..aa.")
    anchors, kept = sample_anchors(jax.random.key(0), supervised, 5)
    assert anchors.tolist() == [[2, 3, 7, 0, 0]]
    assert kept.tolist() == [[True, True, True, False, False]]


def test_more_anchors_than_positions_are_padding():
    anchors, kept = sample_anchors(jax.random.key(0), row("aaa"), 8)
    assert anchors.shape == (1, 8) and kept.sum() == 2


def test_anchors_differ_are_sorted_and_cover_candidates_evenly():
    supervised = row("." * 10 + "a" * 21)
    keys = jax.random.split(jax.random.key(1), 400)
    anchors, kept = jax.vmap(sample_anchors, (0, None, None))(keys, supervised, 5)
    assert kept.all()
    assert (jnp.diff(anchors[:, 0], axis=1) > 0).all()
    counts = np.bincount(np.asarray(anchors).ravel(), minlength=31)
    # 2000 draws over candidates 10 … 29: 100 each, standard deviation below 10.
    assert counts[:10].sum() == counts[30] == 0
    assert (abs(counts[10:30] - 100) < 45).all()


def test_supervision_ends_at_the_first_token_that_is_not():
    supervised = row("..aaaa.aa")
    anchors, kept = jnp.array([[2, 4, 7, 0]]), jnp.array([[True, True, True, False]])
    assert supervised_slots(supervised, anchors, kept, 3).tolist() == [
        [[True, True, True], [True, False, False], [True, False, False], [False] * 3]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("causal, window", [(False, None), (True, 6)])
def test_attention_in_chunks_is_attention_at_once(causal, window):
    """Five anchors, two at a time; at once they are compared with decoding in test_block."""
    config = DrafterConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        target_layers=4,
        taps=(0, 2),
        block_size=4,
        mask_token_id=16,
        causal=causal,
        window=window,
    )
    keys = jax.random.split(jax.random.key(0), 5)
    head = bind(config, random_weights(config, keys[0]))
    table = jax.random.normal(keys[1], (17, 16))
    tokens = jax.random.randint(keys[2], (2, 12), 0, 17)
    features = jax.random.normal(keys[3], (2, 12, 32))
    anchors = jax.random.randint(keys[4], (2, 5), 0, 11)
    arguments = (head, Vocabulary(table, table), tokens, features, anchors)
    got, expected = run_blocks(*arguments, chunk=2), run_blocks(*arguments, chunk=5)
    for ours, plain in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-6)


@pytest.mark.parametrize("name", slow_but(["dspark_rnn"], ["dspark_vanilla", "dspark_rnn"]))
def test_training_step_of_the_original(golden, name):
    folder, trace = golden(name)
    expected = trace["train"]
    arrays = np.load(folder / "train.npz")
    target = checkpoints.load(folder / "target")
    loaded = load_drafter(folder / "draft", target)
    config, params = loaded.drafter.config, loaded.params
    tokens, kept = jnp.asarray(arrays["input_ids"], jnp.int32), jnp.asarray(arrays["keep"])
    anchors = jnp.asarray(arrays["anchors"], jnp.int32)
    supervised = supervised_slots(
        jnp.asarray(arrays["loss_mask"] > 0), anchors, kept, config.depth
    )
    np.testing.assert_array_equal(supervised, arrays["eval_mask"])

    def step(weights):
        features = target_features(
            target.params, target.config, tokens, taps=config.taps, chunk=8
        )
        head = bind(config, weights)
        blocks = run_blocks(head, params.vocabulary, tokens, features.taps, anchors)
        before = before_labels(features.hidden, anchors, config.depth)
        sums = drafter_loss(
            LossConfig(Mixture(chunk=13)), head, params.vocabulary, blocks, supervised, before
        )
        logits = blocks.logits(head, params.vocabulary)
        confidence = head.confidence_logits(blocks.stream, blocks.previous)
        return sums.total / sums.weight, (sums, logits, confidence)

    slope = jax.jit(jax.value_and_grad(step, has_aux=True))
    (loss, (sums, logits, confidence)), slopes = slope(params.head)
    real = np.asarray(kept)
    np.testing.assert_allclose(logits[real], arrays["draft_logits"][real], atol=2e-4)
    np.testing.assert_allclose(confidence[real], arrays["confidence_logits"][real], atol=2e-4)
    got = {
        "loss": loss,
        "ce": sums.cross_entropy / sums.weight,
        "l1": sums.total_variation / sums.weight,
        "confidence": sums.confidence / sums.weight,
    }
    for key, value in got.items():
        np.testing.assert_allclose(value, expected[key], atol=2e-4, err_msg=key)

    norms = {}
    slopes = dict(nnx.to_flat_state(slopes))
    for path, parts in block_parts(config).items():
        for part in parts:
            norms[part.name] = np.linalg.norm(np.asarray(slopes[path][...])[part.index].ravel())
    assert norms.keys() == expected["grad_norms"].keys()
    for key, value in expected["grad_norms"].items():
        np.testing.assert_allclose(norms[key], value, rtol=1e-3, err_msg=key)
