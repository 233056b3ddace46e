"""The gated delta rule over a tree: the kernel or its reference."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, UInt32

from pallas_kernels.dispatch import dispatch
from pallas_kernels.tree_delta_rule.reference import tree_delta_rule_reference


def tree_delta_rule(
    q: Float[Array, "B N J dk"],
    k: Float[Array, "B N J dk"],
    v: Float[Array, "B N J R dv"],
    decay: Float[Array, "B N J R"],
    rate: Float[Array, "B N J R"],
    memory: Float[Array, "B J dk Rdv"],
    ancestors: UInt32[Array, "B N words"],
    begun: Bool[Array, " B"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N J R dv"], Float[Array, "B N J R dv"]]:
    """See `tree_delta_rule_reference` for shapes and meaning, and `dispatch`."""
    arrays = (q, k, v, decay, rate, memory, ancestors, begun)

    def load():
        from pallas_kernels.tree_delta_rule import triton

        return triton.tree_delta_rule_triton, triton.unsupported(k, v)

    return dispatch(tree_delta_rule_reference, load, arrays, implementation)
