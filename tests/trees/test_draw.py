"""What a drawn tree shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.trees.draw import as_figure, as_text, follow, visible
from jaxspec.trees.merge import merge
from jaxspec.trees.tree import DraftTree

WORDS = ["The", "cat", "dog", "sat", "ran"]
CHANCES = np.array([1.0, 0.2, 0.61, 0.106, 0.427, 0.0])


def word(token: int) -> str:
    return WORDS[token]


@pytest.fixture
def tree() -> DraftTree:
    """The -> dog, cat; cat -> ran, sat; one place of padding. The second row is only a root."""
    parents = jnp.array([[-1, 0, 0, 2, 2, -1], [-1] * 6])
    with np.errstate(divide="ignore"):
        scores = jnp.asarray(np.log(np.stack([CHANCES, np.eye(6)[0]])), jnp.float32)
    return DraftTree(
        tokens=jnp.array([[0, 2, 1, 4, 3, 0], [1, 0, 0, 0, 0, 0]]),
        parents=parents,
        depths=jnp.array([[0, 1, 1, 2, 2, 0], [0] * 6]),
        scores=scores,
        valid=scores > -jnp.inf,
    )


def test_text_shows_likely_children_first_and_the_accepted_path(tree):
    lines = as_text(tree, label=word, accepted=[0, 2, 3]).splitlines()
    assert lines == [
        " 1.000 ●  The",
        " 0.610 ●  ├─ cat",
        " 0.427    │  ├─ sat",
        " 0.106 ●  │  └─ ran",
        " 0.200    └─ dog",
    ]


def test_text_of_another_row(tree):
    assert as_text(tree, row=1, label=word) == "    cat"


def test_a_tree_without_probabilities_shows_none():
    tree = jax.jit(merge, static_argnames="size")(
        jnp.array([0]),
        jnp.array([[[1, 3], [1, 4]]]),
        jnp.zeros((1, 2, 2)),
        size=8,
        budget=jnp.array([8]),
    )
    assert as_text(tree, label=word, accepted=[0]).splitlines() == [
        " ●  The",
        "    └─ cat",
        "       ├─ sat",
        "       └─ ran",
    ]


def test_following_tokens_stops_where_the_tree_does(tree):
    assert follow(tree, [1, 4]) == [0, 2, 3]
    assert follow(tree, [1, 4, 2]) == [0, 2, 3]
    assert follow(tree, [3]) == [0]
    assert follow(tree, [0], row=1) == [0]


@pytest.mark.parametrize(
    "text, shown", [(" cat", "cat"), ("  ", "␣␣"), ("\n\n", "⏎⏎"), ("a\tb", "a⇥b"), ("", "")]
)
def test_a_token_is_shown_on_one_line(text, shown):
    assert visible(text) == shown


def test_picture_has_every_node_and_its_chance(tree, tmp_path):
    pytest.importorskip("matplotlib")
    figure = as_figure(tree, label=word, accepted=[0, 2, 3])
    (axes,) = figure.axes
    shown = {text.get_text(): text for text in axes.texts}
    assert {"The", "cat", "dog", "sat", "ran"} <= shown.keys()
    assert {".61", ".20", ".70", ".17"} <= shown.keys()  # given the parent
    bold = {text for text in shown if shown[text].get_fontweight() == "bold"}
    assert bold == {"The", "cat", "ran"}
    figure.savefig(tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_a_dollar_sign_is_not_mathematics(tree, tmp_path):
    pytest.importorskip("matplotlib")
    as_figure(tree, label=lambda token: "$x_{").savefig(tmp_path / "tree.png")
