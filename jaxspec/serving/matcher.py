"""The state of an answer in its grammar, and drafted trees restricted by it.

Nodes that the grammar forbids are removed from a tree. Where it allows only one token, as in
the keys of a JSON schema, that token is added as a node. llguidance allows forced text only in
the tokenizer's own spelling.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxspec.decoding.state import Draft
from jaxspec.trees.tree import NO_PARENT, DraftTree

ALL = np.uint32(2**32 - 1)


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node of a restricted tree.

    Attributes:
      path: the drafted tokens from the root to this node.
      after: bits of the tokens allowed after it.
    """

    parent: int
    score: float
    path: tuple[int, ...]
    after: np.ndarray


class Matcher:
    """The state of one answer in its grammar.

    Attributes:
      waiting: whether any token may come next, as the grammar's lead has not ended.
      allowed: [ceil(V / 32)] uint32, bits of the tokens allowed next, or after the lead; all
        are set once the answer has ended or failed.
      failure: why no token is allowed next; None while the answer can go on.
    """

    def __init__(
        self, start: Any, first: np.ndarray, ends: frozenset[int], begin: int | None = None
    ):
        """Args: start: an `llguidance.LLMatcher` at the start; first: bits of the tokens
        allowed first; ends: stop ids; begin: the token that ends the lead, if there is one."""
        self._start, self._ends, self._begin = start, ends, begin
        self.waiting = begin is not None
        self._parser = start.deep_copy()
        self._decided: list[int] = []
        self._path: tuple[int, ...] = ()  # drafted tokens that the parser has consumed too
        self._over = False
        self.failure: str | None = None
        self.allowed = first

    def advance(self, tokens: Sequence[int]) -> None:
        """Consumes the answer's next tokens, which must have been allowed; where a lead ends,
        up to its end."""
        if self.waiting:
            self.waiting = self._begin not in tokens
            return
        for token in tokens:
            self._over |= token in self._ends
            if not self._over:
                self._parser.consume_token(token)
                self._decided.append(token)
        found = None if self._over else following(self._parser, len(self.allowed))
        if found is None and not self._over:
            self._over = True
            self.failure = self._parser.get_error().partition("\n")[0] or "no token may follow"
        self.allowed = np.full_like(self.allowed, ALL) if found is None else found

    @property
    def forces(self) -> bool:
        """Whether the grammar allows only one token next."""
        return not self._over and _only_one(self.allowed) is not None

    def restrict(
        self, drafted: DraftTree, most: int, deepest: int
    ) -> tuple[DraftTree, np.ndarray]:
        """The best nodes among a drafted tree's allowed ones and forced ones.

        A forced node has its parent's score.

        Args:
          drafted: this row's tree on the host, [N]; its root is the answer's last token.
          most: maximum nodes, root included.
          deepest: maximum depth.

        Returns:
          The tree [N], best nodes first, and the bits of the tokens allowed after each node
          [N, ceil(V / 32)].
        """
        children: list[list[int]] = [[] for _ in drafted.tokens]
        for node in np.flatnonzero(drafted.valid[1:]) + 1:
            children[drafted.parents[node]].append(int(node))
        nodes = [_Node(NO_PARENT, 0.0, (), self.allowed)]
        waiting: list[tuple] = []  # (-score, order, parent, token, drafted children)
        order = itertools.count()

        def wait_below(parent: int, own: Sequence[int]) -> None:
            above, drafts = nodes[parent], {int(drafted.tokens[i]): i for i in own}
            forced = _only_one(above.after)
            for token in drafts if forced is None else (forced,):
                if above.after[token // 32] >> (token % 32) & 1:
                    node = drafts.get(token)
                    score = above.score if forced == token else float(drafted.scores[node])
                    below = () if node is None else children[node]
                    heapq.heappush(waiting, (-score, next(order), parent, token, below))

        if deepest and not self._over:
            wait_below(0, children[0])
        while waiting and len(nodes) < most:
            score, _, parent, token, below = heapq.heappop(waiting)
            path, ends = (*nodes[parent].path, token), token in self._ends
            after = np.full_like(self.allowed, ALL) if ends else self._after(path)
            if after is None:  # a dead end, which plain decoding would meet as well
                continue
            nodes.append(_Node(parent, -score, path, after))
            if not ends and len(path) < deepest:
                wait_below(len(nodes) - 1, below)
        self._go_to(())
        return _as_tree(nodes, drafted.tokens)

    def _after(self, path: tuple[int, ...]) -> np.ndarray | None:
        """Bits of the tokens allowed after a path whose last token is allowed; None if none."""
        self._go_to(path)
        found = following(self._parser, len(self.allowed))
        if found is None:
            self._start_again(path[:-1])
        return found

    def _go_to(self, path: tuple[int, ...]) -> None:
        """Moves the parser to a path of drafted tokens."""
        pairs = zip(self._path, path, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if len(self._path) > same:
            self._parser.rollback(len(self._path) - same)
        if len(path) > same:
            self._parser.consume_tokens(list(path[same:]))
        self._path = path

    def _start_again(self, path: tuple[int, ...]) -> None:
        """Replaces the parser, which cannot leave an error, by a new one at the path."""
        self._parser = self._start.deep_copy()
        self._parser.consume_tokens([*self._decided, *path])
        self._path = path


def following(parser: Any, words: int) -> np.ndarray | None:
    """Bits of the tokens allowed next [words]; None if the parser cannot go on.

    The library appends one bit, which takes another word where 32 divides V.
    """
    found = np.frombuffer(parser.compute_bitmask(), np.uint32)[:words]
    return None if parser.is_error() or not found.any() else found


def _only_one(after: np.ndarray) -> int | None:
    """The token whose bit is the only one set; None if several are."""
    if np.count_nonzero(after) != 1:  # most often; faster than to look for the words
        return None
    word = int(after.argmax())
    bits = int(after[word])
    return None if bits & (bits - 1) else 32 * word + bits.bit_length() - 1


def _as_tree(nodes: Sequence[_Node], drafted: np.ndarray) -> tuple[DraftTree, np.ndarray]:
    """Args: drafted: tokens [N] of the drafted tree."""
    tokens, parents, depths = np.zeros((3, len(drafted)), np.int32)
    tokens[0], parents[:] = drafted[0], NO_PARENT
    scores = np.full(len(drafted), -np.inf, np.float32)
    after = np.full((len(drafted), len(nodes[0].after)), ALL)
    for i, node in enumerate(nodes):
        if node.path:
            tokens[i] = node.path[-1]
        parents[i], depths[i], scores[i] = node.parent, len(node.path), node.score
        after[i] = node.after
    valid = np.arange(len(drafted)) < len(nodes)
    return DraftTree(tokens, parents, depths, scores, valid), after


def restrict(
    matchers: Sequence[Matcher | None], drafted: DraftTree, most: int, deepest: int, vocab: int
) -> Draft:
    """A batch's trees [B, N], on the host, restricted by their rows' grammars.

    Args:
      matchers: one per row; rows without a grammar have None and keep their tree.
      most, deepest: see `Matcher.restrict`.
      vocab: V.
    """
    rows = []
    for i, matcher in enumerate(matchers):
        own = jax.tree.map(lambda x, i=i: x[i], drafted)
        if matcher is None:
            rows.append((own, np.full((len(own.tokens), -(-vocab // 32)), ALL)))
        else:
            rows.append(matcher.restrict(own, most, deepest))
    tree, after = jax.tree.map(lambda *x: np.stack(x), *rows)
    return Draft(tree, allowed=after)
