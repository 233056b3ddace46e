"""Drafters by name, one's own included."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxspec
from examples.own_drafter import Followers, followers
from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.config import TreeConfig
from jaxspec.drafters import registry
from jaxspec.drafters.base import Committed, Drafter, LoadedDrafter
from jaxspec.drafters.joined import Joined
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from tests import tiny
from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.drafters import cases
from tests.slow import slow_but


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "NAMES", dict(registry.NAMES))


def test_names():
    target = tiny.target()
    assert jaxspec.load_drafter("none", target) is PLAIN
    assert jaxspec.load_drafter("ngram", target).drafter == PromptLookup()
    tree = TreeConfig("chain", size=4)
    assert jaxspec.load_drafter("ngram", target, tree=tree).drafter == PromptLookup(size=4)
    spec = "python:examples.own_drafter:followers"
    own = jaxspec.load_drafter(spec, target, tree=tree).drafter
    assert own == Followers(target.config.vocab_size, size=4)
    joined = jaxspec.load_drafter(f"{spec}+ngram", target, tree=tree).drafter
    assert joined == Joined((own, PromptLookup(size=4, depth=3)), 4)
    assert joined.parts == joined.drafters and own.parts == (own,)


def test_a_drafter_has_the_tree_that_suits_it_unless_one_is_given(tmp_path):
    target = tiny.target()
    for kind, rules, tree in (
        ("rnn", {}, "path_conditioned"),
        ("dflash", {}, "chain"),
        ("dspark", dict(survival=0.5), "chain"),
    ):
        loaded, folder = cases.loaded(kind, TreeConfig()), str(tmp_path / kind)
        save_drafter(folder, loaded)
        found = jaxspec.load_drafter(folder, target, **rules).drafter
        assert found.tree == TreeConfig(tree, size=8)
        both = jaxspec.load_drafter(f"{folder}+ngram", target, nodes=4, **rules).drafter
        assert both.drafters[0].tree == TreeConfig(tree, size=4)


def test_a_registered_name_is_one_line_of_ours(names):
    registry.register("followers", followers)
    found = jaxspec.load_drafter("followers", tiny.target())
    assert found.drafter == Followers(tiny.QWEN3.vocab_size)
    registry.register("followers", followers)  # again: the same
    with pytest.raises(ValueError, match="a drafter 'ngram' is registered already"):
        registry.register("ngram", followers)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("python:examples.own_drafter:leaders", "'leaders'.*expected python:MODULE:FUNCTION"),
        ("python:no.such.module:f", "No module named 'no'"),
        ("python:", "expected python:MODULE:FUNCTION"),
        ("ngram+ngram", "'ngram' has nothing to join with prompt lookup; leave [+]ngram out"),
        ("none+ngram", "'none' has nothing to join"),
        ("nothing", "there is no drafter 'nothing'; expected shipped"),
    ],
)
def test_names_that_are_none(spec, message):
    with pytest.raises(ValueError, match=message):
        jaxspec.load_drafter(spec, tiny.target())


def test_ones_own_drafter_may_lie_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "beside_me.py").write_text("from examples.own_drafter import followers\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as a command has
    found = jaxspec.load_drafter("python:beside_me:followers", tiny.target())
    assert found.drafter == Followers(tiny.QWEN3.vocab_size)


@pytest.mark.parametrize("schedule", slow_but(["fixed"], ["fixed", "adaptive"]))
def test_ones_own_drafter_from_the_command_line(tmp_path, monkeypatch, capsys, schedule):
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    folder = write_folder(tmp_path / "tiny", DENSE, random_tensors(DENSE))
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 2, 3, 1, 2], [4, 5]]")
    outputs = {}
    for drafter in ("none", "python:examples.own_drafter:followers"):
        options = ("--drafter", drafter, "--max-new-tokens", 24, "--json", "--dtype", "float32")
        options += ("--schedule", schedule)
        arguments = ("--target", folder, "--prompt-ids", ids, *options)
        assert main(["generate", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert ("speculation " in err) == (drafter != "none" and schedule == "adaptive")
        rows = [json.loads(line) for line in out.splitlines()]
        outputs[drafter] = [row["token_ids"] for row in rows]
    assert len(set(map(str, outputs.values()))) == 1
    assert main(["generate", *map(str, arguments), "--rejection"]) == BAD_INPUT
    assert "Followers does not" in capsys.readouterr().err


def test_followers_drafts_what_followed_last():
    drafter = Followers(vocab=9, size=5)
    seen = jnp.array([[3, 4, 5, 3, 6, 8, 8]])  # the last is padding

    @jax.jit
    def draft(anchor, budget):
        state = drafter.init((), 1, 16)
        known = Committed(seen, None, jnp.array([0]), jnp.array([6]))
        state = drafter.observe((), state, known)
        return drafter.draft((), state, anchor[None], jnp.array([6]), budget[None])[0]

    assert draft(4, 5).tokens[0].tolist() == [4, 5, 3, 6, 8]
    assert draft(4, 3).valid[0].tolist() == [True, True, True, False, False]
    assert draft(7, 5).valid[0].tolist() == [True, False, False, False, False]


def test_a_drafter_of_an_earlier_protocol_is_refused(names):
    class Earlier(Drafter):
        def draft(self, params, state, anchor, position, budget):
            raise AssertionError("it is refused before it drafts")

    registry.register("earlier:", lambda *_, **__: LoadedDrafter(Earlier()))
    message = "'earlier:x': Earlier.draft cannot be called.*expected.*budget, noise of"
    with pytest.raises(ValueError, match=message):
        jaxspec.load_drafter("earlier:x", tiny.target())


def test_defaults_of_a_drafter():
    class Bare(Drafter):
        size, depth = 2, 1

    bare = Bare()
    assert (bare.taps, bare.verify_sizes, bare.head_config) == ((), (), None)
    assert bare.abstract_params(tiny.target().params) == ()
    with pytest.raises(ValueError, match="has a fixed tree"):
        bare.with_tree(TreeConfig())
    with pytest.raises(ValueError, match="Bare does not"):
        bare.check_sampled()
    with pytest.raises(ValueError, match="Bare does not score tokens"):
        bare.rollout((), (), None, None, None)
