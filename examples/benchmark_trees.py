"""What growing a tree costs, on the device and on the host: one run, two tables.

    python examples/benchmark_trees.py --batch 1

Milliseconds, medians. `lse` normalises (log-sum-exp over the vocabulary), `top` finds the
likeliest tokens, `grow` builds the tree from them, `all` is logits to tree and ancestor sets in
one program. The host columns are JetSpec's way: log-softmax and top-k by PyTorch where it is
installed (else by XLA), a copy to the host, a heap and ancestors in Python, a copy back.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import importlib.util
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxspec.cli import exits
from jaxspec.config import TreeConfig
from jaxspec.trees.best_first import best_first
from jaxspec.trees.build import build
from jaxspec.trees.candidates import top_log_probs, top_logits
from jaxspec.trees.path_conditioned import LowRank, path_conditioned
from jaxspec.trees.top_budget import top_budget
from jaxspec.trees.transitions import from_transitions
from jaxspec.trees.tree import ancestors

SIZES = (16, 32, 64, 128, 256, 512)
WIDTH, CANDIDATES, RANK = 7, 16, 256


@jax.jit
def normalise(logits):
    return top_logits(logits, 1)[2]


@functools.partial(jax.jit, static_argnames="k")
def search(logits, k):
    return top_logits(logits, k)[:2]


top = jax.jit(top_log_probs, static_argnames="k")
grow_best_first = jax.jit(best_first, static_argnames="size")
grow_top_budget = jax.jit(top_budget, static_argnames="size")
grow_from_transitions = jax.jit(from_transitions, static_argnames="size")


@functools.partial(jax.jit, static_argnames="size")
def whole_best_first(logits, root, budget, size):
    tree = build(TreeConfig("best_first", size=size, width=WIDTH), logits, root, budget)
    return tree, ancestors(tree)


@functools.partial(jax.jit, static_argnames="size")
def whole_top_budget(logits, root, budget, size):
    tree = build(TreeConfig("top_budget", size=size), logits, root, budget)
    return tree, ancestors(tree)


@functools.partial(jax.jit, static_argnames="size")
def whole_path_conditioned(logits, previous, output, root, budget, size):
    """With a Markov head: base + W2 W1[previous token]."""

    step = LowRank(logits, output, lambda slot, state, tokens: (previous[tokens], state))

    depth = logits.shape[1]
    tree = path_conditioned(
        root, step, (), depth=depth, parents=CANDIDATES, budget=budget, size=size
    )
    return tree, ancestors(tree)


def host_top(logits):
    """Log-probs and ids of the likeliest tokens, on the host: [B, P, W] each."""
    if isinstance(logits, jax.Array):
        return tuple(np.asarray(x) for x in top(logits, WIDTH)[::-1])
    import torch

    values, ids = torch.topk(torch.log_softmax(logits, -1), WIDTH, -1)
    return values.numpy(), ids.numpy()


def host_grow(log_probs, ids, size):
    """JetSpec's heap for every row, with ancestor sets, copied to the device."""
    batch, depth, width = ids.shape
    tokens, parents = np.zeros((batch, size), np.int32), np.full((batch, size), -1, np.int32)
    above = np.zeros((batch, size, size), bool)
    for b in range(batch):
        scores, choices = log_probs[b].astype(np.float64).tolist(), ids[b].tolist()
        depths, heap, count = [0] * size, [(0.0, 0)], 1
        above[b, 0, 0] = True
        while heap and count < size:
            cost, node = heapq.heappop(heap)
            level = depths[node]
            if level == depth:
                continue
            for rank in range(min(width, size - count)):
                tokens[b, count], parents[b, count] = choices[level][rank], node
                above[b, count] = above[b, node]
                above[b, count, count] = True
                depths[count] = level + 1
                heapq.heappush(heap, (cost - scores[level][rank], count))
                count += 1
    return jax.device_put((tokens, parents, above))


def host_whole(logits, size):
    return host_grow(*host_top(logits), size)


def milliseconds(repeats, function, *args, **options) -> float:
    """Median time of a call until its result is there; the first calls compile and warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(function(*args, **options))
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[2:]))


def measure(batch: int, depth: int, vocab: int, repeats: int) -> list[dict]:
    draw = np.random.default_rng(batch)
    values = (3 * draw.standard_normal((batch, depth, vocab), np.float32)).astype(np.float32)
    logits, root = jnp.asarray(values), jnp.zeros(batch, jnp.int32)
    previous, output = (
        jnp.asarray(0.1 * draw.standard_normal((vocab, RANK), np.float32)) for _ in range(2)
    )
    # A table of parents and children, each child a parent of the next depth.
    ids, table = (x[:, :, None].repeat(CANDIDATES, 2) for x in top(logits, CANDIDATES))
    following = jnp.broadcast_to(jnp.arange(CANDIDATES), ids.shape)
    on_host = logits
    if importlib.util.find_spec("torch"):
        import torch

        on_host = torch.from_numpy(values)

    clock = functools.partial(milliseconds, repeats)
    lse, narrow = clock(normalise, logits), clock(search, logits, k=WIDTH)
    host_narrow = clock(host_top, on_host)
    few = top(logits, WIDTH)
    rows = []
    for size in SIZES:
        static = {"budget": jnp.full(batch, size, jnp.int32), "size": size}
        many = top(logits, size - 1)
        rows.append(
            {
                "N": size,
                "lse": lse,
                "best_first top": narrow,
                "best_first grow": clock(grow_best_first, *few, root, **static),
                "best_first all": clock(whole_best_first, logits, root, **static),
                "top_budget top": clock(search, logits, k=size - 1),
                "top_budget grow": clock(grow_top_budget, *many, root, **static),
                "top_budget all": clock(whole_top_budget, logits, root, **static),
                "transitions grow": clock(
                    grow_from_transitions, ids, table, following, root, **static
                ),
                "path_conditioned all": clock(
                    whole_path_conditioned, logits, previous, output, root, **static
                ),
                "host top": host_narrow,
                "host grow": clock(host_grow, *host_top(on_host), size),
                "host all": clock(host_whole, on_host, size),
            }
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    vocab: int = 151_936
    """Size of the vocabulary."""
    depth: int = 15
    """Tokens drafted one after another."""
    batch: tuple[int, ...] = (1, 8)
    """Trees grown together; a table each."""
    repeats: int = 15
    """Timed runs, of which the median is shown."""
    json: Path | None = None
    """File that also gets the tables."""


def main(options: Options) -> None:
    tables = {}
    console = Console(width=max(170, Console().width))
    for batch in options.batch:
        rows = tables[batch] = measure(batch, options.depth, options.vocab, options.repeats)
        title = f"ms on {jax.devices()[0].device_kind}: batch {batch}, P = {options.depth}, "
        printed = Table(title=title + f"V = {options.vocab:,}")
        for name in rows[0]:
            printed.add_column(name.replace(" ", "\n"), justify="right")
        for row in rows:
            printed.add_row(
                str(row["N"]), *(f"{value:.2f}" for name, value in row.items() if name != "N")
            )
        console.print(printed)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
