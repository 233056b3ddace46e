"""Fingerprints that identify a model independently of its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxspec.models.scaled import OutputsFirst, is_outputs_first

if TYPE_CHECKING:
    from jaxspec.drafters.base import LoadedDrafter
    from jaxspec.models.target import Target

SAMPLED = 16  # values hashed per array


def fingerprint(model: Target | LoadedDrafter) -> str:
    """A hash of the first values of every weight, the same in float32 and bfloat16.

    Renaming or moving a model, or the memory layout of its weights, does not change the hash;
    fine-tuning does. Every array must be fully addressable in this process.
    """
    digest = hashlib.sha256()
    weights = jax.tree.leaves_with_path(model.params, is_leaf=is_outputs_first)
    for path, x in weights:
        values = np.asarray(_first_row(x)[:SAMPLED], np.float32)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(f"{x.shape}".encode())
        digest.update(values.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:16]


def _first_row(weight: jax.Array | OutputsFirst) -> jax.Array:
    """All values along the last axis, at index 0 of the others."""
    if is_outputs_first(weight):
        last = weight.values.ndim - weight.inputs - 1
        return weight.values[(*[0] * last, slice(None), *[0] * weight.inputs)]
    return jnp.atleast_1d(weight)[(0,) * (weight.ndim - 1)]


def template_hash(target: Target) -> str:
    """A hash of the chat template's text."""
    template = json.dumps(target.tokenizer.chat_template)
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def same_model(written: Mapping[str, Any], target: str, weights: str) -> bool:
    """Whether the `target` or `fingerprint` of a file's fields may be this model's.

    A model may be moved: without a fingerprint only the last part of its name counts.

    Args:
      target, weights: the model's name and fingerprint.

    >>> same_model({"target": "Qwen/Qwen3-8B"}, "/models/qwen3-8b", "0123")
    True
    """
    name = written.get("target")
    if "fingerprint" in written or not isinstance(name, str):
        return written.get("fingerprint", weights) == weights
    return PurePath(name).name.lower() == PurePath(target).name.lower()
