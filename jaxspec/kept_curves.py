"""Step-time curves in the cache, keyed by setup and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from jaxspec.decoding.curve import Curve
from jaxspec.dtypes import cpu_id, keep_json, kept_json

KEPT = 64


def kept_curve(setup: dict[str, Any]) -> Curve | None:
    """The curve measured for this setup (`decoding.curve.setup_of`), or None."""
    try:
        curve = Curve.parse(kept_json("curves").get(_name(setup)))
        curve.check(setup)
    except ValueError:
        return None
    return curve


def keep_curve(curve: Curve) -> None:
    """Stores a curve; only the newest ones stay."""
    kept = kept_json("curves")
    newest = dict(list(kept.items())[1 - KEPT :])
    keep_json("curves", newest | {_name(curve.setup): dataclasses.asdict(curve)})


def _name(setup: dict[str, Any]) -> str:
    text = json.dumps(setup | {"cpu": cpu_id()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
