"""Text before a grammar holds: decoded freely up to the token that ends it, then restricted."""

import functools

import numpy as np
import pytest
from tokenizers import AddedToken

from jaxspec.decoding.sampling import Sampling
from jaxspec.serving.formats import regex_text
from jaxspec.serving.grammars import Grammars, Lead
from jaxspec.serving.programs import Programs
from jaxspec.serving.requests import Request
from jaxspec.tokenizer import Tokenizer
from tests import tiny
from tests.serving import engines, structured
from tests.serving.structured import CONFIG, MERGES, VOCABULARY, target
from tests.serving.test_grammars import answers, engine

BEGIN, END = VOCABULARY.index("tool"), 0
REGEX = r"(ab|cd){2,4}=[0-9]!"
PROMPT = tuple(structured.tokenizer().encode("user: a tool\n"))


@functools.cache
def grammar(*, may_end: bool):
    """A regular expression behind any text that the token `tool` ends."""
    tokenizer = Tokenizer.from_bpe(
        VOCABULARY, MERGES, special=[0, 1], eos=0, chat_template=None
    )
    tokenizer.fast.add_tokens([AddedToken("tool", special=False)])
    found = Grammars(tokenizer, CONFIG).of(regex_text(REGEX), Lead("tool", may_end))
    assert found.begin == BEGIN
    return found


def likely(begin: float = 0.0, end: float = 0.0, **options) -> Sampling:
    return Sampling(logit_bias={BEGIN: begin, END: end}, **options)


def asked() -> list[Request]:
    """Answers that begin their grammars at once, later, and never, beside a free one."""
    free, needed = grammar(may_end=True), grammar(may_end=False)
    hot = dict(temperature=1.0)
    return [
        Request(PROMPT, 30, likely(100), 1, grammar=free),
        Request(PROMPT, 60, likely(3, **hot), 2, grammar=free),
        Request(PROMPT[:9], 24, likely(-100, **hot), 3, grammar=free),
        Request(PROMPT[:5], 24, likely(**hot), 4),
        Request(PROMPT, 30, likely(3, 100), 5, grammar=needed),
        Request(PROMPT[:7], 60, likely(3, 2, **hot), 6, grammar=needed),
        Request(PROMPT[:7], 1, likely(100), 7, grammar=free),
    ]


def by_definition(request: Request) -> tuple[int, ...]:
    """Greedy decoding, one forward of the whole text and, after the lead, one mask a token."""
    text, matcher = list(request.prompt), request.grammar.matcher()
    while len(text) < len(request.prompt) + request.max_new_tokens:
        logits = np.array(tiny.logits(target(), text)[-1])
        for token, bias in request.sampling.logit_bias:
            logits[token] += bias
        may = np.ones(len(logits), bool)
        if not matcher.waiting:
            words = np.array(matcher.allowed)
            may = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)] == 1
        elif not request.grammar.lead.may_end:
            may[END] = False
        text.append(int(np.where(may, logits, -np.inf).argmax()))
        if text[-1] == END:
            break
        matcher.advance(text[-1:])
    return tuple(text[len(request.prompt) :])


@functools.cache
def expected() -> tuple[tuple[int, ...], ...]:
    return tuple(map(engines.tokens, answers(engine("plain"), asked())))


def test_plain_decoding_follows_the_definition():
    for i in (0, 4):
        assert expected()[i] == by_definition(asked()[i])
    assert [BEGIN in tokens for tokens in expected()] == [1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("drafter", "schedule"),
    [
        ("lookup", "fixed"),
        pytest.param("lookup", "adaptive", marks=pytest.mark.slow),
        pytest.param("itself", "fixed", marks=pytest.mark.slow),
    ],
)
def test_trees_give_the_same(drafter, schedule):
    found = answers(engine(drafter, schedule), asked())
    assert tuple(map(engines.tokens, found)) == expected()
    finishes = [updates[-1].finish for updates in found]
    assert finishes == ["stop", "stop", "length", "length", "stop", "stop", "length"]


def test_rounds_are_whole_until_a_grammar_begins(monkeypatch):
    restricting, whole = [], Programs.restricted_round

    def watched(programs, batch, habit, staircase, matchers):
        restricting.extend(filter(None, matchers))
        return whole(programs, batch, habit, staircase, matchers)

    monkeypatch.setattr(Programs, "restricted_round", watched)
    answers(engine("lookup", "fixed"), [asked()[2]])
    assert not restricting
    answers(engine("lookup", "fixed"), [asked()[0]])
    assert restricting


def test_a_begin_that_is_a_stop_id_ends_the_answer():
    stops = likely(100, stop_ids=(END, BEGIN))
    (updates,) = answers(
        engine("plain"), [Request(PROMPT, 9, stops, grammar=grammar(may_end=True))]
    )
    assert (engines.tokens(updates), updates[-1].finish) == ((BEGIN,), "stop")


def test_an_added_token_of_its_own_ends_a_lead():
    tokenizer = structured.tokenizer()
    assert tokenizer.id_of("tool") is None  # ordinary text
    assert tokenizer.id_of("<end>") is None  # decoding omits it
    assert Grammars(tokenizer, CONFIG).of(regex_text("ab"), Lead("tool", True)).begin is None


@pytest.mark.parametrize(
    ("text", "free", "needed"),
    [("tool", False, False), ("", True, False), ("b a", True, False),
     ("b\n toolab", True, True), ("toolb", False, False), ("toolabtoolab", False, False)],
)  # fmt: skip
def test_a_lead_in_the_grammar_where_no_token_ends_it(text, free, needed):
    found = [
        structured.fits(regex_text("ab"), text, Lead("tool", end)) for end in (True, False)
    ]
    assert found == [free, needed]
