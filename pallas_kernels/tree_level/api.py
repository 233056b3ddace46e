"""Growing one level of a tree: dispatch to XLA or Triton."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.tree_level.reference import Levels, grow_level_reference
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
    """See `grow_level_reference` for shapes and meaning, `dispatch` for implementations.

    Args:
      latent: any float type; rounded to that of `output`.
    """
    arrays = (levels, slot, base, latent.astype(output.dtype), output)

    def load():
        from pallas_kernels.tree_level import triton

        return triton.grow_level_triton, triton.unsupported(levels, latent, output)

    return dispatch(grow_level_reference, load, arrays, implementation, xla=grow_level_xla)
