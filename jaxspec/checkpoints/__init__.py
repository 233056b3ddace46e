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
      devices: number of devices of all processes to shard the weights over
        (`jaxspec.sharding`).
      weights: "dequantised", or "stored" to hold fp8 weights in 8 bits with their scales.

    Raises:
      ValueError: the model cannot be found or read, or is not implemented; there are fewer
        devices; or `weights` is "stored" and the checkpoint is not in fp8.
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
    """Only the configuration; arguments and errors as `load`."""
    path = target_path(name_or_path)
    return _format(path).read_config(path)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """Only the tokenizer, without reading weights; arguments and errors as `load`."""
    path = target_path(name_or_path)
    return _format(path).load_tokenizer(path)


def target_path(name_or_path: str | Path) -> Path:
    """The local file or folder of a name, downloaded if necessary; errors as `load`."""
    from jaxspec.checkpoints import catalog, huggingface

    if not isinstance(name_or_path, str | Path):
        raise ValueError(
            f"a model is named by {name_or_path!r}; expected the text of a name or path"
        )
    if name_or_path in catalog.names() and not Path(name_or_path).exists():
        name_or_path = catalog.find(name_or_path)
    return huggingface.resolve(name_or_path)


def _agree_on_ends(config: TargetConfig, tokenizer: Tokenizer, path: Path) -> TargetConfig:
    """Sets the ids that end a text, in decoding and training data, to those that either the
    configuration or the tokenizer names."""
    ids = tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids)))
    try:
        config = dataclasses.replace(config, eos_token_ids=ids)
    except ValueError as error:
        raise ValueError(f"the tokenizer in {path} does not fit: {error}") from None
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
