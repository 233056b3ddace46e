"""Prompt sets of the commands that measure."""

from __future__ import annotations

from collections.abc import Sequence

from jaxspec.data.prompts import read_prompts, spread
from jaxspec.data.sources import open_source


def chosen(names: Sequence[str], count: int, unread: list[str]) -> dict[str, list[str]]:
    """Reads the prompts of each source.

    Args:
      count: prompts per source, evenly spaced; 0 takes all.
      unread: receives a line per row that cannot be read.

    Raises:
      ValueError: two sources have one label.
    """
    sources = [open_source(name) for name in names]
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--prompts: two sets have the same name ({', '.join(labels)})")
    return {x.label: spread(read_prompts(x, unread), count) for x in sources}


def encoded(
    target,
    texts: dict[str, list[str]],
    *,
    thinking: bool | None,
    max_new_tokens: int,
    spare: int = 0,
) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Prompts of each set as token ids, and a reason per prompt that cannot be used; see
    `prompts.usable_prompts`."""
    from jaxspec.prompts import usable_prompts

    options = dict(raw=False, thinking=thinking, max_new_tokens=max_new_tokens, spare=spare)
    sets, refused = {}, []
    for name, prompts in texts.items():
        rows, bad = usable_prompts(target, prompts, **options)
        sets[name] = list(rows.values())
        refused += [f"{name}: {reason}" for reason in bad.values()]
    return sets, refused
