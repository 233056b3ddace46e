"""Grammars that answers keep to, on the host: what may follow each node of a drafted tree.

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
from jaxspec.decoding.allowed import AllowedTokens
from jaxspec.tokenizer import Tokenizer

KEPT = 64  # grammars, the last ones used
MAX_CHARACTERS = 1 << 17  # of a grammar's text
CPU_SECONDS = 1.0  # to parse a grammar and to find the first tokens
LIMITS = dict(max_lexer_states=20_000, step_lexer_fuel=50_000, step_max_items=20_000)
ALL = np.uint32(2**32 - 1)


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


class Matcher:
    """Where one answer is in its grammar.

    Attributes:
      allowed: [ceil(V / 32)] uint32, bits of the tokens that may come next; all of them once
        the answer has ended, or is stuck.
      failure: why no token may come next, if the answer is stuck; else None.
    """

    def __init__(self, start: Any, first: np.ndarray, ends: frozenset[int]):
        self._start, self._ends = start, ends
        self._tokens: list[int] = []
        self._now = start.deep_copy()
        self.failure: str | None = None
        self.allowed = first

    def advance(self, tokens: Sequence[int]) -> None:
        """Goes on by the answer's next tokens, which were allowed."""
        for token in tokens:
            if token in self._ends or self.failure:
                self.allowed = np.full_like(self.allowed, ALL)
                return
            self._now.consume_token(token)
            self._tokens.append(token)
        self.allowed = self._mask()

    def walk(
        self, tokens: Sequence[int], parents: Sequence[int], valid: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is allowed of one tree, parents before children, whose root is the last token.

        Returns:
          kept [N] bool, and the bits after each node [N, ceil(V / 32)], as in `AllowedTokens`.
        """
        kept = np.zeros(len(tokens), bool)
        after = np.full((len(tokens), len(self.allowed)), ALL, np.uint32)
        children: list[list[int]] = [[] for _ in tokens]
        for node in range(1, len(tokens)):
            if valid[node]:
                children[parents[node]].append(node)

        def visit(node: int, path: list[int], mask: np.ndarray) -> None:
            kept[node], after[node] = True, mask
            for child in children[node]:
                token = int(tokens[child])
                if not mask[token // 32] >> (token % 32) & 1:
                    continue
                if token in self._ends:  # nothing comes after it
                    kept[child] = True
                    continue
                self._now.consume_token(token)
                below = _mask(self._now, len(mask))
                if below is None:  # a dead end, which plain decoding would meet as well
                    self._restore(path)
                    continue
                visit(child, [*path, token], below)
                self._now.rollback(1)

        visit(0, [], self.allowed)
        return kept, after

    def _mask(self) -> np.ndarray:
        found = _mask(self._now, len(self.allowed))
        if found is None:
            self.failure = self._now.get_error().partition("\n")[0] or "no token may follow"
            return np.full_like(self.allowed, ALL)
        return found

    def _restore(self, path: Sequence[int]) -> None:
        """After an error, which a parser never leaves: another one, at the same place."""
        self._now = self._start.deep_copy()
        self._now.consume_tokens([*self._tokens, *path])


def _mask(now: Any, words: int) -> np.ndarray | None:
    """Bits of the tokens that may come next [words]; None if the parser cannot go on.

    The library's have one bit more, which takes a word of its own where 32 divides V.
    """
    found = np.frombuffer(now.compute_bitmask(), np.uint32)[:words]
    return None if now.is_error() or not found.any() else found


def allowed_tokens(
    matchers: Sequence[Matcher | None],
    tokens: np.ndarray,
    parents: np.ndarray,
    valid: np.ndarray,
    vocab: int,
) -> AllowedTokens:
    """Of a batch of trees [B, N]; rows without a matcher are not restricted."""
    kept = np.ones(tokens.shape, bool)
    after = np.full((*tokens.shape, -(-vocab // 32)), ALL, np.uint32)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            tree = tokens[row].tolist(), parents[row].tolist(), valid[row].tolist()
            kept[row], after[row] = matcher.walk(*tree)
    return AllowedTokens(kept, after)


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
        mask = None if start.is_error() else _mask(start, words)
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
