"""Which sequences make a batch, and where they stand in it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.data.conversations import Example
from jaxspec.training.batches import (
    PACKED_UNIT,
    BatchRows,
    Position,
    bucket,
    collate,
    epoch_batches,
    places,
)


def test_buckets():
    assert [bucket(n) for n in (1, 128, 129, 300, 400, 513, 800, 1025)] == [
        128, 128, 256, 384, 512, 768, 1024, 1536,
    ]  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_sequence_once(lengths, batch_size, epoch):
    batches = epoch_batches(lengths, batch_size, seed=7, epoch=epoch)
    assert batches == epoch_batches(lengths, batch_size, seed=7, epoch=epoch)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(batch.rows) == batch_size for batch in batches)
    assert all(lengths[i] <= b.length for b in batches for row in b.rows for i in row)
    assert max(map(len, rows)) == 1 and sum(() in batch.rows for batch in batches) <= 1


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_a_packed_epoch_holds_every_sequence_once(lengths, batch_size, epoch):
    batches = epoch_batches(lengths, batch_size, seed=7, epoch=epoch, packed=640)
    assert batches == epoch_batches(lengths, batch_size, seed=7, epoch=epoch, packed=640)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert {len(batch.rows) for batch in batches} == {batch_size}
    assert {batch.length for batch in batches} == {640}
    for batch in batches:
        _, found = places(batch, lengths, micro_batch=batch_size)
        ends = {}
        for place in found:
            assert place.start % PACKED_UNIT == 0 and place.start >= ends.get(place.row, 0)
            ends[place.row] = place.start + lengths[place.sequence]
        assert all(end <= 640 for end in ends.values())


def test_packed_rows_are_well_filled():
    lengths = np.random.default_rng(0).integers(100, 510, 400).tolist()
    batches = epoch_batches(lengths, 4, seed=0, epoch=0, packed=1024)
    unpacked = epoch_batches(lengths, 4, seed=0, epoch=0)
    used = [sum(4 * batch.length for batch in batches) for batches in (batches, unpacked)]
    assert sum(lengths) > 0.85 * used[0] > 0.8 * used[1]


def test_a_sequence_longer_than_a_packed_row_is_refused():
    with pytest.raises(ValueError, match="200 tokens does not fit a packed row of 128"):
        epoch_batches([9, 200], 1, seed=0, epoch=0, packed=128)


def test_epochs_differ():
    assert epoch_batches([9] * 50, 5, seed=0, epoch=0) != epoch_batches(
        [9] * 50, 5, seed=0, epoch=1
    )


def test_positions_run_through_epochs():
    position, seen = Position(), []
    for _ in range(4):
        seen.append(dataclasses.astuple(position))
        position = position.after(3)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0)]


def collated(examples, batch, **part):
    shape, found = places(batch, [len(x) for x in examples], micro_batch=2, **part)
    return collate(examples, batch.length, shape, found)


def test_rows_of_a_batch():
    examples = [Example(np.full(n, n, np.int32), np.arange(n) > 1) for n in (2, 4, 3)]
    batch = BatchRows(((2,), (0,), (1,), ()), 4)
    tokens, supervised, starts = collated(examples, batch)
    assert tokens.tolist() == [[[3, 3, 3, 0], [2, 2, 0, 0]], [[4, 4, 4, 4], [0] * 4]]
    assert supervised.sum(2).tolist() == [[1, 0], [2, 0]]
    assert not starts.any()
    halves = [collated(examples, batch, rows=[i])[0] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), tokens)


def test_packed_sequences_start_at_units():
    examples = [Example(np.full(n, n, np.int32), np.ones(n, bool)) for n in (3, 65, 2)]
    tokens, supervised, starts = collated(examples, BatchRows(((0, 1, 2), ()), 256))
    row = tokens[0, 0]
    assert [row[at : at + 2].tolist() for at in (0, 64, 192)] == [[3, 3], [65, 65], [2, 2]]
    assert (row > 0).sum() == 70
    # Nothing stands before the first token of a sequence.
    assert supervised[0, 0].sum() == 67 and not supervised[0, 0, [0, 64, 192]].any()
    assert starts[0, 0, [0, 63, 64, 191, 192, 255]].tolist() == [0, 0, 64, 64, 192, 192]
    assert not tokens[0, 1].any() and not starts[0, 1].any()
