"""A folder of compiled programs, which the next process runs without tracing or compiling.

A program's key is a hash of all it depends on: this package's sources, JAX and its settings,
the machine, the static arguments, and the shapes of the others. A file holds native code as
XLA's client serialises it, like JAX's own compilation cache, so only the user may be able to
write the folder. Nothing is unpickled: the caller gives the pytrees of arguments and results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import stat
import tempfile
import warnings
import zlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

PACKAGES = ("jaxspec", "pallas_kernels")
MOST = 256 * 2**20  # bytes in the folder; the least recently used programs are deleted
# A debugging option without effect, which makes JAX's own cache miss: XLA's client can only
# serialise a program that it has compiled itself and not yet run.
UNIQUE = "xla_debug_buffer_assignment_show_max"
KEY_IMPL = "threefry2x32"  # of all random keys (`jaxspec.settings`)


class Program:
    """A compiled program on one device, called with pytrees.

    Arguments, results and donations are those of the jitted function.
    """

    def __init__(self, executable: Any, used: Sequence[int], like: Any):
        """Args:
        executable: XLA's executable.
        used: indices of the argument leaves that it takes.
        like: a pytree like its result, or its shapes.
        """
        self.executable, self.used = executable, tuple(used)
        self._device = executable.local_devices()[0]
        leaves, self._tree = jax.tree.flatten(like)
        self._keys = [i for i, leaf in enumerate(leaves) if _is_key(leaf)]
        self._array = type(jax.device_put(0, self._device))

    def __call__(self, arrays: Any) -> Any:
        leaves = jax.tree.leaves(arrays)
        given = [leaves[i] for i in self.used]
        other = [i for i, x in enumerate(given) if type(x) is not self._array]
        bare = [jax.random.key_data(x) if _is_key(x) else x for x in (given[i] for i in other)]
        for i, x in zip(other, jax.device_put(bare, self._device), strict=True):
            given[i] = x
        found = self.executable.execute_sharded(given)
        found = [x for (x,) in found.disassemble_into_single_device_arrays()]
        for i in self._keys:
            found[i] = jax.random.wrap_key_data(found[i], impl=KEY_IMPL)
        return self._tree.unflatten(found)


class KeptPrograms:
    """The programs of one engine, loaded from a folder or compiled.

    Attributes:
      loaded, compiled: number of programs found in the folder, and compiled here.
    """

    def __init__(self, folder: Path | None = None, machine: str = ""):
        """Args:
        folder: created if missing; not used if others can write it. None keeps nothing.
        machine: what native code depends on besides the kind of device.
        """
        self._folder = None if folder is None else _own_folder(folder)
        self._machine = machine
        self._programs: dict[Hashable, Callable] = {}
        self._names: list[str] = []  # of files that were looked for
        self._expected: dict[str, Future] = {}
        self.loaded = self.compiled = 0

    def call(
        self,
        function: Callable,
        which: Hashable,
        like: Any,
        static: tuple,
        arrays: tuple,
        **options,
    ) -> Any:
        """function(*static, *arrays, **options).

        Args:
          function: jitted.
          which: distinguishes calls of one function with different static arguments or shapes.
          like: a pytree like the result, or its shapes.
          options: further static arguments.
        """
        if self._folder is None:
            return function(*static, *arrays, **options)
        name = function.__name__, which
        program = self._programs.get(name)
        if program is None:
            program = self._find(function, like, static, arrays, options)
            self._programs[name] = program
        return program(arrays)

    def expect(self, start: str) -> None:
        """Loads, in the background, the programs that this start needed the last time.

        They are used only when `call` asks for the same keys.
        """
        if self._folder is None:
            return
        thread = ThreadPoolExecutor(1)
        for path in _listed(self._folder / _start_file(start)):
            self._expected[path.name] = thread.submit(_load, path)
        thread.shutdown(wait=False)

    def remember(self, start: str) -> None:
        """Records what this start needed, for `expect`; drops programs expected in vain."""
        for future in self._expected.values():
            future.cancel()
        self._expected.clear()
        if self._folder is not None:
            with contextlib.suppress(OSError):  # the next start then expects nothing
                names = json.dumps(self._names).encode()
                _replace(self._folder / _start_file(start), names)

    def bind(self, weights: Any) -> Any:
        """Commits weights to the device they are on, as kept programs need.

        Weights on a mesh, and all weights if nothing is kept, stay as they are.
        """
        leaves = jax.tree.leaves(weights)
        place = leaves[0].sharding
        if self._folder is None or not isinstance(place, SingleDeviceSharding):
            return weights
        return jax.device_put(weights, place)

    def _find(self, function, like, static, arrays, options) -> Callable:
        """The program, loaded or compiled; the function itself if it cannot be kept."""
        leaves = jax.tree.leaves(arrays)
        if not _bound(leaves) or not _of_this_package(static):
            return lambda arrays: function(*static, *arrays, **options)
        facts = {
            "function": f"{function.__module__}.{function.__qualname__}",
            "static": repr((static, sorted(options.items()))),
            "tree": str(jax.tree.structure(arrays)),
            "arrays": [f"{x.dtype}{list(x.shape)}" for x in leaves],
            "result": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(like)],
            "machine": self._machine,
        }
        text = json.dumps(facts | _surroundings(), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        self._names.append(name)
        expected = self._expected.pop(name, None)
        if expected is None or expected.cancel():
            found = _load(self._folder / name)
        else:
            found = expected.result()
        if found is not None:
            self.loaded += 1
            return Program(*found, like)
        lowered = function.lower(*static, *arrays, **options)
        compiled = lowered.compile(compiler_options={UNIQUE: secrets.randbelow(2**31)})
        self.compiled += 1
        program = _program(compiled, like)
        if program is None:
            return lambda arrays: compiled(*arrays)
        try:
            _write(self._folder, name, program)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            warnings.warn(f"a compiled program is not kept: {error}", stacklevel=2)
        return program


def _program(compiled: jax.stages.Compiled, like: Any) -> Program | None:
    """A kept program; None if calling it would differ from calling the jitted function."""
    executable = compiled.runtime_executable()
    given = compiled.in_tree.flatten_up_to(compiled.input_shardings)
    used = [i for i, sharding in enumerate(given) if sharding is not None]
    same = compiled.out_tree == jax.tree.structure(like) and all(
        (a.dtype, getattr(a, "weak_type", False)) == (b.dtype, False)
        for a, b in zip(jax.tree.leaves(compiled.out_info), jax.tree.leaves(like), strict=True)
    )
    constants = len(executable.get_parameter_layouts()) != len(used)
    return Program(executable, used, like) if same and not constants else None


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _bound(leaves: Sequence[Any]) -> bool:
    """Whether the arrays are committed to the first device of the only process."""
    if jax.process_count() > 1:
        return False
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    here = all(x.devices() == {jax.devices()[0]} for x in arrays)
    single = all(isinstance(x.sharding, SingleDeviceSharding) for x in arrays)
    return here and single and any(x.committed for x in arrays)


def _of_this_package(static: Any) -> bool:
    """Whether all its code is in the hashed sources; a user's own drafter is not."""
    if isinstance(static, (tuple, list)):
        return all(map(_of_this_package, static))
    if not dataclasses.is_dataclass(static):
        return not callable(static)
    fields = [getattr(static, field.name) for field in dataclasses.fields(static)]
    return type(static).__module__.split(".")[0] in PACKAGES and _of_this_package(fields)


@functools.cache
def _surroundings() -> dict[str, Any]:
    """The properties of this process that every program depends on."""
    device = jax.devices()[0]
    settings = {k: repr(v) for k, v in jax.config.values.items() if "cache" not in k}
    return {
        "sources": _sources(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "device": [device.platform, device.device_kind, device.client.platform_version],
        "settings": settings,
        "flags": {
            k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
        },
    }


def _sources() -> str:
    """A hash of all source code of the packages."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (root / name).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _own_folder(folder: Path) -> Path | None:
    """The folder, if only this user can write it; else None, with a warning."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        why = str(error)
    else:
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.getuid() and not others:
            return folder
        why = f"{folder} holds native code and is writable by others; chmod go-w it, or own it"
    warnings.warn(f"compiled programs are not kept: {why}", stacklevel=3)
    return None


def _start_file(start: str) -> str:
    return f"start-{hashlib.sha256(start.encode()).hexdigest()[:16]}"


def _listed(path: Path) -> list[Path]:
    """The files that a list names, in its folder, as far as they exist; the largest first."""
    try:
        names = set(json.loads(path.read_bytes()))
        found = [other for other in path.parent.iterdir() if other.name in names]
        return sorted(found, key=lambda other: other.stat().st_size, reverse=True)
    except (OSError, ValueError, TypeError):
        return []


def _load(path: Path) -> tuple[Any, Sequence[int]] | None:
    """An executable, and the indices of the argument leaves that it takes.

    None if the file cannot be read or, with a warning, is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError:  # missing, or another user's
        return None
    try:
        checksum, body = data.split(b"\n", 1)
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            raise ValueError("its checksum differs")
        used, code = body.split(b"\n", 1)
        device = jax.devices()[0]
        executable = device.client.deserialize_executable(zlib.decompress(code), [device])
        found = executable, json.loads(used)
    except Exception as error:  # XLA's client may raise anything
        warnings.warn(f"{path} is not a program ({error}); it is compiled again", stacklevel=2)
        return None
    with contextlib.suppress(OSError):  # a folder may be read-only
        path.touch()
    return found


def _write(folder: Path, name: str, program: Program) -> None:
    """Writes a program atomically; then deletes the least recently used files beyond MOST."""
    code = zlib.compress(program.executable.serialize(), 1)
    body = json.dumps(program.used).encode() + b"\n" + code
    _replace(folder / name, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    files = [(path.stat(), path) for path in folder.iterdir()]
    size = 0
    for found, path in sorted(files, key=lambda file: file[0].st_mtime, reverse=True):
        size += found.st_size
        if size > MOST:
            path.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file atomically; a failure leaves nothing behind."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        try:
            stream.write(data)
            stream.flush()
            os.replace(stream.name, path)
        except OSError:
            os.unlink(stream.name)
            raise
