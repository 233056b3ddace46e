"""Growing one level of a tree: dispatch to XLA or Triton."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import check_implementation, check_support
from pallas_kernels.tree_level.reference import Levels
from pallas_kernels.tree_level.xla import grow_level_xla


def grow_level(
    levels: Levels,
    slot: Int[Array, ""] | int,
    base: Float[Array, "B P V"],
    latent: Float[Array, "B M R"],
    output: Float[Array, "V R"],
    *,
    implementation: str | None = None,
) -> Levels:
    """See `grow_level_reference` for shapes and meaning.

    Args:
      latent: any float type; rounded to that of `output`.
      implementation: "xla" (any platform), "triton" (NVIDIA GPUs), or None: triton where the
        program is compiled for an NVIDIA GPU and the shape is supported, else xla.

    Raises:
      ValueError: "triton" was asked for and does not take this shape.
    """
    check_implementation(implementation)
    arrays = (levels, slot, base, latent.astype(output.dtype), output)
    if implementation == "xla":
        return grow_level_xla(*arrays)
    # Pallas takes a fifth of a second to import: only where it is used.
    from pallas_kernels.tree_level.triton import grow_level_triton, unsupported

    reason = unsupported(levels, arrays[3], output)
    if implementation == "triton":
        check_support(reason)
        return grow_level_triton(*arrays)
    if reason:
        return grow_level_xla(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=grow_level_triton, default=grow_level_xla)
