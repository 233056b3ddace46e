"""Several sequences in a row are trained on as if each had its own."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.training.batches import BatchRows, collate, places
from jaxspec.training.features import target_features
from jaxspec.training.loading import Rows
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.step import batch_loss, init_state
from jaxspec.training.trainer import train
from tests import tiny as hybrid
from tests.training import tiny

TARGET = tiny.target()
EXAMPLES = tiny.examples(5)
LENGTHS = [len(example) for example in EXAMPLES]


def rows(batch, *, packed):
    shape, found = places(batch, LENGTHS, micro_batch=len(batch.rows))
    tokens, supervised, starts = (x[0] for x in collate(EXAMPLES, batch.length, shape, found))
    return jax.tree.map(jnp.asarray, Rows(tokens, supervised, starts if packed else None))


PACKED = rows(BatchRows(((3, 0), (4, 2, 1)), 384), packed=True)
ALONE = rows(BatchRows(((0,), (1,), (2,), (3,), (4,)), 128), packed=False)


def test_features_are_those_of_each_sequence_alone():
    @functools.partial(jax.jit, static_argnames="chunk")
    def features(rows, chunk):
        return target_features(
            TARGET.params, TARGET.config, rows.tokens, rows.starts, taps=(0, 1), chunk=chunk
        )

    packed, alone = features(PACKED, 64), features(ALONE, 128)
    batch = BatchRows(((3, 0), (4, 2, 1)), 384)
    for place in places(batch, LENGTHS, micro_batch=2)[1]:
        length = LENGTHS[place.sequence]
        for got, expected in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(
                got[place.of(length)[1:]], expected[place.sequence, :length], atol=5e-6
            )


@pytest.mark.slow
def test_a_hybrids_states_begin_anew_with_every_sequence():
    """Two sequences of one row, the first one chunk long and cut by padding, the second two."""
    target, chunk = hybrid.target(hybrid.HYBRID), 8
    first, second = (np.array(x) for x in hybrid.prompts(5, 16))
    row = np.concatenate([first, np.zeros(3, int), second])[None]
    starts = np.repeat([0, 8, 8], chunk)[None]
    features = functools.partial(
        target_features, target.params, target.config, taps=(0, 2), chunk=chunk
    )
    found = features(jnp.asarray(row), jnp.asarray(starts))
    for sequence, start in ((first, 0), (second, 8)):
        alone = features(jnp.pad(sequence, (0, -len(sequence) % chunk))[None])
        for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            kept = slice(start, start + len(sequence))
            np.testing.assert_allclose(got[0, kept], expected[0, : len(sequence)], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window, causal", [(None, False), (16, True)])
def test_losses_and_gradients_are_those_of_sequences_in_their_own_rows(window, causal):
    """With every candidate an anchor, both train on the same blocks."""
    drafter = dataclasses.replace(tiny.DRAFTER, window=window, causal=causal)
    config = dataclasses.replace(tiny.CONFIG, drafter=drafter, anchors=300)
    weights = init_state(config, TARGET.params).weights

    def loss(rows):
        return jax.value_and_grad(batch_loss, argnums=3, has_aux=True)(
            config, TARGET.config, TARGET.params, weights, rows, jax.random.key(0)
        )

    ((got, sums), slopes), ((expected, expected_sums), expected_slopes) = (
        loss(PACKED),
        loss(ALONE),
    )
    np.testing.assert_array_equal(sums.counted, expected_sums.counted)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        slopes,
        expected_slopes,
    )


@pytest.mark.slow
def test_a_packed_run_resumes_and_reads_kept_features(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, packed=256, batch_size=4, steps=6, anchors=16)
    examples = tiny.examples()
    train(config, TARGET, examples, tmp_path / "whole")
    train(config, TARGET, examples, tmp_path / "kept", features=tmp_path / "features")
    whole, kept = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "kept")
    )
    assert whole[-1]["epoch"] == 2
    for expected, got in zip(whole, kept, strict=True):
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-5)
    weights = tmp_path / "whole" / "drafter" / "model.safetensors"
    trained = weights.read_bytes()
    for path in (tmp_path / "whole" / "drafter").iterdir():
        path.unlink()
    (tmp_path / "whole" / "drafter").rmdir()
    train(config, TARGET, examples, tmp_path / "whole", resume_step=4)
    assert weights.read_bytes() == trained


def test_a_row_length_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="packed is 100; expected a multiple of 64"):
        TrainConfig(tiny.DRAFTER, packed=100)
