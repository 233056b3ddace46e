"""Returning freed memory to the operating system."""

from __future__ import annotations

import ctypes


def trim_memory() -> None:
    """Returns memory that compilers and loaders have freed to the system (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
