"""Contenders of an evaluation as drafters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.drafters.weights import bind
from jaxspec.evaluation.contenders import Contender, Entry, load_entries, without_head
from tests.drafters import cases


@pytest.mark.parametrize("kind", ["dspark", "treeflash", "dflash2"])
def test_without_its_head_a_drafter_proposes_the_base_logits_argmax(kind):
    whole = cases.loaded(kind, TreeConfig())
    bare = without_head(whole)
    anchor, position = jnp.full(1, 3), jnp.zeros(1, jnp.int32)
    state = bare.drafter.init(bare.params, 1, 24)
    depth = bare.drafter.depth
    budget = jnp.full(1, depth + 1)
    drafted = cases.draft(bare.drafter, bare.params, state, anchor, position, budget)

    @jax.jit
    def base(params):
        stream = whole.drafter.stream(params, state, anchor, position)
        return bind(whole.drafter.config, params.head).logits(params.vocabulary, stream)

    tokens = drafted.tokens[0, 1 : depth + 1]
    np.testing.assert_array_equal(tokens, base(whole.params)[0].argmax(-1))


@pytest.mark.parametrize("tree", ["chain", "path_conditioned"])
def test_nodes_are_scored_by_the_confidence_head_where_asked(tree):
    loaded = cases.loaded("dspark", TreeConfig())
    for scores in ("own", "confidence"):
        contender = Contender.parse(f"x=run,tree={tree},scores={scores}")
        drafter = Entry(contender, None, loaded).sized().drafter
        assert drafter.survival_scores == (scores == "confidence")


@pytest.mark.parametrize(
    ("kind", "options"), [("dspark", "tree=top_budget"), ("jetspec", "tree=chain")]
)
def test_a_drafter_without_confidence_is_not_scored_by_it(kind, options):
    entry = Entry(
        Contender.parse(f"x=run,{options},scores=confidence"),
        None,
        cases.loaded(kind, TreeConfig()),
    )
    with pytest.raises(ValueError, match="scores=confidence: survival_scores needs .*; leave"):
        entry.sized()


@pytest.mark.usefixtures("models")
def test_a_drafter_has_the_tree_that_suits_it_unless_one_is_named():
    trees = {
        "ngram": None,
        "none": None,
        "run/a": "path_conditioned",  # has a sequential head
        "run/a+ngram": "path_conditioned",
        "run/a,head=none": "chain",
        "run/a,tree=chain": "chain",
        "run/b": "chain",
        "run/b,tree=top_budget": "top_budget",
    }
    contenders = [Contender.parse(f"{i}={text}") for i, text in enumerate(trees)]
    entries = load_entries("target", contenders)
    assert [entry.contender.tree for entry in entries] == list(trees.values())
    sizes = [entry.sized().drafter.size for entry in entries]
    assert sizes == [1 if text == "none" else 8 for text in trees]


@pytest.mark.usefixtures("models")
def test_the_kind_that_suits_a_drafter_uses_the_options_given():
    (entry,) = load_entries("target", [Contender.parse("a=run/a,candidates=6")])
    assert entry.sized().drafter.tree == TreeConfig("path_conditioned", 8, candidates=6)
    message = "'b': candidates is 6; expected it left out: a chain tree does not use it"
    with pytest.raises(ValueError, match=message):
        load_entries("target", [Contender.parse("b=run/b,candidates=6")])
