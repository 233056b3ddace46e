"""The batches of a run as arrays on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jaxspec.data.conversations import Example
from jaxspec.training.batches import BatchRows, Position, collate, epoch_batches, places
from jaxspec.training.feature_cache import FeatureCache
from jaxspec.training.features import Features
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.sharding import local_rows, place_batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Sequences in rows.

    Attributes:
      tokens: [..., b, T] int32.
      supervised: [..., b, T] bool, tokens the target wrote.
      starts: [..., b, T] int32, first position of the sequence a token belongs to; None if
        every row holds one.
      features: [..., b, T, .] of the target, if cached.
    """

    tokens: jax.Array
    supervised: jax.Array
    starts: jax.Array | None = None
    features: Features | None = None


class Loader:
    """The batches of a run by position, [n, b, T] for n micro-batches of b rows."""

    def __init__(
        self,
        config: TrainConfig,
        examples: Sequence[Example],
        *,
        mesh: Mesh | None = None,
        features: FeatureCache | None = None,
    ):
        self._config, self._examples = config, examples
        self._mesh, self._features = mesh, features
        self._lengths = [len(example) for example in examples]
        self._rows = local_rows(mesh, config.micro_batch)
        self._epoch, self._batches = -1, []

    def at(self, position: Position) -> Rows:
        """Puts this process's part on its devices, without waiting for the transfer."""
        batch = self.plan(position.epoch)[position.index]
        shape, found = places(
            batch,
            self._lengths,
            micro_batch=self._config.micro_batch,
            rows=self._rows,
        )
        tokens, supervised, starts = collate(self._examples, batch.length, shape, found)
        features = None
        if self._features is not None:
            features = self._features.read(batch.length, shape, found)
        rows = Rows(tokens, supervised, starts if self._config.packed else None, features)
        return place_batch(self._mesh, rows, self._rows, self._config.micro_batch)

    def tokens(self, position: Position) -> int:
        """Number of tokens of a batch over all processes, without padding."""
        rows = self.plan(position.epoch)[position.index].rows
        return sum(self._lengths[i] for row in rows for i in row)

    def after(self, position: Position) -> Position:
        """The position of the next batch."""
        return position.after(len(self.plan(position.epoch)))

    def plan(self, epoch: int) -> list[BatchRows]:
        """The batches of an epoch, see `epoch_batches`, which raises ValueError."""
        if epoch != self._epoch:
            config = self._config
            self._batches = epoch_batches(
                self._lengths,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                packed=config.packed,
            )
            self._epoch = epoch
        return self._batches
