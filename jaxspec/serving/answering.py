"""Submitted requests to OpenAI's response objects, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Collection, Sequence

from jaxspec.answer_text import AnswerText
from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.calls import OPEN
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.logprobs import LogProbShape
from jaxspec.serving.metrics import Watch
from jaxspec.serving.protocol import Asked
from jaxspec.serving.requests import Update
from jaxspec.serving.runner import EngineFailed, Ticket
from jaxspec.serving.shapes import Piece, Shape, error_body, joined_pieces, usage
from jaxspec.serving.thoughts import ThoughtReader
from jaxspec.tokenizer import Tokenizer

log = logging.getLogger("uvicorn.error")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One request of an answer."""

    ticket: Ticket
    watch: Watch


class Stuck(BadRequest):
    """An answer cannot go on: its grammar allows none of this model's tokens, or its parser has
    reached a limit. This is the request's fault; a retry does not help."""


class ChoiceReader:
    """Turns the updates of one request into the pieces of its choice."""

    def __init__(self, asked: Asked, choice: int, tokenizer: Tokenizer, *, chat: bool):
        """Args: choice: its place in `asked.requests`."""
        request = asked.requests[choice]
        least = request.sampling.min_tokens
        self._choice, self._silent = choice, asked.silent
        self._echo = asked.echo[choice // asked.choices]
        self._answer = AnswerText(tokenizer, asked.stops, min_tokens=least)
        # A grammar that asks for a call has it after the thoughts, in which any text may be.
        ends = (OPEN,) if asked.tools and asked.tools.lead else ()
        self._thoughts = asked.thoughts and ThoughtReader(asked.thoughts, ends)
        self._reader = asked.tools.reader() if asked.tools else None
        self._undecided = bool(asked.tools and asked.tools.instead)  # whether it is a call
        self._shape = None if request.logprobs is None else LogProbShape(tokenizer, chat=chat)
        self._cached = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found, so that no more tokens are needed."""
        return self._answer.stopped

    def read(self, update: Update) -> Piece:
        """The piece of the next update. Raises Stuck."""
        before = self._answer.taken
        text = self._text(update)
        laws = update.prompt_logprobs + update.logprobs[: self._answer.taken - before]
        finish, thoughts = self._finish(update), ""
        if self._thoughts:
            thoughts, text = self._thoughts.add(text, last=finish is not None)
        text, calls, finish = self._calls(text, finish)
        self._cached = self._cached or update.cached
        return Piece(
            self._choice,
            text,
            self._answer.taken,
            finish,
            update.stats,
            self._cached,
            self._shape.of(laws) if self._shape and laws else None,
            thoughts,
            calls,
        )

    def _text(self, update: Update) -> str:
        """The new text, the echo of the prompt first."""
        text, self._echo = self._echo, ""
        if self._silent or self.stopped:
            return text
        text += self._answer.add(update.tokens)
        return text + self._answer.finish() if update.finish else text

    def _finish(self, update: Update) -> str | None:
        """Why the choice ends, if this is its last update."""
        finish = update.finish and ("stop" if self.stopped else update.finish)
        if finish == "stuck":
            raise Stuck(f"the answer cannot go on in its format: {update.failure}")
        if self._silent and finish == "stop":  # at a token that is not returned
            return "length"
        return finish

    def _calls(self, text: str, finish: str | None) -> tuple[str, Sequence[dict], str | None]:
        """The text outside calls, new parts of calls, and why the choice ends."""
        if self._undecided and text:  # JSON, in which <tool_call> is text, or calls
            self._undecided, self._reader = False, self._reader if text[0] == OPEN[0] else None
        if self._reader is None:
            return text, (), finish
        text, calls = self._reader.add(text, last=finish is not None)
        if finish == "stop":
            text += self._reader.rest()
        called = finish == "stop" and self._reader.count and not self._reader.open
        return text, calls, "tool_calls" if called else finish


@dataclasses.dataclass(frozen=True)
class Answering:
    """The answer to one request body.

    Attributes:
      choices: in the order of `asked.requests`.
    """

    asked: Asked
    choices: Sequence[Choice]
    tokenizer: Tokenizer
    shape: Shape

    async def whole(self) -> dict:
        """The response object with all choices."""
        found: list[list[Piece]] = [[] for _ in self.choices]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                found[piece.choice].append(piece)
        answers = [joined_pieces(own) for own in found]
        return self.shape.whole(answers, self._usage(answers))

    async def events(self) -> AsyncGenerator[dict]:
        """The objects of a stream; an error, if any, comes last."""
        last: dict[int, Piece] = {}
        try:
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    first = piece.choice not in last
                    last[piece.choice] = piece
                    if first or piece.says_something:
                        every = self.asked.usage_in_every_chunk
                        told = self._usage(last.values()) if every else None
                        yield self.shape.chunk(piece, first=first, usage=told)
            if self.asked.include_usage:
                yield self.shape.last(self._usage(last.values()))
        except Stuck as error:
            yield error_body(str(error), "invalid_request_error")
        except EngineFailed as error:
            yield error_body(str(error), "server_error")
        except Exception as error:
            log.exception("an answer could not be given")
            yield error_body(fault_message(error), "server_error")

    def _usage(self, last: Collection[Piece]) -> dict:
        """Args: last: the last piece of every choice so far."""
        found = [piece.stats for piece in last if piece.stats]
        stats = DecodeStats(
            tuple(tokens for own in found for tokens in own.committed),
            sum(own.nodes for own in found),
        )
        tokens = sum(piece.tokens for piece in last)
        # A prompt is counted once; its further choices find the first one's pages.
        cached = sum(p.cached for p in last if p.choice % self.asked.choices == 0)
        return usage(self.asked.prompt_tokens, tokens, stats, cached)

    async def _pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all choices as they come, up to the first error."""
        news: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def follow(choice: int) -> None:
            try:
                async for piece in self._pieces_of(choice):
                    news.put_nowait(piece)
                news.put_nowait(None)
            except Exception as error:
                news.put_nowait(error)

        following = [asyncio.create_task(follow(i)) for i in range(len(self.choices))]
        try:
            left = len(following)
            while left:
                piece = await news.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def _pieces_of(self, choice: int) -> AsyncGenerator[Piece]:
        ticket, watch = self.choices[choice].ticket, self.choices[choice].watch
        reader = ChoiceReader(self.asked, choice, self.tokenizer, chat=self.shape.chat)
        finish = None
        try:
            async for update in ticket:
                watch.see(update)
                piece = reader.read(update)
                if reader.stopped:  # then wait only for the last update's counts
                    ticket.cancel()
                finish = piece.finish
                yield piece
        except (EngineFailed, Stuck):
            finish = "failed"
            raise
        except Exception:
            finish = "error"
            raise
        finally:
            if finish:
                watch.end(finish)


def fault_message(error: Exception) -> str:
    return f"the answer could not be given: {error}"
