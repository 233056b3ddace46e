"""Who sees whom, by the keys of a `config.json`: windows, and in draft heads causality.

In a draft head a layer that slides is causal and one that does not is bidirectional, unless one
key says for all. A window W means that a token sees positions less than W away from its own.
"""

from __future__ import annotations

from typing import Any

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.config import DrafterConfig

CAUSAL = ("causal_head", "causal", "is_causal")  # JetSpec's, vLLM's, z-lab's


def windows(
    whole: JsonConfig, layers: int | None = None, *, switched: bool = True
) -> tuple[int | None, ...]:
    """Every layer's window, None without one.

    Args:
      layers: how many; by default "num_hidden_layers".
      switched: sliding layers need "use_sliding_window", as Qwen's do.

    Raises:
      ValueError: `layer_types` names another kind of layer or too few, or a layer slides and
        programs would disagree about its window.
    """
    layers = whole.integer("num_hidden_layers") if layers is None else layers
    kinds, slides = whole.items("layer_types", str, ()), whole.flag("use_sliding_window")
    if not kinds and slides:  # as Qwen's configuration has it
        full = whole.integer("max_window_layers", 28, least=0)
        kinds = tuple(
            "full_attention" if i < full else "sliding_attention" for i in range(layers)
        )
    kinds = kinds or ("full_attention",) * layers
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise whole.refusal(
            "layer_types",
            f"'full_attention' or 'sliding_attention' for each of the {layers} layers",
        )
    if "sliding_attention" not in kinds:
        whole.has("sliding_window")  # of full attention it says nothing
        return (None,) * layers
    width = whole.integer("sliding_window")
    if switched and not slides:
        raise whole.refusal(
            "use_sliding_window",
            "true beside sliding layers: without it transformers forgets the window of "
            f"{width} that others apply",
        )
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def causality(switch: bool | None, window: tuple[int | None, ...]) -> tuple[bool, ...]:
    """Every layer's, by the switch for all or else by its window."""
    return tuple((w is not None) if switch is None else switch for w in window)


def to_json(window: tuple[int | None, ...]) -> dict[str, Any]:
    """The keys of transformers' Qwen3 for every layer's window.

    Raises:
      ValueError: they are of several widths, which there is no key for.
    """
    widths = sorted(set(window) - {None})
    if len(widths) > 1:
        raise ValueError(
            f"a configuration has one 'sliding_window', the model's layers have {widths}; "
            "expected one width"
        )
    return {
        "layer_types": [f"{'sliding' if w else 'full'}_attention" for w in window],
        "sliding_window": widths[0] if widths else None,
        "use_sliding_window": bool(widths),
    }


def switch(c: DrafterConfig) -> bool | None:
    """The causality of all layers; None where it follows from their windows.

    Raises:
      ValueError: neither is so.
    """
    if len(set(c.causal)) == 1:
        return c.causal[0]
    if c.causal == causality(None, c.window):
        return None
    raise ValueError(
        f"no format has a key for causality layer by layer, {c.causal}; expected one value, or "
        "causal layers where they have windows"
    )
