"""People's data in every format and shape of row: the same rows come out."""

import json
from pathlib import Path

import pytest

from jaxspec.data.jobs import read_jobs
from jaxspec.data.prompts import read_prompts
from jaxspec.data.rows import read_examples
from jaxspec.data.sources import open_source
from jaxspec.training.run_folder import data_hash
from tests.data.files import (
    COMPRESSIONS,
    FILES,
    ROWS,
    SHAREGPT,
    as_lines,
    contents,
    needs,
    saved,
    write,
)
from tests.data.test_conversations import TALK, shown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", FILES)
def test_every_format_in_every_compression(tmp_path, capsys, kind, compression):
    (suffix, encode), (ending, compress) = FILES[kind], COMPRESSIONS[compression]
    path = tmp_path / f"data{suffix}{ending}"
    path.write_bytes(compress(encode(ROWS)))
    source = open_source(path)
    assert source.format == (f"{kind} ({compression})" if compression else kind)
    assert source.label == "data"
    assert [row.fields for row in source] == ROWS
    assert capsys.readouterr().err == f"{path}: read as {source.format}, OpenAI's messages\n"
    assert source.summary()["rows"] == {"OpenAI's messages": 2}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.parquet", "data"])
def test_the_content_decides_and_not_the_name(tmp_path, name, compression):
    path = tmp_path / name
    path.write_bytes(COMPRESSIONS[compression][1](as_lines(ROWS)))
    assert contents(path) == ROWS


def test_our_own_lines_are_not_announced(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_bytes(as_lines([{"prompt": "a"}, {"turns": ["b"]}, {"conversations": TALK}]))
    assert len(contents(path)) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": TALK[:2]}, "OpenAI's messages"),
        ({"conversations": SHAREGPT}, "ShareGPT's conversations"),
        ({"prompt": "a b", "completion": "c d"}, "prompts with completions"),
        ({"prompt": TALK[:1], "completion": TALK[1:2]}, "prompts with completions"),
        ({"messages": json.dumps(TALK[:2])}, "OpenAI's messages"),
        ({"question": "a b", "answer": "c d"}, "questions with answers"),
    ],
    ids=["openai", "sharegpt", "completion", "completion of messages", "json text", "answer"],
)
@pytest.mark.parametrize("kind", FILES)
def test_every_shape_of_row_trains_and_asks_alike(target, tmp_path, capsys, row, shape, kind):
    path = write(tmp_path / f"data{FILES[kind][0]}", kind, [row])
    (example,) = read_examples(path, target, max_length=16, min_supervised=1)
    assert shown(target.tokenizer, example) == "user a b <end> nl assistant C D <END>"
    assert read_prompts(path) == ["a b"]
    (job,) = read_jobs(path)
    assert (job.id, job.turns) == (0, ["a b"])
    assert f"read as {kind}, {shape}\n" in capsys.readouterr().err


@needs("pyarrow")
def test_nulls_of_nested_parquet_are_absent_keys(tmp_path):
    """One schema holds both kinds of message, each with nulls for the other's keys."""
    rows = [{"conversations": SHAREGPT, "id": "x"}, {"conversations": TALK[:2]}]
    assert contents(write(tmp_path / "data.parquet", "parquet", rows)) == rows


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["JSON lines", "a JSON array"])
def test_byte_order_marks_and_windows_lines(tmp_path, kind, encoding, ending):
    path = tmp_path / "data"
    text = FILES[kind][1](ROWS).decode().replace("\n", ending)
    path.write_bytes(text.encode(encoding))
    assert open_source(path).format == kind
    assert contents(path) == ROWS


@needs("pyarrow", "datasets")
def test_the_same_rows_are_the_same_data_in_every_format(target, tmp_path):
    """What tells runs of training and regeneration apart: the hash of tokens, and ids."""
    sources = [saved(ROWS, tmp_path / "saved")]
    sources += [write(tmp_path / f"data{FILES[kind][0]}", kind, ROWS) for kind in FILES]
    found = {
        (
            data_hash(read_examples(source, target, max_length=64, min_supervised=1)),
            tuple((job.id, *job.turns) for job in read_jobs(source)),
        )
        for source in sources
    }
    assert len(found) == 1
    other = write(tmp_path / "other.parquet", "parquet", ROWS[::-1])
    assert data_hash(read_examples(other, target, max_length=64, min_supervised=1)) not in {
        x for x, _ in found
    }


def test_the_guide_lists_what_is_read():
    text = (ROOT / "docs/training.md").read_text()
    table = text.partition("| source |")[2].partition("\n\n")[0]
    listed = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert listed[: len(FILES)] == list(FILES)
    assert listed[len(FILES) :] == [
        "a folder of these files",
        "a saved dataset (`save_to_disk`)",
        "a dataset of the hub, streamed",
    ]
    assert "with gzip, bzip2, xz or zstd" in text
    assert [x for x in COMPRESSIONS if x] == ["gzip", "bzip2", "xz", "zstd"]
