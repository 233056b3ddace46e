"""The model card of a trained drafter: README.md with the hub's metadata."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from jaxspec import __version__
from jaxspec.checkpoints import catalog
from jaxspec.checkpoints.drafter_config import default_format
from jaxspec.checkpoints.tensors import read_json
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.run_folder import CONFIG, FLAGS, METRICS

LICENCE_FIELDS = ("license", "license_name", "license_link")
CARD = """---
{metadata}
---

# A drafter for {target}

Proposes tokens for speculative decoding of **{target}**: the target verifies them, and the
output is the target's own. Trained with jaxspec {version}.

```
jaxspec generate --target {target} --drafter THIS_FOLDER --prompt "Why is the sky blue?"
```

## Recipe

{recipe}

## Acceptance

{acceptance}

## Licence

{licence}
"""


def model_card(run: Path, config: TrainConfig, *, step: int) -> str:
    """The card of a run's drafter, from the files in the run's folder.

    Args:
      step: step after which the drafter's weights were taken.
    """
    identity, flags = read_json(run / CONFIG), _flags(run)
    target = identity["target"]
    known, kind = target_metadata(target), default_format(config.drafter)
    data = [str(name) for name in flags.get("data", ())]
    metadata = ModelCardData(
        library_name="jaxspec",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "drafter", kind],
        datasets=[name for name in map(_hub_name, data) if name] or None,
        **known,
    )
    recipe = _table(_recipe(config, identity, data, step))
    if flags:
        toml = (run / FLAGS).read_text(encoding="utf-8").strip()
        recipe += (
            f"\n\n`jaxspec train --config run.toml`, with run.toml:\n\n```toml\n{toml}\n```"
        )
    if "license" in known:
        licence = f"As the target's: {known.get('license_name', known['license'])}."
    else:
        licence = (
            "The target's licence is not known to the program that wrote this; it holds for a "
            "drafter that was made from the target's weights or answers. Add it above."
        )
    return CARD.format(
        metadata=metadata.to_yaml().strip(),
        target=target,
        version=__version__,
        recipe=recipe,
        acceptance=_acceptance(run / METRICS, step),
        licence=licence,
    )


def target_metadata(target: str) -> dict[str, Any]:
    """`license` and `base_model` of a target, as far as the catalog or its own card says.

    >>> target_metadata("Qwen/Qwen3-8B")
    {'license': 'apache-2.0', 'base_model': 'Qwen/Qwen3-8B'}
    """
    if target in catalog.HUB or target in catalog.HUB.values():
        origin = catalog.HUB.get(target, target)
        return {"license": catalog.LICENCE, "base_model": origin}
    if target == catalog.DEFAULT:
        return {"license": catalog.LICENCE, "base_model": catalog.ORIGIN}
    card = Path(target) / "README.md"
    if card.exists():
        found = metadata_load(card) or {}
        return {name: found[name] for name in (*LICENCE_FIELDS, "base_model") if name in found}
    return {"base_model": target} if _hub_name(target) else {}


def _recipe(
    config: TrainConfig, identity: Mapping[str, Any], data: Sequence[str], step: int
) -> list[tuple[str, str]]:
    drafter, loss, optimizer = config.drafter, config.loss, config.optimizer
    mixture = loss.mixture
    return [
        (
            "drafter",
            f"{drafter.num_layers} layers that read the target's layers "
            f"{', '.join(map(str, drafter.taps))}, {drafter.depth} tokens deep, "
            f"{config.draft_vocab or 'all'} tokens drafted" + _options(drafter),
        ),
        (
            "loss",
            f"{mixture.cross_entropy} cross-entropy + {mixture.kl} KL + "
            f"{mixture.total_variation} total variation, slots weighted by {loss.weighting}",
        ),
        (
            "optimizer",
            f"AdamW, rate {optimizer.learning_rate:g}, {optimizer.warmup:.0%} warm-up, cosine, "
            f"weight decay {optimizer.weight_decay:g}, clipped at {optimizer.clip:g}",
        ),
        (
            "steps",
            f"{config.steps} of {config.batch_size} rows, drafting after "
            f"{config.anchors or 'all'} tokens of each; these weights are of step {step}",
        ),
        ("first weights", config.initial),
        ("seed", str(config.seed)),
        (
            "data",
            f"{identity['sequences']} sequences, hash `{identity['data']}`"
            + (f", from {', '.join(f'`{name}`' for name in data)}" if data else ""),
        ),
        ("target", f"`{identity['target']}`, weights `{identity['fingerprint']}`"),
    ]


def _acceptance(path: Path, step: int) -> str:
    """Tables of tau by step and of acceptance by slot."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    taus = [(str(x["step"]), f"{x['tau']:.2f}") for x in lines if "tau" in x]
    text = "Not validated: no held-out prompts were given."
    if taus:
        text = (
            "Mean tokens per round (tau) of greedy decoding with a chain, on held-out prompts:"
            "\n\n" + _table(taus, "step", "tau")
        )
    trained = next((x for x in lines if x["step"] == step and "acceptance" in x), None)
    if trained is not None:
        slots = [(str(i), f"{x:.3f}") for i, x in enumerate(trained["acceptance"], 1)]
        text += f"\n\nBy drafted slot, on the training batch of step {step}:\n\n"
        text += _table(slots, "slot", "acceptance")
    return text


def _table(rows: Sequence[tuple[str, str]], *heads: str) -> str:
    first, second = heads or ("", "")
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {x} | {y} |" for x, y in rows)]
    return "\n".join(lines)


def _options(drafter: Any) -> str:
    """Fields of a drafter's configuration that are not at their defaults, each after "; "."""
    options = []
    for field in dataclasses.fields(drafter):
        value, default = getattr(drafter, field.name), field.default
        if default is not dataclasses.MISSING and value not in (
            default,
            (default,) * drafter.num_layers,
        ):
            options.append(f"; {field.name} {value}")
    return "".join(options)


def _hub_name(name: str) -> str | None:
    """The name of a hub dataset or model, without a split; None for a path."""
    name = name.partition("::")[0]
    return name if name.count("/") == 1 and not Path(name).exists() else None


def _flags(run: Path) -> dict[str, Any]:
    path = run / FLAGS
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
