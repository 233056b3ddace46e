"""Creates training data: the target's answers to given questions, or to questions it writes.

A drafter learns to predict the target's answers; training on other answers to the same prompts
gives a much worse one (JetSpec's ablation: acceptance length 3.65 against 8.62 on GSM8K).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxspec.arguments import at_least, check_field, check_seed
from jaxspec.data.conversations import extend
from jaxspec.data.identity import fingerprint, template_hash
from jaxspec.data.jobs import Job, Opening
from jaxspec.data.rows import stored_sequences
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import Request
from jaxspec.tokenizer import Tokenizer
from jaxspec.training.answers_file import AnswersFile

GREEDY = Sampling()
ROUNDS = 8  # decode rounds between checks for finished rows


@dataclasses.dataclass(frozen=True)
class RegenerateConfig:
    """How the target answers.

    Attributes:
      sampled: share of the conversations answered by `sampling`, chosen by the seed and their
        index in the input; the others are greedy.
      thinking: thinking switch of the chat template; None: the template's default.
      max_length: maximum tokens per conversation; longer ones become errors.
      question: sampling of the target's own questions, of up to `question_tokens` tokens.
      rows: conversations decoded together.
    """

    max_new_tokens: int = 512
    sampling: Sampling = Sampling()
    sampled: float = 1.0
    thinking: bool | None = None
    max_length: int = 1024
    question: Sampling = Sampling(temperature=1.0)
    question_tokens: int = 96
    seed: int = 0
    rows: int = 16

    def __post_init__(self):
        check_field(self, "sampled", 0 <= self.sampled <= 1, "a share, 0 … 1")
        at_least(1, self, "max_new_tokens", "max_length", "question_tokens", "rows")
        check_seed(self)

    def sampling_of(self, job: Job) -> Sampling:
        """How a conversation's answers are sampled."""
        lot = np.random.default_rng((self.seed, job.number)).random()
        return self.sampling if lot < self.sampled else GREEDY


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run of `regenerate`.

    Attributes:
      rows: number of conversations in the file.
      answered: number of those from this run.
      failed: number of conversations in the file `errors`.
    """

    rows: int
    answered: int
    failed: int
    errors: Path


def regenerate(
    config: RegenerateConfig,
    target: Target,
    jobs: Iterable[Job],
    output: str | Path,
    *,
    drafter: LoadedDrafter = PLAIN,
) -> Outcome:
    """Answers conversations, turn by turn, and appends each to a file when it is complete.

    Rows already in the file are kept: a killed run resumes where it was. Failed conversations
    go to `NAME.errors.jsonl` beside it, and are tried again.

    Args:
      drafter: changes speed only.

    Raises:
      ValueError: the target has no tokenizer; the file has another format, or answers to other
        prompts or by another target, template or sampling; or another process writes it.
    """
    if target.tokenizer is None:
        raise ValueError(f"target {target.name!r} has no tokenizer to read and write text with")
    jobs, made_by = list(jobs), _made_by(config, target)
    with contextlib.closing(AnswersFile(output)) as file:
        waiting = deque(file.waiting(jobs, lambda job: made_by | _sampling(config, job)))
        made = len(jobs) - len(waiting)
        with tqdm(total=len(jobs), initial=made, unit="row", file=sys.stderr) as progress:
            conversations = _Conversations(config, target, drafter, file, made_by, progress)
            conversations.run(waiting)
        answered, failed = conversations.answered, conversations.failed
        return Outcome(len(file.rows) + answered, answered, failed, file.errors)


class _Conversations:
    """Conversations that the target answers together.

    Attributes:
      answered, failed: numbers of completed and of failed conversations.
    """

    def __init__(self, config, target, drafter, file: AnswersFile, made_by, progress: tqdm):
        self.answered = self.failed = 0
        self._config, self._target = config, target
        self._file, self._made_by, self._progress = file, made_by, progress
        self._asked: dict[
            int, tuple[Job, list[int]]
        ] = {}  # by the engine's id, with its answer
        limits = EngineConfig(
            slots=config.rows,
            room=config.max_length,
            queue=2 * config.rows,
            schedule=Fixed(),
            rounds=ROUNDS,
            throughput=True,
        )
        self._engine = Engine(target, drafter, limits)

    def run(self, waiting: deque[Job]) -> None:
        """Answers them all."""
        began, tokens = time.perf_counter(), 0
        while self._asked or waiting:
            while waiting and len(self._asked) < 2 * self._config.rows:
                self._ask(waiting.popleft())
            for update in self._engine.step() if self._asked else ():
                tokens += len(update.tokens)
                self._asked[update.id][1].extend(update.tokens)
                if update.finish is not None:
                    self._hear(*self._asked.pop(update.id))
            speed = tokens / (time.perf_counter() - began)
            self._progress.set_postfix_str(f"{speed:.0f} tokens/s")

    def _ask(self, job: Job) -> None:
        try:
            request = _request(self._config, self._target, job)
            self._asked[self._engine.submit(request)] = job, []
        except ValueError as error:
            self._fail(job, error)

    def _hear(self, job: Job, answer: list[int]) -> None:
        try:
            complete = _hear(self._target, job, answer)
        except ValueError as error:
            self._fail(job, error)
            return
        if not complete:
            self._ask(job)
            return
        self._file.add(_row(job, self._made_by | _sampling(self._config, job)))
        self.answered += 1
        self._progress.update()

    def _fail(self, job: Job, error: ValueError) -> None:
        row = {"id": job.id, "error": str(error), "conversations": job.messages}
        self._file.fail(row)
        self.failed += 1
        self._progress.update()


def user_header(tokenizer: Tokenizer) -> list[int]:
    """Token ids that the chat template puts before a user's text."""
    first, second = (tokenizer.chat(text) for text in ("a", "b"))
    same = next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
    return first[:same]


def _request(config: RegenerateConfig, target: Target, job: Job) -> Request:
    """The next request of a job: for the target's own question, or for an answer.

    Raises:
      ValueError: the job has an error, or the template refuses it.
    """
    if job.error:
        raise ValueError(job.error)
    step = len(job.messages)
    key = jax.random.fold_in(jax.random.key(config.seed), job.number)
    if isinstance(turn := job.turns[0], Opening):
        opening = target.tokenizer.encode(turn.text, special=False)
        job.prompt = user_header(target.tokenizer) + opening
        length, sampling = config.question_tokens, config.question
        step = 2**31 - 1  # a key different from those of the answers
    else:
        asked = [*job.messages, {"role": "user", "content": turn}]
        job.prompt = target.tokenizer.chat(asked, thinking=config.thinking)
        length, sampling = config.max_new_tokens, config.sampling_of(job)
    return Request(job.prompt, length, sampling, jax.random.fold_in(key, step))


def _hear(target: Target, job: Job, answer: list[int]) -> bool:
    """Adds an answer's token ids to the conversation; returns whether it is complete.

    Raises:
      ValueError: the target wrote an empty question.
    """
    text = target.tokenizer.decode(answer)
    turn = job.turns.pop(0)
    if isinstance(turn, Opening):
        question = (turn.text + text).strip()
        if not text.strip():
            raise ValueError(f"the target wrote an empty question after {turn.text!r}")
        job.turns.insert(0, question + turn.ending)
        return False
    job.messages += [
        {"role": "user", "content": turn},
        {"role": "assistant", "content": text},
    ]
    extend(job.sequences, job.prompt, answer)
    job.new_tokens += len(answer)
    job.finished = answer[-1] in target.config.eos_token_ids
    return not job.turns


def _made_by(config: RegenerateConfig, target: Target) -> dict[str, Any]:
    """Metadata of every row of a run."""
    return {
        "target": target.name,
        "fingerprint": fingerprint(target),
        "template": template_hash(target),
        "thinking": config.thinking,
        "dtype": str(target.params.embed.dtype),
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
        "sampled": config.sampled,
        "question": _fields(config.question),
        "question_tokens": config.question_tokens,
    }


def _sampling(config: RegenerateConfig, job: Job | None) -> dict[str, Any]:
    """Sampling settings of a conversation; empty for None."""
    return {} if job is None else _fields(config.sampling_of(job))


def _fields(sampling: Sampling) -> dict[str, Any]:
    """Sampling settings as JSON reads them back."""
    fields = dataclasses.asdict(sampling)
    del fields["stop_ids"]
    return fields | {"logit_bias": [list(bias) for bias in fields["logit_bias"]]}


def _row(job: Job, fields: dict[str, Any]) -> dict[str, Any]:
    metadata = fields | {"new_tokens": job.new_tokens}
    return {
        "id": job.id,
        "conversations": job.messages,
        "finished": job.finished,
        "thinking": metadata.pop("thinking"),
        "sequences": stored_sequences(job.sequences),
        "metadata": metadata,
    }
