"""The gated delta rule over a tree: the reference, with a kernel."""

from pallas_kernels.dispatch import with_kernel
from pallas_kernels.tree_delta_rule.reference import tree_delta_rule_reference


def _kernel():
    from pallas_kernels.tree_delta_rule.triton import tree_delta_rule_triton, unsupported

    return tree_delta_rule_triton, unsupported


tree_delta_rule = with_kernel(tree_delta_rule_reference, _kernel)
