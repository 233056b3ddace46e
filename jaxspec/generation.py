"""From prompts to text: the host's side of decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxspec.config import TargetConfig
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, pack, seed_key, unpack
from jaxspec.decoding.sampling import Sampling, SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Params
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import Drafter
from jaxspec.drafters.plain import Plain
from jaxspec.interrupts import postponed
from jaxspec.models.params import TargetParams
from jaxspec.settings import own_settings, own_settings_between_yields

if TYPE_CHECKING:
    from jaxspec.tokenizer import Tokenizer

Prompt = str | Sequence[int]

CALL_SECONDS = 0.25  # of rounds in one call of the device: a Ctrl-C waits no longer


@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded language model.

    Attributes:
      name: what it was loaded from.
      tokenizer: None for a model that comes without one; its prompts are token ids.
    """

    name: str
    config: TargetConfig
    params: TargetParams
    tokenizer: Tokenizer | None = None


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter and its weights, ready for one target (`load_drafter`)."""

    drafter: Drafter
    params: Any = ()


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


PLAIN = LoadedDrafter(Plain())


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
    decoder, params = bind(target, drafter, implementation, rejection)
    capacity = _check_capacity(decoder, prompts, max_new_tokens, capacity)
    budget = _check_budget(decoder, budget)
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
    decoder, params = bind(target, drafter, implementation, rejection)
    requests = pack(
        decoder,
        prompts,
        batch=1,
        capacity=_check_capacity(decoder, prompts, max_new_tokens, None),
        max_new_tokens=max_new_tokens,
        budget=_check_budget(decoder, budget),
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
    decoder, _ = bind(target, options.get("drafter", PLAIN))
    capacity = _check_capacity(
        decoder, rows, options.pop("max_new_tokens", 256), options.pop("capacity", None)
    )
    batch = max(1, min(options.get("batch_size", 8), len(rows)))
    for name in ("sampling", "seed"):  # one for all prompts, or one each
        if isinstance(options.get(name), Sequence):
            options[name] = options[name][:batch]
    generate(target, rows[:batch], max_new_tokens=1, capacity=capacity, **options)
    return capacity


def as_token_ids(
    target: Target, prompts: Prompt | Sequence[Prompt], *, raw: bool, thinking: bool | None
) -> list[list[int]]:
    """Prompts as token ids, through the chat template unless raw; each checked."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
        prompts = [prompts]
    if not len(prompts):
        raise ValueError(
            "no prompts were given; expected a text, a list of ids, or a list of them"
        )
    return [
        token_ids(target, prompt, raw=raw, thinking=thinking, name=f"prompt {i}")
        for i, prompt in enumerate(prompts)
    ]


def token_ids(
    target: Target, prompt: Prompt, *, raw: bool, thinking: bool | None, name: str
) -> list[int]:
    """One prompt as token ids, through the chat template unless raw.

    Raises:
      ValueError: it is empty, is no text, or holds an id outside the vocabulary; it is called
        `name`.
    """
    if isinstance(prompt, str):
        tokenizer = target.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{name} is text, but target {target.name!r} has no tokenizer; give token ids"
            )
        if not prompt.strip():
            raise ValueError(f"{name} is empty; expected some text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds half a surrogate pair, {prompt[error.start]!r}, at character "
                f"{error.start}; expected text that was not cut inside a character"
            ) from None
        prompt = tokenizer.encode(prompt) if raw else tokenizer.chat(prompt, thinking=thinking)
    row = [int(token) for token in prompt]
    if not row:
        raise ValueError(f"{name} is empty; expected at least one token id")
    bad = next((token for token in row if not 0 <= token < target.config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"{name} has token id {bad}; the target's vocabulary is "
            f"0 … {target.config.vocab_size - 1}. Was it encoded with another tokenizer?"
        )
    return row


def usable_prompts(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    raw: bool,
    thinking: bool | None,
    max_new_tokens: int,
) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Prompts as token ids by their places in a list of many, and why others cannot be used.

    Raises:
      ValueError: none of them can be used.
    """
    rows, refused = {}, {}
    for place, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {place}"
        try:
            ids = token_ids(target, prompt, raw=raw, thinking=thinking, name=name)
            check_positions(target.config, len(ids), max_new_tokens)
            rows[place] = ids
        except ValueError as error:
            text = str(error)
            refused[place] = text if text.startswith(name) else f"{name}: {text}"
    if not rows:
        reason = refused.get(0, "there are none")
        many = f"none of the {len(prompts)} prompts can be used; " if len(prompts) > 1 else ""
        raise ValueError(many + reason)
    return rows, refused


def check_positions(config: TargetConfig, length: int, max_new_tokens: int) -> None:
    """Raises ValueError if a prompt of that length has no room for its new tokens."""
    total, positions = length + max_new_tokens, config.max_positions
    if total > positions:
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones need {total} "
            f"positions; the target has {positions}. Shorten the prompt or lower max_new_tokens"
        )


def request_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """One typed key per request: `seed` folded with 0 … count - 1, or each own seed with 0."""
    if isinstance(seed, (int, np.integer)):
        return _fold_keys(seed_key(seed), np.arange(count))
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} prompts; give one, or one each")
    return jax.numpy.stack([jax.random.fold_in(seed_key(s), 0) for s in seed])


_fold_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))


def bind(
    target: Target,
    drafter: LoadedDrafter,
    implementation: str | None = None,
    rejection: bool = False,
) -> tuple[Decoder, Params]:
    """The static half of decoding and its weights.

    Raises:
      ValueError: rejection sampling with a drafter that does not draw chains.
    """
    if rejection:
        _check_draws(drafter.drafter)
    decoder = Decoder(
        target.config,
        drafter.drafter,
        rejection=rejection,
        cache_dtype="float32" if jax.default_backend() == "cpu" else None,
        implementation=implementation,
    )
    return decoder, Params(target.params, drafter.params)


def _check_draws(drafter: Drafter) -> None:
    otherwise = "or leave rejection out: sample-then-match is lossless with any drafter"
    if not hasattr(drafter, "draft_sampled"):
        raise ValueError(
            "rejection sampling needs a drafter that draws its chains; "
            f"{type(drafter).__name__} does not. Use a trained block drafter, {otherwise}"
        )
    if drafter.tree.kind != "chain" or drafter.size <= drafter.depth:
        raise ValueError(
            f"rejection sampling needs a chain of {drafter.depth + 1} nodes for all that the "
            f"drafter draws; its tree is {drafter.tree.kind!r} with {drafter.size}. Use such a "
            f"chain, {otherwise}"
        )


def _check_capacity(
    decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, capacity: int | None
) -> int:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    longest = max(map(len, prompts))
    check_positions(decoder.config, longest, max_new_tokens)
    needed = capacity_for(longest + max_new_tokens, decoder)
    if capacity is not None and capacity < needed:
        raise ValueError(
            f"capacity is {capacity}; a prompt of {longest} tokens, {max_new_tokens} new ones "
            f"and the drafter's depth need {needed}. Raise it or leave it out"
        )
    if capacity is not None and capacity % decoder.chunk:
        raise ValueError(f"capacity is {capacity}; expected a multiple of {decoder.chunk}")
    return needed if capacity is None else capacity


def _check_budget(decoder: Decoder, budget: int | None) -> int:
    size = decoder.drafter.size
    if budget is not None and not 1 <= budget <= size:
        raise ValueError(f"budget is {budget}; the drafter's trees have 1 … {size} nodes")
    return size if budget is None else budget
