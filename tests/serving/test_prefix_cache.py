"""Prefixes that are not run again: the same numbers, tokens and rounds as without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.drafters.base import Drafter, LoadedDrafter
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.prefix_cache import PrefixIndex
from jaxspec.serving.requests import Request
from jaxspec.trees.tree import chain
from tests import tiny
from tests.serving import engines
from tests.serving.engines import drain, tokens
from tests.slow import slow_but

SYSTEM = tuple(tiny.prompts(37)[0])  # two chunks of 16, and 5 tokens
TURNS = [
    Request((*SYSTEM, *own), 8, Sampling(temperature=temperature, stop_ids=()), seed=i)
    for i, (own, temperature) in enumerate(
        [((1, 2), 0.0), ((3,), 0.8), ((1, 2), 0.0), ((4,) * 11, 0.0), ((4,) * 12, 0.8)]
    )
]


@dataclasses.dataclass(frozen=True)
class Recurrent(Drafter):
    """Drafts from a state that all tokens of the text went into, in order."""

    size: int = 4
    depth: int = 3

    def init(self, params, batch, capacity):
        return jnp.zeros(batch, jnp.int32)

    def observe(self, params, state, committed):
        for i in range(committed.tokens.shape[1]):
            mixed = (state * 31 + committed.tokens[:, i]) % 1009
            state = jnp.where(i < committed.count, mixed, state)
        return state

    def draft(self, params, state, anchor, position, budget, noise=None):
        drafted = (state[:, None] + jnp.arange(self.depth)) % 11
        return chain(anchor, drafted, budget - 1, size=self.size), state


DRAFTERS = {
    "keys and values": engines.DRAFTERS["survival tree"],
    "tokens": engines.LOOKUP,
    "recurrent": LoadedDrafter(Recurrent()),
}


def cold(drafter=engines.LOOKUP, megabytes=1.0, slots=1):
    few = dict(slots=slots, budget=2, schedule=Fixed(), prefix_cache_mb=megabytes)
    return Engine(tiny.target(), drafter, EngineConfig(**(engines.CONFIG | few)))


def engine(*options):
    made = cold(*options)
    made.warm_up()
    return made


def answers(engine, requests):
    """Of one request after the other: tokens, counts, and tokens of the prompt not run."""
    found = []
    for request in requests:
        id = engine.submit(request)
        updates = drain(engine)[id]
        found.append((tokens(updates), updates[-1].stats, updates[0].cached))
    return found


@pytest.mark.parametrize("name", slow_but(["tokens"], DRAFTERS))
def test_a_hit_changes_neither_tokens_nor_rounds(name):
    plain = answers(engine(DRAFTERS[name], 0), TURNS)
    found = answers(engine(DRAFTERS[name]), TURNS)
    assert [x[:2] for x in found] == [x[:2] for x in plain]
    assert [x[2] for x in plain] == [0] * 5
    # The fourth prompt has 48 tokens: of its three chunks the last must run.
    assert [x[2] for x in found] == [0, 32, 32, 32, 48]


@pytest.mark.parametrize("name", slow_but(["tokens"], DRAFTERS))
def test_a_prefix_is_bit_for_bit_what_running_it_gives(name):
    made = engine(DRAFTERS[name])
    programs, prefixes, request = made._programs, made._prefixes, TURNS[4]
    requests = programs.pack(request)

    def run(prefilling, first, keep=None):
        for i in range(first, 4):
            prefilling = programs.run_chunk(requests, i, prefilling)
            if keep is not None and i < 3:
                prefixes.keep(prefilling, keep, request.prompt, "")
        return jax.device_get((prefilling.cache, prefilling.drafter, prefilling.final))

    scratch = run(programs.begin_prompt(), 0, keep=[])
    prefilling, pages = prefixes.begin(programs.begin_prompt(), request.prompt, "")
    assert len(pages) == 3
    for x, y in zip(*map(jax.tree.leaves, (scratch, run(prefilling, 3))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_memory_is_bounded_and_old_prefixes_give_way():
    made = engine(engines.LOOKUP, 0.05)
    used, room = made.prefix_pages
    assert used == 0 and 2 <= room <= 6
    start = made.device_bytes()
    asked = [Request(tuple(prompt), 4) for prompt in tiny.prompts(*[50] * 6)]
    first = answers(made, asked)
    assert made.prefix_pages == (room, room) and made.device_bytes() == start
    again = answers(made, [asked[-1], asked[0]])
    assert [x[0] for x in again] == [first[-1][0], first[0][0]]
    assert again[0][2] == 16 * min(3, room) and again[1][2] == 0


def test_requests_share_prefixes_under_their_salt():
    made = engine()
    one, other = (dataclasses.replace(TURNS[0], cache_salt=salt) for salt in "ab")
    assert [x[2] for x in answers(made, [one, other, one])] == [0, 0, 32]


def test_prompts_with_log_probabilities_are_run_whole():
    made = engine()
    asked = dataclasses.replace(TURNS[0], logprobs=0, prompt_logprobs=True)
    assert [x[2] for x in answers(made, [asked, asked, TURNS[0]])] == [0, 0, 32]
    assert made.prefix_pages[0] == 2


def test_memory_is_half_of_the_rows_by_default_or_what_is_asked_for():
    """Rows have room for 96 tokens here."""
    assert cold(megabytes=None, slots=4).prefix_pages == (0, 4 * 96 // 2 // 16)
    assert cold(megabytes=0).prefix_pages == (0, 0)
    with pytest.raises(
        ValueError, match="mb is 0.001 MiB, but a page of 16 tokens takes 0.012"
    ):
        cold(megabytes=0.001)
    with pytest.raises(ValueError, match="prefix_cache_mb is -1; expected at least 0"):
        EngineConfig(prefix_cache_mb=-1)


class TestIndex:
    TEXT = list(range(100))

    def fill(self, index, tokens, count, salt=""):
        chain = index.match(tokens, salt)
        while len(chain) < count:
            page = index.extend(chain, tokens, salt)
            if page is None:
                break
            chain.append(page)
        return [page.place for page in chain]

    def found(self, index, tokens, salt=""):
        return [page.place for page in index.match(tokens, salt)]

    def test_the_longest_known_prefix_that_leaves_a_token(self):
        index = PrefixIndex(8, 4)
        places = self.fill(index, self.TEXT, 3)
        assert len(set(places)) == 3
        assert self.found(index, self.TEXT) == places
        assert self.found(index, self.TEXT[:12]) == places[:2]
        assert self.found(index, self.TEXT[:13]) == places
        assert self.found(index, [*self.TEXT[:5], 99, *self.TEXT[6:]]) == places[:1]
        assert self.found(index, self.TEXT[4:]) == []
        assert self.found(index, self.TEXT, salt="x") == []

    def test_the_least_recently_used_give_way_from_their_ends(self):
        index = PrefixIndex(4, 4)
        old, new = self.TEXT, self.TEXT[::-1]
        self.fill(index, old, 2)
        self.fill(index, new, 2)
        assert len(self.found(index, old)) == 2  # is the most recent now
        self.fill(index, [7] * 20, 1)
        assert (len(self.found(index, old)), len(self.found(index, new))) == (2, 1)
        assert len(index) == 4

    def test_a_page_that_is_known_already_is_used_again(self):
        """The last page of a prompt that ends with it is run again, though it is known."""
        index = PrefixIndex(8, 4)
        places = self.fill(index, self.TEXT, 3)
        assert self.fill(index, self.TEXT[:12], 3) == places
        assert len(index) == 3

    def test_a_prompt_does_not_push_out_its_own_start(self):
        index = PrefixIndex(3, 4)
        assert len(self.fill(index, self.TEXT, 9)) == 3
        assert len(self.found(index, self.TEXT)) == 3

    def test_a_page_whose_start_is_gone_is_not_found(self):
        index = PrefixIndex(2, 4)
        chain = index.match(self.TEXT)
        chain.append(index.extend(chain, self.TEXT))
        chain.append(index.extend(chain, self.TEXT))
        self.fill(index, self.TEXT[::-1], 2)
        assert self.found(index, self.TEXT) == []
        self.fill(index, self.TEXT, 1)  # its pages have new ids
        assert len(self.found(index, self.TEXT)) == 1
