"""Checks that the output on this machine is right, at the optimisation level in use.

    python examples/gpu/check.py --golden ../shared/golden

- kernels: `pytest -m gpu`, every kernel against its definition; the Mosaic kernel of attention,
  which has not run on a GPU yet, at the very end;
- ties: of equal values the one of lowest index comes first, as trees and argmax rely on;
- lossless: small random targets (dense, experts, gated delta nets), every drafter and every
  tree, greedy and sampled: tokens equal plain decoding's, in float32;
- golden: traces of the original implementations, tokens and tokens committed per round, where
  their folder is given.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # pytest has a process of its own

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxspec.api import generate
from jaxspec.config import (
    TREE_KINDS,
    DeltaNetConfig,
    DrafterConfig,
    TargetConfig,
    TreeConfig,
)
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.eagle import EagleDrafter, eagle_params
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.small_model import SmallModel
from jaxspec.drafters.weights import random_weights
from jaxspec.models.params import random_params
from jaxspec.models.target import Target
from jaxspec.trees.candidates import top_logits

LEVEL = "--xla_backend_optimization_level"
GRACE = 40  # seconds after --seconds in which what has begun may end
WORKERS = 6  # processes of pytest, if pytest-xdist is installed
NEW_TOKENS = 40
SIZES = (97, 7), (4096, 63), (151_936, 63)  # (vocabulary, tokens to find)

# Head dims that the kernels take; logits far enough apart for any order of float32 sums.
TARGETS = {
    "dense": TargetConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_positions=512,
    )
}
TARGETS["experts"] = dataclasses.replace(
    TARGETS["dense"],
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=128,
    norm_topk_prob=True,
    sparse_layers=(0, 2),
)
TARGETS["delta nets"] = dataclasses.replace(
    TARGETS["dense"],
    delta_net=DeltaNetConfig(
        layers=(0, 2), key_heads=2, value_heads=4, key_dim=32, value_dim=32
    ),
    rotary_dim=16,
    attention_gate=True,
    zero_centered_norms=True,
)
SAMPLINGS = [Sampling(), Sampling(temperature=0.7), Sampling(), Sampling(1, top_p=0.9)]
PROMPT_LENGTHS = (1, 5, 130, 30)

HEADS = {
    "dflash": dict(taps=(0, 1), block_size=8),
    "jetspec": dict(taps=(-1, 1), block_size=8, causal=True),
    "dspark": dict(taps=(0, 1), sequential="markov"),
    "gated": dict(taps=(1,), sequential="gated"),
    "rnn": dict(taps=(0, 1), causal=True, sequential="rnn"),
    "treeflash": dict(taps=(0, 2), block_size=8, sequential="mlp", confidence="hidden"),
    "window": dict(taps=(0, 1), block_size=8, window=4),
    "dflash2": dict(
        taps=(0, 1),
        sequential="bilinear",
        rank=6,
        candidates=8,
        conv_taps=2,
        conv_group=16,
        block_size=8,
    ),
}
LOW_RANK = dict(predict_next=True, rank=6, confidence="hidden_and_previous", block_size=7)

GOLDEN_TREES = {
    "jetspec_a": TreeConfig("best_first", size=60, width=7),
    "dflash_a": TreeConfig("best_first", size=40, width=6),
    "dspark_vanilla": TreeConfig("chain", size=8),
    "dspark_rnn": TreeConfig("chain", size=8),
    "treeflash_a": TreeConfig("transitions", size=40, width=6, candidates=5),
    "dflash2_a": TreeConfig("chain", size=8),
    "dflash2_window_a": TreeConfig("chain", size=8),
    "eagle3_a": TreeConfig("chain", size=6),
    "eagle3_speculators_a": TreeConfig("chain", size=6),
}


def kernels(names: str, seconds: Callable[[], float]) -> dict:
    """`pytest -m gpu` in processes of its own, several if pytest-xdist is installed.

    Args:
      names: the tests, as `pytest -k` takes them.
      seconds: how long they may take, asked when they start.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if LEVEL not in flags:  # the tests' own default is the fastest to compile
        flags += f" {LEVEL}=3"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = "-m pytest -q -m gpu -p no:cacheprovider tests/pallas_kernels -k".split()
        command += [names]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
        subprocess.run(
            [sys.executable, *command, f"--junitxml={report}"],
            cwd=timing.ROOT,
            env=os.environ | dict(XLA_FLAGS=flags),
            stdout=sys.stderr,
            timeout=seconds(),
            check=False,  # the report says what failed
        )
        if not report.exists():
            raise RuntimeError("pytest wrote no report; its output says why")
        suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    ran = count["tests"] - count["skipped"]
    if count["failures"] or count["errors"]:
        raise AssertionError(f"pytest -m gpu: {count}")
    if jax.default_backend() == "gpu" and not ran:
        raise AssertionError("pytest -m gpu ran no test")
    return dict(passed=ran)


def ties() -> dict:
    """Equal values, in order of index, from every search that the library makes."""
    rng = np.random.default_rng(0)
    for vocab, k in SIZES:
        values = rng.integers(0, 20, (15, vocab)).astype(np.float32)
        right = np.argsort(-values, axis=-1, kind="stable")[:, :k]
        chosen = {
            "top_k": jax.jit(jax.lax.top_k, static_argnums=1)(values, k)[1],
            "top_logits": jax.jit(top_logits, static_argnums=1)(values, k)[0],
        }
        for name, tokens in chosen.items():
            np.testing.assert_array_equal(tokens, right, err_msg=f"{name} of {vocab}")
        first = jax.jit(functools.partial(jnp.argmax, axis=-1))(values)
        np.testing.assert_array_equal(first, right[:, 0], err_msg=f"argmax of {vocab}")
    return dict(sizes=SIZES)


@functools.cache
def target(name: str) -> Target:
    config = TARGETS[name]
    return Target(name, config, random_params(config, jax.random.key(0), scale=0.3))


def small_layer(target: TargetConfig) -> dict:
    """Fields that the configs of block drafters and of EAGLE-3 share."""
    return dict(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        target_layers=target.num_layers,
    )


def head(kind: str) -> DrafterConfig:
    c, own = TARGETS["dense"], HEADS[kind]
    low_rank = own.get("sequential") in ("markov", "gated", "rnn")
    return DrafterConfig(
        **small_layer(c),
        num_layers=1,
        mask_token_id=c.vocab_size - 1,
        **(LOW_RANK if low_rank else {}) | own,
    )


def shaken(weights):
    """Weights large enough for every part to matter; none is left at zero or one."""
    leaves, tree = jax.tree.flatten(weights)
    random = np.random.default_rng(2)
    leaves = [x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def block_weights(kind: str, of: str):
    return block_params(
        shaken(random_weights(head(kind), jax.random.key(1))), target(of).params
    )


@functools.cache
def eagle(of: str) -> tuple[EagleConfig, Any]:
    """EAGLE-3's head for a target, and its params."""
    c = TARGETS[of]
    config = EagleConfig(
        **small_layer(c), target_hidden_size=c.hidden_size, taps=(-1, 0, 1), steps=5
    )
    weights = shaken(random_weights(config, jax.random.key(1)))
    return config, eagle_params(weights, target(of).params)


def drafters(of: str, quick: bool) -> dict[tuple[str, str], Callable[[], LoadedDrafter]]:
    """What makes each drafter for a target with each tree it can grow, by (drafter, tree).

    Args:
      quick: one block drafter with its trees, and those that need no training.
    """
    small = "dense" if TARGETS[of].delta_net else of  # what drafts keeps keys and values

    def tree_of(kind: str) -> TreeConfig:
        return TreeConfig(kind, size=8 if kind == "chain" else 40, width=3, candidates=6)

    def small_model() -> LoadedDrafter:
        return LoadedDrafter(SmallModel(TARGETS[small]), target(small).params)

    def block(kind: str, tree: str) -> LoadedDrafter:
        return LoadedDrafter(BlockDrafter(head(kind), tree_of(tree)), block_weights(kind, of))

    def eagle3(tree: str) -> LoadedDrafter:
        config, params = eagle(of)
        return LoadedDrafter(EagleDrafter(config, tree_of(tree)), params)

    found = {
        ("ngram", "merged"): lambda: LoadedDrafter(PromptLookup()),
        ("small", "chain"): small_model,
        ("dspark+ngram", "best_first"): lambda: with_lookup(block("dspark", "best_first")),
    }
    for kind in ("dspark",) if quick else HEADS:
        for tree in TREE_KINDS:
            if tree != "transitions" or head(kind).sequential not in (None, "rnn", "bilinear"):
                found[kind, tree] = functools.partial(block, kind, tree)
    for tree in () if quick else ("chain", "path_conditioned"):
        found["eagle3", tree] = functools.partial(eagle3, tree)
    return found


def completions(of: str, **options) -> list:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TARGETS[of].vocab_size, n).tolist() for n in PROMPT_LENGTHS]
    return generate(
        target(of), prompts, max_new_tokens=NEW_TOKENS, seed=3, sampling=SAMPLINGS, **options
    )


def lossless(plain, of: str, make: Callable[[], LoadedDrafter]) -> dict:
    """Raises where a drafter's tokens differ from plain decoding's, a future's result."""
    done = completions(of, drafter=make())
    expected = [completion.token_ids for completion in plain.result()]
    found = [completion.token_ids for completion in done]
    for row, (ours, right) in enumerate(zip(found, expected, strict=True)):
        if ours != right:
            pairs = zip(ours, right, strict=False)
            at = next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(right))
            )
            raise AssertionError(f"prompt {row} differs from plain decoding at token {at}")
    rounds = sum(completion.stats.rounds for completion in done)
    tokens = sum(map(len, found))
    return dict(prompts=len(found), tokens=tokens, rounds=rounds)


def golden(folder: Path, name: str) -> dict:
    """A golden case: plain and speculative tokens, and tokens committed in every round."""
    from jaxspec.loading import load_drafter, load_target

    trace = json.loads((folder / name / "trace.json").read_text())
    prompts, new = trace["prompts"], trace["config"]["max_new"]
    own = load_target(folder / name / "target")
    drafter = load_drafter(str(folder / name / "draft"), own, tree=GOLDEN_TREES[name])
    asked = [prompt["prompt"] for prompt in prompts]
    plain = generate(own, asked, max_new_tokens=new)
    done = generate(own, asked, drafter=drafter, max_new_tokens=new)
    for i, (prompt, ours, drafted) in enumerate(zip(prompts, plain, done, strict=True)):
        for how, completion in (("plain", ours), ("speculative", drafted)):
            if completion.token_ids[:new] != prompt["ar"][:new]:
                raise AssertionError(f"prompt {i}: {how} tokens differ from the original's")
        recorded = prompt.get("tree_accept") or prompt["accept"]
        if "block_sizes" in prompt:  # the original shortens its last blocks
            whole = max(prompt["block_sizes"])
            sizes = prompt["block_sizes"]
            recorded = [n for n, s in zip(recorded, sizes, strict=False) if s == whole]
        # The last round may be cut short by the limit of new tokens.
        committed = list(drafted.stats.committed)[:-1]
        both = min(len(committed), len(recorded))
        if not both or committed[:both] != recorded[:both]:
            raise AssertionError(f"prompt {i} committed {committed}, the original {recorded}")
    tau = np.mean([completion.stats.tau for completion in done])
    return dict(prompts=len(prompts), tau=round(float(tau), 3))


def main(arguments: list[str] | None = None) -> int:
    """Everything runs at once: the tests in processes of their own, generations in threads.

    What has not begun after --seconds is skipped; what has may take some seconds more.

    Returns:
      The exit status: 1 where a check failed or was skipped.
    """
    options = parse(arguments)
    rows = timing.Rows("check", options, rates=False)

    def most() -> float:
        """Seconds that tests which start now may take."""
        return rows.left + GRACE

    rows.measure(ties, check="ties")
    pool = concurrent.futures.ThreadPoolExecutor(options.threads)
    asked = {
        pool.submit(work): settings
        for settings, work in jobs(options, pool, most)
        if not rows.known(**settings)
    }
    collect(asked, rows, rows.left)
    pool.shutdown(wait=False, cancel_futures=True)
    begun = {future: asked.pop(future) for future in list(asked) if not future.cancelled()}
    collect(begun, rows, most() + 5)  # by then the tests are killed
    for settings in asked.values():
        rows.measure(_late, **settings)
    for settings in begun.values():
        rows.measure(_late, begun=True, **settings)
    mosaic = functools.partial(kernels, "mosaic", most)
    rows.measure(mosaic, check="kernels", case="mosaic")
    if rows.skipped:
        print(f"{rows.skipped} checks were skipped: give more --seconds", file=sys.stderr)
    return int(rows.finish() or rows.skipped > 0)


def collect(futures: dict, rows: timing.Rows, seconds: float) -> None:
    """Writes the rows of futures that end within some seconds, and removes them."""
    with contextlib.suppress(TimeoutError):
        for future in concurrent.futures.as_completed(futures, timing.timeout(seconds)):
            rows.measure(future.result, begun=True, **futures.pop(future))


def jobs(options, pool, most: Callable[[], float]) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """The settings and the work of every check but the first and the last."""
    yield dict(check="kernels", case="triton"), functools.partial(kernels, "not mosaic", most)
    for name in GOLDEN_TREES if options.golden else ():
        yield (
            dict(check="golden", case=name),
            functools.partial(golden, options.golden, name),
        )
    for of in ("dense",) if options.model == "tiny" else TARGETS:
        plain = pool.submit(completions, of)
        for (drafter, tree), make in drafters(
            of, options.model == "tiny" or of != "dense"
        ).items():
            settings = dict(check="lossless", target=of, drafter=drafter, tree=tree)
            yield settings, functools.partial(lossless, plain, of, make)


def _late() -> dict:
    raise TimeoutError("the time was over before it was done")


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "check")
    parser.add_argument("--golden", type=Path, help="folder of golden cases")
    parser.add_argument("--model", choices=("tiny",), help="fewer drafters, for a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    timing.leave(main())
