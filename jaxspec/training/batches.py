"""Which sequences make a batch: the same ones in the same order whenever an epoch is asked for.

Sequences of similar length go together, padded to a bucket's length, so that few shapes are
compiled and little is computed in vain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxspec.training.conversations import Example

UNIT = 128  # bucket lengths are multiples
EMPTY = -1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Indices of its sequences, `EMPTY` for padding rows, and the length they are padded to."""

    rows: tuple[int, ...]
    length: int


@dataclasses.dataclass(frozen=True)
class Position:
    """The next batch: `index` within `epoch`, both from 0."""

    epoch: int = 0
    index: int = 0

    def after(self, batches: int) -> Position:
        """The position after this one in an epoch of so many batches."""
        if self.index + 1 < batches:
            return Position(self.epoch, self.index + 1)
        return Position(self.epoch + 1, 0)


def bucket(length: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, … units that holds `length` tokens."""
    units = -(-length // UNIT)
    power = 1 << (units - 1).bit_length()
    return UNIT * (power * 3 // 4 if power > 2 and power * 3 // 4 >= units else power)


def plan(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[Batch]:
    """The batches of an epoch; every sequence is in exactly one.

    What is left over of a bucket joins the next longer one; only one batch, of the longest
    left, has `EMPTY` rows.
    """
    if not lengths:
        raise ValueError("there are no sequences to train on")
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    buckets = np.array([bucket(length) for length in lengths])
    batches, waiting = [], []
    for length in np.unique(buckets).tolist():
        waiting += order[buckets[order] == length].tolist()
        whole = len(waiting) // batch_size * batch_size
        for start in range(0, whole, batch_size):
            batches.append(Batch(tuple(waiting[start : start + batch_size]), length))
        waiting = waiting[whole:]
    if waiting:
        padding = [EMPTY] * (batch_size - len(waiting))
        batches.append(
            Batch(tuple(waiting + padding), bucket(max(lengths[i] for i in waiting)))
        )
    return [batches[i] for i in random.permutation(len(batches))]


def share(batch: Batch, *, micro_batch: int, host: int = 0, hosts: int = 1) -> np.ndarray:
    """One host's sequences of every micro-batch of a batch, [n, b / hosts].

    Raises:
      ValueError: a micro-batch cannot be divided among the hosts.
    """
    if micro_batch % hosts:
        raise ValueError(
            f"a micro-batch of {micro_batch} sequences cannot be divided among {hosts} hosts"
        )
    return np.array(batch.rows).reshape(-1, hosts, micro_batch // hosts)[:, host]


def collate(
    examples: Sequence[Example],
    batch: Batch,
    *,
    micro_batch: int,
    host: int = 0,
    hosts: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """One host's share of every micro-batch of a batch.

    Returns:
      Tokens int32 and supervised bool, [n, b / hosts, T], for n micro-batches of b sequences.
    """
    rows = share(batch, micro_batch=micro_batch, host=host, hosts=hosts)
    tokens = np.zeros((*rows.shape, batch.length), np.int32)
    supervised = np.zeros((*rows.shape, batch.length), bool)
    for place, row in np.ndenumerate(rows):
        if row != EMPTY:
            tokens[place][: len(examples[row])] = examples[row].tokens
            supervised[place][: len(examples[row])] = examples[row].supervised
    return tokens, supervised
