"""Checks the shapes and types that functions declare, in tests; in use nobody does."""

import beartype
import jaxtyping

PACKAGES = ("jaxspec.trees", "jaxspec.models", "jaxspec.drafters", "jaxspec.decoding",
            "pallas_kernels")  # fmt: skip


def check(function):
    """beartype, for functions whose annotations have shapes: `Int[Array, "B N"]`."""
    shaped = any('Array, "' in str(kind) or "Array, '" in str(kind)
                 for kind in function.__annotations__.values())  # fmt: skip
    return beartype.beartype(function) if shaped else function


def install() -> None:
    jaxtyping.install_import_hook(PACKAGES, f"{__name__}.check")
