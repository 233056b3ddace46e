"""Grammars of answers: parsing them, once for all requests.

A `Grammar` is parsed once, for all requests that ask for it; a `Matcher` is one answer's
position in it. The parsers are llguidance's (https://github.com/guidance-ai/llguidance), which
limit their own steps, so a hostile grammar is refused or ends its own answer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import time
from typing import Any

import numpy as np

from jaxspec.config import TargetConfig
from jaxspec.serving.matcher import Matcher, following
from jaxspec.tokenizer import Tokenizer

KEPT = 64  # most recently used grammars that are kept
MAX_CHARACTERS = 1 << 17  # of a grammar's text
CPU_SECONDS = 1.0  # to parse a grammar and to find the first tokens
# In llguidance's messages: the place in the grammar's text, which no user has written.
PLACE = re.compile(r"^at \d+\(\d+\): |(\n +\d+ \| |<non-verbose).*", re.DOTALL)
LIMITS = dict(max_lexer_states=20_000, step_lexer_fuel=50_000, step_max_items=20_000)


@dataclasses.dataclass(frozen=True)
class Lead:
    """Any text that comes before what a grammar describes.

    Attributes:
      end: the text that ends it.
      may_end: whether the answer may end in it.
    """

    end: str
    may_end: bool

    def before(self, text: str) -> str:
        """The text of a grammar of answers with this lead."""
        end = re.escape(self.end).replace("/", r"\/")
        start = "LEAD_ALONE | lead after" if self.may_end else "lead after"
        rules = [f"start: {start}", f"lead[lazy]: /(.|\\n)*{end}/"]
        if self.may_end:
            rules.append(rf"LEAD_ALONE: /(.|\n)*/ & ~/(.|\n)*{end}(.|\n)*/")
        return "\n".join([*rules, text.replace("start:", "after:", 1)])


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """The set of allowed answers.

    Attributes:
      start: an `llguidance.LLMatcher` that has consumed nothing.
      first: [ceil(V / 32)] uint32, bits of the tokens allowed first, after the lead.
      ends: stop ids.
      lead: text before the grammar holds, if a token of its own ends it; else None.
      begin: that token; until it comes, answers are not restricted.
    """

    start: Any
    first: np.ndarray
    ends: frozenset[int]
    lead: Lead | None
    begin: int | None

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer."""
        return Matcher(self.start, self.first, self.ends, self.begin)


class Grammars:
    """Parses and keeps grammars over one target's tokens."""

    def __init__(self, tokenizer: Tokenizer, config: TargetConfig):
        self._tokenizer, self._config = tokenizer, config
        self._one_at_a_time = threading.Lock()
        self._known = functools.lru_cache(KEPT)(self._parse)

    def of(self, text: str, lead: Lead | None = None) -> Grammar:
        """The grammar of a text in llguidance's format.

        Args: lead: comes before what the text describes.

        Raises:
          ValueError: the text is not a grammar, is too large or takes too long to parse; or the
            target has no stop ids.
        """
        if not self._config.eos_token_ids:
            raise ValueError("the target has no stop ids, which a grammar's answers end with")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"the grammar has {len(text)} characters; expected up to {MAX_CHARACTERS}"
            )
        with self._one_at_a_time:
            return self._known(text, lead)

    def _parse(self, text: str, lead: Lead | None) -> Grammar:
        begin = lead and self._tokenizer.id_of(lead.end)
        if lead is not None and begin is None:
            text, lead = lead.before(text), None
        library, tokens = llguidance(), self._tokens
        limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
        began = time.thread_time()
        start = library.LLMatcher(tokens, text, log_level=0, limits=limits)
        words = -(-self._config.vocab_size // 32)
        mask = None if start.is_error() else following(start, words)
        if mask is None:
            why = PLACE.sub("", start.get_error()).strip()
            raise ValueError(why or "no sequence of this model's tokens matches the grammar")
        seconds = time.thread_time() - began
        if seconds > CPU_SECONDS:
            raise ValueError(
                f"the grammar takes {seconds:.1f} s of CPU time to start; expected up to "
                f"{CPU_SECONDS}"
            )
        return Grammar(start, mask, frozenset(self._config.eos_token_ids), lead, begin)

    @functools.cached_property
    def _tokens(self):
        """The vocabulary in llguidance's form."""
        library, config = llguidance(), self._config
        wrapped = library.TokenizerWrapper(_Vocabulary(self._tokenizer, config))
        return library.LLTokenizer(wrapped, config.vocab_size, list(config.eos_token_ids))


class _Vocabulary:
    """A tokenizer with the interface of `llguidance.TokenizerWrapper`.

    Tokens in angle brackets that are part of the text, as Qwen3's `<tool_call>`, stand for
    their bytes; llguidance's own reader of tokenizers takes them for special tokens.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, config: TargetConfig):
        every = range(config.vocab_size)
        self._tokenizer, self.eos_token_id = tokenizer, config.eos_token_ids[0]
        self.tokens = [tokenizer.token_bytes(token) for token in every]
        self.special_token_ids = [token for token in every if tokenizer.is_special(token)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


def llguidance():
    """Imports llguidance; raises ValueError if it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ValueError(
            "grammars need llguidance, which is not installed (pip install llguidance)"
        ) from error
    return llguidance
