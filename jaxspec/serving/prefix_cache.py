"""Prefix cache: the target's and drafter's caches of prompt prefixes, in pages of one chunk.

A page holds the cache rows of one prefilled chunk, so a prompt that starts from pages continues
with exactly the numbers of a full prefill: the same chunks at the same positions. Rows
committed by decoding are not kept: its forwards have other shapes, and so other rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.prefill import begin_prefill
from jaxspec.decoding.state import Decoder, Params, Prefilling
from jaxspec.serving.kept_programs import KeptPrograms
from jaxspec.sharding import beside


@dataclasses.dataclass(frozen=True)
class Page:
    """One chunk of tokens after a certain prefix.

    Attributes:
      id: unique, never reused.
      place: its index in the pool.
    """

    id: int
    place: int


class PrefixIndex:
    """Maps prefixes to places of a pool; evicts the least recently used.

    The key of a page is the page before it and its own tokens, which are compared in full, so a
    hash collision cannot return another prefix.
    """

    def __init__(self, places: int, chunk: int):
        """Args: places: capacity in pages; chunk: tokens per page."""
        self._chunk, self._free = chunk, list(range(places))
        self._ids = itertools.count()
        # Using a page uses those before it too, so later pages are evicted first.
        self._pages: OrderedDict[Hashable, Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, tokens: Sequence[int], salt: str = "") -> list[Page]:
        """The pages of the longest known prefix that leaves at least one token to run.

        Args:
          salt: only prefixes stored with an equal salt are found.
        """
        chain: list[Page] = []
        while (len(chain) + 1) * self._chunk < len(tokens):
            page = self._pages.get(self._key(chain, tokens, salt))
            if page is None:
                break
            chain.append(page)
        self._use(chain, tokens, salt)
        return chain

    def extend(
        self, chain: Sequence[Page], tokens: Sequence[int], salt: str = ""
    ) -> Page | None:
        """A new page after those of `chain`, for the next of `tokens`, to be filled.

        None if every place holds a page of the chain itself.
        """
        own = self._key(chain, tokens, salt)
        page = self._pages.get(own)
        if page is None and not self._free:
            key, oldest = next(iter(self._pages.items()))
            if oldest in chain:
                return None
            del self._pages[key]
            self._free.append(oldest.place)
        if page is None:
            page = self._pages[own] = Page(next(self._ids), self._free.pop())
        self._use([*chain, page], tokens, salt)
        return page

    def _key(self, chain: Sequence[Page], tokens: Sequence[int], salt: str) -> Hashable:
        start = len(chain) * self._chunk
        before = chain[-1].id if chain else salt
        return before, tuple(tokens[start : start + self._chunk])

    def _use(self, chain: Sequence[Page], tokens: Sequence[int], salt: str) -> None:
        for count in reversed(range(len(chain))):
            self._pages.move_to_end(self._key(chain[:count], tokens, salt))


@dataclasses.dataclass(frozen=True)
class PageShape:
    """The part of a prompt's cache and drafter state that a page holds.

    Attributes:
      axes: per array, the axis of positions, of which a page has `chunk`; None for an array
        without, such as a recurrent state, which a page holds whole, as at its end.
      chunk: tokens per page.
    """

    axes: tuple[int | None, ...]
    chunk: int

    @classmethod
    def of(cls, decoder: Decoder, params: Params) -> PageShape:
        """Finds the axes of positions: those that grow with the capacity."""

        def shapes(chunks):
            capacity = chunks * decoder.chunk
            begun = jax.eval_shape(lambda: _held(begin_prefill(decoder, params, 1, capacity)))
            return jax.tree.leaves(begun)

        axes = []
        for small, large in zip(shapes(2), shapes(3), strict=True):
            grows = (i for i, size in enumerate(small.shape) if size != large.shape[i])
            axes.append(next(grows, None))
        return cls(tuple(axes), decoder.chunk)

    def read(self, held: Any, i: jax.Array) -> Any:
        """Page i of (cache, drafter's state)."""

        def one(x, axis):
            cut = jax.lax.dynamic_slice_in_dim
            return x if axis is None else cut(x, i * self.chunk, self.chunk, axis)

        leaves, tree = jax.tree.flatten(held)
        return tree.unflatten(map(one, leaves, self.axes))

    def write(self, held: Any, page: Any, i: jax.Array) -> Any:
        """(cache, drafter's state) with page i written."""

        def one(x, new, axis):
            put = jax.lax.dynamic_update_slice_in_dim
            return new if axis is None else put(x, new, i * self.chunk, axis)

        leaves, tree = jax.tree.flatten(held)
        return tree.unflatten(map(one, leaves, jax.tree.leaves(page), self.axes))


@functools.partial(jax.jit, static_argnames=("decoder", "shape", "places"))
def empty_pool(decoder: Decoder, params: Params, *, shape: PageShape, places: int) -> Any:
    """An empty pool: arrays of pages of (cache, drafter's state), places on the first axis."""
    begun = _held(begin_prefill(decoder, params, 1, 2 * decoder.chunk))
    page = shape.read(begun, 0)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (places, *x.shape)), page)


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="pool")
def save_page(
    pool: Any, prefilling: Prefilling, i: jax.Array, place: jax.Array, *, shape: PageShape
) -> Any:
    """Writes page i of a prompt, whose chunk has just run, to a place of the pool."""
    put = jax.lax.dynamic_update_index_in_dim
    page = shape.read(_held(prefilling), i)
    return jax.tree.map(lambda x, new: put(x, new, place, 0), pool, page)


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="prefilling")
def load_pages(
    pool: Any, prefilling: Prefilling, places: jax.Array, count: jax.Array, *, shape: PageShape
) -> Prefilling:
    """Fills the first `count` chunks of a prompt from the pool's `places` [n]."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

    def one(i, held):
        return shape.write(held, jax.tree.map(lambda x: take(x, places[i]), pool), i)

    cache, drafter = jax.lax.fori_loop(0, count, one, _held(prefilling))
    return dataclasses.replace(prefilling, cache=cache, drafter=drafter)


def _held(prefilling: Prefilling) -> tuple:
    return prefilling.cache, prefilling.drafter


class PrefixCache:
    """The prefix cache of one engine: a pool on the device, allocated once, and its index.

    Attributes:
      chunk: tokens per page.
      places: capacity in pages.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        capacity: int,
        megabytes: float,
        *,
        kept: KeptPrograms,
    ):
        """Args:
          capacity: tokens per row of a prompt's caches.
          megabytes: MiB of memory for the pool.

        Raises ValueError if not a single page fits.
        """
        self._kept, self._shape = kept, PageShape.of(decoder, params)
        self.chunk, self._most = decoder.chunk, capacity // decoder.chunk
        make = functools.partial(empty_pool, decoder, shape=self._shape)
        one = jax.eval_shape(functools.partial(make, places=1), params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one)) / 2**20
        self.places = int(megabytes / size)
        if not self.places:
            raise ValueError(
                f"prefix_cache_mb is {megabytes:g} MiB, but a page of {self.chunk} tokens "
                f"takes {size:.2g} MiB; give more, or 0 to keep no prefixes"
            )
        shape, given = self._shape, ((decoder,), (params,))
        pool = kept.call(empty_pool, (), one, *given, shape=shape, places=self.places)
        self._pool = beside(pool, params)
        self._index = PrefixIndex(self.places, self.chunk)

    def __len__(self) -> int:
        """Pages in use."""
        return len(self._index)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self._pool))

    def begin(
        self, prefilling: Prefilling, tokens: Sequence[int], salt: str
    ) -> tuple[Prefilling, list[Page]]:
        """Fills an empty prompt with its longest cached prefix; also returns the pages used."""
        chain = self._index.match(tokens, salt)
        return (self._load(prefilling, chain) if chain else prefilling), chain

    def keep(
        self, prefilling: Prefilling, chain: list[Page], tokens: Sequence[int], salt: str
    ) -> bool:
        """Adds the page of the last chunk run to the chain; returns whether it fits."""
        page = self._index.extend(chain, tokens, salt)
        if page is None:
            return False
        self._save(prefilling, len(chain), page.place)
        chain.append(page)
        return True

    def compile(self, prefilling: Prefilling) -> None:
        """Compiles its programs by running them once on an empty prompt, which is donated."""
        self._save(prefilling, 0, 0)
        self._load(prefilling, [])

    def _save(self, prefilling: Prefilling, i: int, place: int) -> None:
        given = self._pool, prefilling, np.int32(i), np.int32(place)
        self._pool = self._run(save_page, self._pool, *given)

    def _load(self, prefilling: Prefilling, chain: Sequence[Page]) -> Prefilling:
        places = np.zeros(self._most, np.int32)
        places[: len(chain)] = [page.place for page in chain]
        given = self._pool, prefilling, places, np.int32(len(chain))
        return self._run(load_pages, prefilling, *given)

    def _run(self, function: Callable, like: Any, *arrays: Any) -> Any:
        return self._kept.call(function, (), like, (), arrays, shape=self._shape)
