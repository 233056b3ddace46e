"""Targets and drafters by name."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxspec.checkpoints import catalog
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Drafter
from jaxspec.drafters.joined import Joined
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.generation import PLAIN, LoadedDrafter, Target
from jaxspec.settings import own_settings
from jaxspec.sharding import mesh_of, place

LOOKUP_TOO = "+ngram"  # after a drafter's name
DEEPEST_MATCH = 15  # tokens copied at a time beside a trained drafter


@own_settings()
def load_target(
    name_or_path: str | Path = "smollm2-135m", *, dtype: str = "float32", devices: int = 1
) -> Target:
    """Loads a target model.

    Args:
      name_or_path: a name of `checkpoints.catalog`, a GGUF file, a Hugging Face folder, or a
        name on the hub.
      dtype: of weights and cache, "float32" or "bfloat16"; products accumulate in float32.
      devices: cuts the weights over so many, those of all processes counted
        (`jaxspec.sharding`); compute with them inside `sharding.mesh_of(target.params)`.

    Raises:
      ValueError: it cannot be found, is damaged, or is a model the decoder does not implement.
    """
    from jaxspec import checkpoints

    loaded = checkpoints.load(name_or_path, dtype, devices)
    return Target(str(name_or_path), loaded.config, loaded.params, loaded.tokenizer)


@own_settings()
def load_drafter(
    spec: str,
    target: Target,
    *,
    tree: TreeConfig | None = None,
    dtype: str = "float32",
    threshold: float = 0.0,
    survival: float = 0.0,
) -> LoadedDrafter:
    """A drafter for a target.

    Args:
      spec: "none" (plain decoding), "ngram" (prompt lookup), "small:NAME" (a small model with
        the same vocabulary, loaded as a target is), "shipped" (the trained one that comes with
        the package, for the default target), or the folder or hub name of a trained drafter
        ("repo::subfolder" too). "+ngram" after one of the last three joins prompt lookup.
      tree: what it drafts; each kind of drafter has its default.
      dtype: of the drafter's weights.
      threshold: a chain ends before the first token that the drafter's confidence head gives
        less than this probability of being accepted after those before it; 0 keeps all.
      survival: a chain ends where the product of those probabilities falls below this.

    Raises:
      ValueError: the drafter cannot be found, does not fit the target, or has no chains or no
        confidence head for the rules given.
    """
    rules = {"threshold": threshold, "survival": survival}
    for name, value in rules.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected a probability, 0 … 1")
    if spec.endswith(LOOKUP_TOO):
        options = dict(tree=tree, dtype=dtype, **rules)
        return with_lookup(load_drafter(spec.removesuffix(LOOKUP_TOO), target, **options))
    loaded = _load_drafter(spec, target, tree, dtype)
    if not any(rules.values()):
        return loaded
    from jaxspec.drafters.block import BlockDrafter

    static = loaded.drafter
    if not (
        isinstance(static, BlockDrafter)
        and static.config.confidence
        and static.tree.kind == "chain"
    ):
        raise ValueError(
            "threshold and survival end the chains of a trained drafter by its confidence "
            f"head; {spec!r} has no such head, or its tree is no chain. Leave them out"
        )
    params = loaded.params
    placed = {  # on the devices of the others
        name: jax.device_put(np.float32(value), getattr(params, name).sharding)
        for name, value in rules.items()
    }
    return dataclasses.replace(loaded, params=dataclasses.replace(params, **placed))


def with_lookup(loaded: LoadedDrafter) -> LoadedDrafter:
    """A drafter joined with prompt lookup (`beside_lookup`)."""
    return LoadedDrafter(beside_lookup(loaded.drafter), (loaded.params, ()))


def beside_lookup(drafter: Drafter) -> Joined:
    """The static part of a drafter and prompt lookup in trees of the same size.

    Raises:
      ValueError: it drafts nothing, or is prompt lookup itself.
    """
    if drafter.size < 2 or isinstance(drafter, PromptLookup):
        raise ValueError(f"{drafter} has nothing to join with prompt lookup; leave +ngram out")
    lookup = PromptLookup(size=drafter.size, depth=min(drafter.size - 1, DEEPEST_MATCH))
    return Joined((drafter, lookup), drafter.size)


def change_drafter(
    loaded: LoadedDrafter, change: Callable[[LoadedDrafter], LoadedDrafter]
) -> LoadedDrafter:
    """change(loaded); where prompt lookup is joined with a drafter, that drafter changes."""
    if not isinstance(loaded.drafter, Joined):
        return change(loaded)
    return with_lookup(change(LoadedDrafter(loaded.drafter.drafters[0], loaded.params[0])))


def with_survival(drafter):
    """The drafter with its scores from its confidence head, where it can."""
    return change_drafter(drafter, _with_survival)


def _with_survival(drafter):
    static = drafter.drafter
    config = getattr(static, "config", None)
    if not getattr(config, "confidence", None):
        return drafter
    tree = static.tree.kind
    if tree == "chain" or (tree == "path_conditioned" and config.sequential):
        return dataclasses.replace(
            drafter, drafter=dataclasses.replace(static, survival_scores=True)
        )
    return drafter


def _load_drafter(
    spec: str, target: Target, tree: TreeConfig | None, dtype: str
) -> LoadedDrafter:
    if spec == "none":
        return PLAIN
    if spec == "ngram":
        return LoadedDrafter(PromptLookup(size=tree.size) if tree else PromptLookup())
    if spec.startswith("small:"):
        from jaxspec.drafters.small_model import SmallModel

        small = load_target(spec.removeprefix("small:"), dtype=dtype)
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
        drafter = SmallModel(small.config, tree) if tree else SmallModel(small.config)
        return LoadedDrafter(drafter, small.params)
    from jaxspec.checkpoints.drafters import load_drafter as load_block_drafter

    drafter, params = load_block_drafter(
        spec, target.config, target.params, tree or TreeConfig(), dtype
    )
    with mesh_of(target.params) as mesh:
        return LoadedDrafter(drafter, params if mesh is None else place(mesh, params))


def _tokenizes(target: Target) -> list[int]:
    """Token ids of a text that most tokenizers cut differently."""
    return target.tokenizer.encode("Hello, world! 1969 naïve\n\tdef f(x):", special=False)


def enable_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that the next process starts quickly.

    Call it before anything is computed. JAX runs what it finds in the folder: use one that only
    you can write.

    Args:
      folder: by default the one JAX has already ($JAX_COMPILATION_CACHE_DIR), or
        $JAXSPEC_CACHE/xla, or ~/.cache/jaxspec/xla.

    Returns:
      The folder; None, with a warning, if it cannot be written: programs are not kept then.
    """
    known = jax.config.jax_compilation_cache_dir
    if folder is None and known:
        return Path(known)
    try:
        folder = catalog.cache_dir() / "xla" if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept, every start compiles them again: {error}; set "
            "JAXSPEC_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
