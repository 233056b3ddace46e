"""From submitted requests to the objects of an answer: its choices side by side, whole or as a
stream."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence

from jaxspec.answer_text import AnswerText
from jaxspec.decoding.stats import DecodeStats
from jaxspec.serving.metrics import Watch
from jaxspec.serving.protocol import Asked, Shape, error_body, usage
from jaxspec.serving.runner import EngineFailed, Ticket
from jaxspec.tokenizer import Tokenizer

log = logging.getLogger("uvicorn.error")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One request of an answer."""

    ticket: Ticket
    watch: Watch


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that a choice grew by; the last of a choice has the reason why it ended."""

    choice: int
    text: str
    tokens: int  # of the choice so far
    finish: str | None = None
    stats: DecodeStats | None = None


@dataclasses.dataclass(frozen=True)
class Answering:
    """The answer to one body.

    Attributes:
      choices: in the order of `asked.requests`.
    """

    asked: Asked
    choices: Sequence[Choice]
    tokenizer: Tokenizer
    shape: Shape

    async def whole(self) -> dict:
        """The object that holds all choices."""
        texts, last = [""] * len(self.choices), {}
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                texts[piece.choice] += piece.text
                last[piece.choice] = piece
        answers = [(text, last[i].finish) for i, text in enumerate(texts)]
        return self.shape.whole(answers, self._usage(last))

    async def events(self) -> AsyncGenerator[dict]:
        """The objects of a stream; an error, if there is one, is the last."""
        last: dict[int, Piece] = {}
        try:
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    first = piece.choice not in last
                    last[piece.choice] = piece
                    if first or piece.text or piece.finish:
                        told = self._usage(last) if self.asked.usage_in_every_chunk else None
                        yield self.shape.chunk(
                            piece.text, piece.finish, piece.choice, first=first, usage=told
                        )
            if self.asked.include_usage:
                yield self.shape.last(self._usage(last))
        except EngineFailed as error:
            yield error_body(str(error), "server_error")
        except Exception as error:
            log.exception("an answer could not be given")
            yield error_body(fault_message(error), "server_error")

    def _usage(self, last: Mapping[int, Piece]) -> dict:
        """Args: last: the last piece of every choice so far."""
        found = [piece.stats for piece in last.values() if piece.stats]
        stats = DecodeStats(
            tuple(tokens for own in found for tokens in own.committed),
            sum(own.nodes for own in found),
        )
        tokens = sum(piece.tokens for piece in last.values())
        return usage(self.asked.prompt_tokens, tokens, stats)

    async def _pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all choices as they come; the first error ends them."""
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
        answer, count, cut, finish = AnswerText(self.tokenizer, self.asked.stops), 0, None, None
        try:
            async for update in ticket:
                watch.see(update)
                text = ""
                if not answer.stopped:  # once cut, the counts of the rest are awaited alone
                    count += len(update.tokens)
                    text = answer.add(update.tokens)
                    if update.finish and not answer.stopped:
                        text += answer.finish()
                if answer.stopped and not cut:
                    cut = "stop"
                    ticket.cancel()
                finish = update.finish and (cut or update.finish)
                yield Piece(choice, text, count, finish, update.stats)
        except EngineFailed:
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
