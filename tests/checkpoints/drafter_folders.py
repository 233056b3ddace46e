"""Block drafters of the tiny target in files, for tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from jaxspec.checkpoints.drafters import CHAIN, load_drafter, save_drafter
from jaxspec.drafters.registry import trained
from jaxspec.drafters.weights import random_weights
from tests import tiny
from tests.drafters import cases

FORMATS = {
    "dflash": "dflash",
    "jetspec": "dflash",
    "treeflash": "treeflash",
    "dspark": "deepspec",
    "gated": "deepspec",
    "rnn": "dflash",  # a causal one: DeepSpec has no key for that
    "window": "dflash",
    "dflash2": "dflash",
}


def save(folder, kind, dtype=jnp.float32, format=None):
    """A drafter of the tiny target on disk; what was saved."""
    config = cases.KINDS[kind]
    if kind == "treeflash":  # has no confidence head
        config = dataclasses.replace(config, confidence=None)
    weights = random_weights(config, jax.random.key(3), dtype)
    saved = trained(config, weights, tiny.target().params, CHAIN)
    save_drafter(folder, saved, FORMATS[kind] if format is None else format)
    return saved


def load(folder, dtype=jnp.float32):
    return load_drafter(folder, tiny.target(), dtype=dtype)


def edit(folder, change):
    """Applies `change` to the parsed config.json."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def change_tensors(folder, change):
    """Applies `change` to the tensors, by name."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: x.astype(x.dtype, order="C") for name, x in tensors.items()}, path)


def own(raw):
    return raw.get("dflash_config", raw)
