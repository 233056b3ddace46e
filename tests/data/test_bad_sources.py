"""Data that cannot be read, or only in part: what is wrong is named, in one line."""

import pickle
import re
import sys
from pathlib import Path

import pytest

from jaxspec.data.jobs import read_jobs
from jaxspec.data.prompts import read_prompts
from jaxspec.data.rows import read_examples
from jaxspec.data.sources import open_source
from tests.data.files import (
    COMPRESSIONS,
    FILES,
    ROWS,
    as_lines,
    as_parquet,
    contents,
    folder_of,
    needs,
    saved,
    write,
    zstd,
)

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
    path = write(tmp_path / "data", kind, [*bad, *ROWS])
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
    path = write(tmp_path / "data", kind, [])
    for read, error in (
        (read_prompts, "data holds no prompts"),
        (read_jobs, "data: no prompts"),
        (lambda x: read_examples(x, target, max_length=9), "data: no conversations"),
    ):
        with pytest.raises(ValueError, match=error):
            read(path)


@pytest.mark.parametrize("kind", FILES)
def test_wrong_columns_are_named(target, tmp_path, kind):
    path = write(tmp_path / "data", kind, [{"query": "a", "response": "b"}] * 2)
    with pytest.raises(ValueError, match=r"(line 1|row 0): expected .*\['query', 'response'\]"):
        read_examples(path, target, max_length=9)
    with pytest.raises(ValueError, match="(line 1|row 0): expected .*found.*query"):
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


def as_parquet_file(table, path):
    from pyarrow import parquet

    parquet.write_table(table, path)


def as_saved_dataset(table, path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(table).save_to_disk(path)


@needs("pyarrow")
@pytest.mark.parametrize("save", [as_parquet_file, as_saved_dataset])
@pytest.mark.parametrize("bad", ["text that is not UTF-8", "a date after the year 9999"])
def test_a_bad_value_in_a_table_does_not_end_the_rows(tmp_path, bad, save):
    import pyarrow

    if bad.startswith("text"):
        found = pyarrow.array([b"a", b"\xff", b"c", b"\xff"]).buffers()
        columns = {"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 4, found)}
    else:
        days = pyarrow.array([0, 3 * 10**14, 0, 3 * 10**14], pyarrow.timestamp("ms"))
        columns = {"prompt": ["a", "b", "c", "d"], "day": days}
    path = tmp_path / "data"
    save(pyarrow.table(columns), path)
    refused = []
    assert read_prompts(path, refused) == ["a", "c"]
    for number, error in zip((1, 3), refused, strict=True):
        assert error.startswith(f"{path}, row {number}: the row cannot be decoded (")


@pytest.mark.parametrize("name", ["data.jsonl", "runs/data.jsonl.gz", "./runs/data", "data"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cannot read {Path(name)}: .*No such file"):
        open_source(name)


@pytest.mark.parametrize("module", ["pyarrow", "datasets", "zstd"])
def test_a_missing_library_is_one_line_with_its_remedy(tmp_path, monkeypatch, module):
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
