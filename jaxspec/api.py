"""What a user calls to decode: generate, stream, and what makes the first call quick."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterable, Sequence

import jax
import numpy as np

from jaxspec.answer_text import AnswerText
from jaxspec.arguments import integer
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import (
    check_budget,
    check_capacity,
    check_tokens,
    decoder_for,
    pack,
    request_keys,
    stop_ids_of,
    unpack,
)
from jaxspec.decoding.sampling import Sampling, SamplingRows
from jaxspec.decoding.state import Decoder, DecodeState, Params, Requests
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.interrupts import postponed
from jaxspec.loading import as_drafter
from jaxspec.models.target import Target, check_target
from jaxspec.pace import Pace
from jaxspec.prompts import Prompt, as_token_ids
from jaxspec.results import Completion, Finish, Interrupted
from jaxspec.settings import on_devices_of_target, own_settings_between_yields
from jaxspec.sharding import any_process, first_process, over_processes

CALL_SECONDS = 0.25  # target duration of one device call, which a Ctrl-C has to wait for


@on_devices_of_target
def generate(
    target: Target,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: LoadedDrafter | str = PLAIN,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] | None = (),
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seed: int | Sequence[int] | jax.Array = 0,
    budget: int | Pace | None = None,
    batch_size: int = 8,
    capacity: int | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    rejection: bool = False,
    progress: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Completes prompts; whatever the drafter, the output is the target's own.

    In float32 the tokens equal plain decoding's, greedy or sampled at the same seed. That holds
    on GPUs too: a float32 target does not use the faster TF32 there. bfloat16 may flip
    near-ties.

    Args:
      prompts: texts, conversations, or lists of token ids, or a single one of them. A text
        becomes a user's turn in the chat template, unless `raw`; a conversation is a list of
        messages {"role": …, "content": …}.
      drafter: from `load_drafter`, or its name there: it is then loaded in each call. Plain
        decoding by default.
      stop: texts that end an answer. The answer's text is cut before the first of them; its
        tokens end with the one that completes it. None is none.
      sampling: one for all prompts or one per prompt.
      seed: prompt i uses `seed` folded with i; or one seed, or typed key, per prompt.
      budget: nodes verified per round, root included; the drafter's whole tree by default. A
        `Pace` (`measure_pace`) chooses it in each round, and fixes capacity and batch size.
      batch_size: prompts decoded together.
      capacity: tokens per row that the cache holds, a multiple of 128 with room for prompt, new
        tokens and one block of the drafter; by default the smallest of a few that fits. Calls
        with equal capacity share compiled programs.
      thinking: turns the thinking of a Qwen3 chat template on or off.
      rejection: a block drafter samples its chains instead of taking the likeliest tokens, and
        rejection sampling verifies them: the same distribution as plain sampling, but other
        tokens at the same seed.
      progress: called with the number of tokens written since its last call, several times a
        second.

    Returns:
      One `Completion` per prompt, in order.

    Raises:
      ValueError: a prompt is empty, has a token id outside the vocabulary, or exceeds the
        target's positions or the capacity with its new tokens; or an option is out of range.
      Interrupted: Ctrl-C; it holds the completions so far.
    """
    prompts = as_token_ids(target, prompts, raw=raw, thinking=thinking)
    stops = _stop_texts(target, stop)
    drafter = as_drafter(target, drafter)
    decoder, params = decoder_for(target, drafter, rejection=rejection)
    batch_size = integer("batch_size", batch_size, low=1)
    pace, batch = None, min(batch_size, len(prompts))
    if isinstance(budget, Pace):
        pace, batch, budget, capacity = budget, budget.rows, budget.budget, None
    capacity = check_capacity(decoder, prompts, max_new_tokens, capacity)
    if pace is not None:
        pace.check(decoder, params, capacity)
        capacity = pace.capacity
    budget = check_budget(decoder, budget)
    sampling = _one_each(sampling, len(prompts))
    for options in sampling:  # all of them before the first batch: an error loses its answers
        check_tokens(options, target.config)
    keys = request_keys(seed, len(prompts))

    completions = []
    with postponed() as asked:
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
            lengths = [len(prompt) for prompt in prompts[rows]]
            answers = [
                AnswerText(target.tokenizer, stops, min_tokens=options.min_tokens)
                for options in sampling[rows]
                if stops
            ]
            if pace is None:
                step = functools.partial(_step, decoder, params, requests.sampling)
            else:
                step = pace.steps(params, state, requests.sampling)
            state = _decode(step, state, lengths, answers, asked, progress)
            results = unpack(state, lengths)
            seconds = time.perf_counter() - began
            for row, (ids, stats) in enumerate(results):
                text = target.tokenizer and target.tokenizer.decode(ids)
                stop_ids = stop_ids_of(sampling[start + row], target.config)
                finish = _finish(ids, stop_ids, max_new_tokens)
                done = Completion(ids, text, stats, seconds, finish)
                completions.append(_cut(done, answers[row]) if answers else done)
            if pace is not None:
                pace.count(max(len(ids) for ids, _ in results))
            if _interrupted(state, asked):
                raise Interrupted(completions)
    return completions


def _stop_texts(target: Target, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stop = () if stop is None else stop
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    stops = tuple(stop) if several else (stop,)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop holds {text!r}; expected non-empty texts")
    if stops and target.tokenizer is None:
        raise ValueError(
            f"stop texts need a tokenizer, and target {target.name!r} has none; use "
            "Sampling.stop_ids"
        )
    return stops


def _one_each(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * count
    for options in samplings:
        if not isinstance(options, Sampling):
            raise ValueError(
                f"sampling has {options!r}; expected a jaxspec.Sampling, or one per prompt"
            )
    if len(samplings) != count:
        raise ValueError(
            f"sampling has {len(samplings)} entries for {count} prompts; give one, or one per "
            "prompt"
        )
    return samplings


def _cut(done: Completion, answer: AnswerText) -> Completion:
    """The completion up to its stop text, if it has one."""
    answer.see(done.token_ids)
    answer.finish()
    if not answer.stopped:
        return done
    ids = done.token_ids[: answer.taken]
    return dataclasses.replace(
        done,
        token_ids=ids,
        text=answer.text,
        stats=done.stats.first(len(ids)),
        finish="stop",
    )


def _finish(ids: list[int], stop_ids: Sequence[int], max_new_tokens: int) -> Finish:
    if ids[-1] in stop_ids:
        return "stop"
    return "length" if len(ids) >= max_new_tokens else "interrupted"


def _step(
    decoder: Decoder, params: Params, sampling: SamplingRows, state: DecodeState, rounds: int
) -> DecodeState:
    return decode(decoder, params, state, sampling, np.int32(rounds))


def _decode(
    step: Callable[[DecodeState, int], DecodeState],
    state: DecodeState,
    lengths: Sequence[int],
    answers: Sequence[AnswerText],
    asked: Sequence[int],
    progress: Callable[[int], object] | None,
) -> DecodeState:
    """Runs rounds until every row is done, or a Ctrl-C is in `asked` (`postponed`).

    Args:
      lengths: of the prompts.
      answers: of every row, or none if there are no stop texts.
    """
    rounds, written = 1, 0 if progress is None else int(state.length.sum())
    while True:
        if answers:
            state = _end_stopped(state, lengths, answers)
        if state.done.all() or _interrupted(state, asked):
            return state
        began = time.perf_counter()
        state = step(state, rounds)
        state.done.block_until_ready()
        if progress is not None:
            before, written = written, int(state.length.sum())
            progress(written - before)
        faster = CALL_SECONDS / (time.perf_counter() - began)
        rounds = max(1, int(rounds * min(faster, 4)))  # the first call may compile
        if over_processes(state):  # their clocks differ
            rounds = int(first_process(rounds))


def _interrupted(state: DecodeState, asked: Sequence[int]) -> bool:
    """Whether a Ctrl-C is in `asked`, in this process or another that decodes the same rows."""
    return any_process(bool(asked)) if over_processes(state) else bool(asked)


def _end_stopped(
    state: DecodeState, lengths: Sequence[int], answers: Sequence[AnswerText]
) -> DecodeState:
    """Marks rows done whose answers have a stop text."""
    tokens, ends, done = jax.device_get((state.tokens, state.length, state.done))
    for i, answer in enumerate(answers):
        answer.see(tokens[i, lengths[i] : ends[i]])
    stopped = [answer.stopped for answer in answers]
    done = done | np.array(stopped + [False] * (len(done) - len(stopped)))
    return dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))


@on_devices_of_target
def stream(
    target: Target,
    prompt: Prompt,
    *,
    drafter: LoadedDrafter | str = PLAIN,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] | None = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    budget: int | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    rejection: bool = False,
    rounds: int = 4,
) -> Generator[str, None, DecodeStats]:
    """Yields the text of one completion as it grows, in whole characters.

    Runs the compiled programs of `generate`, `rounds` rounds at a time; other arguments and
    errors as there: the call checks them, before the first text is asked for. Text that may
    begin a stop text is held back until that is decided. The generator's return value is the
    request's `DecodeStats`.
    """
    check_target(target)
    if target.tokenizer is None:
        raise ValueError(
            f"target {target.name!r} has no tokenizer; use generate with token ids"
        )
    rounds = integer("rounds", rounds, low=1)
    prompts = as_token_ids(target, [prompt], raw=raw, thinking=thinking)
    stops, drafter = _stop_texts(target, stop), as_drafter(target, drafter)
    (options,) = _one_each(sampling, 1)
    decoder, params = decoder_for(target, drafter, rejection=rejection)
    requests = pack(
        decoder,
        prompts,
        batch=1,
        capacity=check_capacity(decoder, prompts, max_new_tokens, None),
        max_new_tokens=max_new_tokens,
        budget=check_budget(decoder, budget),
        sampling=[options],
        keys=request_keys(seed, 1),
    )
    answer = AnswerText(target.tokenizer, stops, min_tokens=options.min_tokens)
    return _pieces(decoder, params, requests, answer, rounds)


@own_settings_between_yields
def _pieces(
    decoder: Decoder, params: Params, requests: Requests, answer: AnswerText, rounds: int
) -> Generator[str, None, DecodeStats]:
    """The answer of a single request, `rounds` rounds at a time; see `stream`."""
    state = prefill(decoder, params, requests)
    while True:
        ((ids, stats),) = unpack(state, requests.length)
        piece, done = answer.see(ids), bool(state.done[0])
        if done:
            piece += answer.finish()
        if piece:
            yield piece
        if answer.stopped:
            return stats.first(answer.taken)
        if done:
            return stats
        state = decode(decoder, params, state, requests.sampling, np.int32(rounds))


@on_devices_of_target
def warm_up(target: Target, prompts: Prompt | Sequence[Prompt], **options) -> int:
    """Compiles what `generate(target, prompts, **options)` will run; decodes one round.

    Args:
      options: the keyword arguments of `generate`.

    Returns:
      The capacity. Pass it to `generate` to run the same programs on part of the prompts.
    """
    raw, thinking = options.pop("raw", False), options.pop("thinking", None)
    rows = as_token_ids(target, prompts, raw=raw, thinking=thinking)
    options["drafter"] = as_drafter(target, options.get("drafter", PLAIN))
    decoder, _ = decoder_for(target, options["drafter"])
    new_tokens = options.pop("max_new_tokens", 256)
    capacity = check_capacity(decoder, rows, new_tokens, options.pop("capacity", None))
    batch = min(integer("batch_size", options.get("batch_size", 8), low=1), len(rows))
    options["sampling"] = _one_each(options.get("sampling", Sampling()), len(rows))[:batch]
    options["seed"] = request_keys(options.get("seed", 0), len(rows))[:batch]
    few = min(new_tokens, 2)  # prefill gives the first, one round the second
    generate(target, rows[:batch], max_new_tokens=few, capacity=capacity, **options)
    return capacity
