"""The dtype in which this machine verifies trees fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxspec.checkpoints import catalog
from jaxspec.whole_files import replace_text

DTYPES = ("float32", "bfloat16")
ROWS, WIDTH, HEIGHT = 8, 8192, 8192  # 8 nodes times a weight larger than any CPU cache
REPEATS = 10
WORTH = 1.1  # least speedup over float32 that outweighs its exactness


@dataclasses.dataclass(frozen=True)
class Fastest:
    """A dtype, and why it was chosen."""

    dtype: str
    reason: str


def fastest() -> Fastest:
    """bfloat16 on accelerators, and on CPUs where a measurement says so; else float32.

    The measurement takes about a second and is kept in the cache. Several processes on CPUs
    take float32 without measuring, as they must agree.
    """
    if jax.default_backend() != "cpu":
        return Fastest("bfloat16", f"fastest on a {jax.devices()[0].device_kind}")
    if jax.process_count() > 1:
        return Fastest("float32", "the rule for several processes on CPUs")
    seconds = kept_seconds()
    gain = seconds["float32"] / seconds["bfloat16"]
    if gain > WORTH:
        return Fastest("bfloat16", f"{gain:.1f}x as fast as float32 on this CPU")
    return Fastest("float32", f"{1 / gain:.1f}x as fast as bfloat16 on this CPU")


def kept_seconds() -> dict[str, float]:
    """`product_seconds`, read from the cache if this CPU was measured before."""
    kept, cpu = kept_json("speeds"), cpu_id()
    own = kept.get(cpu)
    if isinstance(own, dict) and all(_is_time(own.get(dtype)) for dtype in DTYPES):
        return own
    found = product_seconds()
    keep_json("speeds", kept | {cpu: found})
    return found


def _is_time(value) -> bool:
    return isinstance(value, float) and value > 0


def product_seconds() -> dict[str, float]:
    """Seconds of a few rows times a weight, by dtype: the minimum of interleaved repeats."""
    arrays = {
        dtype: (jnp.ones((ROWS, HEIGHT), dtype), jnp.ones((HEIGHT, WIDTH), dtype))
        for dtype in DTYPES
    }
    times: dict[str, list[float]] = {dtype: [] for dtype in arrays}
    for _ in range(REPEATS + 1):
        for dtype, (x, weight) in arrays.items():
            began = time.perf_counter()
            _product(x, weight).block_until_ready()
            times[dtype].append(time.perf_counter() - began)
    return {dtype: min(found[1:]) for dtype, found in times.items()}  # the first compiles


@jax.jit
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("rh,hw->rw", x, weight, preferred_element_type=jnp.float32)


def cpu_id() -> str:
    """Identifies this CPU and its JAX among others that share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    except OSError:
        kind = [platform.machine(), platform.processor()]
    words = [*kind, str(os.cpu_count()), jax.__version__]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def kept_json(name: str) -> dict:
    """Reads a JSON file of the cache; {} if it is missing or not an object."""
    try:
        found = json.loads((catalog.cache_dir() / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_json(name: str, value: dict) -> None:
    """Writes a JSON file of the cache atomically; does nothing without a cache folder."""
    with contextlib.suppress(OSError):
        path = catalog.cache_dir() / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(value, indent=1) + "\n")
