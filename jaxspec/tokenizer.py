"""Text to token ids and back: encoding, chat templates, streaming."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxspec.text_stream import Decoding, TextStream, decoder_steps

Messages = Sequence[dict[str, str]]

_NO_BLANKS = str.maketrans("", "", " -\n")


class Tokenizer:
    """A tokenizer with the chat template of its model.

    Attributes:
      eos_token_ids: ids that end a text, as the tokenizer knows them; the model's
        configuration may name more.
    """

    def __init__(self, backend):
        """Args: backend: a `transformers.PreTrainedTokenizerFast`, or what is called as one."""
        self._backend = backend
        eos = backend.eos_token_id
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Raises:
          ValueError: it cannot be read.
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
        tokens: Sequence[str],
        merges: Sequence[str],
        *,
        special: Iterable[int],
        eos: int,
        chat_template: str | None,
    ) -> Tokenizer:
        """Byte-level BPE that splits digits one by one and adds no space in front.

        Args:
          tokens: in order of their ids, in GPT-2's byte alphabet.
          merges: 'left right', most preferred first.
          special: ids that match as a whole and that decoding leaves out.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(tokens[i], special=True, normalized=False)
                for i in (*special, eos)
            ]
        )
        return cls(_Plain(tokenizer, eos, chat_template))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with or without the special tokens the model expects around a text."""
        return self._backend.encode(text, add_special_tokens=special)

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: the tokenizer's own decoder fails on these ids.
        """
        ids = [int(i) for i in ids]
        try:
            return self._backend.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        except BaseException as error:  # a panic in the library's Rust is no `Exception`
            if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
                raise
            raise ValueError(f"the tokenizer cannot decode the ids {ids} ({error})") from error

    def chat(
        self,
        messages: str | Messages,
        *,
        thinking: bool | None = None,
        tools: Sequence[dict] = (),
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        Args:
          messages: {'role': …, 'content': …} each; a string is one turn of the user.
          thinking: whether the model may think first (Qwen3); None leaves it to the template.
          tools: that the model may call, in OpenAI's form, for a template that `takes_tools`.

        Raises:
          ValueError: there is no chat template, or none with a switch for thinking.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options = {"tools": list(tools)} if tools else {}
        return self._render(
            messages, thinking, add_generation_prompt=True, return_dict=False, **options
        )

    def render(self, messages: Messages, *, thinking: bool | None = None) -> list[int]:
        """Token ids of a whole conversation, answers included; arguments as for `chat`."""
        return self._render(messages, thinking, add_generation_prompt=False, return_dict=False)

    @property
    def chat_template(self) -> str | None:
        """Its source, Jinja, which may be set; the default one where there are several."""
        template = self._backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._backend.chat_template = template

    @property
    def marks_answers(self) -> bool:
        """Whether the chat template says which tokens are answers: `{% generation %}`."""
        return "{%generation%}" in (self.chat_template or "").translate(_NO_BLANKS)

    @property
    def switches_thinking(self) -> bool:
        """Whether the chat template has a switch for thinking."""
        return "enable_thinking" in (self.chat_template or "")

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return "tools" in (self.chat_template or "")

    def render_marked(
        self, messages: Messages, *, thinking: bool | None = None
    ) -> tuple[list[int], list[int]]:
        """`render`, and 1 for every token of an answer, 0 for others; needs `marks_answers`."""
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
        except Exception as error:  # whatever a template, which is a program, raises
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one round at a time."""
        return TextStream(self)

    @functools.cached_property
    def decoding(self) -> Decoding:
        """How text grows as ids arrive."""
        return Decoding.of(self.fast)

    def shown(self, token: int) -> str | None:
        """A token as the vocabulary has it; None for one that `decode` leaves out."""
        found = self.fast.id_to_token(token)
        return None if found in self._special else found

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return self.shown(token) is None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds inside a text; of an added token, its name's.

        Those of an id that the tokenizer does not have are b"".
        """
        name = self.fast.id_to_token(token)
        if name is None or token in self._added:
            return (name or "").encode()
        kinds = self._decoder_kinds
        if "ByteLevel" in kinds:
            return b"".join(_bytes_of(character) for character in name)
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", name)):
            return bytes.fromhex(byte[1])
        # Decoders treat the first token of a text in ways of their own.
        return self.decode([token, token])[len(self.decode([token])) :].encode()

    @functools.cached_property
    def _decoder_kinds(self) -> set[str]:
        return {step["type"] for step in decoder_steps(self.fast)}

    @functools.cached_property
    def _added(self) -> dict:
        return self.fast.get_added_tokens_decoder()

    @functools.cached_property
    def _special(self) -> set[str]:
        return {token.content for token in self._added.values() if token.special}

    @property
    def fast(self):
        """The `tokenizers.Tokenizer` behind it, if there is one."""
        return getattr(self._backend, "backend_tokenizer", None)


class _Plain:
    """A `tokenizers.Tokenizer`, called as one of transformers, which takes seconds to import
    and is needed for chats alone."""

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
    """GPT-2's: printable bytes are themselves, the others follow from U+0100 on."""
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
