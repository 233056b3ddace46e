"""Reads and writes `config.json` of published drafters, and lists their formats.

A format is recognised by keys that only it has, as several share names of architectures.

===========  ============  ========================================  ====================
format       drafters      recognised by                             module
===========  ============  ========================================  ====================
speculators  EAGLE-3       `speculators_model_type` "eagle3"         `eagle3_formats`
speculators  P-EAGLE       `speculators_model_type` "peagle"         `eagle3_formats`
speculators  block         `speculators_model_type`                  `speculators`
treeflash    block         `treeflash_config`                        `treeflash`
dflash       block         `dflash_config`                           `zlab`
deepspec     block         `markov_rank` with `target_layer_ids`     `deepspec`
deepspec     EAGLE-3       `ttt_length` with `target_layer_ids`      `eagle3_formats`
eagle3       EAGLE-3       `eagle_config`, "Eagle3" in               `eagle3_formats`
                           `architectures`, or `draft_vocab_size`
                           with one layer
===========  ============  ========================================  ====================
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxspec.checkpoints.deepspec import DeepSpec
from jaxspec.checkpoints.drafter_format import Config, DrafterFormat
from jaxspec.checkpoints.eagle3_formats import (
    EagleDeepSpec,
    EagleOriginal,
    EagleSpeculators,
    ParallelEagleSpeculators,
)
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.quantisation import read_quantisation
from jaxspec.checkpoints.speculators import Speculators
from jaxspec.checkpoints.treeflash import TreeFlash
from jaxspec.checkpoints.zlab import ZLab
from jaxspec.config import DrafterConfig, TargetConfig

# The first format that recognises a configuration reads it.
FORMATS: tuple[DrafterFormat, ...] = (
    EagleSpeculators(),
    ParallelEagleSpeculators(),
    Speculators(),
    TreeFlash(),
    ZLab(),
    DeepSpec(),
    EagleDeepSpec(),
    EagleOriginal(),
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))


def format_of(config: Config, name: str) -> DrafterFormat:
    """The format of this name for a kind of drafter.

    Raises:
      ValueError: this kind of drafter has no such format.
    """
    own = {format.name: format for format in FORMATS if format.kind is type(config)}
    if name not in own:
        raise ValueError(f"format is {name!r}; expected one of {tuple(own)} for this drafter")
    return own[name]


def default_format(config: Config) -> str:
    """The name of a drafter's default format."""
    if not isinstance(config, DrafterConfig):
        return "speculators"
    return "treeflash" if config.sequential == "mlp" else "dflash"


def recognise(raw: dict[str, Any], origin: Any) -> DrafterFormat:
    """The format of a `config.json`.

    Raises:
      ValueError: no known drafter has such a configuration.
    """
    for format in FORMATS:
        if format.recognises(raw):
            return format
    found = raw.get("architectures") or raw.get("model_type")
    if str(raw.get("model_type")).endswith("_mtp"):
        raise ValueError(
            f"{origin} holds the MTP layer of a target ({found}); draft with 'mtp:{origin}'"
        )
    raise ValueError(
        f"{origin}: the configuration, of {found}, is not a drafter's; expected "
        "'dflash_config', 'treeflash_config', 'speculators_model_type', 'eagle_config', or "
        "'markov_rank' or 'ttt_length' with 'target_layer_ids'"
    )


def from_json(raw: dict[str, Any], origin: Any, target: TargetConfig | None = None) -> Config:
    """The drafter a `config.json` describes; accepts the keys of transformers 4 and 5.

    Warns of keys that are not known (`JsonConfig.finish`).

    Args:
      target: the drafter's target, whose depth some files lack; None if unknown.

    Raises:
      ValueError: a key is missing, not implemented, contradicts another, or belongs to a target
        of another shape.
    """
    format = recognise(raw, origin)
    whole = JsonConfig(raw, origin, "a drafter")
    read_quantisation(whole)
    config = format.from_json(whole, target)
    if config.target_layers is None and target is not None:
        change = functools.partial(dataclasses.replace, config)
        config = whole.make(change, target_layers=target.num_layers)
    last = (config.target_layers or 0) - 1
    if last in config.taps and last >= 0 and not format.normed_last:
        raise ValueError(
            f"{origin}: the drafter reads the last layer, {last}, before the target's final "
            "norm, which is not supported; expected earlier layers"
        )
    if target is not None:
        _check_target(config, target, origin)
    return config


def to_json(
    config: Config,
    name: str,
    dtype: str,
    *,
    kept: int | None = None,
    verifier: str | None = None,
) -> dict[str, Any]:
    """`config.json` of a drafter in a published format.

    Args:
      name: name of the format, one of `NAMES`.
      kept: size of the draft vocabulary; None for all tokens.
      verifier: the target's hub name or path, which speculators' format names.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    format = format_of(config, name)
    format.check_expressible(config, kept)
    return format.to_json(config, dtype, kept=kept, verifier=verifier)


def _check_target(config: Config, target: TargetConfig, origin: Any) -> None:
    """Raises ValueError when a drafter was made for a target of another shape."""
    width = getattr(config, "target_hidden_size", config.hidden_size)
    for name, ours, theirs in (
        ("hidden size", width, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("number of target layers", config.target_layers, target.num_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"{origin}: the drafter's {name} is {ours}, the target's is {theirs}; "
                "use the target that it was trained for"
            )
