"""Targets and drafters by name, and where compiled programs are kept."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np

from jaxspec import checkpoints
from jaxspec.arguments import integer
from jaxspec.checkpoints import Weights, catalog, drafters, mtp, speculators
from jaxspec.checkpoints.tensors import read_json
from jaxspec.config import TreeConfig
from jaxspec.drafters import registry
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import change_drafter
from jaxspec.drafters.small_model import SmallModel
from jaxspec.dtypes import fastest
from jaxspec.models.target import Target, check_target
from jaxspec.settings import own_settings
from jaxspec.sharding import mesh_of, place

NODES = 8  # nodes per tree, where none are given


@own_settings()
@mesh_of(None)  # not the caller's, which would place what is loaded
def load_target(
    name_or_path: str | Path = "smollm2-135m",
    *,
    dtype: str = "float32",
    devices: int = 1,
    weights: Weights = "dequantised",
) -> Target:
    """Loads a target model.

    Args:
      name_or_path: a name of `checkpoints.catalog`, a GGUF file, a Hugging Face folder, or a
        name on the hub.
      dtype: of weights and caches: "float32", "bfloat16", or "auto" for the faster one here
        (`dtypes.fastest`); products accumulate in float32.
      devices: number of devices of all processes to shard the weights over
        (`jaxspec.sharding`). The functions of `jaxspec` compute on them; programs of your own,
        `logits` and `hidden_states` do inside `sharding.mesh_of(target.params)`.
      weights: how to hold an fp8 checkpoint: "dequantised" to `dtype`, or "stored" in 8 bits
        with scales: half the memory and, on a GPU, half the bytes that a step reads.

    Raises:
      ValueError: the model cannot be found, is damaged, or is not implemented; or `weights` is
        "stored" and the checkpoint is not in fp8.
    """
    dtype = fastest().dtype if dtype == "auto" else dtype
    return checkpoints.load(name_or_path, dtype, devices, weights)


@own_settings()
@mesh_of(None)
def load_drafter(
    spec: str,
    target: Target,
    *,
    tree: TreeConfig | None = None,
    nodes: int | None = None,
    dtype: str | None = None,
    threshold: float = 0.0,
    survival: float = 0.0,
) -> LoadedDrafter:
    """Loads a drafter for a target.

    Args:
      spec: "none" (plain decoding), "ngram" (prompt lookup), "mtp" (the multi-token-prediction
        layer in the target's checkpoint), "mtp:NAME" (that layer in another folder or hub
        repository), "small:NAME" (a small model with the same vocabulary,
        loaded as a target), "python:MODULE:FUNCTION" (your own, `drafters.registry.Factory`, of
        the current folder or an installed package), "shipped" (the trained drafter for the
        default target), or the folder or hub name of a trained drafter ("repo::subfolder"
        too). "NAME+ngram" adds prompt lookup to any but the first two.
      tree: the kind and size of tree to draft. Without it the kind is chosen: a chain with
        `threshold` or `survival`, else path_conditioned for EAGLE-3, MTP and drafters with a
        sequential head, a chain for others.
      nodes: nodes of the tree, root included, instead of `tree`; 8 by default.
      dtype: of the drafter's weights; the target's by default.
      threshold: ends a chain before the first token whose acceptance probability, by the
        confidence head, is below this; 0 keeps all.
      survival: ends a chain where the product of those probabilities falls below this.

    Raises:
      ValueError: the drafter cannot be found or does not fit the target; or `threshold` or
        `survival` is given and it drafts no chains or has no confidence head.
    """
    check_target(target)
    if not isinstance(spec, str):
        raise ValueError(
            f"spec is {spec!r}; expected a text: the name or folder of a drafter, or 'none'"
        )
    if not isinstance(tree, TreeConfig | None):
        raise ValueError(
            f"tree is {tree!r}; expected a jaxspec.TreeConfig, which has a kind and a size"
        )
    if spec in registry.UNSCORED and tree is not None and tree.kind != "chain":
        raise ValueError(
            f"tree is of kind {tree.kind!r}, which grows from scores, and {spec!r} has none; "
            "give nodes instead"
        )
    rules = {"threshold": threshold, "survival": survival}
    for name, value in rules.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected a probability, 0 … 1")
    if tree is not None and nodes is not None:
        raise ValueError(f"nodes is {nodes}, but tree has a size too; give one of them")
    nodes = NODES if nodes is None else integer("nodes", nodes, low=1)
    dtype = str(target.params.embed.dtype) if dtype is None else dtype
    shape = tree or TreeConfig(size=nodes)
    loaded = registry.make(spec, target, tree=shape, dtype=dtype, trained=_trained)
    if any(rules.values()):
        return change_drafter(loaded, functools.partial(_end_chains, spec=spec, rules=rules))
    return change_drafter(loaded, _branching) if tree is None else loaded


def as_drafter(target: Target, drafter: LoadedDrafter | str) -> LoadedDrafter:
    """A loaded drafter as it is; a name loaded.

    Raises:
      ValueError: it is neither, or `load_drafter` raises it.
    """
    if isinstance(drafter, str):
        return load_drafter(drafter, target)
    if not isinstance(drafter, LoadedDrafter):
        raise ValueError(
            f"drafter is {drafter!r}; expected a name or the result of load_drafter. Wrap your "
            "own: LoadedDrafter(drafter, params)"
        )
    return drafter


def trained_folder(spec: str) -> Path | None:
    """The folder of a trained drafter; None for one of another kind.

    Args:
      spec: see `load_drafter`.

    Raises:
      ValueError: the drafter, or the model that it names, cannot be found.
    """
    alone = spec.removesuffix(registry.LOOKUP_TOO)
    name, colon, argument = alone.partition(":")
    if name + colon in ("small:", "mtp:"):
        checkpoints.target_path(argument)
    if {alone, name + colon} & registry.NAMES.keys():
        return None
    return drafters.drafter_folder(alone)


def named_target(spec: str) -> str | None:
    """The target that a trained drafter's files name; None if they name none.

    Args:
      spec: see `load_drafter`.

    Raises:
      ValueError: the drafter or its target cannot be found.
    """
    folder = trained_folder(spec)
    if folder is None:
        return None
    found = speculators.verifier(read_json(folder / "config.json"), folder)
    if found is None:
        return None
    try:
        checkpoints.target_path(found)
    except ValueError as error:
        raise ValueError(
            f"drafter {spec!r} names its target, {found!r}, which cannot be found ({error}); "
            "say where it is with --target"
        ) from error
    return found


def _branching(loaded: LoadedDrafter) -> LoadedDrafter:
    """Replaces the chain by the kind of tree that suits the drafter best."""
    drafter = loaded.drafter
    if drafter.best_tree == "chain":
        return loaded
    tree = TreeConfig(drafter.best_tree, drafter.size)
    return dataclasses.replace(loaded, drafter=drafter.with_tree(tree))


def _end_chains(loaded: LoadedDrafter, *, spec: str, rules: dict[str, float]) -> LoadedDrafter:
    config = loaded.drafter.head_config
    if config is None or config.confidence is None or loaded.drafter.tree.kind != "chain":
        raise ValueError(
            f"threshold and survival need a confidence head and a chain; {spec!r} has no such "
            "head, or its tree is not a chain. Leave them out"
        )
    params = loaded.params
    placed = {  # on the devices of the other weights
        name: jax.device_put(np.float32(value), getattr(params, name).sharding)
        for name, value in rules.items()
    }
    return dataclasses.replace(loaded, params=dataclasses.replace(params, **placed))


def _small(name: str, target: Target, *, tree: TreeConfig, dtype: str) -> LoadedDrafter:
    """Factory of "small:NAME"."""
    small = load_target(name, dtype=dtype)
    if small.config.vocab_size != target.config.vocab_size:
        raise ValueError(
            f"drafter {small.name!r} has a vocabulary of {small.config.vocab_size} tokens, "
            f"target {target.name!r} one of {target.config.vocab_size}; "
            "a small drafter must share the target's tokenizer"
        )
    known = small.tokenizer and target.tokenizer
    if known and _tokenizes(small) != _tokenizes(target):
        raise ValueError(
            f"drafter {small.name!r} turns text into other tokens than target "
            f"{target.name!r}; a small drafter must share the target's tokenizer"
        )
    return LoadedDrafter(SmallModel(small.config, tree), small.params)


def _mtp(argument: str, target: Target, *, tree: TreeConfig, dtype: str) -> LoadedDrafter:
    """Factory of "mtp" and "mtp:NAME": the multi-token-prediction layer in the target's
    checkpoint, or in another folder or hub repository."""
    path = checkpoints.target_path(argument or target.name)
    return _placed(mtp.load(path, target, tree, dtype), target)


def _trained(name: str, target: Target, *, tree: TreeConfig, dtype: str) -> LoadedDrafter:
    """Factory of all other names: a trained drafter's folder or hub name."""
    return _placed(drafters.load_drafter(name, target, tree, dtype), target)


def _placed(loaded: LoadedDrafter, target: Target) -> LoadedDrafter:
    """A drafter with its weights on the target's devices."""
    with mesh_of(target.params) as mesh:
        params = loaded.params if mesh is None else place(mesh, loaded.params)
        return dataclasses.replace(loaded, params=params)


def _tokenizes(target: Target) -> list[int]:
    """Token ids of a text that most tokenizers cut differently."""
    return target.tokenizer.encode("Hello, world! 1969 naïve\n\tdef f(x):", special=False)


def enable_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that the next process starts quickly.

    Call it before anything is computed. JAX runs the code it finds in the folder: use one that
    only you can write.

    Args:
      folder: by default JAX's own ($JAX_COMPILATION_CACHE_DIR), else $JAXSPEC_CACHE/xla, else
        ~/.cache/jaxspec/xla.

    Returns:
      The folder; None, with a warning, if it cannot be written.
    """
    known = jax.config.jax_compilation_cache_dir
    if folder is None and known:
        return Path(known)
    try:
        folder = compilation_cache(folder)
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept, and every start compiles them again: {error}; "
            "set JAXSPEC_CACHE to a writable folder",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def compilation_cache(folder: str | Path | None = None) -> Path:
    """The folder of `enable_compilation_cache`, created if it is missing.

    Raises:
      OSError: it cannot be written.
    """
    known = folder or jax.config.jax_compilation_cache_dir
    folder = Path(known) if known else catalog.cache_dir() / "xla"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


registry.register("small:", _small)
registry.register("mtp", _mtp)
registry.register("mtp:", _mtp)
