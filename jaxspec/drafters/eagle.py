"""The EAGLE-3 drafter in a decoding loop: the layer runs once per drafted level.

Pair i is the target's feature of position i and the token at i + 1. Its keys and values are
cached once both are committed; those of drafted rows, which differ, last for one draft. The
last pair of a prefix contains the anchor, so every draft runs it first.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed, Drafter
from jaxspec.drafters.eagle_head import EagleConfig, PairHead
from jaxspec.drafters.head import Vocabulary
from jaxspec.drafters.rollout import Choose, SampledChain, greedy_with, sampled
from jaxspec.drafters.weights import abstract_weights, bind
from jaxspec.models.cache import KVCache, KVRows, init_cache
from jaxspec.models.params import TargetParams
from jaxspec.noise import Noise, bias
from jaxspec.trees.candidates import top_log_probs
from jaxspec.trees.levels import ROOT, best_nodes
from jaxspec.trees.tree import DraftTree, chain, chain_nodes, known, pack_bits, root_only
from pallas_kernels.tree_attention import tree_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleParams:
    """Weights of an EAGLE-3 drafter or an MTP layer, with an embedding and an LM head.

    Attributes:
      head: the network's weights (`weights.abstract_weights`, `mtp.abstract_mtp`).
      vocabulary: embedding and LM head, the target's or its own, and which tokens are drafted.
    """

    head: nnx.State
    vocabulary: Vocabulary

    @property
    def whole_head(self) -> nnx.State:
        """The head's weights as in a checkpoint."""
        return self.head


def eagle_params(
    head: nnx.State,
    target: TargetParams,
    *,
    kept: ArrayLike | None = None,
    unembed: ArrayLike | None = None,
    embed: ArrayLike | None = None,
) -> EagleParams:
    """A head's weights with an embedding and an LM head.

    Args:
      kept: [V'] int32, the tokens to draft, ascending; None for all.
      unembed: [V', M], the drafter's own LM head; None for the target's rows.
      embed: [V, M], the drafter's own embedding; None for the target's.
    """
    kept = None if kept is None else jnp.asarray(kept, jnp.int32)
    judge = target.unembed if kept is None else target.unembed[kept]
    own = unembed is not None
    return EagleParams(
        head,
        Vocabulary(
            embed=target.embed if embed is None else jnp.asarray(embed),
            unembed=jnp.asarray(unembed) if own else judge,
            kept=kept,
            judge=judge if own else None,
            own_embed=embed is not None,
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState:
    """State of an EAGLE-3 drafter after the committed tokens.

    Attributes:
      cache: keys and values of the pairs; row i needs the token at i + 1.
      features: only `keys` is used, [B, 1, S, M]: `PairHead.fuse` of every position.
    """

    cache: KVCache
    features: KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Level:
    """The F rows to run next, with what they need of earlier levels.

    Attributes:
      rows: keys and values of all drafted rows, levels side by side.
      features: [B, F, M].
      tokens: [B, F] int32.
      seen: [B, F, N'] bool, which of the N' drafted rows each attends to, itself included.
      scores: [B, F] float32, log-probability of each row's path; -inf where there is no row.
      places: [B, F] int32, index of each row among the candidates (`levels.best_nodes`).
    """

    rows: KVRows
    features: jax.Array
    tokens: jax.Array
    seen: jax.Array
    scores: jax.Array
    places: jax.Array


@dataclasses.dataclass(frozen=True)
class EagleDrafter(Drafter):
    """Drafts with EAGLE-3, as a chain or as its dynamic tree.

    The tree is EAGLE-2's, `path_conditioned`: every level runs the `tree.candidates` best nodes
    of the level above and keeps `tree.width` children of each; the best of all levels are
    verified. EAGLE-2 and SGLang use one number k for both.
    """

    config: EagleConfig
    tree: TreeConfig
    best_tree = "path_conditioned"

    def __post_init__(self):
        if self.tree.kind not in ("chain", "path_conditioned"):
            raise ValueError(
                f"tree kind {self.tree.kind!r} needs scores by depth or by the previous token, "
                "but this drafter's depend on the whole path; use chain or path_conditioned"
            )

    @property
    def size(self) -> int:
        return self.tree.size

    @property
    def depth(self) -> int:
        return max(1, min(self.config.steps, self.tree.size - 1))

    @property
    def passes(self) -> int:
        """Runs of the network for one tree."""
        return self.depth

    @property
    def pass_tokens(self) -> int:
        """F, tokens of a row of the batch that one run takes."""
        return 1 if self.tree.kind == "chain" else min(self.tree.candidates, self.size - 1)

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.taps

    def with_tree(self, tree: TreeConfig) -> EagleDrafter:
        return dataclasses.replace(self, tree=tree)

    def head(self, params: EagleParams) -> PairHead:
        """The network with its weights."""
        return bind(self.config, params.head)

    def abstract_params(self, target: TargetParams) -> EagleParams:
        weights = abstract_weights(self.config, target.embed.dtype)
        return jax.eval_shape(eagle_params, weights, target)

    def check_sampled(self) -> None:
        if self.tree.kind != "chain":
            raise ValueError(
                f"rejection sampling needs a chain; the drafter's tree is {self.tree.kind!r}. "
                "Use a chain, or leave rejection out: sample-then-match is lossless with any "
                "drafter"
            )

    def init(self, params: EagleParams, batch: int, capacity: int) -> EagleState:
        c, dtype = self.config, params.head.fc.dtype
        features = jnp.zeros((batch, 1, capacity, c.hidden_size), dtype)
        return EagleState(
            init_cache(c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, dtype),
            KVCache((features,), ()),
        )

    def observe(
        self, params: EagleParams, state: EagleState, committed: Committed
    ) -> EagleState:
        """Runs the pairs whose tokens are committed: those before `position + count - 1`."""
        head, position = self.head(params), committed.position
        batch, count = committed.tokens.shape
        own = head.fuse(committed.features)
        # C - 1 of the C features are followed by a token here; the pair before them is complete
        # now, unless they are the first. Rows past the committed ones are garbage.
        before = feature_at(state, position - 1)
        features = jnp.concatenate([before[:, None], own], axis=1)
        tokens = jnp.pad(committed.tokens, ((0, 0), (0, 1)))
        skipped = jnp.where(position > 0, 0, 1)
        index = skipped[:, None] + jnp.arange(count)
        features = jnp.take_along_axis(features, index[..., None], axis=1)
        tokens = jnp.take_along_axis(tokens, index, axis=1)
        start = jnp.maximum(position - 1, 0)

        rows = {}
        depths, bits = chain_nodes(batch, count)

        def attend(layer, q, k, v):
            rows[layer] = k, v
            return self._attend(layer, q, k, v, state.cache, start, bits, depths)

        # XLA drops the last layer's output, which is not needed.
        head(params.vocabulary, features, tokens, start[:, None] + depths, attend)
        keys, values = zip(*(rows[i] for i in range(self.config.num_layers)), strict=True)
        cache = state.cache.write(KVRows(keys, values), start, after=keys[-1])
        fresh = KVRows((own[:, :, None],), ())
        return EagleState(cache, state.features.write(fresh, position, after=features))

    def draft(
        self,
        params: EagleParams,
        state: EagleState,
        anchor: jax.Array,
        position: jax.Array,
        budget: jax.Array,
        noise: Noise | None = None,
    ) -> tuple[DraftTree, EagleState]:
        if self.size == 1:
            return root_only(anchor), state
        vocab, kept = self.config.vocab_size, params.vocabulary.kept
        added = bias(noise, position, self.depth, vocab, kept)
        if self.tree.kind == "chain":
            choose = greedy_with(added)
            tokens, logits = self.rollout(params, state, anchor, position, choose)
            gains = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
            return chain(anchor, tokens, budget - 1, gains, size=self.size), state
        return self._grow(params, state, anchor, position, budget, added), state

    def draft_sampled(
        self,
        params: EagleParams,
        state: EagleState,
        anchor: jax.Array,
        position: jax.Array,
        temperature: jax.Array,
        keys: jax.Array,
    ) -> tuple[SampledChain, EagleState]:
        """Samples a chain; arguments as in `BlockDrafter.draft_sampled`."""
        choose = sampled(temperature, keys)
        tokens, log_q = self.rollout(params, state, anchor, position, choose)
        whole = jnp.full(anchor.shape, self.depth, jnp.int32)
        certain = jnp.zeros(tokens.shape, jnp.float32)
        return SampledChain(tokens, log_q, params.vocabulary.kept, whole, certain), state

    def rollout(
        self,
        params: EagleParams,
        state: EagleState,
        anchor: jax.Array,
        position: jax.Array,
        choose: Choose,
    ) -> tuple[jax.Array, jax.Array]:
        def step(level: _Level, slot):
            logits, features, level = self._run(params, state, position, level, slot)
            chosen, law = choose(slot, logits[:, 0])
            token = params.vocabulary.ids(chosen)
            following = dataclasses.replace(
                level,
                features=features,
                tokens=token[:, None],
                seen=level.seen | _own(slot + 1, 1, self.depth),
            )
            return following, (token, law)

        start = self._start(state, anchor, position, 1)
        _, (tokens, laws) = jax.lax.scan(step, start, jnp.arange(self.depth))
        return tokens.swapaxes(0, 1), laws.swapaxes(0, 1)

    def _grow(
        self, params: EagleParams, state: EagleState, anchor, position, budget, added
    ) -> DraftTree:
        """EAGLE-2's tree: a pool of W candidates after each of F rows per level.

        Args:
          added: to the logits of each depth, see `noise.bias`.
        """
        vocabulary, rows = params.vocabulary, jnp.arange(anchor.shape[0])[:, None]
        frontier = self.pass_tokens
        width = min(self.tree.width, vocabulary.unembed.shape[0])

        def grow(level: _Level, slot):
            logits, features, level = self._run(params, state, position, level, slot)
            likely, gains = top_log_probs(logits + added[:, slot, None], width)  # [B, F, W]
            scores = known(level.scores[..., None] + jnp.minimum(gains, 0.0))
            scores, tokens = (x.reshape(len(anchor), -1) for x in (scores, likely))
            tokens = vocabulary.ids(tokens)
            best, index = jax.lax.top_k(scores, frontier)
            above = index // width
            parents = jnp.repeat(level.places, width, axis=1)
            following = dataclasses.replace(
                level,
                features=features[rows, above],
                tokens=tokens[rows, index],
                seen=level.seen[rows, above] | _own(slot + 1, frontier, self.depth),
                scores=best,
                places=slot * frontier * width + index,
            )
            return following, (tokens, parents, jnp.full_like(tokens, slot + 1), scores)

        start = self._start(state, anchor, position, frontier)
        _, pool = jax.lax.scan(grow, start, jnp.arange(self.depth))
        nodes = (jnp.moveaxis(x, 0, 1).reshape(len(anchor), -1) for x in pool)
        return best_nodes(anchor, *nodes, size=self.size, budget=budget)

    def _start(self, state: EagleState, anchor, position, frontier: int) -> _Level:
        """The first level: only the last pair."""
        c, batch, first = self.config, anchor.shape[0], jnp.arange(frontier) == 0
        shape = (batch, self.depth * frontier, c.num_kv_heads, c.head_dim)
        empty = tuple(jnp.zeros(shape, keys.dtype) for keys in state.cache.keys)
        feature = feature_at(state, position - 1)
        seen = _own(jnp.int32(0), frontier, self.depth)
        return _Level(
            rows=KVRows(empty, empty),
            features=jnp.broadcast_to(feature[:, None], (batch, frontier, c.hidden_size)),
            tokens=jnp.broadcast_to(anchor[:, None], (batch, frontier)),
            seen=jnp.broadcast_to(seen, (batch, *seen.shape)),
            scores=jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf), (batch, frontier)),
            places=jnp.full((batch, frontier), ROOT, jnp.int32),
        )

    def _run(
        self, params: EagleParams, state: EagleState, position, level: _Level, slot: jax.Array
    ) -> tuple[jax.Array, jax.Array, _Level]:
        """Runs a level's rows: logits [B, F, V'], next features [B, F, M], and their rows."""
        head = self.head(params)
        batch, frontier = level.tokens.shape
        count = self.depth * frontier
        first, last = slot * frontier, jnp.maximum(position - 1, 0)
        put = jax.lax.dynamic_update_slice_in_dim
        # A window counts from the last pair, as in training, for drafted rows too.
        depths = jnp.zeros((batch, count), jnp.int32)
        # Attention needs as many queries as rows: those of other levels attend to themselves.
        seen = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
        bits = pack_bits(put(seen, level.seen, first, axis=1))
        keys, values = list(level.rows.keys), list(level.rows.values)

        def attend(layer, q, k, v):
            for rows, new in ((keys, k), (values, v)):
                rows[layer] = put(rows[layer], new.astype(rows[layer].dtype), first, axis=1)
            q = put(jnp.zeros((batch, count, *q.shape[2:]), q.dtype), q, first, axis=1)
            arrays = q, keys[layer], values[layer], state.cache, last, bits, depths
            out = self._attend(layer, *arrays)
            return jax.lax.dynamic_slice_in_dim(out, first, frontier, axis=1)

        positions = jnp.broadcast_to(last[:, None] + slot, level.tokens.shape)
        output = head(params.vocabulary, level.features, level.tokens, positions, attend)
        level = dataclasses.replace(level, rows=KVRows(tuple(keys), tuple(values)))
        return head.logits(params.vocabulary, output), head.feedback(output), level

    def _attend(self, layer: int, q, k, v, cache: KVCache, lengths, bits, depths) -> jax.Array:
        return tree_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            lengths,
            k,
            v,
            bits,
            scale=self.config.head_dim**-0.5,
            depths=depths,
            window=self.config.window[layer],
        )


def feature_at(state: EagleState, position: jax.Array) -> jax.Array:
    """Features [B, M] at positions [B]; arbitrary where a position is negative."""
    features = state.features.keys[0][:, 0]
    index = jnp.maximum(position, 0)[:, None, None]
    return jnp.take_along_axis(features, index, axis=1)[:, 0].astype(jnp.float32)


def _own(slot: jax.Array, frontier: int, levels: int) -> jax.Array:
    """bool [F, N']: the place of each row of level `slot` among the rows of all levels."""
    place = slot * frontier + jnp.arange(frontier)
    return place[:, None] == jnp.arange(levels * frontier)
