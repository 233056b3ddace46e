"""Prompts of users as token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.data.messages import read_messages
from jaxspec.decoding.requests import check_positions
from jaxspec.models.target import Target, check_target

Message = Mapping[str, Any]
# A text, token ids, or a conversation.
Prompt = str | Sequence[int] | Sequence[Message]


def as_token_ids(
    target: Target, prompts: Prompt | Sequence[Prompt], *, raw: bool, thinking: bool | None
) -> list[list[int]]:
    """One prompt or many as token ids; see `token_ids`.

    Raises:
      ValueError: a prompt cannot be used, `target` is not a loaded one, or the call is traced,
        as in `jax.jit`.
    """
    check_target(target)
    # Inside jit every array is traced; inside grad and vmap, what their arguments decide.
    arrays = jnp.zeros(()), target.params.embed, prompts
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        raise ValueError(
            "the call is traced by jax.jit, grad or vmap; expected a call outside of them, as "
            "it runs a loop in Python. jaxspec.logits and hidden_states may be traced"
        )
    if isinstance(prompts, Mapping):
        raise ValueError(
            "prompts is a single message; a conversation is a list of messages: put it in []"
        )
    if hasattr(prompts, "tolist"):  # an array
        prompts = prompts.tolist()
    if isinstance(prompts, Iterable) and not isinstance(prompts, str):
        prompts = list(prompts)
    if not isinstance(prompts, list) or (prompts and isinstance(prompts[0], _PARTS)):
        prompts = [prompts]
    if not prompts:
        raise ValueError(
            "prompts is empty; expected a text, a list of token ids, or a list of those"
        )
    return [
        token_ids(target, prompt, raw=raw, thinking=thinking, name=f"prompt {i}")
        for i, prompt in enumerate(prompts)
    ]


_PARTS = (int, np.integer, Mapping)  # elements of a single prompt


def token_ids(
    target: Target, prompt: Prompt, *, raw: bool, thinking: bool | None, name: str
) -> list[int]:
    """One prompt as token ids.

    Args:
      prompt: a text, which becomes a user's turn in the chat template unless `raw`; a
        conversation, a list of messages {"role", "content"} that the assistant continues; or
        token ids.
      name: what errors call the prompt.

    Raises:
      ValueError: the prompt is empty, is none of these, or has an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        prompt = _from_text(target, prompt, raw=raw, thinking=thinking, name=name)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        prompt = _from_messages(target, prompt, raw=raw, thinking=thinking, name=name)
    try:
        row = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"{name} is {str(prompt)[:60]!r}; expected a text, a list of token ids, or a list "
            "of messages {'role': …, 'content': …}"
        ) from None
    if not row:
        raise ValueError(f"{name} is empty; expected at least one token id")
    bad = next((token for token in row if not 0 <= token < target.config.vocab_size), None)
    if bad is not None:
        raise ValueError(
            f"{name} has token id {bad}; the target's vocabulary is "
            f"0 … {target.config.vocab_size - 1}. Was it encoded with another tokenizer?"
        )
    return row


def _from_text(target: Target, text: str, *, raw, thinking, name) -> list[int]:
    tokenizer = _tokenizer(target, name, "text")
    if not text.strip():
        raise ValueError(f"{name} is empty; expected some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; expected text that was not cut inside a character"
        ) from None
    return tokenizer.encode(text) if raw else tokenizer.chat(text, thinking=thinking)


def _from_messages(target: Target, messages, *, raw, thinking, name) -> list[int]:
    tokenizer = _tokenizer(target, name, "a conversation")
    if raw:
        raise ValueError(
            f"{name} is a conversation, which needs the chat template; leave raw out"
        )
    try:
        read = read_messages(list(messages))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not any(message["content"].strip() for message in read):
        raise ValueError(f"{name} is empty; expected a message with some text")
    return tokenizer.chat(read, thinking=thinking)


def _tokenizer(target: Target, name: str, kind: str):
    if target.tokenizer is None:
        raise ValueError(
            f"{name} is {kind}, but target {target.name!r} has no tokenizer; give token ids"
        )
    return target.tokenizer


def usable_prompts(
    target: Target,
    prompts: Sequence[Prompt | ValueError],
    *,
    raw: bool,
    thinking: bool | None,
    max_new_tokens: int,
    spare: int = 0,
) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Usable prompts as token ids, and reasons why the others are not, both by index.

    Args:
      prompts: prompts, or an error in place of one that could not be read.
      spare: tokens past an answer that also need positions.

    Raises:
      ValueError: none of them can be used.
    """
    rows, refused = {}, {}
    for place, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {place}"
        if isinstance(prompt, ValueError):
            refused[place] = str(prompt)
            continue
        try:
            ids = token_ids(target, prompt, raw=raw, thinking=thinking, name=name)
            check_positions(target.config, len(ids), max_new_tokens, spare)
            rows[place] = ids
        except ValueError as error:
            text = str(error)
            refused[place] = text if text.startswith(name) else f"{name}: {text}"
    if not rows:
        reason = refused.get(0, "there are none")
        many = f"none of the {len(prompts)} prompts is usable; " if len(prompts) > 1 else ""
        raise ValueError(many + reason)
    return rows, refused
