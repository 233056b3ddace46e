"""The target's forward. Every forward is a tree: plain decoding is a tree of one node, a
prompt chunk is a chain."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxspec.config import TargetConfig
from jaxspec.models.attention import attention
from jaxspec.models.cache import KVRows
from jaxspec.models.delta_net import DeltaRows, DeltaState, Kinship, delta_net, kinship
from jaxspec.models.layers import lookup, project, project_out, project_swiglu, rms_norm
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import (
    AttentionParams,
    DeltaNetParams,
    MlpParams,
    MoeParams,
    TargetParams,
)
from jaxspec.models.rope import Angles, layer_angles
from jaxspec.models.scaled import is_scaled
from jaxspec.models.state import LayerRows, LayerStates
from jaxspec.trees.packing import Packing
from jaxspec.trees.tree import chain_nodes
from pallas_kernels.mesh import on_one_device
from pallas_kernels.tree_attention import tree_attention

MIN_ROWS = 8  # rows of a product of narrow operands, for cuBLAS: XLA pads each with fewer
FEW_ROWS = 64  # up to this many rows, float32 results of products cost little


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """Outputs of the target for N nodes.

    Attributes:
      hidden: [B, N, M] float32, after the final norm; `unembed` turns it into logits.
      taps: [B, N, len(taps) * M] float32, outputs of the tapped layers side by side.
      rows: new cache rows of the nodes, for `LayerStates.write`.
    """

    hidden: jax.Array
    taps: jax.Array
    rows: LayerRows


def forward(
    params: TargetParams,
    config: TargetConfig,
    tokens: Int[Array, "B N"],
    depths: Int[Array, "B N"],
    ancestors: UInt32[Array, "B N W"],
    states: LayerStates,
    lengths: Int[Array, " B"],
    *,
    taps: tuple[int, ...] = (),
    packing: Packing | None = None,
    embeddings: Float[Array, "B N M"] | None = None,
    implementation: str | None = None,
) -> ForwardOutput:
    """Runs the target on N nodes that see the committed prefix and their ancestors.

    States are only read; `ForwardOutput.rows` holds what to write once nodes are accepted.

    Args:
      tokens: int32.
      depths: int32; a node stands at position `lengths + depths`.
      ancestors: bits, W = ceil(N / 32), ancestor-or-self (`trees.ancestors`); parents come
        before children.
      states: of the layers after the prefix.
      lengths: int32, tokens of the prefix.
      taps: layers whose outputs to return, 0-based; -1 is the embedding, and the last layer
        is tapped after the final norm (as Hugging Face's `hidden_states[-1]`).
      packing: run only on the nodes it packs: `hidden` and `taps` are then packed, [1, T, .],
        and `rows` of other nodes are meaningless.
      embeddings: float32, instead of the tokens' own; not with a packing.
      implementation: of tree attention, see `pallas_kernels.tree_attention`; "triton" also
        runs the kernels around the products (`fuses`).
    """
    check_taps(taps, config)
    batch, n = tokens.shape
    positions = lengths[:, None] + depths
    if packing is not None:
        tokens, positions = packing.gather(tokens), packing.gather(positions)
    angles = layer_angles(config, positions)
    x = lookup(params.embed, tokens) if embeddings is None else embeddings  # [B, N, M]
    fused = fuses(params, config, implementation)
    count, rows = tokens.size, None
    if fused:
        # Nodes side by side, padded with zeros: products of fewer rows would each pad theirs.
        rows = max(count, MIN_ROWS if _by_value(params) else 2)  # of one row XLA makes scalars
        x = jnp.pad(x.reshape(1, count, -1), ((0, 0), (0, rows - count), (0, 0)))
    nodes = _Nodes((batch, n), rows, lengths, depths, ancestors, packing, implementation)
    kin = kinship(ancestors, lengths) if config.delta_layers else None
    outputs, kv, delta = {-1: x}, [], []
    for i, layer in enumerate(params.layers):
        if isinstance(layer.attention, DeltaNetParams):
            state = states.delta[len(delta)]
            mixed, kept = _delta_layer(layer.attention, config, x, nodes, state, kin)
            delta.append(kept)
        else:
            cache = states.kv.keys[len(kv)], states.kv.values[len(kv)]
            window = config.layer_windows[i]
            mixed, kept = _attend(layer.attention, config, x, nodes, angles[i], cache, window)
            kv.append(kept)
        x = _add_mlp(layer.mlp, config, x + mixed, count, nodes.results)
        outputs[i] = x
    hidden = rms_norm(x, params.final_norm, config.rms_norm_eps)
    outputs[config.num_layers - 1] = hidden
    if fused:
        outputs = {i: x[:, :count].reshape(*tokens.shape, -1) for i, x in outputs.items()}
    tapped = [outputs[i] for i in taps]
    return ForwardOutput(
        hidden=outputs[config.num_layers - 1],
        taps=jnp.concatenate(tapped, axis=-1) if tapped else hidden[:, :count, :0],
        rows=LayerRows(KVRows(*map(tuple, zip(*kv, strict=True))), tuple(delta)),
    )


def forward_chain(
    params: TargetParams,
    config: TargetConfig,
    tokens: Int[Array, "B T"],
    states: LayerStates,
    lengths: Int[Array, " B"],
    **options,
) -> ForwardOutput:
    """`forward` over tokens that follow one another, such as those of a prompt."""
    depths, bits = chain_nodes(*tokens.shape)
    return forward(params, config, tokens, depths, bits, states, lengths, **options)


def _by_value(params: TargetParams) -> bool:
    """Whether a layer has matrices that are not in 8 bits."""
    return not all(
        is_scaled(layer.mlp.down) and is_scaled(getattr(layer.attention, "qkv", None))
        for layer in params.layers
    )


# Traced once for all layers that are alike, and part of the program around it: the same program
# as without, in a fraction of the time before it is compiled.
_traced_once = functools.partial(jax.jit, inline=True)
STATIC = dict(static=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Nodes:
    """The nodes of a forward, and where they are in its activations.

    Attributes:
      shape: (B, N).
      rows: activations are [1, rows, ...], nodes side by side; None: as `tokens` are.
    """

    shape: tuple[int, int] = dataclasses.field(metadata=STATIC)
    rows: int | None = dataclasses.field(metadata=STATIC)
    lengths: jax.Array
    depths: jax.Array
    ancestors: jax.Array
    packing: Packing | None
    implementation: str | None = dataclasses.field(metadata=STATIC)

    @property
    def results(self) -> jnp.dtype:
        """Dtype of all products except the LM head's and those added to the residual stream.

        Of many rows float32 results would be most of what a step moves beside its weights.
        """
        many = self.rows is not None and self.rows > FEW_ROWS
        return jnp.dtype(jnp.bfloat16 if many else jnp.float32)

    def rectangle(self, x: jax.Array) -> jax.Array:
        """Activations as a rectangle [B, N, ...]."""
        if self.packing is not None:
            return self.packing.spread(x)
        if self.rows is None:
            return x
        batch, n = self.shape
        return x[:, : batch * n].reshape(batch, n, *x.shape[2:])

    def activations(self, x: jax.Array) -> jax.Array:
        """The activations of a rectangle [B, N, ...]; zeros where there is no node."""
        if self.packing is not None:
            x = self.packing.gather(x)
        if self.rows is None:
            return x
        x = x.reshape(1, -1, *x.shape[2:])
        return jnp.pad(x, [(0, 0), (0, self.rows - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


@functools.partial(_traced_once, static_argnames=("config", "window"))
def _attend(
    params: AttentionParams,
    config: TargetConfig,
    x: jax.Array,
    nodes: _Nodes,
    angles: Angles,
    cache: tuple[jax.Array, jax.Array],
    window: int | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What attention adds to x, and the nodes' keys and values."""
    dtype, kept = cache[0].dtype, []

    def attend(q, k, v):
        # Rounded here and kept: XLA would rather keep every layer's whole projection until the
        # rows are committed, and take them from it then.
        k, v = jax.lax.optimization_barrier((k.astype(dtype), v.astype(dtype)))
        q, k, v = (nodes.rectangle(x) for x in (q, k, v))
        kept.extend((k, v))
        attended = tree_attention(
            q,
            *cache,
            nodes.lengths,
            k,
            v,
            nodes.ancestors,
            scale=config.head_dim**-0.5,
            depths=nodes.depths,
            window=window,
            ordered=True,
            implementation=nodes.implementation,
            rows=None if nodes.packing is not None else nodes.rows,
        )
        return attended if nodes.packing is None else nodes.activations(attended)

    dtype_of_heads = dtype if nodes.rows is not None else None
    out = attention(params, config, x, angles, attend, dtype_of_heads, nodes.results)
    return out, tuple(kept)


def _delta_layer(
    params: DeltaNetParams,
    config: TargetConfig,
    x: jax.Array,
    nodes: _Nodes,
    state: DeltaState,
    kin: Kinship,
) -> tuple[jax.Array, DeltaRows]:
    """What a gated delta net adds to x, and the nodes' rows."""
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    inputs = project("bnm,mjw->bnjw", normed, params.inputs, nodes.results)
    if nodes.packing is not None:
        inputs = nodes.packing.spread(inputs)
    inputs = inputs.reshape(-1, *inputs.shape[2:])
    out, rows = delta_net(params, config, inputs, state, kin, kernels=nodes.rows is not None)
    out = nodes.activations(out).reshape(*x.shape[:2], -1)
    return project_out(out, params.output), rows


def fuses(params: TargetParams, config: TargetConfig, implementation: str | None) -> bool:
    """Whether a forward runs the kernels for NVIDIA GPUs around its products.

    It does with bfloat16 weights on one device and heads whose size is a power of two. With
    float32, for exactness, XLA computes everything but attention.
    """
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    narrow = params.embed.dtype == jnp.bfloat16
    tiles = config.head_dim & (config.head_dim - 1) == 0
    return implementation == "triton" and narrow and tiles and on_one_device()


def unembed(params: TargetParams, hidden: Float[Array, "*S M"]) -> Float[Array, "*S V"]:
    """Float32 logits of hidden states after the final norm."""
    return project("...m,vm->...v", hidden, params.unembed)


def check_taps(taps: tuple[int, ...], config: TargetConfig) -> None:
    """Raises ValueError when a tap is not a layer of the target."""
    bad = [tap for tap in taps if not -1 <= tap < config.num_layers]
    if bad:
        raise ValueError(
            f"taps {bad} are out of range: the target has layers 0 … {config.num_layers - 1} "
            "(-1 is the embedding); was the drafter trained for another target?"
        )


@functools.partial(_traced_once, static_argnames=("config", "count", "results"))
def _add_mlp(
    params: MlpParams | MoeParams, config: TargetConfig, x: jax.Array, count: int, results
) -> jax.Array:
    return x + mlp(params, config, x, count, results)


def mlp(
    params: MlpParams | MoeParams,
    config: TargetConfig,
    x: Float[Array, "B N M"],
    count: int | None = None,
    results=jnp.float32,
) -> Float[Array, "B N M"]:
    """The output of an MLP or a mixture of experts, which is added to x.

    Args:
      count: number of leading rows that are not padding; all by default.
      results: dtype that gates and ups of a dense MLP are rounded to.
    """
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    if isinstance(params, MoeParams):
        flat = normed.reshape(-1, config.hidden_size)
        out = mixture_of_experts(params, config, flat[:count])  # padding would read experts
        return jnp.pad(out, ((0, len(flat) - len(out)), (0, 0))).reshape(x.shape)
    hidden = project_swiglu(normed, params.gate_up, results)
    return project("bnf,fm->bnm", hidden, params.down)
