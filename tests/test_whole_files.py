"""Files and folders appear whole, or stay as they were."""

import pytest

from jaxspec.whole_files import new_folder, replace_text


def test_a_text_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    for text in ("{}\n", "ä\n"):
        replace_text(path, text)
        assert path.read_text("utf-8") == text
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud83d")
    assert path.read_text("utf-8") == "ä\n"


def test_a_folder_appears_at_the_end(tmp_path):
    (tmp_path / "new.partial" / "of a killed run").mkdir(parents=True)
    with new_folder(tmp_path / "new") as partial:
        (partial / "a").write_text("")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_a_folder_goes_at_an_error(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "new"):
        raise KeyError
    assert not list(tmp_path.iterdir())
