"""The tensors of draft heads, and their places in the weights."""

from __future__ import annotations

import numpy as np

from jaxspec.checkpoints import dflash2
from jaxspec.checkpoints.drafter_files import Table
from jaxspec.checkpoints.fuse import Part, linear, same, swiglu
from jaxspec.config import DrafterConfig
from jaxspec.drafters.eagle_head import EagleConfig, ParallelEagleConfig


def block_parts(c: DrafterConfig) -> Table:
    """The tensors of every weight of a block drafter's head, by path."""
    width = c.hidden_size
    table = {
        ("fc",): linear("fc.weight", width, len(c.taps) * width),
        ("hidden_norm",): same("hidden_norm.weight", width),
        ("norm",): same("norm.weight", width),
    }
    for i in range(c.num_layers):
        layer = f"layers.{i}."
        weights = _layer_parts(c, layer, inputs=width, qk_norm=True)
        table |= {("layers", i, name): parts for name, parts in weights.items()}
        convolutions = dflash2.convolutions(c, layer)
        table |= {("layers", i, *path): parts for path, parts in convolutions.items()}
    table |= {("sequential", name): parts for name, parts in _sequential_parts(c).items()}
    if c.confidence:
        inputs = width + (c.rank if c.confidence == "hidden_and_previous" else 0)
        kernel = Part("confidence_head.proj.weight", (1, inputs), np.s_[...], (0,))
        table["confidence", "kernel"] = (kernel,)
        table["confidence", "bias"] = same("confidence_head.proj.bias", 1)
    return table


def eagle_parts(c: EagleConfig) -> Table:
    """The tensors of every weight of an EAGLE-3 or P-EAGLE head, by path."""
    width, each, tapped = c.hidden_size, c.target_hidden_size, len(c.taps)
    table = {
        ("fc",): linear("fc.weight", width, tapped * each),
        ("norm",): same("norm.weight", width),
    }
    if c.tap_norm == "joined":
        table["tap_norm",] = same("input_norm.weight", tapped * each)
    elif c.tap_norm == "each":
        table["tap_norm",] = tuple(
            Part(f"fc_norm.{i}.weight", (each,), np.s_[i * each : (i + 1) * each], (0,))
            for i in range(tapped)
        )
    if isinstance(c, ParallelEagleConfig):
        table["mask_hidden",] = (Part("mask_hidden", (1, 1, tapped * each), np.s_[...], (0,)),)
    for i in range(c.num_layers):
        layer, inputs = f"layers.{i}.", width if i else 2 * width
        weights = _layer_parts(c, layer, inputs=inputs, qk_norm=c.qk_norm)
        if i == 0:
            weights["hidden_norm"] = same(f"{layer}hidden_norm.weight", width)
        table |= {("layers", i, name): parts for name, parts in weights.items()}
    return table


def _layer_parts(
    c: DrafterConfig | EagleConfig, layer: str, *, inputs: int, qk_norm: bool
) -> dict[str, tuple[Part, ...]]:
    """The weights of a layer whose tensors' names begin with `layer`.

    Args:
      inputs: width of its attention's input.
    """
    width, dim = c.hidden_size, c.head_dim
    queries, keys = c.num_heads * dim, c.num_kv_heads * dim
    a = f"{layer}self_attn."
    weights = {
        "norm": same(f"{layer}input_layernorm.weight", width),
        # [inputs, K, G, D]
        "q": (Part(f"{a}q_proj.weight", (queries, inputs), np.s_[...], (1, 2, 3, 0)),),
        "kv": (  # [inputs, K, 2, D]
            Part(f"{a}k_proj.weight", (keys, inputs), np.s_[:, :, 0], (1, 2, 0)),
            Part(f"{a}v_proj.weight", (keys, inputs), np.s_[:, :, 1], (1, 2, 0)),
        ),
        # [K, G, D, M]
        "out": (Part(f"{a}o_proj.weight", (width, queries), np.s_[...], (3, 0, 1, 2)),),
        "mlp_norm": same(f"{layer}post_attention_layernorm.weight", width),
        **swiglu(f"{layer}mlp.", width, c.intermediate_size),
    }
    if qk_norm:
        weights["q_norm"] = same(f"{a}q_norm.weight", dim)
        weights["k_norm"] = same(f"{a}k_norm.weight", dim)
    return weights


def _sequential_parts(c: DrafterConfig) -> dict[str, tuple[Part, ...]]:
    """The weights of the sequential head; none without one."""
    width = c.hidden_size
    if c.sequential is None:
        return {}
    if c.sequential == "bilinear":
        return dflash2.selector(c)
    if c.sequential == "mlp":
        up_gate = (2 * c.intermediate_size, 2 * width)
        return {
            "norm": same("ar_approximation.norm.weight", width),
            # [2 M, 2, F] and [2, F]
            "up_gate": (Part("ar_approximation.ug.weight", up_gate, np.s_[...], (1, 2, 0)),),
            "bias": (Part("ar_approximation.ug.bias", up_gate[:1], np.s_[...], (0, 1)),),
            "down": linear("ar_approximation.d.weight", width, c.intermediate_size),
        }
    weights = {
        "previous": same("markov_head.markov_w1.weight", c.vocab_size, c.rank),
        "output": same("markov_head.markov_w2.weight", c.vocab_size, c.rank),
    }
    if c.sequential == "gated":
        weights["gate"] = linear("markov_head.gate_proj.weight", c.rank, width + c.rank)
        weights["bias"] = same("markov_head.gate_proj.bias", c.rank)
    if c.sequential == "rnn":
        joint = (3 * c.rank, 2 * c.rank + width)
        weights["joint"] = linear("markov_head.joint_proj.weight", *joint)
        weights["bias"] = same("markov_head.joint_proj.bias", 3 * c.rank)
    return weights
