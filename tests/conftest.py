"""Fixtures and skips shared by all tests."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

CUDA = "jax_plugins.xla_cuda13"

# Processes that tests start compile the Python that they import once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Tests run small programs once, and compiling them costs most of the time: three times less
# without optimisation, a fifth less again as a single LLVM module, and a third less without the
# newer emitters, where XLA has others.
LEVEL = "--xla_backend_optimization_level"
if LEVEL not in os.environ.get("XLA_FLAGS", ""):
    whole = "--xla_cpu_parallel_codegen_split_count=1"
    flags = [os.environ.get("XLA_FLAGS", ""), f"{LEVEL}=0", whole]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of a package above it
        return True


# What was compiled is kept, except for GPUs, where tests read what compilers say; `make clean`
# removes it. The next run takes a third of the time. JAX packs it with `zstandard` if that is
# installed, much faster than otherwise.
if _missing(CUDA):
    CACHE = Path(__file__).parents[1] / ".pytest_cache/xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import shapes  # noqa: E402

shapes.install()  # before the first import of what it checks

from jaxspec import checkpoints  # noqa: E402
from jaxspec.models.target import Target  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
OWN_GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """Skips what this machine cannot run; `real` skips in the fixture that loads the model."""
    reasons = {}
    if _missing("torch"):
        reasons["parity"] = "torch is not installed (extra 'parity')"
    if _missing(CUDA):
        reasons["h100"] = "the CUDA compiler is not installed (`make h100`)"
    if jax.default_backend() != "gpu":
        reasons["gpu"] = "there is no GPU"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Runs Python's collector less often, and not over what was imported: tracing makes many
    objects that stay, and each collection would walk all of them."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs before a process holds so many that the kernel refuses memory
    maps (65,530 of them by default), where XLA dies by a segmentation fault."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
    yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden cases and prompts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> (folder, trace.json) of a golden case.

    A case per family is in the repository; those beside it are more of them.
    """

    def case(name: str) -> tuple[Path, dict]:
        folder = OWN_GOLDEN / name
        folder = folder if folder.is_dir() else SHARED / "golden" / name
        if not folder.is_dir():
            pytest.skip(f"the golden case {name} is not there: {folder}")
        return folder, json.loads((folder / "trace.json").read_text())

    return case


@pytest.fixture(scope="session")
def unavailable():
    """Skips for a reason; where $JAXSPEC_MUST_FETCH is set, as in CI, fails for it."""
    return pytest.fail if os.environ.get("JAXSPEC_MUST_FETCH") else pytest.skip


@pytest.fixture(scope="session")
def smollm2_path(unavailable) -> Path:
    """The GGUF file of the real small target."""
    try:
        return checkpoints.target_path("smollm2-135m")
    except ValueError as error:
        unavailable(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Target:
    """The real small target in float32, loaded once."""
    return checkpoints.load(smollm2_path)
