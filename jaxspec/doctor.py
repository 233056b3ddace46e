"""Findings about this machine, with advice: one per subject."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from packaging.requirements import Requirement

from jaxspec.checkpoints import catalog
from jaxspec.dtypes import HEIGHT, ROWS, WIDTH, fastest, product_seconds
from jaxspec.loading import compilation_cache
from jaxspec.settings import own_settings

DISTRIBUTION = "jaxspec"
EXTRAS = ("serve", "plots", "tensorboard", "wandb", "datasets", "data", "cuda")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fact about the machine.

    Attributes:
      found: what was found.
      advice: what to do; "" if nothing.
      fault: whether this keeps jaxspec from working.
    """

    subject: str
    found: str
    advice: str = ""
    fault: bool = False


@own_settings()
def examine() -> Iterator[Finding]:
    """Yields all findings; measuring speeds takes about a second."""
    for look in (versions, devices, memory, speeds, compiled_programs, default_target, hub):
        yield _looked(look)
    yield from extras()


def _looked(look: Callable[[], Finding]) -> Finding:
    """The result of one examination; an exception becomes a finding."""
    try:
        return look()
    except Exception as error:  # a broken installation breaks anywhere
        subject = look.__name__.replace("_", " ")
        return Finding(subject, f"{type(error).__name__}: {error}", "see the error", True)


def versions() -> Finding:
    """Versions of Python and the required packages, against the requirements."""
    found = f"Python {platform.python_version()}, jax {jax.__version__}"
    wrong = [line for line in map(_lacking, _requirements("")) if line]
    if not wrong:
        return Finding("versions", found)
    found += f"; not as needed: {', '.join(map(str, wrong))}"
    return Finding("versions", found, _pip_install(wrong), True)


def devices() -> Finding:
    """The devices that JAX uses."""
    kinds = [device.device_kind for device in jax.devices()]
    backend = jax.default_backend()
    found = f"{len(kinds)} x {kinds[0]}, {os.cpu_count()} cores of {platform.machine()}"
    if backend == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        return Finding(
            "devices",
            f"{found}; JAX does not see the machine's NVIDIA GPU",
            "pip install 'jax[cuda13]', and leave JAX_PLATFORMS unset",
        )
    return Finding("devices", found)


def memory() -> Finding:
    """The device's memory, and the largest target that fits."""
    stats = jax.devices()[0].memory_stats() or {}
    size = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = size / 2 / 1.25 / 1e9  # bfloat16, a fifth kept for caches and temporaries
    return Finding(
        "memory",
        f"{size / 1e9:.0f} GB, room for about {largest:.0f} B parameters in bfloat16",
        "jaxspec plan says what a setup needs" if largest > 4 else "",
    )


def speeds() -> Finding:
    """Speed of verifying a tree in float32 and in bfloat16: a few rows times a weight."""
    seconds = product_seconds()
    size = 4 * WIDTH * HEIGHT
    found = ", ".join(
        f"{dtype} {size * jnp.dtype(dtype).itemsize / 4 / s / 1e9:.1f} GB/s"
        for dtype, s in seconds.items()
    )
    chosen = fastest()
    return Finding(
        "speeds",
        f"{ROWS} rows times a weight: {found}",
        f"--dtype auto is {chosen.dtype} here, {chosen.reason}; float32 equals plain decoding",
    )


def compiled_programs() -> Finding:
    """The cache of compiled programs."""
    try:
        folder = compilation_cache()
    except OSError as error:
        advice = "set JAXSPEC_CACHE to a writable folder; without one every start compiles"
        return Finding("compiled programs", str(error), advice)
    files = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    found = f"{folder}: {len(files)} files, {sum(files) / 1e6:.0f} MB"
    advice = f"rm -r {folder} frees the space" if sum(files) > 5e9 else ""
    return Finding("compiled programs", found, advice)


def default_target() -> Finding:
    """The default target, which needs no hub."""
    found = catalog.here()
    if found is None:
        advice = "the first command downloads it (100 MB), or set JAXSPEC_OFFLINE"
        return Finding("default target", f"{catalog.DEFAULT} is not here yet", advice)
    return Finding("default target", f"{catalog.DEFAULT}: {found}")


def hub() -> Finding:
    """The folder of Hugging Face checkpoints, and whether the hub may be used."""
    from huggingface_hub import constants

    found = f"checkpoints of the hub are kept in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", found, "HF_HUB_OFFLINE is set: nothing is downloaded")
    return Finding("hub", found)


def extras() -> Iterator[Finding]:
    """Optional extras, and which of their packages are missing."""
    for name in EXTRAS:
        wrong = {r: lacking for r in _requirements(name) if (lacking := _lacking(r))}
        if wrong:
            found = ", ".join(lacking.name for lacking in wrong.values())
            advice = f"{_pip_install(wrong)} if you need it"
            yield Finding(f"extra {name}", f"not installed: {found}", advice)
        else:
            yield Finding(f"extra {name}", "installed")


def _requirements(extra: str, package: str = DISTRIBUTION) -> list[Requirement]:
    """Requirements of a package, or of one of its extras."""
    found = []
    for line in importlib.metadata.requires(package) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if extra == "":
            wanted = marker is None or marker.evaluate({"extra": ""})
        else:
            wanted = marker is not None and (
                marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
            )
        if wanted:
            requirement.marker = None  # it holds, and pip knows nothing of the extra
            found.append(requirement)
    return found


def _pip_install(requirements: Iterable[Requirement]) -> str:
    return f"pip install {' '.join(repr(str(r)) for r in requirements)}"


def _lacking(requirement: Requirement) -> Requirement | None:
    """The requirement if it is not met, else None."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return requirement
    if not requirement.specifier.contains(version, prereleases=True):
        return requirement
    inner = (r for e in requirement.extras for r in _requirements(e, requirement.name))
    return next((lacking for lacking in map(_lacking, inner) if lacking), None)
