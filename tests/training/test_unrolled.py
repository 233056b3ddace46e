"""EAGLE-3's training: unrolled steps are decoding's, losses speculators', runs resumable."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import checkpoints
from jaxspec.api import generate
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.checkpoints.head_tensors import eagle_parts
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed
from jaxspec.drafters.eagle import EagleDrafter
from jaxspec.drafters.unrolled import unroll
from jaxspec.drafters.weights import bind
from jaxspec.models.layers import rms_norm
from jaxspec.training.features import target_features
from jaxspec.training.losses import LossConfig
from jaxspec.training.recipe import LOSSES, eagle_config
from jaxspec.training.trainer import train
from jaxspec.training.unrolled_loss import unrolled_loss
from jaxspec.training.vocabulary_loss import Mixture
from tests.drafters import eagle_cases as cases
from tests.slow import slow_but
from tests.training import tiny

CLOSE = dict(rtol=1e-4, atol=1e-4)
COMMON = dict(confidence=0.0, truth="target")
DECAY = dict(weighting="exponential", decay=-1 / np.log(0.8))
GOLDEN_LOSSES = {
    "kl_decay_1": LossConfig(Mixture(0.0, 1.0, 0.0), weighting="uniform", **COMMON),
    "kl_decay_08": LossConfig(Mixture(0.0, 1.0, 0.0), **DECAY, **COMMON),
    "ce_decay_08": LossConfig(Mixture(1.0, 0.0, 0.0), **DECAY, **COMMON),
}


@pytest.fixture(scope="module")
def case(golden):
    folder, trace = golden("eagle3_speculators_a")
    target = checkpoints.load(folder / "target")
    return trace, np.load(folder / "train.npz"), target, load_drafter(folder / "draft", target)


@pytest.mark.slow
@pytest.mark.parametrize("variant", GOLDEN_LOSSES)
def test_a_training_step_of_speculators(case, variant):
    trace, arrays, target, loaded = case
    expected, config, params = trace["train"][variant], loaded.drafter.config, loaded.params
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    supervised = jnp.asarray(arrays["loss_mask"] > 0)
    last = rms_norm(
        jnp.asarray(arrays["last_hidden"]), target.params.final_norm, target.config.rms_norm_eps
    )

    def step(weights):
        features = target_features(
            target.params, target.config, tokens, taps=config.taps, chunk=8
        )
        head, vocabulary = bind(config, weights), params.vocabulary
        outputs = unroll(head, vocabulary, tokens, features.taps, steps=3, chunk=24)
        arguments = head, vocabulary, outputs, tokens, supervised, last
        sums = unrolled_loss(GOLDEN_LOSSES[variant], *arguments)
        return sums.total / sums.weight, (head.logits(vocabulary, outputs), sums.counted)

    slope = jax.jit(jax.value_and_grad(step, has_aux=True))
    (loss, (logits, counted)), slopes = slope(params.head)
    for j in range(3):  # the ends are padded otherwise there
        inside = slice(0, 63 - j)
        np.testing.assert_allclose(
            logits[0, j, inside], arrays["draft_logits"][j, inside], atol=2e-4, rtol=0
        )
    np.testing.assert_allclose(loss, expected["loss"], **CLOSE)
    assert counted.tolist() == [expected["metrics"][f"full_acc_{j}_total"] for j in range(3)]
    slopes, norms = dict(nnx.to_flat_state(slopes)), {}
    for path, parts in eagle_parts(config).items():
        for part in parts:
            norms[part.name] = np.linalg.norm(np.asarray(slopes[path][...])[part.index].ravel())
    assert norms.keys() == expected["gradients"].keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected["gradients"][name], **CLOSE, err_msg=name)


@pytest.mark.parametrize("kind", slow_but(["two layers"], ["normed", "window", "two layers"]))
def test_a_step_is_a_chain_of_true_tokens(kind):
    """Step j at index i is what decoding computes j tokens after the anchor i + 1."""
    config, params = cases.KINDS[kind], cases.params(kind, reduced=True)
    drafter = EagleDrafter(config, TreeConfig("chain", size=4))
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 11, (1, 14)), jnp.int32)
    taps = jnp.asarray(random.standard_normal((1, 14, 32 * len(config.taps))), jnp.float32)
    head, vocabulary = bind(config, params.head), params.vocabulary
    run = jax.jit(functools.partial(unroll, head, vocabulary, steps=3, chunk=5))
    outputs = head.logits(vocabulary, run(tokens, taps))
    # Two sequences in one row, from 4 on and from 0: as the one alone.
    packed = jnp.concatenate([tokens[:, :4], tokens], axis=1)
    starts = jnp.where(jnp.arange(18) < 4, 0, 4)[None]
    after = head.logits(
        vocabulary, run(packed, jnp.concatenate([taps[:, :4], taps], axis=1), starts)
    )
    np.testing.assert_allclose(after[:, :, 4:], outputs, rtol=1e-4, atol=1e-5)

    @jax.jit
    def decoded(position):
        state = drafter.init(params, 1, 16)
        committed = Committed(tokens, taps, jnp.array([0]), position)
        state = drafter.observe(params, state, committed)

        def follow(slot, logits):  # the true token, by an index of the whole vocabulary
            return tokens[:, position[0] + 1 + slot], logits

        whole = dataclasses.replace(vocabulary, kept=None)
        true = dataclasses.replace(params, vocabulary=whole)
        return drafter.rollout(true, state, tokens[:, position[0]], position, follow)[1][0]

    for anchor in (1, 5, 9):
        expected = decoded(jnp.array([anchor]))
        np.testing.assert_allclose(outputs[0, :, anchor - 1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("truth", ["target", "data"])
def test_some_indices_are_unrolled_as_all_are(truth):
    """Outputs and loss are those of all indices; places after the end count nothing."""
    params = cases.params("two layers", reduced=True)
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, 11, (2, 14)), jnp.int32)
    taps = jnp.asarray(random.standard_normal((2, 14, 96)), jnp.float32)
    hidden = jnp.asarray(random.standard_normal((2, 14, 32)), jnp.float32)
    starts = jnp.where(jnp.arange(14) < 6, 0, 6) * jnp.ones((2, 1), jnp.int32)
    supervised = jnp.asarray(random.random((2, 14)) < 0.5)
    some = jnp.asarray([[1, 4, 5, 9, 14], [0, 3, 10, 14, 14]])
    config = LossConfig(Mixture(1.0, 1.0, 0.0), reduction="slots", confidence=0.0, truth=truth)
    head, vocabulary = bind(cases.KINDS["two layers"], params.head), params.vocabulary

    @jax.jit
    def run(at):
        outputs = unroll(head, vocabulary, tokens, taps, starts, at, steps=3, chunk=4)
        arguments = outputs, tokens, supervised, hidden, starts, at
        return outputs, unrolled_loss(config, head, vocabulary, *arguments)

    whole, of_all = run(None)
    outputs, sums = run(some)
    for row, inside in enumerate(some < 14):
        expected = whole[row][:, some[row][inside]]
        np.testing.assert_allclose(outputs[row][:, inside], expected, rtol=1e-4, atol=1e-5)
    assert 0 < sums.counted[0] < of_all.counted[0]
    _, shuffled = run(jnp.asarray(random.permuted(np.tile(np.arange(14), (2, 1)), axis=1)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), shuffled, of_all)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # Steps supervise 3, 2 and 1 rows, each of loss 1, and count 1, 1/2, 1/4.
        ("slots", 1 + 1 / 2 + 1 / 4),
        ("weights", 1.0),
        ("positions", (3 + 2 / 2 + 1 / 4) / 4),
    ],
)
def test_reductions(reduction, expected):
    """speculators and ours; NeMo; SpecForge and DeepSpec."""
    config = LossConfig(
        Mixture(1 / np.log(11), 0.0, 0.0), weighting="exponential", decay=1 / np.log(2),
        reduction=reduction, **COMMON,
    )  # fmt: skip
    params = cases.params("plain")

    @jax.jit
    def loss():
        head = bind(cases.PLAIN, jax.tree.map(jnp.zeros_like, params.head))  # a uniform law
        return unrolled_loss(
            config,
            head,
            params.vocabulary,
            jnp.ones((1, 3, 4, 32)),
            jnp.zeros((1, 4), jnp.int32),
            jnp.ones((1, 4), bool),
            jnp.ones((1, 4, 32)),
        )

    sums = loss()
    np.testing.assert_allclose(sums.total / sums.weight, expected, rtol=1e-5)


EAGLE = dataclasses.replace(
    tiny.CONFIG,
    drafter=eagle_config(tiny.TARGET_CONFIG, steps=3),
    loss=LOSSES["eagle3"],
    steps=6,
)


@pytest.mark.slow
def test_a_run_resumes_and_its_drafter_decodes(tmp_path):
    """From a checkpoint on, the weights end the same, bit for bit."""
    config = dataclasses.replace(EAGLE, packed=128, draft_vocab=12)
    target, examples = tiny.target(), tiny.examples()
    whole = train(config, target, examples, tmp_path / "run")
    before = (whole / "model.safetensors").read_bytes()
    whole.rename(tmp_path / "first")
    assert train(config, target, examples, tmp_path / "run", resume_step=2) == whole
    assert (whole / "model.safetensors").read_bytes() == before

    loaded = load_drafter(whole, target, TreeConfig("chain", 4))
    assert loaded.drafter.config == config.drafter
    assert loaded.params.vocabulary.kept.shape == (12,)
    rows = [[1, 2, 3], [4, 5]]
    done, plain = (
        generate(target, rows, max_new_tokens=8, **x) for x in ({"drafter": loaded}, {})
    )
    assert [x.token_ids for x in done] == [x.token_ids for x in plain]
    on = dataclasses.replace(EAGLE, initial=str(whole), steps=1)
    assert train(on, target, examples, tmp_path / "on").exists()


@pytest.mark.parametrize(
    "changes", [dict(weighting="dpace"), dict(reduction="blocks")], ids=str
)
def test_losses_of_blocks_are_refused(changes):
    with pytest.raises(ValueError, match="needs blocks; expected one of .* with EAGLE-3"):
        dataclasses.replace(EAGLE, loss=dataclasses.replace(EAGLE.loss, **changes))


def test_layers_it_reads_by_default():
    deep = dataclasses.replace(tiny.TARGET_CONFIG, num_layers=36)
    assert eagle_config(deep).taps == (1, 17, 32)
    assert eagle_config(tiny.TARGET_CONFIG).taps == (0, 1)
