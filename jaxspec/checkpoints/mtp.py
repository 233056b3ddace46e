"""Loads multi-token-prediction layers, which draft for their target, from its checkpoint or
from files of their own."""

from __future__ import annotations

from pathlib import Path

from jaxspec.checkpoints.fuse import build, check_dtype, check_tensors, expected_shapes, linear
from jaxspec.checkpoints.huggingface import WEIGHTS
from jaxspec.checkpoints.hybrid import predictor_tensors
from jaxspec.checkpoints.quantised import open_weights
from jaxspec.checkpoints.target_weights import layer_parts
from jaxspec.checkpoints.target_weights import norm_parts as norm
from jaxspec.checkpoints.tensors import SafetensorsFolder
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.mtp import MtpConfig, MtpWeights, abstract_mtp, mtp_config
from jaxspec.drafters.registry import trained
from jaxspec.models.target import Target

LAYER = "mtp.layers.0."
REMEDY = (
    "draft with 'mtp' where the target is a published checkpoint of Qwen3.5, 3.6, 3.8 or "
    "Qwen3-Next, with 'mtp:NAME' where the layer is in another folder or hub repository, or "
    "with another drafter"
)


def load(path: Path, target: Target, tree: TreeConfig, dtype) -> LoadedDrafter:
    """The drafter inside a target's checkpoint, or one published apart from it.

    Args:
      path: the target's folder, as published, or one that has its MTP layer: a checkpoint, or
        only the layer's tensors, with or without "mtp." before their names.
      tree: tree to draft.
      dtype: of its weights in memory.

    Raises:
      ValueError: the checkpoint has no MTP layer, or several, or is damaged.
    """
    dtype = check_dtype(dtype)
    if not path.is_dir():
        raise ValueError(f"{path} is a file, which holds no MTP layer; {REMEDY}")
    if (path / WEIGHTS).exists():
        raise ValueError(f"{path} was converted, which leaves MTP layers out; {REMEDY}")
    whole = (path / "config.json").exists()
    tensors = predictor_tensors(open_weights(path) if whole else SafetensorsFolder(path))
    if not tensors.shapes:
        raise ValueError(f"{path} has no tensor 'mtp.…', so no MTP layer; {REMEDY}")
    further = next((name for name in tensors.shapes if name.startswith("mtp.layers.1.")), None)
    if further is not None:
        raise ValueError(
            f"{path}: tensor '{further}' belongs to a second MTP layer; expected one, which "
            "runs again for every token"
        )
    config = mtp_config(target.config)
    table = mtp_parts(config, tensors.shapes)
    check_tensors(tensors, expected_shapes(table))
    weights = build(tensors, table, abstract_mtp(config, dtype))
    return trained(config, weights, target.params, tree)


def mtp_parts(config: MtpConfig, names) -> MtpWeights:
    """`MtpWeights` with the `Part`s of every array in its place.

    Args:
      names: see `target_weights.target_parts`.
    """
    c, width = config.layer, config.hidden_size
    return MtpWeights(
        token_norm=norm(c, "mtp.pre_fc_norm_embedding.weight", width),
        feature_norm=norm(c, "mtp.pre_fc_norm_hidden.weight", width),
        fc=linear("mtp.fc.weight", width, 2 * width),
        layer=layer_parts(c, 0, LAYER, names),
        norm=norm(c, "mtp.norm.weight", width),
    )
