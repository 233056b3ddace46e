"""The block drafter in a decoding loop: one pass of the head drafts a whole tree.

Context enters as keys and values of committed tokens, projected once when they commit and kept
in the drafter's cache, which a pass only reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from jaxspec.config import DrafterConfig, TreeConfig, TreeKind
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.drafters.confidence import confident_prefix, surviving_prefix
from jaxspec.drafters.head import OUTPUT, DraftHead, Vocabulary, restrict
from jaxspec.drafters.rollout import (
    Choose,
    SampledChain,
    greedy_with,
    rollout,
    sampled,
)
from jaxspec.drafters.selector import lattice, lattice_tree, pick, walk
from jaxspec.drafters.transitions import transition_table
from jaxspec.drafters.visibility import block_visibility
from jaxspec.drafters.weights import abstract_weights, bind
from jaxspec.models.cache import KVCache, init_cache
from jaxspec.models.params import TargetParams
from jaxspec.noise import Noise, bias
from jaxspec.trees.build import build
from jaxspec.trees.path_conditioned import LowRank, path_conditioned
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import DraftTree, chain, pack_bits
from pallas_kernels.mesh import on_one_device
from pallas_kernels.tree_attention import tree_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockParams:
    """Weights and settings of a block drafter.

    Attributes:
      head: the head's weights (`weights.abstract_weights`); with a draft vocabulary W2 has only
        the rows of its tokens.
      vocabulary: the target's embedding and LM head, and which tokens are drafted.
      threshold: scalar float32; a chain ends before the first slot of lower confidence.
      survival: scalar float32; a chain ends before its survival falls below this. 0 turns
        either rule off; both need a confidence head.
      temperatures: scalar or [P] float32, divide the confidence logits of each slot
        (`evaluation.calibration`).
      whole_output: [V, R], W2 as in the checkpoint, if the head's has fewer rows; only
        `whole_head` reads it.
    """

    head: nnx.State
    vocabulary: Vocabulary
    threshold: jax.Array
    survival: jax.Array
    temperatures: jax.Array
    whole_output: jax.Array | None = None

    @property
    def whole_head(self) -> nnx.State:
        """The head's weights as in a checkpoint, as given to `block_params`."""
        if self.whole_output is None:
            return self.head
        flat = dict(nnx.to_flat_state(self.head))
        flat[OUTPUT] = flat[OUTPUT].replace(self.whole_output)
        return nnx.from_flat_state(list(flat.items()))


def block_params(
    head: nnx.State,
    target: TargetParams,
    *,
    kept: ArrayLike | None = None,
    unembed: ArrayLike | None = None,
    threshold: float = 0.0,
    survival: float = 0.0,
    temperatures: Sequence[float] | float = 1.0,
) -> BlockParams:
    """Joins a head's weights with the target's embedding and LM head, without copying these.

    Args:
      head: weights as in a checkpoint.
      kept: [V'] int32, the tokens to draft, ascending; their rows are gathered once, here. None
        drafts all tokens.
      unembed: [V', M], the drafter's own LM head; None for the target's.
    """
    kept = None if kept is None else jnp.asarray(kept, jnp.int32)
    whole = dict(nnx.to_flat_state(head)).get(OUTPUT) if kept is not None else None
    head, vocabulary = restrict(head, Vocabulary(target.embed, target.unembed), kept)
    if unembed is not None:
        own, judge = jnp.asarray(unembed), vocabulary.unembed
        vocabulary = dataclasses.replace(vocabulary, unembed=own, judge=judge)
    rules = (jnp.asarray(x, jnp.float32) for x in (threshold, survival, temperatures))
    return BlockParams(head, vocabulary, *rules, None if whole is None else whole[...])


@dataclasses.dataclass(frozen=True)
class BlockDrafter(Drafter):
    """A drafter of whole blocks: DFlash, DFlash2, JetSpec, DSpark or TreeFlash, by `config`.

    With a sequential head, `chain`, `best_first` and `top_budget` score along the head's own
    greedy choices; `path_conditioned` scores the children of the `tree.candidates` best nodes
    of every depth given all of their ancestors; `transitions` (TreeFlash's) tabulates
    `tree.width` children of the `tree.candidates` likeliest tokens of every depth. Without a
    head, each depth is scored independently. DFlash2's selector has a table of its candidates
    (`selector.lattice_tree`).

    The state is the `KVCache` of the context.

    Attributes:
      survival_scores: chains and `path_conditioned` trees are scored by the confidence head's
        survival probabilities instead of the drafter's own (`trees.path_conditioned`).
    """

    config: DrafterConfig
    tree: TreeConfig
    survival_scores: bool = False

    def __post_init__(self):
        if self.tree.kind == "transitions" and self.config.sequential in (None, "rnn"):
            raise ValueError(
                "tree kind 'transitions' needs a sequential head that reads only the previous "
                f"token, but the drafter's is {self.config.sequential!r}; use "
                + ("path_conditioned" if self.config.sequential else "top_budget")
            )
        conditioned = self.tree.kind == "path_conditioned" and self.config.sequential
        if self.survival_scores and not (
            self.config.confidence and (conditioned or self.tree.kind == "chain")
        ):
            raise ValueError(
                "survival_scores needs a path_conditioned tree and a sequential head, or a "
                f"chain, and a confidence head; found tree {self.tree.kind!r}, sequential "
                f"{self.config.sequential!r}, confidence {self.config.confidence!r}"
            )

    @property
    def size(self) -> int:
        return self.tree.size

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.taps

    @property
    def head_config(self) -> DrafterConfig:
        return self.config

    @property
    def best_tree(self) -> TreeKind:
        return "path_conditioned" if self.config.sequential else "chain"

    def with_tree(self, tree: TreeConfig) -> BlockDrafter:
        return dataclasses.replace(self, tree=tree)

    def abstract_params(self, target: TargetParams) -> BlockParams:
        weights = abstract_weights(self.config, target.embed.dtype)
        return jax.eval_shape(block_params, weights, target)

    def check_sampled(self) -> None:
        if self.tree.kind != "chain" or self.size <= self.depth:
            raise ValueError(
                f"rejection sampling needs a chain of {self.depth + 1} nodes for the drafter's "
                f"whole sample; its tree is {self.tree.kind!r} with {self.size}. Use such a "
                "chain, or leave rejection out: sample-then-match is lossless with any drafter"
            )

    def init(self, params: BlockParams, batch: int, capacity: int) -> KVCache:
        c, dtype = self.config, params.head.fc.dtype
        return init_cache(c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, dtype)

    def observe(self, params: BlockParams, state: KVCache, committed: Committed) -> KVCache:
        # Rows past `count` are written too: rows at or past the anchor's position are never
        # read, and the next call overwrites them.
        offsets = jnp.arange(committed.tokens.shape[1])
        positions = committed.position[:, None] + offsets
        rows = bind(self.config, params.head).context(committed.features, positions)
        return state.write(rows, committed.position)

    def draft(
        self,
        params: BlockParams,
        state: KVCache,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        budget: Int[Array, " B"],
        noise: Noise | None = None,
    ) -> tuple[DraftTree, KVCache]:
        head, vocabulary, stream, base = self._scored(params, state, anchor, position)
        added = bias(noise, position, self.depth, self.config.vocab_size, vocabulary.kept)
        if self.config.candidates:
            table = lattice(head, vocabulary, stream, base, anchor, added)
            tree = lattice_tree(self.tree, table, anchor, budget)
        elif self.config.sequential and self.tree.kind == "path_conditioned":
            tree = self._path_conditioned(head, params, stream, base, added, anchor, budget)
        elif self.tree.kind == "transitions":
            table = transition_table(
                head,
                vocabulary,
                stream,
                base,
                added,
                anchor,
                parents=self.tree.candidates,
                children=self.tree.width,
            )
            tree = from_transitions(*table, anchor, budget=budget, size=self.tree.size)
        else:
            choose = greedy_with(added)
            tokens, logits = rollout(head, vocabulary, stream, base, anchor, choose)
            if self.tree.kind == "chain" and self.config.confidence:
                log_confidence = _log_confidence(head, params, stream, anchor, tokens)
                lengths = _chain_lengths(params, log_confidence)
                budget = jnp.minimum(budget, lengths + 1)
                if self.survival_scores:
                    size, kept = self.tree.size, budget - 1
                    return chain(anchor, tokens, kept, log_confidence, size=size), state
            tree = vocabulary.of_tree(build(self.tree, logits, anchor, budget))
        return tree, state

    def draft_sampled(
        self,
        params: BlockParams,
        state: KVCache,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
        temperature: Float[Array, " B"],
        keys: Key[Array, " B"],
    ) -> tuple[SampledChain, KVCache]:
        """Samples a chain, for `decoding.rejection.accept_by_rejection`.

        Args:
          anchor, position: as in `draft`.
          temperature: at 0 the likeliest token has probability one.
          keys: consumed; separate from those of the target's choices.
        """
        head, vocabulary, stream, base = self._scored(params, state, anchor, position)
        choose = sampled(temperature, keys)

        if self.config.candidates:
            table = lattice(head, vocabulary, stream, base, anchor)
            chosen, log_q = walk(table.scores, choose)
            tokens, support = pick(table.tokens, chosen), table.tokens
        else:
            tokens, log_q = rollout(head, vocabulary, stream, base, anchor, choose)
            support = vocabulary.kept
        log_confidence = _log_confidence(head, params, stream, anchor, tokens)
        lengths = _chain_lengths(params, log_confidence)
        return SampledChain(tokens, log_q, support, lengths, log_confidence), state

    def rollout(
        self,
        params: BlockParams,
        state: KVCache,
        anchor: jax.Array,
        position: jax.Array,
        choose: Choose,
    ) -> tuple[jax.Array, jax.Array]:
        return rollout(*self._scored(params, state, anchor, position), anchor, choose)

    def _scored(self, params: BlockParams, state: KVCache, anchor, position):
        """The head, its vocabulary, the stream of its pass, and base logits [B, P, V']."""
        head, vocabulary = bind(self.config, params.head), params.vocabulary
        stream = self.stream(params, state, anchor, position)
        return head, vocabulary, stream, head.logits(vocabulary, stream)

    def stream(
        self,
        params: BlockParams,
        state: KVCache,
        anchor: Int[Array, " B"],
        position: Int[Array, " B"],
    ) -> Float[Array, "B P M"]:
        """The head's pass over one block per row: see `DraftHead.stream`."""
        c, size = self.config, self.config.block_size
        visibility = [pack_bits(block_visibility(c, layer)) for layer in range(c.num_layers)]

        def attend(layer, q, k, v):
            return tree_attention(
                q,
                state.keys[layer],
                state.values[layer],
                position,
                k,
                v,
                jnp.broadcast_to(visibility[layer], (*anchor.shape, *visibility[layer].shape)),
                scale=c.head_dim**-0.5,
                depths=jnp.broadcast_to(jnp.arange(size), (*anchor.shape, size)),
                window=c.window[layer],
            )

        return bind(c, params.head).stream(params.vocabulary, anchor, position, attend)

    def _path_conditioned(
        self, head: DraftHead, params: BlockParams, stream, base, added, anchor, budget
    ) -> DraftTree:
        vocabulary = params.vocabulary

        def ids(slot, nodes):  # nodes are draft indices, but the root is a token id
            if vocabulary.kept is None:
                return nodes
            return jnp.where(slot == 0, nodes, vocabulary.ids(nodes))

        def advance(slot, state, nodes):
            return head.advance(vocabulary, stream[:, slot, None], ids(slot, nodes), state)

        def corrected(slot, state, nodes):
            latent, state = advance(slot, state, nodes)
            logits = head.correct(vocabulary, base[:, slot, None], latent)
            return logits + added[:, slot, None], state

        step = corrected
        if self.config.sequential != "mlp" and not self.survival_scores:
            # On a mesh the kernels would need W2 and the whole batch on every device.
            step = LowRank(
                base + added,
                head.sequential.output[...],
                advance,
                implementation=None if on_one_device() else "xla",
            )

        def confidence(slot, state, nodes):
            logits = head.confidence_logits(stream[:, slot, None], ids(slot, nodes))
            return logits / jnp.broadcast_to(params.temperatures, (self.depth,))[slot]

        tree = path_conditioned(
            anchor,
            step,
            head.sequential.initial_state((*anchor.shape, 1)),
            depth=self.depth,
            parents=self.tree.candidates,
            budget=budget,
            size=self.tree.size,
            confidence=confidence if self.survival_scores else None,
        )
        return vocabulary.of_tree(tree)


def _log_confidence(head: DraftHead, params: BlockParams, stream, anchor, tokens) -> jax.Array:
    """Log of the calibrated confidence in every slot of a chain [B, P]; 0 without the head."""
    if head.confidence is None:
        return jnp.zeros(tokens.shape, jnp.float32)
    previous = jnp.concatenate([anchor[:, None], tokens[:, :-1]], axis=1)
    return jax.nn.log_sigmoid(head.confidence_logits(stream, previous) / params.temperatures)


def _chain_lengths(params: BlockParams, log_confidence: jax.Array) -> jax.Array:
    """Tokens of a chain worth verifying, by both confidence rules: [B] int32."""
    confidence = jnp.exp(log_confidence)
    return jnp.minimum(
        confident_prefix(confidence, params.threshold),
        surviving_prefix(confidence, params.survival),
    )
