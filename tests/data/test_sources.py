"""People's data in every format: the same rows come out, and what is wrong is named."""

import bz2
import gzip
import importlib.util
import json
import lzma
import pickle
import re
from pathlib import Path

import pytest

from jaxspec.data.jobs import read_jobs
from jaxspec.data.prompts import read_prompts
from jaxspec.data.rows import read_examples
from jaxspec.data.sources import open_source
from jaxspec.models.target import Target
from jaxspec.training.run_folder import data_hash
from tests.data.test_conversations import PLAIN, TALK, shown, tokenizer
from tests.training import tiny

ROOT = Path(__file__).parents[2]
SHAREGPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]
ROWS = [{"messages": TALK[:2]}, {"messages": TALK}]


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def zstd(data: bytes) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_parquet(rows) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows), sink, row_group_size=1)
    return sink.getvalue().to_pybytes()


FILES = {
    "JSON lines": (".jsonl", as_lines),
    "a JSON array": (".json", as_array),
    "parquet": (".parquet", as_parquet),
}
COMPRESSIONS = {
    "": ("", bytes),
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "zstd": (".zst", zstd),
}


def contents(source):
    return [row.fields for row in open_source(source)]


@pytest.fixture(scope="module")
def target():
    plain = tiny.target()
    return Target("tiny", plain.config, plain.params, tokenizer(PLAIN))


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
    ],
    ids=["openai", "sharegpt", "completion", "completion of messages", "json text"],
)
@pytest.mark.parametrize("kind", FILES)
def test_every_shape_of_row_trains_and_asks_alike(target, tmp_path, capsys, row, shape, kind):
    suffix, encode = FILES[kind]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(encode([row]))
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
    path = tmp_path / "data.parquet"
    path.write_bytes(as_parquet(rows))
    assert contents(path) == rows


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["JSON lines", "a JSON array"])
def test_byte_order_marks_and_windows_lines(tmp_path, kind, encoding, ending):
    path = tmp_path / "data"
    text = FILES[kind][1](ROWS).decode().replace("\n", ending)
    path.write_bytes(text.encode(encoding))
    assert open_source(path).format == kind
    assert contents(path) == ROWS


BAD = [b"{\n", b"[1]\n", b'{"prompt": "\xff"}\n', b"\n", as_lines([{"prompt": "good"}])]


@pytest.mark.parametrize("order", [1, -1], ids=["bad first", "good first"])
def test_a_bad_line_does_not_end_the_others(tmp_path, order):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(BAD[::order]))
    refused = []
    assert read_prompts(path, refused) == ["good"]
    assert sorted(
        re.sub(".*line .: ", "", x).split(",")[0].split(" (")[0] for x in refused
    ) == [
        "expected a JSON object",
        "not JSON",
        "not UTF-8 text",
    ]
    jobs = read_jobs(path)
    assert [job.turns for job in jobs if not job.error] == [["good"]]
    assert [job.id for job in jobs] == ([0, 1, 2, 4] if order == 1 else [0, 2, 3, 4])


@pytest.mark.parametrize("kind", ["a JSON array", "parquet"])
def test_a_bad_row_of_a_table_is_named(target, tmp_path, capsys, kind):
    bad = [{"messages": [{"role": "user"}]}, {"messages": []}]
    path = tmp_path / "data"
    path.write_bytes(FILES[kind][1]([*bad, *ROWS]))
    assert len(read_examples(path, target, max_length=64, min_supervised=1)) == 2
    told = capsys.readouterr().err
    assert "data, row 0: message 0: the content is null" in told
    assert "data, row 1: the conversation has no message" in told


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (
            b"prompt,completion\na,b\n",
            r"data, line 1: not JSON .*'prompt,completion'; expected",
        ),
        (as_lines([1, 2]), "line 1: expected a JSON object, found '1'; expected JSON lines"),
        (b"[{}, ", "not a JSON array .Expecting value"),
        (b"[1, 2]", "row 0: expected a JSON object, found 1; expected JSON lines"),
        ("{}".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (pickle.dumps(ROWS), r"cannot tell what .* holds .it begins b'.x80"),
        (b"ARROW1\0\0", "cannot tell what .*ARROW1"),
        (b"PAR1 and no more", "is not a parquet file that can be read"),
    ],
)
def test_what_cannot_be_told_is_one_line(tmp_path, content, error):
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        contents(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", FILES)
def test_no_rows(target, tmp_path, kind):
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "data"
        parquet.write_table(arrow.table({"messages": arrow.array([], arrow.string())}), path)
    else:
        path = tmp_path / "data"
        path.write_bytes(FILES[kind][1]([]))
    for read, error in (
        (read_prompts, "data holds no prompts"),
        (read_jobs, "data: no prompts"),
        (lambda x: read_examples(x, target, max_length=9), "data: no conversations"),
    ):
        with pytest.raises(ValueError, match=error):
            read(path)


@pytest.mark.parametrize("kind", FILES)
def test_wrong_columns_are_named(target, tmp_path, kind):
    path = tmp_path / "data"
    path.write_bytes(FILES[kind][1]([{"question": "a", "answer": "b"}] * 2))
    with pytest.raises(
        ValueError, match=r"(line 1|row 0): expected .*\['answer', 'question'\]"
    ):
        read_examples(path, target, max_length=9)
    with pytest.raises(ValueError, match="(line 1|row 0): expected .*found.*question"):
        read_prompts(path)


@pytest.mark.parametrize("cut", [-1, -9, 40])
@pytest.mark.parametrize("compression", [x for x in COMPRESSIONS if x])
def test_compressed_data_that_is_cut_off(tmp_path, compression, cut):
    whole = COMPRESSIONS[compression][1](as_lines([{"prompt": f"{i}" * i} for i in range(99)]))
    path = tmp_path / "data.jsonl"
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=f"its {compression} data is damaged or cut off"):
        contents(path)


@needs("pyarrow")
def test_parquet_that_is_damaged(tmp_path):
    path, whole = tmp_path / "data.parquet", as_parquet(ROWS)
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="is not a parquet file that can be read"):
        contents(path)
    path.write_bytes(whole[:4] + bytes(100) + whole[104:])
    with pytest.raises(ValueError, match="parquet file that can be read|damaged after row"):
        contents(path)


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@needs("pyarrow")
def test_folders_of_files_and_their_splits(tmp_path, capsys):
    first, second, other = ([{"prompt": x}] for x in ("first", "second", "other"))
    folder = folder_of(
        tmp_path / "v1.5",
        {
            "README.md": b"---\n",
            "dataset_info.json": b"{}",
            ".cache/x.jsonl": as_lines(other),
            "data/train-00000-of-00002.parquet": as_parquet(first),
            "data/train-00001-of-00002.parquet": as_parquet(second),
            "test.jsonl.gz": gzip.compress(as_lines(other)),
        },
    )
    with pytest.raises(ValueError, match="several splits .train, test.; name one: .*::train"):
        open_source(folder)
    with pytest.raises(ValueError, match="v1.5::dev is no split; found train, test"):
        open_source(f"{folder}::dev")
    source = open_source(f"{folder}::train")
    assert source.label == "v1.5-train"
    rows = list(source)
    assert [(row.number, row.fields["prompt"]) for row in rows] == [(0, "first"), (1, "second")]
    assert rows[1].where.endswith("train-00001-of-00002.parquet, row 0")
    assert "read as a folder with 2 files of parquet, split train, prompts\n" in (
        capsys.readouterr().err
    )
    assert read_prompts(f"{folder}::test") == ["other"]
    assert read_prompts(f"{folder}::train[:1]") == ["first"]


def test_a_folder_without_splits_is_read_whole(tmp_path):
    folder = folder_of(
        tmp_path / "answers",
        {"a.jsonl": as_lines([{"prompt": "1"}]), "b/c.json": as_array([{"prompt": "2"}])},
    )
    assert read_prompts(folder) == ["1", "2"]
    with pytest.raises(ValueError, match="holds no data files; expected"):
        open_source(folder_of(tmp_path / "empty", {"notes.txt": b"x"}))


def saved(rows, path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@needs("datasets")
def test_saved_datasets(target, tmp_path, capfd):
    import datasets

    path = saved(ROWS, tmp_path / "saved")
    capfd.readouterr()
    assert contents(path) == ROWS
    assert capfd.readouterr().err == f"{path}: read as a saved dataset, OpenAI's messages\n"
    both = {
        "train": datasets.Dataset.from_list(ROWS[:1]),
        "test": datasets.Dataset.from_list(ROWS),
    }
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="both has several splits .train, test."):
        open_source(tmp_path / "both")
    assert contents(f"{tmp_path / 'both'}::test") == ROWS
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the saved dataset .*saved: "):
        open_source(path)


@needs("datasets")
def test_columns_of_json_that_datasets_keeps_as_text(tmp_path):
    import datasets

    rows = [{"messages": TALK[:2]}]
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    assert read_prompts(tmp_path / "saved") == ["a b"]


@needs("datasets", "pyarrow")
def test_code_that_comes_with_a_dataset_is_refused(tmp_path):
    script = {"data.py": b"raise SystemExit('it ran')"}
    saved(ROWS, tmp_path / "saved")
    for name in ("saved", "files"):
        folder = folder_of(tmp_path / name, {"x.jsonl": as_lines(ROWS)} | script)
        with pytest.raises(ValueError, match="holds a program, data.py; datasets that need"):
            open_source(folder)


@needs("datasets")
def test_datasets_of_the_hub_are_streamed(tmp_path, monkeypatch, capsys):
    """`datasets` reads a local folder of the hub's layout as it reads the hub."""
    import datasets

    folder_of(
        tmp_path / "owner" / "name",
        {
            "README.md": b"---\nconfigs:\n- config_name: main\n  data_files:\n"
            b"  - {split: train, path: main/train*}\n  - {split: test, path: main/test*}\n"
            b"- config_name: hard\n  data_files: [{split: test, path: hard.jsonl}]\n---\n",
            "main/train.jsonl": as_lines([{"prompt": f"{i}"} for i in range(5)]),
            "main/test.jsonl": as_lines([{"prompt": "t"}]),
            "hard.jsonl": as_lines([{"prompt": "h"}]),
        },
    )
    load, asked = datasets.load_dataset, []

    def here(name, *arguments, **options):
        asked.append(options)
        return load(str(tmp_path / name), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", here)
    assert read_prompts("owner/name::hard/test") == ["h"]
    assert read_prompts("owner/name::main/train[:3]") == ["0", "1", "2"]
    assert (
        "owner/name::main/train[:3]: read as a dataset of the hub, streamed, split train, "
        in (capsys.readouterr().err)
    )
    assert open_source("owner/name::main/test").label == "name-main-test"
    with pytest.raises(ValueError, match="owner/name::main/dev is no split; found train, test"):
        open_source("owner/name::main/dev")
    with pytest.raises(ValueError, match=r"hard.*; a subset is chosen by owner/name::SUBSET"):
        open_source("owner/name")
    assert asked == [{"streaming": True}] * len(asked)


@needs("datasets")
def test_without_the_hub_a_name_is_one_error(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "owner/name is no file or folder here, and cannot be read as a dataset of the"
    with pytest.raises(ValueError, match=message) as raised:
        open_source("owner/name::train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["data.jsonl", "runs/data.jsonl.gz", "./runs/data", "data"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cannot read {Path(name)}: .*No such file"):
        open_source(name)


@pytest.mark.parametrize("module", ["pyarrow", "datasets", "zstd"])
def test_a_missing_library_is_one_line_with_its_remedy(tmp_path, monkeypatch, module):
    import sys

    if module == "zstd":
        content = zstd(as_lines(ROWS))
        for name in ("compression", "backports", "backports.zstd"):
            monkeypatch.setitem(sys.modules, name, None)
        source, remedy = folder_of(tmp_path, {"data": content}) / "data", "backports.zstd"
    elif module == "pyarrow":
        content = as_parquet(ROWS)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        source, remedy = folder_of(tmp_path, {"data": content}) / "data", "pyarrow"
    else:
        source = saved(ROWS, tmp_path / "data")
        monkeypatch.setitem(sys.modules, "datasets", None)
        remedy = "datasets"
    with pytest.raises(ValueError, match=f"need.* pip install {remedy}"):
        contents(source)


@needs("pyarrow", "datasets")
def test_the_same_rows_are_the_same_data_in_every_format(target, tmp_path):
    """What tells runs of training and regeneration apart: the hash of tokens, and ids."""
    sources = [saved(ROWS, tmp_path / "saved")]
    for suffix, encode in FILES.values():
        sources.append(tmp_path / f"data{suffix}")
        sources[-1].write_bytes(encode(ROWS))
    found = {
        (
            data_hash(read_examples(source, target, max_length=64, min_supervised=1)),
            tuple((job.id, *job.turns) for job in read_jobs(source)),
        )
        for source in sources
    }
    assert len(found) == 1
    other = tmp_path / "other.parquet"
    other.write_bytes(as_parquet(ROWS[::-1]))
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
