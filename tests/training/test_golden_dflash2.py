"""Training steps of DFlash2 against those of both public trainers (../shared/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import checkpoints
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.checkpoints.head_tensors import block_parts
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.models.layers import rms_norm
from jaxspec.training.blocks import before_labels
from jaxspec.training.features import target_features
from jaxspec.training.losses import LossConfig, drafter_loss
from jaxspec.training.vocabulary_loss import Mixture
from tests.slow import slow_but

CLOSE = dict(rtol=1e-4, atol=1e-4)
KL, CE = Mixture(0.0, 1.0, 0.0, chunk=13), Mixture(1.0, 0.0, 0.0, chunk=13)
SPECULATORS = dict(truth="target", missing="inject", reduction="slots", selector=0.7)
TRAINERS = {
    "kl_decay": LossConfig(KL, confidence=0.0, decay=4.0, **SPECULATORS),
    "ce_dpace": LossConfig(CE, confidence=0.0, weighting="dpace", **SPECULATORS),
    "nemo": LossConfig(CE, confidence=0.0, decay=4.0, missing="skip", selector=0.7),
}


@pytest.mark.parametrize("trainer", slow_but(["kl_decay"], TRAINERS))
def test_a_training_step(golden, trainer):
    folder, trace = golden("dflash2_a")
    arrays = np.load(folder / "train.npz")
    expected = trace["train"]["nemo" if trainer == "nemo" else "speculators"]
    expected = expected if trainer == "nemo" else expected[trainer]
    rows, prefix = (slice(0, 2), "nemo") if trainer == "nemo" else (slice(0, 1), "spec")
    target = checkpoints.load(folder / "target")
    loaded = load_drafter(folder / "draft", target)
    config, params = loaded.drafter.config, loaded.params

    tokens = jnp.asarray(arrays["input_ids"][rows], jnp.int32)
    anchors = jnp.asarray(arrays[f"{prefix}_anchors"].reshape(len(tokens), -1), jnp.int32)
    at = np.asarray(anchors)[..., None] + 1 + np.arange(config.depth)
    inside = at < tokens.shape[1]
    mask = arrays["loss_mask"][rows]
    supervised = np.take_along_axis(mask[:, None], np.minimum(at, tokens.shape[1] - 1), axis=-1)
    supervised = jnp.asarray((supervised > 0) & inside)
    if prefix == "spec":
        np.testing.assert_array_equal(supervised[0], arrays["spec_mask"][:, 1:] > 0)
    last = rms_norm(
        jnp.asarray(arrays["last_hidden"][rows]),
        target.params.final_norm,
        target.config.rms_norm_eps,
    )

    def step(weights):
        features = target_features(
            target.params, target.config, tokens, taps=config.taps, chunk=8
        )
        head = bind(config, weights)
        blocks = run_blocks(head, params.vocabulary, tokens, features.taps, anchors)
        sums = drafter_loss(
            TRAINERS[trainer],
            head,
            params.vocabulary,
            blocks,
            supervised,
            before_labels(last, anchors, config.depth),
        )
        return sums.total / sums.weight, (sums, head.logits(params.vocabulary, blocks.stream))

    slope = jax.jit(jax.value_and_grad(step, has_aux=True))
    (loss, (sums, logits)), slopes = slope(params.head)
    known = "nemo_logits" if trainer == "nemo" else "spec_unary_logits"
    theirs = arrays[known].reshape(len(tokens), -1, *arrays[known].shape[-2:])
    np.testing.assert_allclose(logits, theirs[..., -config.depth :, :], atol=2e-4)
    np.testing.assert_allclose(loss, expected["loss"], **CLOSE)
    base = (sums.kl if trainer == "kl_decay" else sums.cross_entropy) / sums.weight
    unary = expected["base_loss" if trainer == "nemo" else "unary_loss"]
    np.testing.assert_allclose(base, unary, **CLOSE)
    selection = sums.selection
    np.testing.assert_allclose(selection.loss / sums.weight, expected["selector_loss"], **CLOSE)

    recall = float(selection.recalled.sum() / sums.counted.sum())
    if trainer == "nemo":
        assert recall == pytest.approx(expected["candidate_recall"])
        assert float(sums.counted.sum()) == expected["valid_tokens"]
        assert float(selection.blocks) == expected["valid_blocks"]
    else:
        metrics = expected["metrics"]
        recalled = metrics["unary_candidate_recall_at_4_sum"]
        total = metrics["unary_candidate_recall_at_4_total"]
        assert recall == pytest.approx(recalled / total)
        assert float(selection.blocks) == metrics["eal_total"]
        oracle = metrics["unary_top_4_oracle_accepted_length_sum"]
        assert float(selection.blocks + selection.oracle) == oracle
        assert float(selection.blocks + selection.selected) == metrics["eal_sum"]

    slopes, norms = dict(nnx.to_flat_state(slopes)), {}
    for path, parts in block_parts(config).items():
        for part in parts:
            norms[part.name] = np.linalg.norm(np.asarray(slopes[path][...])[part.index].ravel())
    assert norms.keys() == expected["gradients"].keys()
    for name, value in expected["gradients"].items():
        np.testing.assert_allclose(norms[name], value, **CLOSE, err_msg=name)
