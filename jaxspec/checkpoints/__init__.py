"""Checkpoints: from a name or a path to a target that can run.

Importing this package is quick; formats are imported when one is loaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from jaxspec.config import TargetConfig
    from jaxspec.models.target import Target
    from jaxspec.tokenizer import Tokenizer

Weights = Literal["dequantised", "stored"]


def load(
    name_or_path: str | Path,
    dtype="float32",
    devices: int = 1,
    weights: Weights = "dequantised",
) -> Target:
    """Loads a target.

    Args:
      name_or_path: a name of `checkpoints.catalog`, a GGUF file, a Hugging Face folder, or a
        name on the hub.
      dtype: of the weights.
      devices: cuts the weights over so many, of all processes (`jaxspec.sharding`).
      weights: "dequantised", or "stored": those of 8 bits stay so, with their scales.

    Raises:
      ValueError: it cannot be found or read, or is a model the decoder does not implement; or
        there are fewer devices;
        or weights are to stay in 8 bits that are not stored so.
    """
    import jax

    from jaxspec.models.params import outputs_first
    from jaxspec.models.target import Target

    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}; expected one of {get_args(Weights)}")

    path = target_path(name_or_path)
    reader = _format(path)
    config = reader.read_config(path)
    tokenizer = reader.load_tokenizer(path)
    if tokenizer is not None:
        config = _agree_on_ends(config, tokenizer, path)
    mesh = None
    if devices != 1:
        from jaxspec.sharding import decoding_mesh

        mesh = decoding_mesh(devices, config.num_kv_heads)
    stored = weights == "stored"
    params = reader.load_params(path, config, dtype, mesh, stored=stored)
    if mesh is None and params.embed.dtype == "bfloat16" and jax.default_backend() == "cpu":
        params = outputs_first(params)
    return Target(str(name_or_path), config, params, tokenizer)


def read_config(name_or_path: str | Path) -> TargetConfig:
    """The configuration alone; arguments and errors as `load`."""
    path = target_path(name_or_path)
    return _format(path).read_config(path)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """The tokenizer alone, without reading weights; arguments and errors as `load`."""
    path = target_path(name_or_path)
    return _format(path).load_tokenizer(path)


def target_path(name_or_path: str | Path) -> Path:
    """The local file or folder behind a name, downloaded if need be; errors as `load`."""
    from jaxspec.checkpoints import catalog, huggingface

    if name_or_path in catalog.names() and not Path(name_or_path).exists():
        name_or_path = catalog.find(name_or_path)
    return huggingface.resolve(name_or_path)


def _agree_on_ends(config: TargetConfig, tokenizer: Tokenizer, path: Path) -> TargetConfig:
    """Decoding and training data end a text at the same ids: all that either one names."""
    ids = tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids)))
    try:
        config = dataclasses.replace(config, eos_token_ids=ids)
    except ValueError as error:
        raise ValueError(f"the tokenizer in {path} and the configuration: {error}") from None
    tokenizer.eos_token_ids = ids
    return config


def _format(path: Path):
    """The module that reads this kind of checkpoint."""
    from jaxspec.checkpoints import gguf, huggingface

    if path.is_dir():
        return huggingface
    if path.suffix == ".gguf":
        return gguf
    raise ValueError(
        f"{path} is neither a folder nor a .gguf file; pass the checkpoint's folder"
    )
