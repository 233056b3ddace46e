"""Memory that is free in the process, and not yet the system's again."""

from __future__ import annotations

import ctypes


def trim_memory() -> None:
    """Gives back what compilers and loaders have freed, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
