"""What a user calls: load a target and a drafter, generate, stream."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxspec import checkpoints
from jaxspec.checkpoints import catalog
from jaxspec.checkpoints.drafters import load_drafter as load_block_drafter
from jaxspec.config import TreeConfig
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import (
    Prompt,
    as_token_ids,
    check_budget,
    check_capacity,
    decoder_for,
    pack,
    request_keys,
    unpack,
)
from jaxspec.decoding.sampling import Sampling, SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Params
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters import registry
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import change_drafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.small_model import SmallModel
from jaxspec.interrupts import postponed
from jaxspec.models.target import Target
from jaxspec.settings import own_settings, own_settings_between_yields
from jaxspec.sharding import mesh_of, place

CALL_SECONDS = 0.25  # of rounds in one call of the device: a Ctrl-C waits no longer


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      token_ids: the tokens generated, a final stop id included.
      text: the same as text, special tokens left out; None without a tokenizer.
      seconds: wall-clock time of the batch the prompt was in, prompt included. The first call
        for a shape also compiles (see `warm_up`).
    """

    token_ids: list[int]
    text: str | None
    stats: DecodeStats
    seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`.

    Attributes:
      completions: what there was by then, whole answers first; the last ones may be cut short.
    """

    def __init__(self, completions: list[Completion]):
        super().__init__("interrupted")
        self.completions = completions


@own_settings()
def generate(
    target: Target,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: LoadedDrafter = PLAIN,
    max_new_tokens: int = 256,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seed: int | Sequence[int] = 0,
    budget: int | None = None,
    batch_size: int = 8,
    capacity: int | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    rejection: bool = False,
    implementation: str | None = None,
) -> list[Completion]:
    """Completes prompts; whatever the drafter, the output is the target's own.

    In float32 the tokens equal plain decoding's, greedy or sampled at the same seed, on GPUs
    too: products of a float32 target are exact to float32 there, not TF32, which is slower.
    bfloat16 may flip near-ties.

    Args:
      prompts: texts or lists of token ids, or a single one of them. A text becomes a user's
        turn in the chat template, unless `raw`.
      drafter: from `load_drafter`; plain decoding by default.
      sampling: one for all prompts or one per prompt.
      seed: prompt i uses `seed` folded with i; or one seed per prompt.
      budget: nodes verified per round, root included; the drafter's whole tree by default.
      batch_size: prompts decoded together.
      capacity: places for tokens per row, a multiple of 128; the smallest bucket that fits by
        default. Calls that share it share compiled programs.
      thinking: turns the thinking of a Qwen3 chat template on or off.
      rejection: a block drafter draws its chains instead of taking the likeliest tokens, and
        they are verified by rejection sampling: the same law, but other tokens than plain
        sampling at the same seed.
      implementation: of tree attention (`pallas_kernels.tree_attention`).

    Returns:
      One `Completion` per prompt, in order.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, a prompt that with its new
        tokens passes the target's positions or the capacity, or an option out of range.
      Interrupted: Ctrl-C; it holds what there is.
    """
    prompts = as_token_ids(target, prompts, raw=raw, thinking=thinking)
    decoder, params = decoder_for(target, drafter, implementation, rejection)
    capacity = check_capacity(decoder, prompts, max_new_tokens, capacity)
    budget = check_budget(decoder, budget)
    sampling = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(sampling) != len(prompts):
        raise ValueError(
            f"{len(sampling)} samplings for {len(prompts)} prompts; give one, or one each"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    keys = request_keys(seed, len(prompts))

    completions = []
    batch = min(batch_size, len(prompts))
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        began = time.perf_counter()
        requests = pack(
            decoder,
            prompts[rows],
            batch=batch,
            capacity=capacity,
            max_new_tokens=max_new_tokens,
            budget=budget,
            sampling=sampling[rows],
            keys=keys[rows],
        )
        state = prefill(decoder, params, requests)
        state, whole = _decode(decoder, params, state, requests.sampling)
        results = unpack(state, [len(prompt) for prompt in prompts[rows]])
        seconds = time.perf_counter() - began
        completions += [
            Completion(ids, target.tokenizer and target.tokenizer.decode(ids), stats, seconds)
            for ids, stats in results
        ]
        if not whole:
            raise Interrupted(completions)
    return completions


def _decode(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> tuple[DecodeState, bool]:
    """Rounds until every row is done, or until a Ctrl-C; whether it came to the end."""
    rounds, whole = 1, bool(state.done.all())
    with postponed() as asked:
        while not whole and not asked:
            began = time.perf_counter()
            state = decode(decoder, params, state, sampling, np.int32(rounds))
            whole = bool(state.done.all())
            faster = CALL_SECONDS / (time.perf_counter() - began)
            rounds = max(1, int(rounds * min(faster, 4)))  # the first call may compile
    return state, whole


@own_settings_between_yields
def stream(
    target: Target,
    prompt: Prompt,
    *,
    drafter: LoadedDrafter = PLAIN,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    budget: int | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    rejection: bool = False,
    implementation: str | None = None,
    rounds: int = 4,
) -> Generator[str, None, DecodeStats]:
    """Yields the text of one completion as it grows, never half a character.

    Runs the compiled programs of `generate` for a few `rounds` at a time; arguments as there.
    The generator's return value is the request's `DecodeStats`.
    """
    if target.tokenizer is None:
        raise ValueError(
            f"target {target.name!r} has no tokenizer; use generate with token ids"
        )
    prompts = as_token_ids(target, [prompt], raw=raw, thinking=thinking)
    decoder, params = decoder_for(target, drafter, implementation, rejection)
    requests = pack(
        decoder,
        prompts,
        batch=1,
        capacity=check_capacity(decoder, prompts, max_new_tokens, None),
        max_new_tokens=max_new_tokens,
        budget=check_budget(decoder, budget),
        sampling=[sampling],
        keys=request_keys(seed, 1),
    )
    state = prefill(decoder, params, requests)
    pieces, shown = target.tokenizer.stream(), 0
    while True:
        ((ids, stats),) = unpack(state, [len(prompts[0])])
        for token in ids[shown:]:
            if piece := pieces.step(token):
                yield piece
        shown = len(ids)
        if bool(state.done[0]):
            if piece := pieces.finish():
                yield piece
            return stats
        state = decode(decoder, params, state, requests.sampling, np.int32(rounds))


def warm_up(target: Target, prompts: Prompt | Sequence[Prompt], **options) -> int:
    """Compiles what `generate(target, prompts, **options)` will run; decodes one token each.

    Returns:
      The capacity; give it to `generate` for a part of the prompts to run the same programs.
    """
    raw, thinking = options.pop("raw", False), options.pop("thinking", None)
    rows = as_token_ids(target, prompts, raw=raw, thinking=thinking)
    decoder, _ = decoder_for(target, options.get("drafter", PLAIN))
    capacity = check_capacity(
        decoder, rows, options.pop("max_new_tokens", 256), options.pop("capacity", None)
    )
    batch = max(1, min(options.get("batch_size", 8), len(rows)))
    for name in ("sampling", "seed"):  # one for all prompts, or one each
        if isinstance(options.get(name), Sequence):
            options[name] = options[name][:batch]
    generate(target, rows[:batch], max_new_tokens=1, capacity=capacity, **options)
    return capacity


@own_settings()
def load_target(
    name_or_path: str | Path = "smollm2-135m", *, dtype: str = "float32", devices: int = 1
) -> Target:
    """Loads a target model.

    Args:
      name_or_path: a name of `checkpoints.catalog`, a GGUF file, a Hugging Face folder, or a
        name on the hub.
      dtype: of weights and cache, "float32" or "bfloat16"; products accumulate in float32.
      devices: cuts the weights over so many, those of all processes counted
        (`jaxspec.sharding`); compute with them inside `sharding.mesh_of(target.params)`.

    Raises:
      ValueError: it cannot be found, is damaged, or is a model the decoder does not implement.
    """
    return checkpoints.load(name_or_path, dtype, devices)


@own_settings()
def load_drafter(
    spec: str,
    target: Target,
    *,
    tree: TreeConfig | None = None,
    dtype: str = "float32",
    threshold: float = 0.0,
    survival: float = 0.0,
) -> LoadedDrafter:
    """A drafter for a target.

    Args:
      spec: "none" (plain decoding), "ngram" (prompt lookup), "small:NAME" (a small model with
        the same vocabulary, loaded as a target is), "python:MODULE:FUNCTION" (one's own,
        `drafters.registry.Factory`), "shipped" (the trained one that comes with the package,
        for the default target), or the folder or hub name of a trained drafter
        ("repo::subfolder" too). "+ngram" after one of the last four joins prompt lookup.
      tree: what it drafts; each kind of drafter has its default.
      dtype: of the drafter's weights.
      threshold: a chain ends before the first token that the drafter's confidence head gives
        less than this probability of being accepted after those before it; 0 keeps all.
      survival: a chain ends where the product of those probabilities falls below this.

    Raises:
      ValueError: the drafter cannot be found, does not fit the target, or has no chains or no
        confidence head for the rules given.
    """
    rules = {"threshold": threshold, "survival": survival}
    for name, value in rules.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected a probability, 0 … 1")
    options = dict(tree=tree, dtype=dtype, trained=_trained)
    loaded = registry.make(spec, target, **options)
    if not any(rules.values()):
        return loaded
    return change_drafter(loaded, functools.partial(_end_chains, spec=spec, rules=rules))


def _end_chains(loaded: LoadedDrafter, *, spec: str, rules: dict[str, float]) -> LoadedDrafter:
    config = loaded.drafter.head_config
    if config is None or config.confidence is None or loaded.drafter.tree.kind != "chain":
        raise ValueError(
            "threshold and survival end the chains of a trained drafter by its confidence "
            f"head; {spec!r} has no such head, or its tree is no chain. Leave them out"
        )
    params = loaded.params
    placed = {  # on the devices of the others
        name: jax.device_put(np.float32(value), getattr(params, name).sharding)
        for name, value in rules.items()
    }
    return dataclasses.replace(loaded, params=dataclasses.replace(params, **placed))


def _small(name: str, target: Target, *, tree: TreeConfig | None, dtype: str) -> LoadedDrafter:
    """Factory of "small:NAME"."""
    small = load_target(name, dtype=dtype)
    if small.config.vocab_size != target.config.vocab_size:
        raise ValueError(
            f"drafter {small.name!r} has a vocabulary of {small.config.vocab_size} tokens, "
            f"target {target.name!r} one of {target.config.vocab_size}; "
            "a small drafter must share the target's tokenizer"
        )
    known = small.tokenizer and target.tokenizer
    if known and _tokenizes(small) != _tokenizes(target):
        raise ValueError(
            f"drafter {small.name!r} turns text into other tokens than target "
            f"{target.name!r}; a small drafter must share the target's tokenizer"
        )
    drafter = SmallModel(small.config, tree) if tree else SmallModel(small.config)
    return LoadedDrafter(drafter, small.params)


def _trained(
    name: str, target: Target, *, tree: TreeConfig | None, dtype: str
) -> LoadedDrafter:
    """Factory of what is no other name: a trained drafter's folder or hub name."""
    drafter, params = load_block_drafter(
        name, target.config, target.params, tree or TreeConfig(), dtype
    )
    with mesh_of(target.params) as mesh:
        return LoadedDrafter(drafter, params if mesh is None else place(mesh, params))


def _tokenizes(target: Target) -> list[int]:
    """Token ids of a text that most tokenizers cut differently."""
    return target.tokenizer.encode("Hello, world! 1969 naïve\n\tdef f(x):", special=False)


def enable_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that the next process starts quickly.

    Call it before anything is computed. JAX runs what it finds in the folder: use one that only
    you can write.

    Args:
      folder: by default the one JAX has already ($JAX_COMPILATION_CACHE_DIR), or
        $JAXSPEC_CACHE/xla, or ~/.cache/jaxspec/xla.

    Returns:
      The folder; None, with a warning, if it cannot be written: programs are not kept then.
    """
    known = jax.config.jax_compilation_cache_dir
    if folder is None and known:
        return Path(known)
    try:
        folder = catalog.cache_dir() / "xla" if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept, every start compiles them again: {error}; set "
            "JAXSPEC_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


registry.register("small:", _small)
