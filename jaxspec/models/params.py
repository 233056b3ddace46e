"""Weights of the target, laid out as the step reads them: one array per layer and use.

The query, key and value projections are one matrix and so are gate and up, fused when a
checkpoint is loaded. Their middle axes keep key/value heads (K) and feed-forward channels (F)
separate, so that tensor parallelism shards one axis of one array.

Letters: M model width, K key/value heads, G query heads per key/value head, D head dim,
F feed-forward width, E experts, V vocabulary. Of gated delta nets: J key heads, R value heads
per key head, dk and dv dimensions of a key and a value, C = 2 dk + R dv.

Matrices of attention and of feed-forward layers, experts included, the last product of gated
delta nets and the LM head may be a `ScaledWeight` each, which keeps 8 bits a value
(`scaled_spec`). Matrices of dense layers may be an `OutputsFirst` each, for CPUs
(`outputs_first`).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.models.scaled import OutputsFirst, ScaledWeight

Matrix = jax.Array | ScaledWeight | OutputsFirst
# Matrices that may stay in 8 bits, by name and number of axes: letters of all axes, of inputs.
SCALABLE = {
    ("qkv", 4): ("mkgd", "m"),
    ("out", 4): ("kgdm", "kgd"),
    ("gate_up", 3): ("mcf", "m"),
    ("down", 2): ("fm", "f"),
    ("output", 4): ("jrdm", "jrd"),
    ("gate_up", 4): ("emci", "m"),
    ("down", 3): ("eim", "i"),
    ("lm_head", 2): ("vm", "m"),
}
DELTA_INPUTS = {("inputs", 3): ("mjw", "m")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionParams:
    norm: jax.Array  # [M]
    qkv: Matrix  # [M, K, G + 2, D]: for each key/value head its G queries, its key, its value;
    # with gates [M, K, 2 G + 2, D], every query followed by its gate
    qkv_bias: jax.Array | None  # [K, G + 2, D]
    q_norm: jax.Array | None  # [D]
    k_norm: jax.Array | None  # [D]
    out: Matrix  # [K, G, D, M]

    @property
    def gated(self) -> bool:
        """Whether every query has a gate."""
        return self.qkv.shape[2] != self.out.shape[1] + 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetParams:
    norm: jax.Array  # [M]
    inputs: (
        jax.Array
    )  # [M, J, C + R dv + 2 R]: for each key head its query, its key, its values, their
    # output gates, their rates and their decays
    convolution: jax.Array  # [J, C, taps]; the last tap is a token's own
    log_rate: jax.Array  # [J, R] float32, A_log
    step_bias: jax.Array  # [J, R] float32, dt_bias
    head_norm: jax.Array  # [dv]
    output: Matrix  # [J, R, dv, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlpParams:
    norm: jax.Array  # [M]
    gate_up: Matrix  # [M, 2, F]
    down: Matrix  # [F, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedExpertParams:
    gate: jax.Array  # [M]
    gate_up: Matrix  # [M, 2, F]
    down: Matrix  # [F, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeParams:
    norm: jax.Array  # [M]
    router: jax.Array  # [M, E]
    gate_up: Matrix  # [E, M, 2, F]
    down: Matrix  # [E, F, M]
    shared: SharedExpertParams | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerParams:
    attention: AttentionParams | DeltaNetParams
    mlp: MlpParams | MoeParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetParams:
    embed: jax.Array  # [V, M]
    layers: tuple[LayerParams, ...]
    final_norm: jax.Array  # [M]
    lm_head: Matrix | None  # [V, M]; None when tied to `embed`

    @property
    def unembed(self) -> Matrix:
        """The LM head, [V, M]."""
        return self.embed if self.lm_head is None else self.lm_head


def abstract_params(
    config: TargetConfig,
    dtype=jnp.float32,
    *,
    block: tuple[int, int] | None = None,
    lm_head: bool = False,
    devices: int = 1,
) -> TargetParams:
    """The shape of every weight as a `ShapeDtypeStruct`, nothing allocated.

    With a block, matrices that may stay in 8 bits do (`scaled_spec`), the LM head if asked for.

    What stays float32 whatever the dtype: norms that are stored less one, which bfloat16 would
    round once one is added, and the rates of decay.
    """
    c = config
    weight = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    norm = _exact if c.zero_centered_norms else weight

    def mlp(i: int) -> MlpParams | MoeParams:
        if i in c.sparse_layers:
            return _abstract_moe(c, weight, norm)
        return MlpParams(
            norm=norm(c.hidden_size),
            gate_up=weight(c.hidden_size, 2, c.intermediate_size),
            down=weight(c.intermediate_size, c.hidden_size),
        )

    def attention(i: int) -> AttentionParams | DeltaNetParams:
        if i in c.delta_layers:
            return _abstract_delta_net(c, weight, norm)
        return _abstract_attention(c, weight, norm)

    params = TargetParams(
        embed=weight(c.vocab_size, c.hidden_size),
        layers=tuple(LayerParams(attention(i), mlp(i)) for i in range(c.num_layers)),
        final_norm=norm(c.hidden_size),
        lm_head=None if c.tie_embeddings else weight(c.vocab_size, c.hidden_size),
    )
    if block is None:
        return params

    scaled = jax.tree.map_with_path(
        lambda path, spec: scaled_spec(path, spec, block, devices) or spec, params
    )
    return scaled if lm_head else dataclasses.replace(scaled, lm_head=params.lm_head)


def scaled_spec(
    path, spec: jax.ShapeDtypeStruct, block: tuple[int, int], devices: int = 1
) -> ScaledWeight | None:
    """The shapes of a weight in 8 bits; None for one that keeps its dtype.

    A block is cut to what divides the last axis of outputs and the last of inputs evenly, of
    feed-forward channels and of the vocabulary those of one device.

    Args:
      path, spec: of the weight by value in `TargetParams`.
      block: outputs and inputs that share a scale.
      devices: over which feed-forward channels and the vocabulary are cut.
    """
    known = SCALABLE.get((path[-1].name, len(spec.shape)))
    if known is None:
        return None
    letters, inputs = known
    outputs = "".join(letter for letter in letters if letter not in inputs)
    sizes = dict(zip(letters, spec.shape, strict=True))
    scales = dict(sizes)
    for letter, size in zip((outputs[-1], inputs[-1]), block, strict=True):
        cut = letter in "fv" and sizes[letter] % devices == 0
        scales[letter] //= math.gcd(size, sizes[letter] // (devices if cut else 1))
    shape, scale = (tuple(x[letter] for letter in outputs + inputs) for x in (sizes, scales))
    return ScaledWeight(
        values=jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        scale=jax.ShapeDtypeStruct(scale, jnp.float32),
        inputs=len(inputs),
        dtype=jnp.dtype(spec.dtype),
        leading=letters.index(inputs),
    )


def outputs_first(params: TargetParams) -> TargetParams:
    """The same weights, matrices of dense layers as `OutputsFirst`; frees those given."""
    leaves, tree = jax.tree.flatten_with_path(params)
    return tree.unflatten([_outputs_first(path[-1].name, x) for path, x in leaves])


def _outputs_first(name: str, weight: jax.Array) -> jax.Array | OutputsFirst:
    known = (SCALABLE | DELTA_INPUTS).get((name, weight.ndim))
    if known is None or not known[0].startswith(known[1]):  # it is so already, or of experts
        return weight
    inputs = len(known[1])
    own = range(inputs, weight.ndim)
    values = jnp.moveaxis(weight, own, range(len(own))).block_until_ready()
    weight.delete()
    return OutputsFirst(values, inputs)


def _exact(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _abstract_attention(c: TargetConfig, weight, norm) -> AttentionParams:
    queries = 2 * c.group_size if c.attention_gate else c.group_size
    head_norm = norm(c.head_dim) if c.qk_norm else None
    return AttentionParams(
        norm=norm(c.hidden_size),
        qkv=weight(c.hidden_size, c.num_kv_heads, queries + 2, c.head_dim),
        qkv_bias=weight(c.num_kv_heads, queries + 2, c.head_dim) if c.attention_bias else None,
        q_norm=head_norm,
        k_norm=head_norm,
        out=weight(c.num_kv_heads, c.group_size, c.head_dim, c.hidden_size),
    )


def _abstract_delta_net(c: TargetConfig, weight, norm) -> DeltaNetParams:
    d = c.delta_net
    heads, group = d.key_heads, d.group_size
    return DeltaNetParams(
        norm=norm(c.hidden_size),
        inputs=weight(c.hidden_size, heads, d.channels + group * d.value_dim + 2 * group),
        convolution=weight(heads, d.channels, d.taps),
        log_rate=_exact(heads, group),
        step_bias=_exact(heads, group),
        head_norm=weight(d.value_dim),
        output=weight(heads, group, d.value_dim, c.hidden_size),
    )


def _abstract_moe(c: TargetConfig, weight, norm) -> MoeParams:
    experts, width, shared = c.num_experts, c.moe_intermediate_size, c.shared_expert_size
    return MoeParams(
        norm=norm(c.hidden_size),
        router=weight(c.hidden_size, experts),
        gate_up=weight(experts, c.hidden_size, 2, width),
        down=weight(experts, width, c.hidden_size),
        shared=SharedExpertParams(
            gate=weight(c.hidden_size),
            gate_up=weight(c.hidden_size, 2, shared),
            down=weight(shared, c.hidden_size),
        )
        if shared
        else None,
    )


def random_params(
    config: TargetConfig, key: jax.Array, *, scale=0.1, dtype=jnp.float32
) -> TargetParams:
    """Gaussian weights with the given scale, norms at one; for tests and shape studies."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def make(path, spec, key):
        if "norm" in path[-1].name:
            return jnp.ones(spec.shape, spec.dtype)
        return scale * jax.random.normal(key, spec.shape, spec.dtype)

    return jax.tree.unflatten(
        tree, [make(path, spec, k) for (path, spec), k in zip(leaves, keys, strict=True)]
    )
