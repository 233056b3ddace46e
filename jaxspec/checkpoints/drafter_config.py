"""`config.json` of published block drafters, to `DrafterConfig` and back: the formats by name.

The formats are told apart by their configuration, never by the name of the architecture, which
several of them share.

===========  ========================  ===========================
format       recognised by             module
===========  ========================  ===========================
speculators  `speculators_model_type`  `checkpoints.speculators`
treeflash    `treeflash_config`        `checkpoints.treeflash`
dflash       `dflash_config`           `checkpoints.zlab`
deepspec     `markov_rank`             `checkpoints.deepspec`
===========  ========================  ===========================
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.block_format import BlockFormat
from jaxspec.checkpoints.deepspec import DeepSpec
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.quantised import read_quantisation
from jaxspec.checkpoints.speculators import Speculators
from jaxspec.checkpoints.treeflash import TreeFlash
from jaxspec.checkpoints.zlab import ZLab
from jaxspec.config import DrafterConfig

# The first that recognises a configuration reads it.
FORMATS: dict[str, BlockFormat] = {
    format.name: format for format in (Speculators(), TreeFlash(), ZLab(), DeepSpec())
}


def format_named(name: str) -> BlockFormat:
    """Raises ValueError if there is none of the name."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; expected one of {tuple(FORMATS)}")
    return FORMATS[name]


def recognise(raw: dict[str, Any], origin: Any) -> str:
    """The format, one of `FORMATS`, by the keys that only it has.

    Raises:
      ValueError: no known drafter has such a configuration.
    """
    for name, format in FORMATS.items():
        if format.recognises(raw):
            return name
    found = raw.get("architectures") or raw.get("model_type")
    raise ValueError(
        f"{origin}: the configuration, of {found}, is not a drafter's; expected "
        "'dflash_config', 'treeflash_config', 'speculators_model_type', 'eagle_config', or "
        "'markov_rank' or 'ttt_length' with 'target_layer_ids'"
    )


def from_json(raw: dict[str, Any], origin: Any) -> DrafterConfig:
    """The drafter a `config.json` describes; accepts the keys of transformers 4 and 5.

    Warns of keys that are not known (`JsonConfig.finish`).

    Raises:
      ValueError: a key is missing, asks for something that is not implemented, or contradicts
        another.
    """
    format = FORMATS[recognise(raw, origin)]
    whole = JsonConfig(raw, origin, "a drafter")
    read_quantisation(whole)
    return format.from_json(whole)


def to_json(
    config: DrafterConfig,
    format: str,
    dtype: str,
    *,
    kept: int | None = None,
    verifier: str | None = None,
) -> dict[str, Any]:
    """`config.json` of a drafter in a published format.

    Args:
      kept: tokens of the draft vocabulary, None for all; of speculators' format alone.
      verifier: the target's hub name or path, likewise.

    Raises:
      ValueError: the format cannot express the configuration.
    """
    codec = format_named(format)
    codec.check_expressible(config, kept)
    return codec.to_json(config, dtype, kept=kept, verifier=verifier)
