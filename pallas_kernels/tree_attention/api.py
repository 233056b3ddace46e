"""The one call behind which implementations of tree attention live."""

from __future__ import annotations

import jax

from pallas_kernels.tree_attention.reference import tree_attention_reference


def tree_attention(
    q,
    k_cache,
    v_cache,
    lengths,
    k_new,
    v_new,
    ancestors,
    *,
    scale: float,
    depths=None,
    window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """See `tree_attention_reference` for shapes and meaning.

    Args:
      implementation: "xla" (the reference, any platform); None chooses it.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation is {implementation!r}; expected 'xla' or None")
    return tree_attention_reference(
        q,
        k_cache,
        v_cache,
        lengths,
        k_new,
        v_new,
        ancestors,
        scale=scale,
        depths=depths,
        window=window,
    )
