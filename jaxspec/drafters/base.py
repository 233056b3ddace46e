"""What a drafter is. A drafter proposes; only the target decides."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from jaxspec.trees.tree import DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Committed:
    """Consecutive tokens the target has run on, with what it saw there.

    Row i of a sequence is its token at absolute position `position + i`; only the first
    `count` rows are committed, the others are padding to be ignored or overwritten.

    Attributes:
      tokens: [B, C] int32.
      features: [B, C, len(taps) * M] float32, the tapped layers' outputs.
      position: [B] int32.
      count: [B] int32.
    """

    tokens: jax.Array
    features: jax.Array
    position: jax.Array
    count: jax.Array


class Drafter(Protocol):
    """A static, hashable object; its params and its state are pytrees.

    State belongs to a batch and is donated from round to round: `observe` and `draft` return
    the new one. A drafter never uses the random keys that decide the output.

    Attributes:
      size: N, nodes of its trees, root included (static).
      depth: P, the deepest node it can draft (static).
      taps: target layers whose outputs it reads (`models.decoder.forward`).
      verify_sizes: sizes below N that its trees may fit into; a round verifies in the smallest
        that holds every row's tree. Each is one more forward to compile.
    """

    size: int
    depth: int
    taps: tuple[int, ...]
    verify_sizes: tuple[int, ...]

    def init(self, params: Any, batch: int, capacity: int) -> Any:
        """An empty state for sequences of up to `capacity` tokens."""

    def observe(self, params: Any, state: Any, committed: Committed) -> Any:
        """Takes in tokens that were committed, in order, prompt chunks included."""

    def draft(
        self, params: Any, state: Any, anchor: jax.Array, position: jax.Array, budget: jax.Array
    ) -> tuple[DraftTree, Any]:
        """Proposes continuations of the anchor, the token decided but not yet observed.

        Args:
          anchor: [B] int32, token at absolute position `position`.
          position: [B] int32; positions 0 … position - 1 have been observed.
          budget: [B] int32, nodes wanted per row, root included, 1 … size.
        """
