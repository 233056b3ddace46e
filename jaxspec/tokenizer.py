"""Text to token ids and back: encoding, decoding, chat templates."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

Messages = Sequence[dict[str, str]]

PRE_TOKENIZERS = ("smollm", "qwen2")  # as GGUF files name them
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_BLANKS = str.maketrans("", "", " -\n")


class Tokenizer:
    """A tokenizer with the chat template of its model.

    Attributes:
      eos_token_ids: ids that end a text, by the tokenizer's files; the model's configuration
        may name more.
    """

    def __init__(self, backend):
        """Args: backend: a `transformers.PreTrainedTokenizerFast`, or one with its API."""
        self._backend = backend
        eos = backend.eos_token_id
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Raises:
          ValueError: the tokenizer cannot be read.
        """
        try:
            return cls(
                _transformers().AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            )
        except Exception as error:  # whatever the parsers raise on a damaged file
            raise ValueError(
                f"the tokenizer in {folder} cannot be read ({error}); download it again"
            ) from error

    @classmethod
    def from_bpe(
        cls,
        tokens: Sequence[str | None],
        merges: Sequence[str],
        *,
        pre: str = "smollm",
        special: Iterable[int],
        added: Iterable[int] = (),
        eos: int,
        chat_template: str | None,
    ) -> Tokenizer:
        """Byte-level BPE that adds no leading space.

        Args:
          tokens: in order of their ids, in GPT-2's byte alphabet; None for an unused id.
          merges: 'left right', most preferred first.
          pre: one of `PRE_TOKENIZERS`, how text is split into words. "smollm" splits off single
            digits, "qwen2" uses the expression of Qwen's tokenizers, after NFC.
          special, added: ids that are matched whole; decoding omits the special ones.
        """
        import tokenizers
        from tokenizers import decoders, models

        vocabulary = {token: i for i, token in enumerate(tokens) if token is not None}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        _split_words(tokenizer, pre)
        tokenizer.decoder = decoders.ByteLevel()
        whole = functools.partial(tokenizers.AddedToken, normalized=False)
        tokenizer.add_special_tokens([whole(tokens[i], special=True) for i in (*special, eos)])
        tokenizer.add_tokens([whole(tokens[i], special=False) for i in added])
        return cls(_Plain(tokenizer, eos, chat_template))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids. Args: special: add the special tokens that the model expects around it."""
        return self._backend.encode(text, add_special_tokens=special)

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: the tokenizer's own decoder fails on these ids.
        """
        ids = [int(i) for i in ids]
        try:
            return self._backend.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        except BaseException as error:  # a panic in the library's Rust is not an `Exception`
            if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
                raise
            raise ValueError(f"the tokenizer cannot decode the ids {ids} ({error})") from error

    def chat(
        self,
        messages: str | Messages,
        *,
        thinking: bool | None = None,
        tools: Sequence[dict] = (),
        **switches: bool,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
          messages: dicts {'role': …, 'content': …}; a string is a single user turn.
          thinking: whether the model may think first (Qwen3); None: the template's default.
          tools: tools that the model may call, in OpenAI's format; needs `takes_tools`.
          switches: further switches that the template has, such as Qwen3.8's preserve_thinking.

        Raises:
          ValueError: there is no chat template, or it has no switch for `thinking`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options = switches | ({"tools": list(tools)} if tools else {})
        return self._render(
            messages, thinking, add_generation_prompt=True, return_dict=False, **options
        )

    def render(self, messages: Messages, *, thinking: bool | None = None) -> list[int]:
        """Token ids of a whole conversation, answers included; arguments as for `chat`."""
        return self._render(messages, thinking, add_generation_prompt=False, return_dict=False)

    @property
    def chat_template(self) -> str | None:
        """The template's Jinja source, which may be set; the default one of several."""
        template = self._backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._backend.chat_template = template

    @property
    def marks_answers(self) -> bool:
        """Whether the chat template marks answer tokens, by `{% generation %}`."""
        return "{%generation%}" in (self.chat_template or "").translate(_NO_BLANKS)

    def template_has(self, text: str) -> bool:
        """Whether there is a chat template with this text in it."""
        return text in (self.chat_template or "")

    @property
    def switches_thinking(self) -> bool:
        """Whether the chat template has a switch for thinking."""
        return self.template_has("enable_thinking")

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template takes tools."""
        return self.template_has("tools")

    def render_marked(
        self, messages: Messages, *, thinking: bool | None = None
    ) -> tuple[list[int], list[int]]:
        """`render`, and a mask: 1 for answer tokens, else 0. Needs `marks_answers`."""
        rendered = self._render(
            messages, thinking, return_dict=True, return_assistant_tokens_mask=True
        )
        return rendered["input_ids"], rendered["assistant_masks"]

    def _render(self, messages: Messages, thinking: bool | None, **options):
        if self.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; encode the prompt as plain text, or use "
                "a checkpoint tuned for chat"
            )
        if thinking is not None:
            if not self.switches_thinking:
                raise ValueError(
                    f"thinking is {thinking}, but the chat template has no such switch; "
                    "leave it at None"
                )
            options["enable_thinking"] = thinking
        try:
            return self._backend.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def shown(self, token: int) -> str | None:
        """A token as the vocabulary spells it; None for one that `decode` omits."""
        found = self.fast.id_to_token(token)
        return None if found in self._special else found

    def is_special(self, token: int) -> bool:
        """Whether `decode` omits the token."""
        return self.shown(token) is None

    def id_of(self, text: str) -> int | None:
        """The id of the added token that stands for just this text; None if there is none, or
        if `decode` omits it."""
        token = None if self.fast is None else self.fast.token_to_id(text)
        return token if token in self._added and not self.is_special(token) else None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds inside a text; for an added token, those of its name.

        b"" for an id that the tokenizer does not have.
        """
        name = self.fast.id_to_token(token)
        if name is None or token in self._added:
            return (name or "").encode()
        kinds = self._decoder_kinds
        if "ByteLevel" in kinds:
            return b"".join(_bytes_of(character) for character in name)
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", name)):
            return bytes.fromhex(byte[1])
        # Decoders treat the first token of a text specially.
        return self.decode([token, token])[len(self.decode([token])) :].encode()

    @functools.cached_property
    def decoder_steps(self) -> list[dict] | None:
        """The steps of the decoder, each with its type; [] without a decoder, which puts blanks
        between tokens; None where they are unknown, as `fast` is None."""
        if self.fast is None:
            return None
        if self.fast.decoder is None:
            return []
        decoder = json.loads(self.fast.decoder.__getstate__())
        return decoder.get("decoders", [decoder])

    @functools.cached_property
    def _decoder_kinds(self) -> set[str]:
        return {step["type"] for step in self.decoder_steps}

    @functools.cached_property
    def _added(self) -> dict:
        return self.fast.get_added_tokens_decoder()

    @functools.cached_property
    def _special(self) -> set[str]:
        return {token.content for token in self._added.values() if token.special}

    @property
    def fast(self):
        """The underlying `tokenizers.Tokenizer`, or None."""
        return getattr(self._backend, "backend_tokenizer", None)


def _split_words(tokenizer, pre: str) -> None:
    """Sets how a `tokenizers.Tokenizer` normalises text and splits it into words."""
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        words = Split(Regex(QWEN2_WORDS), "isolated")
    else:
        words = Digits(individual_digits=True)
    own = ByteLevel(add_prefix_space=False, use_regex=pre != "qwen2")
    tokenizer.pre_tokenizer = Sequence([words, own])


class _Plain:
    """A `tokenizers.Tokenizer` with transformers' API; transformers itself, which takes seconds
    to import, is loaded only for chats."""

    def __init__(self, tokenizer, eos: int, chat_template: str | None):
        self.backend_tokenizer, self.eos_token_id = tokenizer, eos
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool, **_) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, **options):
        options = options | {"chat_template": self.chat_template}
        return self._renderer.apply_chat_template(messages, **options)

    @functools.cached_property
    def _renderer(self):
        tokenizer, eos = self.backend_tokenizer, self.eos_token_id
        return _transformers().PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(eos)
        )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes are themselves, others map to U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _bytes_of(character: str) -> bytes:
    byte = _byte_alphabet().get(character)
    return character.encode() if byte is None else bytes([byte])


def _transformers():
    # Keeps it quiet about missing PyTorch: only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
