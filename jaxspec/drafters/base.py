"""The interface of drafters. A drafter proposes; only the target decides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int

from jaxspec.config import DrafterConfig, TreeConfig, TreeKind
from jaxspec.models.params import TargetParams
from jaxspec.noise import Noise
from jaxspec.trees.tree import DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Committed:
    """Consecutive tokens that the target has run on, with their features.

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


class Drafter:
    """A drafter: a static, hashable object, with params and state as pytrees.

    To write one, inherit a frozen dataclass from this class and define `size`, `depth`, `init`,
    `observe` and `draft`; the rest has defaults. See examples/own_drafter.py.

    State belongs to a batch and is donated from round to round: `observe` and `draft` return
    the new one.

    Attributes:
      size: N, nodes of its trees, root included (static).
      depth: P, the deepest node it can draft (static).
      taps: target layers whose outputs it reads (`models.decoder.forward`).
      verify_sizes: sizes below N; a round verifies in the smallest one that holds every row's
        tree. Each is one more forward to compile.
      head_config: configuration of the draft head of a block drafter (`drafters.block`); None
        for all others, joined drafters included.
      best_tree: the kind of tree that suits it best, where its user names none.
    """

    size: int
    depth: int
    taps: tuple[int, ...] = ()
    verify_sizes: tuple[int, ...] = ()
    head_config: DrafterConfig | None = None
    best_tree: TreeKind = "chain"

    def init(self, params: Any, batch: int, capacity: int) -> Any:
        """An empty state for sequences of up to `capacity` tokens.

        An axis that grows with `capacity` must be indexed by position: entry p is written when
        the token at position p is observed (`serving.prefix_cache` cuts states there).
        """
        raise NotImplementedError

    def observe(self, params: Any, state: Any, committed: Committed) -> Any:
        """Updates the state by committed tokens, in order, prompt chunks included."""
        raise NotImplementedError

    def draft(
        self,
        params: Any,
        state: Any,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
        noise: Noise | None = None,
    ) -> tuple[DraftTree, Any]:
        """Proposes continuations of the anchor, which is decided but not yet observed.

        Args:
          anchor: [B] int32, token at absolute position `position`.
          position: [B] int32; positions 0 … position - 1 have been observed.
          budget: [B] int32, nodes wanted per row, root included, 1 … size.
          noise: of the target's choices after the anchor; None if all are greedy. A drafter
            that scores tokens adds it (`noise.bias`), and has more of them accepted.
        """
        raise NotImplementedError

    def check_sampled(self) -> None:
        """Raises ValueError unless the drafter has `draft_sampled`, for rejection sampling.

        A drafter that samples chains overrides this method and defines draft_sampled(params,
        state, anchor, position, temperature, keys) -> (`rollout.SampledChain`, state).
        """
        raise ValueError(
            "rejection sampling needs a drafter that samples its chains; "
            f"{type(self).__name__} does not. Use a trained block drafter, or leave rejection "
            "out: sample-then-match is lossless with any drafter"
        )

    def rollout(self, params: Any, state: Any, anchor, position, choose):
        """Chooses token by token, each given the choices before it; for trained drafters.

        Args:
          anchor, position: as in `draft`.
          choose: see `rollout.Choose`.

        Returns:
          tokens [B, P] int32, their ids, and the laws [B, P, V'].

        Raises:
          ValueError: the drafter does not score its vocabulary.
        """
        raise ValueError(
            f"{type(self).__name__} does not score tokens one after another; expected a "
            "trained drafter, alone"
        )

    def with_tree(self, tree: TreeConfig) -> Drafter:
        """The drafter with trees of `tree.size` nodes, of `tree.kind` if it has a choice."""
        raise ValueError(f"{self} has a fixed tree; leave the tree options out")

    def abstract_params(self, target: TargetParams) -> Any:
        """Shapes of its params for a target, whose weights may be shapes too."""
        return ()

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """The drafters it is made of."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter and its weights, ready for one target (`jaxspec.load_drafter`)."""

    drafter: Drafter
    params: Any = ()
