"""Answers that keep to grammars: the tokens of constrained plain decoding, whatever drafts."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.small_model import SmallModel
from jaxspec.serving.calls import Tool, calls_text
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import json_text, regex_text
from jaxspec.serving.grammars import Grammars
from jaxspec.serving.matcher import restrict
from jaxspec.serving.requests import Request
from jaxspec.serving.xml_calls import XmlCalls
from jaxspec.trees.tree import DraftTree
from tests import tiny
from tests.serving import engines
from tests.serving.structured import CONFIG, grammars, target, tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"(ab|cd){2,4}=[0-9]+!"
DRAFTERS = {
    "plain": PLAIN,
    "stranger": LoadedDrafter(
        SmallModel(CONFIG, TreeConfig("top_budget", size=12), depth=4),
        tiny.target(CONFIG, seed=2).params,
    ),
    "lookup": LoadedDrafter(PromptLookup(size=8, depth=5)),
    "itself": LoadedDrafter(
        SmallModel(CONFIG, TreeConfig("top_budget", size=12), depth=4), target().params
    ),
}


def grammar(text):
    return grammars().of(text)


def regex(pattern):
    return grammar(regex_text(pattern))


def asked() -> list[Request]:
    """Constrained answers beside free ones, greedy and sampled."""
    prompt = tuple(tokenizer().encode('user: {"name": "tool", "age": 7}\n'))
    json = grammar(json_text(SCHEMA, ""))
    call = calls_text(XmlCalls, [Tool("see", SCHEMA)], free=False, several=False)
    hot = Sampling(temperature=0.9)
    return [
        Request(prompt, 40, Sampling(), 1, grammar=json),
        Request(prompt, 24, Sampling(), 2),
        Request(prompt[:9], 40, hot, 3, grammar=json),
        Request(prompt[:5], 24, hot, 4),
        Request(prompt, 30, Sampling(), 5, grammar=regex(REGEX)),
        Request(prompt, 30, Sampling(temperature=1.5, top_k=9), 6, grammar=regex(REGEX)),
        Request(prompt[:7], 1, Sampling(), 7, grammar=json),
        Request(prompt[:7], 72, Sampling(), 8, grammar=grammar(call)),
    ]


@functools.cache
def engine(drafter: str, schedule: str = "fixed", slots: int = 2) -> Engine:
    fixed = schedule == "fixed"
    plan = Fixed() if fixed else engines.SCHEDULES["adaptive"]
    limits = dict(slots=slots, room=96, chunk=16, max_nodes=24, throughput=True)
    config = EngineConfig(schedule=plan, top_logprobs=2, **limits)
    made = Engine(target(), DRAFTERS[drafter], config)
    if not fixed:
        made = Engine(target(), DRAFTERS[drafter], config, curve=engines.staircase(made))
    return made


def answers(engine, requests):
    ids = [engine.submit(request) for request in requests]
    found = engines.drain(engine)
    return [found[id] for id in ids]


@functools.cache
def expected() -> tuple[tuple[int, ...], ...]:
    return tuple(map(engines.tokens, answers(engine("plain"), asked())))


def by_definition(request: Request) -> tuple[int, ...]:
    """Greedy decoding, one forward of the whole text and one mask a token."""
    text, matcher = list(request.prompt), request.grammar.matcher()
    while len(text) < len(request.prompt) + request.max_new_tokens:
        logits = np.array(tiny.logits(target(), text)[-1])
        words = np.array(matcher.allowed)
        may = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)]
        logits[may == 0] = -np.inf
        text.append(int(logits.argmax()))
        if text[-1] == 0:
            break
        matcher.advance(text[-1:])
    return tuple(text[len(request.prompt) :])


def test_plain_decoding_follows_the_definition():
    for i in (0, 4):
        assert expected()[i] == by_definition(asked()[i])


def test_answers_keep_to_their_grammars():
    texts = [tokenizer().decode(row) for row in expected()]
    for i in (4, 5):
        assert re.fullmatch(REGEX, texts[i]) or expected()[i][-1] != 0
    for i in (0, 2, 6):
        assert texts[i].startswith('{"name": "'[: len(texts[i])])
    assert texts[7].startswith("<tool_call>\n<function=see>\n<parameter=name>\n")
    assert not texts[1].startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "schedule"),
    [("lookup", "fixed"), ("lookup", "adaptive"), ("stranger", "fixed"), ("itself", "fixed")],
)
def test_trees_give_constrained_plain_decodings_tokens(drafter, schedule):
    found = answers(engine(drafter, schedule), asked())
    assert tuple(map(engines.tokens, found)) == expected()
    assert [updates[-1].finish for updates in found][6] == "length"
    if drafter == "itself":
        assert max(found[0][-1].stats.committed) > 2


def chain_of(text: str) -> list[int]:
    return [token for letter in text for token in tokenizer().encode(letter)]


def drafted(tokens, parents, scores=None) -> DraftTree:
    """One row's tree on the host, its root first."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    scores = -np.arange(len(tokens)) if scores is None else scores
    nodes = np.array(tokens), np.array(parents), np.array(depths), np.array(scores, np.float32)
    return DraftTree(*nodes, np.array(parents) != -2)


def paths(tree: DraftTree) -> list[str]:
    """The text of every node's path, in the nodes' order."""
    found = [""]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        if parent >= 0:
            found.append(found[parent] + tokenizer().decode([int(token)]))
    assert tree.valid.sum() == len(found)
    return found


def letters(bits: np.ndarray) -> str:
    return "".join(sorted(tokenizer().decode([i]) for i in set_bits(bits) if i))


def set_bits(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def test_a_tree_loses_what_may_not_be():
    """root - a - b - ! and beside it  root - c - c,  for (ab|cd){2,4}=..."""
    tree = drafted([1, *chain_of("ab!cc")], [-1, 0, 1, 2, 0, 4])
    matcher = regex(REGEX).matcher()
    found, after = matcher.restrict(tree, most=4, deepest=9)
    assert paths(found) == ["", "a", "ab", "c"]
    assert [letters(row) for row in after[:4]] == ["ac", "b", "ac", "d"]
    assert letters(matcher.allowed) == "ac"  # the tree leaves it where it was


@pytest.mark.parametrize(
    ("most", "deepest", "expected"),
    [
        (6, 9, ["", "a", "ab", "c", "cd", "cda"]),
        (5, 9, ["", "a", "ab", "c", "cd"]),
        (6, 1, ["", "a", "c"]),
        (6, 0, [""]),
        (1, 9, [""]),
    ],
)
def test_a_tree_gains_what_is_forced(most, deepest, expected):
    """After an a only b may come, after a c only d: they score as the node that they follow."""
    tree = drafted([1, *chain_of("acda"), 0], [-1, 0, 0, 2, 3, -2], [0, -1, -2, -7, -8, 0])
    found, _ = regex(REGEX).matcher().restrict(tree, most, deepest)
    assert paths(found) == expected
    scores = {"": 0, "a": -1, "ab": -1, "c": -2, "cd": -2, "cda": -8}
    assert found.scores[: len(expected)].tolist() == [scores[path] for path in expected]


def test_a_forced_node_that_was_drafted_keeps_what_was_drafted_below():
    tree = drafted([1, *chain_of("xyab")], [-1, 0, 1, 2, 3], [0, -3, -4, -5, -6])
    found, _ = regex("xy[a-d]+!").matcher().restrict(tree, most=5, deepest=9)
    assert paths(found) == ["", "x", "xy", "xya", "xyab"]
    assert found.scores.tolist() == [0, 0, 0, -5, -6]


def test_a_forced_text_is_spelt_as_the_tokenizer_does():
    tree = drafted([1, 0, 0, 0], [-1, -2, -2, -2])
    found, _ = regex("(tool){100}").matcher().restrict(tree, most=4, deepest=9)
    assert paths(found) == ["", "tool", "tooltool", "tooltooltool"]


def test_a_row_without_a_grammar_keeps_its_tree():
    row = drafted([1, *chain_of("?!")], [-1, 0, 0])
    trees = jax.tree.map(lambda x: np.stack([x, x]), row)
    matchers = [None, regex("!").matcher()]
    draft = restrict(matchers, trees, most=3, deepest=2, vocab=CONFIG.vocab_size)
    assert draft.tree.tokens[0].tolist() == row.tokens.tolist()
    assert (draft.allowed[0] == 2**32 - 1).all()
    second = jax.tree.map(lambda x: x[1], draft.tree)
    assert paths(second) == ["", "!", "!"]  # and the stop id, which has no text
    assert second.tokens.tolist() == [1, *chain_of("!"), 0]


def test_a_dead_end_is_not_drafted_and_ends_its_answer_alone():
    """No token of this vocabulary begins the letter after the a."""
    stuck = regex("(aa|€)b|c€")
    tree = drafted([1, *chain_of("ca")], [-1, 0, 0])
    assert paths(stuck.matcher().restrict(tree, most=3, deepest=1)[0]) == ["", "a"]
    bias = {tokenizer().encode("c")[0]: 100.0}
    prompt = tuple(tokenizer().encode("user:"))
    lost = Request(prompt, 9, Sampling(logit_bias=bias), grammar=stuck)
    found = answers(engine("plain"), [lost, asked()[1], lost])
    for updates in (found[0], found[2]):
        assert updates[-1].finish == "stuck" and updates[-1].failure
    assert engines.tokens(found[1]) == expected()[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampling=Sampling(stop_ids=())), "ends with one of the target's own stop ids"),
        (dict(sampling=Sampling(min_tokens=2)), "a grammar decides where its answer ends"),
    ],
)
def test_what_excludes_a_grammar_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        engine("plain").submit(Request((1,), 9, grammar=regex("a"), **options))


@pytest.mark.parametrize("vocab", [107, 127, 128, 129, 160])
def test_a_model_may_have_more_tokens_than_its_tokenizer(vocab):
    """None of them may come, and 32 of them are one word of a mask, exactly."""
    assert len(tokenizer().encode("ab")) == 2
    config = dataclasses.replace(CONFIG, vocab_size=vocab)
    matcher = Grammars(tokenizer(), config).of(regex_text("ab")).matcher()
    a, b, end = *tokenizer().encode("ab"), 0
    assert bits(matcher.allowed, vocab) == [a]
    tree = drafted([9, a, b, b], [-1, 0, 1, 0])  # a path of two, and a wrong one
    found, after = matcher.restrict(tree, most=4, deepest=2)
    assert found.tokens.tolist() == [9, a, b, 0]
    assert [bits(row, vocab) for row in after[:3]] == [[a], [b], [end]]
    matcher.advance([a])
    assert bits(matcher.allowed, vocab) == [b]


def bits(words: np.ndarray, vocab: int) -> list[int]:
    assert words.shape == (-(-vocab // 32),)
    return set_bits(words)


def test_log_probabilities_beside_a_grammar_are_the_models_own():
    prompt = tuple(tokenizer().encode("user: tool"))
    asked = Request(prompt, 12, grammar=regex(REGEX), logprobs=0)
    (updates,) = answers(engine("plain"), [asked])
    tokens = engines.tokens(updates)
    law = jax.nn.log_softmax(tiny.logits(target(), [*prompt, *tokens])[len(prompt) - 1 : -1])
    own = np.asarray(law)[np.arange(len(tokens)), list(tokens)]
    found = [one.logprob for update in updates for one in update.logprobs]
    np.testing.assert_allclose(found, own, atol=1e-4)
