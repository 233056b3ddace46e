"""Draws a draft tree as text for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxspec.trees.tree import NO_PARENT, DraftTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Label = Callable[[int], str]

ACCEPTED = "#1a7f4b"
QUIET = "#8a94a0"
PAPER_TO_BLUE = ("#ffffff", "#9fc2ea")  # a path of probability 0 … 1, by its square root
LABEL_LENGTH = 16


def visible(text: str) -> str:
    """A token's text on one line, with blanks, line breaks and tabs as symbols."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")


def follow(tree: DraftTree, tokens: Sequence[int], *, row: int = 0) -> list[int]:
    """The nodes that `tokens` reach from the root, root first, as far as the tree has them."""
    node = {
        (int(parent), int(token)): i
        for i, (parent, token) in enumerate(
            zip(tree.parents[row], tree.tokens[row], strict=True)
        )
        if parent != NO_PARENT
    }
    path = [0]
    for token in tokens:
        if (path[-1], int(token)) not in node:
            break
        path.append(node[path[-1], int(token)])
    return path


def as_text(
    tree: DraftTree, *, row: int = 0, label: Label = str, accepted: Sequence[int] = ()
) -> str:
    """The tree as lines, likeliest children first.

    Every line starts with the probability of the node's path under the drafter, where it has
    one (scores that are all 0 stand for none), and a dot if the node was accepted::

         1.000 ●  The
         0.610 ●  ├─ cat
         0.427    │  ├─ sat
         0.106 ●  │  └─ ran
         0.202    └─ dog

    Args:
      row: row of the batch.
      label: text of a token id.
      accepted: nodes of the accepted path, root included, as `follow` gives them.
    """
    children, scores = _children(tree, row), np.asarray(tree.scores[row])
    tokens, accepted = np.asarray(tree.tokens[row]), set(accepted)
    probabilities = _has_probabilities(tree, row)
    lines = []

    def write(node, before, branch, below):
        chance = f"{np.exp(scores[node]):6.3f} " if probabilities else " "
        dot = "●" if node in accepted else " "
        lines.append(f"{chance}{dot}  {before}{branch}{label(int(tokens[node]))}".rstrip())
        last = len(children[node]) - 1
        for i, child in enumerate(children[node]):
            ends = ("└─ ", "   ") if i == last else ("├─ ", "│  ")
            write(child, before + below, *ends)

    write(0, "", "", "")
    return "\n".join(lines)


def as_figure(
    tree: DraftTree, *, row: int = 0, label: Label = str, accepted: Sequence[int] = ()
) -> Figure:
    """The tree as a picture, depth from left to right, likeliest children on top.

    The number beside a node is its probability given its parent; its shade shows the
    probability of its whole path; accepted nodes are green. Save it with `.savefig(path)`.
    Needs matplotlib (extra 'plots'). Arguments as for `as_text`.
    """
    from matplotlib.figure import Figure

    children, parents = _children(tree, row), np.asarray(tree.parents[row])
    tokens, scores = np.asarray(tree.tokens[row]), np.asarray(tree.scores[row])
    depths, accepted = np.asarray(tree.depths[row]), set(accepted)
    probabilities = _has_probabilities(tree, row)
    height, leaves = _heights(children)

    # One unit of an axis is one level, or one leaf: 1.6 by 0.44 inches.
    across, down = int(depths.max()) + 1.1, leaves + 1.2
    figure = Figure(figsize=(1.6 * across, 0.44 * down), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.55, across - 0.55), ylim=(leaves + 0.5, -0.7))
    axes.axis("off")

    for node in height:
        x, y, chosen = depths[node], height[node], node in accepted
        if node:
            gain = float(np.exp(scores[node] - scores[parents[node]]))
            _draw_edge(axes, x, y, height[parents[node]], gain, chosen)
            if probabilities:
                _draw_gain(axes, x, y, gain, chosen)
        shade = float(np.exp(scores[node] / 2)) if probabilities else None
        _draw_node(axes, x, y, label(int(tokens[node])), shade, chosen)
    legend = "green: accepted by the target"
    if probabilities:
        legend += "    shade: probability of the path    number: given the node before"
    axes.text(-0.45, leaves + 0.15, legend, fontsize=6.5, color=QUIET, va="center")
    return figure


def _draw_edge(axes, x, y, above, gain: float, chosen: bool) -> None:
    """From the parent, one level to the left on the line `above`, to the node at (x, y)."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bend = [(x - 1, above), (x - 0.45, above), (x - 0.75, y), (x - 0.3, y), (x, y)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    axes.add_patch(
        PathPatch(
            Path(bend, codes),
            fill=False,
            edgecolor=ACCEPTED if chosen else "#c3cad2",
            linewidth=2.2 if chosen else 0.6 + 1.8 * gain,
            capstyle="round",
            zorder=2 if chosen else 1,
        )
    )


def _draw_gain(axes, x, y, gain: float, chosen: bool) -> None:
    """The probability given the parent, below the node."""
    axes.annotate(
        f"{gain:.2f}".removeprefix("0"),
        (x, y),
        xytext=(0, -9),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=6.5,
        color=ACCEPTED if chosen else QUIET,
        zorder=4,
    )


def _draw_node(axes, x, y, text: str, shade: float | None, chosen: bool) -> None:
    """A box with the token; `shade` 0 … 1 goes from paper to blue, None leaves it white."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("paths", PAPER_TO_BLUE)
    axes.text(
        x,
        y,
        text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…",
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold" if chosen else "normal",
        color="#10261b" if chosen else "#2c3640",
        parse_math=False,
        zorder=3,
        bbox={
            "boxstyle": "round,pad=0.32,rounding_size=0.5",
            "facecolor": "white" if shade is None else colors(shade),
            "edgecolor": ACCEPTED if chosen else "#c3cad2",
            "linewidth": 1.6 if chosen else 0.8,
        },
    )


def _children(tree: DraftTree, row: int) -> dict[int, list[int]]:
    """Children of every valid node, best score first."""
    valid, parents = np.asarray(tree.valid[row]), np.asarray(tree.parents[row])
    scores = np.asarray(tree.scores[row])
    children = {int(node): [] for node in np.flatnonzero(valid)}
    for node in list(children)[1:]:
        children[int(parents[node])].append(node)
    for siblings in children.values():
        siblings.sort(key=lambda node: -scores[node])
    return children


def _heights(children: dict[int, list[int]]) -> tuple[dict[int, int], int]:
    """The line of every node: leaves in order, a parent on the line of its best child."""
    height, lines = {}, 0

    def place(node):
        nonlocal lines
        height[node] = lines
        for child in children[node]:
            place(child)
        lines += not children[node]

    place(0)
    return height, lines


def _has_probabilities(tree: DraftTree, row: int) -> bool:
    return bool(np.any(np.asarray(tree.scores[row])[np.asarray(tree.valid[row])] != 0))
