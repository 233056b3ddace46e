"""Training data: rows with a conversation, and its token ids if stored.

Besides the text, a row of `regenerate` has the tokens that the target saw and wrote,

    "sequences": [{"token_ids": [...], "answers": [[start, stop], ...]}, ...]

where `answers` are the half-open ranges that it wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxspec.data.conversations import Example, answer_ranges, encode
from jaxspec.data.files import Row
from jaxspec.data.identity import fingerprint, same_model
from jaxspec.data.messages import row_messages
from jaxspec.data.sources import Source, open_source
from jaxspec.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxspec.models.target import Target

SEQUENCES = "sequences"
SHOWN = 3  # skipped rows that messages quote


def stored_sequences(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Sequences in the form that a row stores."""
    return [
        {"token_ids": example.tokens.tolist(), "answers": answer_ranges(example)}
        for example in examples
    ]


def read_sequences(sequences: Any, vocab: int) -> list[Example]:
    """The sequences of a row.

    Args:
      vocab: size of the target's vocabulary.

    Raises:
      ValueError: they do not have the form of `stored_sequences`.
    """
    if not isinstance(sequences, list) or not all(isinstance(x, dict) for x in sequences):
        found = json.dumps(sequences, default=str)[:60]
        raise ValueError(f"'{SEQUENCES}' is {found}; expected objects")
    examples = []
    for number, sequence in enumerate(sequences):
        where = f"{SEQUENCES}[{number}]"
        ids, answers = sequence.get("token_ids"), sequence.get("answers")
        if not (isinstance(ids, list) and all(type(x) is int for x in ids)):
            raise ValueError(f"{where}: 'token_ids' is not a list of token ids")
        bad = next((x for x in ids if not 0 <= x < vocab), None)
        if bad is not None:
            raise ValueError(
                f"{where}: token id {bad}; the target's vocabulary is 0 … {vocab - 1}"
            )
        supervised, end = np.zeros(len(ids), bool), 0
        for pair in answers if isinstance(answers, list) else [None]:
            good = isinstance(pair, list) and [type(x) for x in pair] == [int, int]
            if not good or not end <= pair[0] < pair[1] <= len(ids):
                raise ValueError(
                    f"{where}: 'answers' has {json.dumps(pair, default=str)[:60]}; expected "
                    f"ascending ranges [start, stop] within the {len(ids)} ids"
                )
            supervised[pair[0] : pair[1]], end = True, pair[1]
        examples.append(Example(np.array(ids, np.int32), supervised))
    return examples


def row_examples(
    row: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    vocab: int,
    stop_ids: Collection[int] = (),
    known: bool = True,
) -> list[Example]:
    """The sequences of a row: its stored token ids, or else its rendered text.

    Args:
      vocab: size of the target's vocabulary.
      stop_ids: token ids that end an answer, besides the tokenizer's.
      known: whether this target wrote the row; stored ids of another target are not used.

    Raises:
      ValueError: the row is not a conversation, or its rendering differs from the stored text.
    """
    finished, thinking = row.get("finished", True), row.get("thinking")
    if type(finished) is not bool or thinking not in (None, True, False):
        raise ValueError(
            f"'finished' is {finished!r} and 'thinking' {thinking!r}; expected true or false, "
            "or null for the second"
        )
    if SEQUENCES in row and known:
        examples = read_sequences(row[SEQUENCES], vocab)
    else:
        options = dict(messages=row_messages(row), finished=finished, stop_ids=stop_ids)
        try:
            examples = encode(tokenizer, thinking=thinking, **options)
        except ValueError:
            # Other people's data does not name its thinking mode: try the one without thinking.
            if "thinking" in row or not tokenizer.switches_thinking:
                raise
            thinking = False
            examples = encode(tokenizer, thinking=thinking, **options)
    return [dataclasses.replace(example, thinking=thinking) for example in examples]


def read_examples(
    sources: str | Path | Source | Sequence[str | Path | Source],
    target: Target,
    *,
    max_length: int,
    min_supervised: int = 14,
    any_target: bool = False,
) -> list[Example]:
    """All sequences of conversations, truncated to `max_length` tokens.

    Sequences with fewer than `min_supervised` answer tokens are dropped, unusable rows are
    skipped. How many there are of each, and the first unusable rows, are printed to standard
    error.

    Args:
      any_target: also use rows that another model wrote; their text is rendered.

    Raises:
      ValueError: a source cannot be read, a row names another target, no sequence is left, or a
        length is below 1.
    """
    for name, length in (("max_length", max_length), ("min_supervised", min_supervised)):
        if length < 1:
            raise ValueError(f"{name} is {length}; expected at least 1")
    if isinstance(sources, str | Path | Source):
        sources = [sources]
    sources = [open_source(source) for source in sources]
    ours = fingerprint(target)
    read = functools.partial(
        row_examples,
        tokenizer=target.tokenizer,
        vocab=target.config.vocab_size,
        stop_ids=target.config.eos_token_ids,
    )
    examples: list[Example] = []
    skipped: list[str] = []
    conversations = dropped = truncated = 0
    for row in itertools.chain.from_iterable(sources):
        conversations += 1
        try:
            metadata = row.fields.get("metadata")
            of_model = metadata if isinstance(metadata, dict) else {}
            known = same_model(of_model, target.name, ours)
            encoded = read(row.fields, known=known) if known or any_target else None
        except ValueError as error:
            skipped.append(f"{row.where}: {error}")
            continue
        if encoded is None:
            raise _another_wrote(row, target)
        for example in encoded:
            cut = example.cut(max_length)
            if cut.supervised.sum() < min_supervised:
                dropped += 1
            else:
                truncated += len(example) > max_length
                examples.append(cut)
    files = ", ".join(source.name for source in sources)
    if not conversations:
        raise ValueError(f"{files}: no conversations; expected one JSON object per line")
    if not examples:
        raise ValueError(
            f"{files}: none of {conversations} conversations can be trained on; {dropped} "
            f"sequences have fewer than {min_supervised} answer tokens within {max_length} "
            "tokens (see --max-length, --min-supervised)" + _shown(skipped)
        )
    counts = f"{len(examples)} sequences of {conversations} conversations"
    if dropped:
        counts += f"; {dropped} dropped, with fewer than {min_supervised} answer tokens"
    if truncated:
        counts += f"; {truncated} truncated to {max_length} tokens"
    print(f"{files}: {counts}{_shown(skipped)}", file=sys.stderr)
    return examples


def _another_wrote(row: Row, target: Target) -> ValueError:
    wrote = row.fields["metadata"].get("target")
    return ValueError(
        f"{row.where}: {wrote!r} wrote this row, but the target is {target.name!r}; regenerate "
        "the answers with this target, or give --any-target to train on another model's answers"
    )


def _shown(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    first = "".join(f"\n  {reason}" for reason in skipped[:SHOWN])
    more = "" if len(skipped) <= SHOWN else f"\n  and {len(skipped) - SHOWN} more"
    return f"; {len(skipped)} skipped:{first}{more}"
