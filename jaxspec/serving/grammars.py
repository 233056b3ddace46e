"""Grammars that answers keep to.

A `Grammar` is made once for a text and shared by the requests that ask for it; a `Matcher` is
where one answer is in it. The parsers are llguidance's (https://github.com/guidance-ai/llguidance),
which bound their own steps, so a hostile grammar is refused or ends its own answer.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxspec.config import TargetConfig
from jaxspec.serving.matcher import Matcher, following
from jaxspec.tokenizer import Tokenizer

KEPT = 64  # grammars, the last ones used
MAX_CHARACTERS = 1 << 17  # of a grammar's text
CPU_SECONDS = 1.0  # to parse a grammar and to find the first tokens
LIMITS = dict(max_lexer_states=20_000, step_lexer_fuel=50_000, step_max_items=20_000)


class Grammar:
    """What answers may be.

    Attributes:
      text: in llguidance's format; equal grammars have equal texts.
    """

    def __init__(self, text: str, start: Any, first: np.ndarray, ends: Sequence[int]):
        """Args: start: an `llguidance.LLMatcher` that has seen nothing; first: bits of what may
        come first; ends: stop ids."""
        self.text, self._start, self._first = text, start, first
        self._ends = frozenset(ends)

    def __eq__(self, other) -> bool:
        return isinstance(other, Grammar) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def matcher(self) -> Matcher:
        """One at the start of an answer."""
        return Matcher(self._start, self._first, self._ends)


class Grammars:
    """The grammars of one target's tokens."""

    def __init__(self, tokenizer: Tokenizer, config: TargetConfig):
        self._tokenizer, self._config = tokenizer, config
        self._one_at_a_time = threading.Lock()
        self._known = functools.lru_cache(KEPT)(self._parse)

    def of(self, text: str) -> Grammar:
        """The grammar of a text in llguidance's format.

        Raises:
          ValueError: it is none, it is too large, or it takes too long; or the target has no
            stop ids.
        """
        if not self._config.eos_token_ids:
            raise ValueError("the target has no stop ids to end with")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"the grammar has {len(text)} characters; expected up to {MAX_CHARACTERS}"
            )
        with self._one_at_a_time:
            return self._known(text)

    def _parse(self, text: str) -> Grammar:
        library, tokens = llguidance(), self._tokens
        limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
        began = time.thread_time()
        start = library.LLMatcher(tokens, text, log_level=0, limits=limits)
        words = -(-self._config.vocab_size // 32)
        mask = None if start.is_error() else following(start, words)
        if mask is None:
            why = start.get_error().partition("<non-verbose")[0].strip()
            raise ValueError(why or "no text of this model's tokens fits it")
        seconds = time.thread_time() - began
        if seconds > CPU_SECONDS:
            raise ValueError(
                f"it takes {seconds:.1f} s of computing to begin; expected up to {CPU_SECONDS}"
            )
        return Grammar(text, start, mask, self._config.eos_token_ids)

    @functools.cached_property
    def _tokens(self):
        """The tokens as llguidance knows them."""
        library, config = llguidance(), self._config
        wrapped = library.TokenizerWrapper(_Vocabulary(self._tokenizer, config))
        return library.LLTokenizer(wrapped, config.vocab_size, list(config.eos_token_ids))


class _Vocabulary:
    """A tokenizer in the shape that `llguidance.TokenizerWrapper` takes.

    Tokens that are names in angle brackets but part of a text, as Qwen3's `<tool_call>`, are
    their bytes; llguidance's own reading of a tokenizer takes them for special ones.
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
    """The library; ValueError if it is not there."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ValueError(
            "the server has no grammars: llguidance is not installed (pip install llguidance)"
        ) from error
    return llguidance
