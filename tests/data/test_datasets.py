"""Folders of files, saved datasets and datasets of the hub, with their splits."""

import gzip

import pytest

from jaxspec.data.prompts import read_prompts
from jaxspec.data.sources import open_source
from tests.data.files import (
    ROWS,
    as_array,
    as_lines,
    as_parquet,
    contents,
    folder_of,
    needs,
    saved,
)
from tests.data.test_conversations import TALK


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
    with pytest.raises(ValueError, match="v1.5::dev is not a split; found train, test"):
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
    with pytest.raises(ValueError, match="name::main/dev is not a split; found train, test"):
        open_source("owner/name::main/dev")
    with pytest.raises(ValueError, match=r"hard.*; choose a subset by owner/name::SUBSET"):
        open_source("owner/name")
    assert asked == [{"streaming": True}] * len(asked)


@needs("datasets")
def test_without_the_hub_a_name_is_one_error(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "owner/name is not a local file or folder, and cannot be read as a dataset of the"
    with pytest.raises(ValueError, match=message) as raised:
        open_source("owner/name::train")
    assert "\n" not in str(raised.value)
