"""TreeFlash's format."""

import pytest

from tests.checkpoints.drafter_folders import edit, load, save


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "treeflash",
            lambda c: c["treeflash_config"].update(ar_approximation="gru"),
            "'ar_approximation' is 'gru'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kind, change, message):
    save(tmp_path / "a", kind)
    edit(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")
