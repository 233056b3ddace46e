"""Log-probabilities in OpenAI's shapes, of completions and of chats."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxspec.serving.requests import TokenLogProb
from jaxspec.tokenizer import Tokenizer


class LogProbShape:
    """Formats the log-probabilities of one choice, a few tokens at a time.

    A token is shown as its text, or as `bytes:\\xe2\\x82` if its bytes alone are not text.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool):
        self._tokenizer, self._chat = tokenizer, chat
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the tokens so far

    def of(self, found: Sequence[TokenLogProb]) -> dict:
        """The log-probability object of the next tokens."""
        return self._of_chat(found) if self._chat else self._of_completion(found)

    def _of_chat(self, found: Sequence[TokenLogProb]) -> dict:
        def entry(token: int, logprob: float) -> dict:
            raw = self._tokenizer.token_bytes(token)
            return {"token": shown(raw), "logprob": logprob, "bytes": list(raw)}

        content = [
            entry(one.token, one.logprob)
            | {"top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _of_completion(self, found: Sequence[TokenLogProb]) -> dict:
        lists: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for one in found:
            raw = self._tokenizer.token_bytes(one.token)
            likeliest: dict[str, float] = {}
            for token, logprob in (*one.top, (one.token, one.logprob)):
                # Of tokens with equal text, the likeliest counts.
                likeliest.setdefault(shown(self._tokenizer.token_bytes(token)), logprob)
            lists["tokens"].append(shown(raw))
            lists["token_logprobs"].append(one.logprob)
            lists["top_logprobs"].append(None if one.logprob is None else likeliest)
            lists["text_offset"].append(self._offset)
            if not self._tokenizer.is_special(one.token):
                self._offset += len(self._characters.decode(raw))
        return lists


def shown(raw: bytes) -> str:
    """
    >>> shown(b" caf\\xc3\\xa9"), shown(b"\\xc3")
    (' café', 'bytes:\\\\xc3')
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined_logprobs(parts: Sequence[dict]) -> dict:
    """Joins the objects of consecutive tokens into one."""
    lists = {name: [] for name, value in parts[0].items() if isinstance(value, list)}
    for part in parts:
        for name, values in lists.items():
            values += part[name]
    return parts[0] | lists
