"""Configurations: frozen and hashable, so that they can be static arguments of `jax.jit`."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxspec.arguments import at_least, check_field, check_indices, convert_field


def check_heads(config: Any) -> None:
    """Raises ValueError unless query heads are in groups and heads have pairs to rotate."""
    at_least(1, config, "num_heads", "num_kv_heads")
    grouped = config.num_heads % config.num_kv_heads == 0
    rule = f"a multiple of num_kv_heads = {config.num_kv_heads}"
    check_field(config, "num_heads", grouped, rule)
    even = config.head_dim >= 2 and config.head_dim % 2 == 0
    check_field(config, "head_dim", even, "an even number, for rotary positions")


def check_taps(config: Any) -> None:
    """Raises ValueError unless a drafter reads layers of its target, each once."""
    taps, layers = config.taps, config.target_layers
    apart = len(set(taps)) == len(taps) > 0
    inside = all(-1 <= tap and (layers is None or tap < layers) for tap in taps)
    rule = f"different layers of the target, -1 … {'' if layers is None else layers - 1}"
    check_field(config, "taps", apart and inside, rule)


def for_every_layer(config: Any, *names: str) -> None:
    """Stores a value per layer where a field has one for all; raises ValueError for another
    number of values, and for a window below 1."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,) * config.num_layers
        object.__setattr__(config, name, values)
        check_field(config, name, len(values) == config.num_layers, "one value per layer")
        if name == "window":
            wide = all(w is None or w >= 1 for w in values)
            check_field(config, name, wide, "None or at least 1")


ROPE_KINDS = ("linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched to long contexts; formulas are in `models.rope`.

    Attributes:
      kind: one of `ROPE_KINDS`.
      factor: s, by which the context grows.
      original_positions: L, positions of the model before scaling (yarn, llama3).
      beta_fast, beta_slow: range, in rotations over L, in which yarn interpolates.
      truncate: yarn rounds that range to whole channel pairs.
      attention_factor: factor of yarn's cosines and sines; None: from mscale and
        mscale_all_dim, or the paper's rule if those are None too.
      low_freq_factor, high_freq_factor: range in which llama3 interpolates.
    """

    kind: str
    factor: float
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        check = functools.partial(check_field, self)
        check("kind", self.kind in ROPE_KINDS, f"one of {ROPE_KINDS}")
        check("factor", 0 < self.factor < float("inf"), "a positive number")
        stretched = self.kind == "linear" or self.original_positions >= 1
        check("original_positions", stretched, f"at least 1 with kind = {self.kind!r}")
        order = self.beta_fast >= self.beta_slow > 0
        check("beta_fast", order, f"at least beta_slow = {self.beta_slow}, both positive")
        order = self.high_freq_factor >= self.low_freq_factor > 0
        check(
            "high_freq_factor",
            order,
            f"at least low_freq_factor = {self.low_freq_factor}, both positive",
        )


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """Layers that are gated delta nets (arXiv 2412.06464) in place of attention.

    Attributes:
      layers: their indices.
      key_heads, value_heads: each key head serves value_heads / key_heads consecutive value
        heads.
      key_dim, value_dim: dimensions of a head.
      taps: width of the causal convolution in tokens, the current one included.
      interleaved: checkpoints store the projections by key head, as Qwen3-Next's do.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    interleaved: bool = False

    def __post_init__(self):
        check = functools.partial(check_field, self)
        at_least(1, self, "key_heads", "value_heads", "key_dim", "value_dim")
        check("taps", self.taps >= 2, "at least 2")
        even = self.value_heads % self.key_heads == 0
        check("value_heads", even, f"a multiple of key_heads = {self.key_heads}")

    @property
    def group_size(self) -> int:
        """Value heads per key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Channels of the convolution per key head: its query, its key and its values."""
        return 2 * self.key_dim + self.group_size * self.value_dim


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """A decoder-only transformer: Qwen3, Qwen3-MoE, or Llama-shaped through the flags; with
    `delta_net` a hybrid as Qwen3.5 and Qwen3-Next are.

    Attributes:
      delta_net: the layers that are gated delta nets; None if all are attention.
      rotary_dim: leading dimensions of a head that are rotated; None: all.
      attention_gate: the query projection also gives a gate for every head's output.
      zero_centered_norms: checkpoints store norm weights minus one.
      shared_expert_size: width of a sparse layer's gated expert for every token; 0 for none.
      qk_norm: RMSNorm over the head dimension of queries and keys (Qwen3: True, Llama: False).
      rope_scaling: None for plain rotary positions.
      sliding_rope_theta: rotary base of layers with a window, unscaled; None: as the others.
      windows: per layer, the number of last positions a token attends to, its own included;
        None: all of them. (): all layers without a window.
      attention_bias: biases on the query, key and value projections (Qwen2: True).
      tie_embeddings: the LM head is the embedding table.
      num_experts: experts of a sparse layer; 0 for a dense model.
      sparse_layers: indices of the layers whose MLP is a mixture of experts.
      norm_topk_prob: renormalise the chosen experts' probabilities to sum to one.
      eos_token_ids: ids that end a generation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    sliding_rope_theta: float | None = None
    windows: tuple[int | None, ...] = ()
    rms_norm_eps: float = 1e-6
    max_positions: int = 40_960
    tie_embeddings: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sparse_layers: tuple[int, ...] = ()
    shared_expert_size: int = 0
    delta_net: DeltaNetConfig | None = None
    rotary_dim: int | None = None
    attention_gate: bool = False
    zero_centered_norms: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if all(window is None for window in self.windows):
            object.__setattr__(self, "windows", ())
        check = functools.partial(check_field, self)
        at_least(
            1, self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"
        )
        check_heads(self)
        rotary = self.head_dim if self.rotary_dim is None else self.rotary_dim
        even = 2 <= rotary <= self.head_dim and rotary % 2 == 0
        check("rotary_dim", even, f"an even number, at most head_dim = {self.head_dim}")
        self._check_layers()
        experts = not self.sparse_layers or 1 <= self.experts_per_token <= self.num_experts
        check("experts_per_token", experts, f"1 … num_experts = {self.num_experts}")
        check_indices(
            self, "eos_token_ids", self.eos_token_ids, self.vocab_size, "tokens of this model"
        )

    def _check_layers(self) -> None:
        # num_layers may be huge in a damaged file: allocate nothing of its size here.
        windows, count = self.windows, self.num_layers
        each = len(windows) in (0, count) and all(w is None or w >= 1 for w in windows)
        check_field(self, "windows", each, f"None or at least 1 for each of {count} layers")
        check_indices(self, "sparse_layers", self.sparse_layers, count, "layers")
        check_indices(self, "delta_net.layers", self.delta_layers, count, "layers")
        some = len(set(self.delta_layers)) < count
        check_field(self, "delta_net", some, f"at least one attention layer among {count}")
        both = [i for i in self.delta_layers if windows and windows[i]]
        whole = f"None for the gated delta nets {both}, which see all positions"
        check_field(self, "windows", not both, whole)

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are gated delta nets."""
        return () if self.delta_net is None else self.delta_net.layers

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers, which keep keys and values."""
        return tuple(i for i in range(self.num_layers) if i not in self.delta_layers)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where there is none."""
        return self.windows or (None,) * self.num_layers

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads


TreeKind = Literal["chain", "best_first", "top_budget", "path_conditioned", "transitions"]
TREE_KINDS = get_args(TreeKind)
# The options that each kind uses besides its size; of path_conditioned trees, EAGLE-3's alone
# have a width. Confidences below `threshold` or `survival` end a chain (`load_drafter`).
TREE_OPTIONS: dict[TreeKind, tuple[str, ...]] = {
    "chain": ("threshold", "survival"),
    "best_first": ("width",),
    "top_budget": (),
    "path_conditioned": ("width", "candidates"),
    "transitions": ("width", "candidates"),
}


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """How a drafter's scores become a tree (`trees.build`).

    Attributes:
      kind: one of `TREE_KINDS`.
      size: N, nodes of the tree, root included; smaller trees are padded to it. A row's budget,
        an array, may be smaller.
      width: children per expanded node (`best_first`, `path_conditioned` of EAGLE-3) or per
        scored parent (`transitions`).
      candidates: parents per depth whose children are scored over the whole vocabulary
        (`path_conditioned`, `transitions`).
    """

    kind: TreeKind = "chain"
    size: int = 16
    width: int = 4
    candidates: int = 16

    def __post_init__(self):
        check_field(self, "kind", self.kind in TREE_KINDS, f"one of {TREE_KINDS}")
        sizes = ("size", "width", "candidates")
        for name in sizes:
            convert_field(self, name, operator.index, "an integer")
        at_least(1, self, *sizes)


def tree_size(budget: int) -> int:
    """The size of trees that verify `budget` nodes: a power of two, so that programs compiled
    for one budget serve others."""
    return 1 << (budget - 1).bit_length()


LOW_RANK = ("markov", "gated", "rnn", "bilinear")  # heads with their own token embedding
SEQUENTIAL_HEADS = (*LOW_RANK, "mlp")
CONFIDENCE_HEADS = ("hidden", "hidden_and_previous")


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A block drafter; covers DFlash, DFlash2, JetSpec, DSpark and TreeFlash.

    Attributes:
      hidden_size: M, of the drafter and its target, whose embedding and LM head it uses.
      target_layers: number of layers of the drafter's target; None where its file does not say.
      taps: target layers whose outputs the drafter reads, 0-based, in this order; -1 is the
        embedding.
      block_size: slots of one pass, the anchor's included.
      mask_token_id: id whose embedding fills the slots after the anchor.
      causal: per layer, or one for all: a slot attends to earlier slots only, rather than to
        its whole block.
      predict_next: slot k predicts position k + 1, and the anchor's slot is used. Otherwise
        slot k predicts its own position, and the anchor's output is unused.
      sequential: one of `SEQUENTIAL_HEADS`, or None.
      rank: width of the previous token's embedding in the head (markov, gated, rnn, bilinear).
      candidates: k, the likeliest tokens of a slot, among which a bilinear head selects; 0 for
        other heads, which correct the logits of all tokens.
      confidence: one of `CONFIDENCE_HEADS`, or None.
      window: per layer, or one for all: a slot attends to positions less than `window` away;
        None: to all.
      conv_taps: K, width in slots of the convolutions around every sublayer; 0 for none.
      conv_group: contiguous channels that share the input-dependent part of a convolution.
      logit_scale, logit_softcap: base logits are c tanh(scale z / c), or scale z without a cap.
      embedding_scale: multiplies the target's embedding of the block's tokens.
      rope_scaling: None for plain rotary positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    target_layers: int | None
    taps: tuple[int, ...]
    block_size: int
    mask_token_id: int
    causal: tuple[bool, ...] | bool = False
    predict_next: bool = False
    sequential: str | None = None
    rank: int = 0
    candidates: int = 0
    confidence: str | None = None
    window: tuple[int | None, ...] | int | None = None
    conv_taps: int = 0
    conv_group: int = 0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    max_positions: int = 40_960

    def __post_init__(self):
        check = functools.partial(check_field, self)
        at_least(1, self, "num_layers")
        for_every_layer(self, "causal", "window")
        check_heads(self)
        check_taps(self)
        check("depth", self.depth >= 1, "a block with at least one predicting slot")
        masks = 0 <= self.mask_token_id < self.vocab_size
        check("mask_token_id", masks, f"a row of the embedding, 0 … {self.vocab_size - 1}")
        self._check_parts(check)
        inside = 0 <= self.conv_taps <= self.block_size
        check("conv_taps", inside, f"0, or up to block_size = {self.block_size}")
        if self.conv_taps:
            divides = self.conv_group >= 1 and self.hidden_size % self.conv_group == 0
            check("conv_group", divides, f"a divisor of hidden_size = {self.hidden_size}")
        else:
            none = self.conv_group == 0
            check("conv_group", none, "0 without convolutions (conv_taps = 0)")
        for name in ("logit_scale", "embedding_scale"):
            check(name, 0 < getattr(self, name) < float("inf"), "a positive number")
        cap = self.logit_softcap
        check("logit_softcap", cap is None or 0 < cap < float("inf"), "None or positive")

    def _check_parts(self, check: Callable) -> None:
        """Checks the sequential and the confidence head."""
        kind, confidence = self.sequential, self.confidence
        known = kind in (None, *SEQUENTIAL_HEADS)
        check("sequential", known, f"None or one of {SEQUENTIAL_HEADS}")
        low_rank = kind in LOW_RANK
        wanted = "at least 1" if low_rank else "0"
        check("rank", (self.rank >= 1) == low_rank, f"{wanted} with sequential = {kind!r}")
        known = confidence in (None, *CONFIDENCE_HEADS)
        check("confidence", known, f"None or one of {CONFIDENCE_HEADS}")
        embeds = low_rank or confidence != "hidden_and_previous"
        rule = "None or 'hidden': only low-rank heads embed the previous token"
        check("confidence", embeds, rule)
        if kind == "bilinear":
            several = 2 <= self.candidates <= self.vocab_size
            check("candidates", several, f"2 … {self.vocab_size}")
        else:
            check("candidates", self.candidates == 0, f"0 with sequential = {kind!r}")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def depth(self) -> int:
        """P: positions one pass predicts."""
        return self.block_size if self.predict_next else self.block_size - 1


def spaced_taps(layers: int, count: int) -> tuple[int, ...]:
    """Evenly spaced target layers, from the second to the third last (DFlash's rule).

    A target too shallow for that gives different layers all the same: evenly spaced from the
    first, or all of them.

    >>> spaced_taps(36, 5)
    (1, 9, 17, 25, 33)
    >>> spaced_taps(7, 5), spaced_taps(4, 5)
    ((0, 1, 3, 4, 5), (0, 1, 2, 3))
    """
    if count == 1:
        return (layers // 2,)
    if layers <= count:
        return tuple(range(layers))
    if layers - 4 >= count - 1:
        return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))
    return tuple(int(i * (layers - 2) / (count - 1) + 0.5) for i in range(count))
