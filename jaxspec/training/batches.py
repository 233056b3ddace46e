"""Assigns sequences to batches, deterministically for each epoch.

Sequences of similar length share a batch, padded to a bucket's length, so that few shapes are
compiled and little padding is computed. Packed rows have one length and hold as many sequences
as fit, each starting at a multiple of `PACKED_UNIT`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxspec.data.conversations import Example

UNIT = 128  # bucket lengths are multiples of this; tokens per chunk of the target's forward
PACKED_UNIT = 64  # the same for packed rows; smaller, as it wastes less of a row
OPEN_ROWS = 64  # rows tried for each sequence; more would barely improve packing


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """Indices of the sequences of each row, () for padding, and the length of the rows."""

    rows: tuple[tuple[int, ...], ...]
    length: int


@dataclasses.dataclass(frozen=True)
class Position:
    """The next batch: `index` within `epoch`, both from 0."""

    epoch: int = 0
    index: int = 0

    def after(self, batches: int) -> Position:
        """The next position, in epochs of `batches` batches."""
        if self.index + 1 < batches:
            return Position(self.epoch, self.index + 1)
        return Position(self.epoch + 1, 0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of a sequence in a batch: micro-batch, row, first position."""

    sequence: int
    micro_batch: int
    row: int
    start: int

    def of(self, length: int) -> tuple[int, int, slice]:
        """The index of its `length` tokens in an array [n, b, T, ...]."""
        return self.micro_batch, self.row, slice(self.start, self.start + length)


def bucket(length: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, … units that holds `length` tokens."""
    units = -(-length // UNIT)
    power = 1 << (units - 1).bit_length()
    return UNIT * (power * 3 // 4 if power > 2 and power * 3 // 4 >= units else power)


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, packed: int = 0
) -> list[BatchRows]:
    """The batches of an epoch; every sequence is in exactly one.

    Sequences left over in a bucket move to the next longer one; only the last batch has padding
    rows.

    Args:
      batch_size: rows of a batch.
      packed: length of rows that sequences share; 0 gives each its own.

    Raises:
      ValueError: there are no sequences, or one does not fit a packed row.
    """
    if not lengths:
        raise ValueError("no sequences to train on; expected at least one")
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    if packed:
        rows = pack_rows(lengths, order.tolist(), packed)
        rows += [()] * (-len(rows) % batch_size)
        starts = range(0, len(rows), batch_size)
        batches = [BatchRows(tuple(rows[i : i + batch_size]), packed) for i in starts]
        return [batches[i] for i in random.permutation(len(batches))]
    buckets = np.array([bucket(length) for length in lengths])
    batches, waiting = [], []
    for length in np.unique(buckets).tolist():
        waiting += order[buckets[order] == length].tolist()
        whole = len(waiting) // batch_size * batch_size
        for start in range(0, whole, batch_size):
            batches.append(_batch(waiting[start : start + batch_size], batch_size, length))
        waiting = waiting[whole:]
    if waiting:
        longest = bucket(max(lengths[i] for i in waiting))
        batches.append(_batch(waiting, batch_size, longest))
    return [batches[i] for i in random.permutation(len(batches))]


def pack_rows(
    lengths: Sequence[int], order: Sequence[int], row_length: int
) -> list[tuple[int, ...]]:
    """Packs sequences into rows, each into the first open row that has room.

    Raises:
      ValueError: a sequence does not fit a row.

    >>> pack_rows([64, 100, 50, 128], [0, 1, 2, 3], 192)
    [(0, 1), (2, 3)]
    """
    longest = max(lengths)
    if longest > row_length:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit a packed row of {row_length}; "
            "truncate sequences (max_length) or pack longer rows"
        )
    rows: list[list[int]] = []
    opened: dict[int, int] = {}  # row -> room
    for sequence in order:
        needed = _whole_units(lengths[sequence])
        row = next((row for row, room in opened.items() if room >= needed), None)
        if row is None:
            row, opened[len(rows)] = len(rows), row_length
            rows.append([])
        rows[row].append(sequence)
        opened[row] -= needed
        if not opened[row] or len(opened) > OPEN_ROWS:
            del opened[min(opened, key=opened.get)]
    return [tuple(row) for row in rows]


def places(
    batch: BatchRows,
    lengths: Sequence[int],
    *,
    micro_batch: int,
    rows: Sequence[int] | None = None,
) -> tuple[tuple[int, int], list[Place]]:
    """Places of the sequences in some rows of every micro-batch of a batch.

    Args:
      rows: row indices; all by default.

    Returns:
      (number of micro-batches, rows of each), and the places of the sequences in them.
    """
    rows = range(micro_batch) if rows is None else rows
    shape = (len(batch.rows) // micro_batch, len(rows))

    def find() -> Iterator[Place]:
        for n, row in np.ndindex(shape):
            start = 0
            for sequence in batch.rows[n * micro_batch + rows[row]]:
                yield Place(sequence, n, row, start)
                start += _whole_units(lengths[sequence])

    return shape, list(find())


def collate(
    examples: Sequence[Example], length: int, shape: tuple[int, int], found: Sequence[Place]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32, supervised bool, and the start of each token's sequence, all [n, b, T].

    The first token of a sequence is not supervised, as it has no context.

    Args:
      length: T.
      shape, found: from `places`.
    """
    tokens = np.zeros((*shape, length), np.int32)
    supervised = np.zeros((*shape, length), bool)
    starts = np.zeros((*shape, length), np.int32)
    for place in found:
        example = examples[place.sequence]
        at = place.of(len(example))
        tokens[at], supervised[at] = example.tokens, example.supervised
        supervised[place.of(1)] = False
        starts[place.micro_batch, place.row, place.start :] = place.start
    return tokens, supervised, starts


def _batch(rows: Sequence[int], batch_size: int, length: int) -> BatchRows:
    return BatchRows((*((row,) for row in rows), *[()] * (batch_size - len(rows))), length)


def _whole_units(length: int) -> int:
    return -(-length // PACKED_UNIT) * PACKED_UNIT
