"""DFlash in speculators' format against what speculators computed (../shared/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec.checkpoints.head_tensors import block_parts
from jaxspec.config import TreeConfig
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.models.layers import rms_norm
from jaxspec.training.blocks import before_labels
from jaxspec.training.features import target_features
from jaxspec.training.losses import LossConfig, drafter_loss
from jaxspec.training.vocabulary_loss import Mixture
from tests.drafters import goldens
from tests.drafters.goldens import observed
from tests.slow import slow_but

NAME, CHAIN = "dflash_speculators_a", TreeConfig("chain", size=8)
CLOSE = dict(rtol=1e-4, atol=1e-4)
COMMON = dict(confidence=0.0, truth="target", reduction="slots")
LOSSES = {  # tv is half of the L1 distance
    "kl_decay": LossConfig(Mixture(0.0, 1.0, 0.0), decay=4.0, **COMMON),
    "ce_dpace": LossConfig(Mixture(1.0, 0.0, 0.0), weighting="dpace", **COMMON),
    "tv_ce": LossConfig(Mixture(0.1, 0.0, 0.45), decay=4.0, **COMMON),
}


@pytest.fixture(scope="module")
def case(golden):
    folder, trace = golden(NAME)
    target, loaded = goldens.load(folder, CHAIN)
    return folder, trace, target, loaded.drafter, loaded.params


def test_rounds(case):
    """The first four of every prompt: logits over the draft vocabulary, drafts as token ids."""
    folder, trace, target, drafter, params = case

    @jax.jit
    def draft(tokens, features, position):
        state, anchor = observed(drafter, params, tokens, features, position)
        at = position[None]
        stream = drafter.stream(params, state, anchor, at)
        logits = bind(drafter.config, params.head).logits(params.vocabulary, stream)
        tree, _ = drafter.draft(params, state, anchor, at, jnp.array([drafter.size]))
        return logits[0], tree.tokens[0, 1 : drafter.depth + 1]

    for _, recorded, inputs in goldens.rounds((folder, trace), target, drafter.taps, 4):
        logits, drafts = draft(*inputs)
        np.testing.assert_allclose(logits, recorded["draft_logits"], atol=2e-4)
        np.testing.assert_array_equal(drafts, recorded["drafts"])


@pytest.mark.parametrize("variant", slow_but(["kl_decay"], LOSSES))
def test_a_training_step(case, variant):
    folder, trace, target, drafter, params = case
    expected, arrays = trace["train"][variant], np.load(folder / "train.npz")
    config = drafter.config
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    anchors = jnp.asarray(arrays["anchors"][None], jnp.int32)
    supervised = jnp.asarray(arrays["mask"][None, :, 1:] > 0)
    last = rms_norm(
        jnp.asarray(arrays["last_hidden"]), target.params.final_norm, target.config.rms_norm_eps
    )

    def step(weights):
        features = target_features(
            target.params, target.config, tokens, taps=config.taps, chunk=8
        )
        head = bind(config, weights)
        blocks = run_blocks(head, params.vocabulary, tokens, features.taps, anchors)
        before = before_labels(last, anchors, config.depth)
        arguments = head, params.vocabulary, blocks, supervised, before
        sums = drafter_loss(LOSSES[variant], *arguments)
        return sums.total / sums.weight, head.logits(params.vocabulary, blocks.stream)

    slope = jax.jit(jax.value_and_grad(step, has_aux=True))
    (loss, logits), slopes = slope(params.head)
    np.testing.assert_allclose(logits[0], arrays["draft_logits"][:, 1:], atol=2e-4)
    np.testing.assert_allclose(loss, expected["loss"], **CLOSE)
    slopes, norms = dict(nnx.to_flat_state(slopes)), {}
    for path, parts in block_parts(config).items():
        for part in parts:
            norms[part.name] = np.linalg.norm(np.asarray(slopes[path][...])[part.index].ravel())
    for name in set(expected["gradients"]) & set(norms):
        np.testing.assert_allclose(
            norms[name], expected["gradients"][name], **CLOSE, err_msg=name
        )
    assert set(expected["gradients"]) - set(norms) <= {"lm_head.weight"}  # frozen here
