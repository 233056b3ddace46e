"""`examples/shipped_drafter/compare.py`: the table that compares kinds of drafter."""

import importlib.util
import sys
from pathlib import Path

import pytest

from jaxspec.evaluation import results

SCRIPT = Path(__file__).parents[2] / "examples/shipped_drafter/compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_kinds", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """DFlash commits 2 tokens in every round, JetSpec 2 or 3 alike: 1.25 times as many."""
    committed = {"dflash": [[0, 0, 10], [0, 0, 20]], "jetspec": [[0, 0, 5, 5], [0, 0, 10, 10]]}
    paths = []
    for kind, rounds in committed.items():
        paths.append(tmp_path / f"{kind}.jsonl")
        for budget in (8, 16):
            row = results.Rounds(
                *("sums", 0.0, f"{kind} chain", f"run/{kind}", "chain", "own", "float32"),
                *(budget, "walk", rounds, [80, 160], [25, 50]),
            )
            results.append(paths[-1], row)
    return paths


def test_contrasts_are_ratios_of_tau(compare, files, capsys):
    assert compare.Compare(tuple(files)).run() == 0
    text = capsys.readouterr().out
    assert "| DFlash: slots see each other | 2.00 [2.00, 2.00] |" in text
    assert "| JetSpec: causal slots | 2.50 [2.50, 2.50] |" in text
    assert "| jetspec chain | dflash chain | 1.250 [1.250, 1.250] |" in text
    assert "Markov" not in text  # was not measured


def test_a_short_table_has_no_contrasts(compare, files, capsys):
    assert compare.Compare(tuple(files), short=True).run() == 0
    text = capsys.readouterr().out
    assert "| JetSpec: causal slots | 2.50 [2.50, 2.50] |" in text and "ratio" not in text


def test_a_clock_gives_each_kind_its_drafting_and_all_the_same_verification(
    compare, files, tmp_path, capsys
):
    """Plain decoding takes 10 ms, verification and commit 9 and 11, in the median 10."""
    clock = tmp_path / "clock.jsonl"
    clock.write_bytes(files[0].read_bytes())
    for name, budget, draft, verify in (
        ("plain", 1, 1.0, 8.0),
        ("out/kinds/dflash-0/drafter,tree=chain, 16 nodes", 16, 2.0, 8.0),
        ("jetspec-0/drafter,tree=chain, 16 nodes", 16, 5.0, 10.0),
    ):
        phases = {"draft": draft, "grow": None, "verify": verify, "commit": 1.0}
        results.append(clock, results.Costs(name, "float32", budget, phases))
    assert compare.Compare(tuple(files), clock=(clock,), short=True).run() == 0
    text = capsys.readouterr().out
    # Taus of 2 and 2.5 over rounds of 2 + 10 and 5 + 10 ms.
    assert "see each other | chain | 16 | 2.0 | 12.0 | 2.00 [2.00, 2.00] | 1.67 [" in text
    assert "causal slots | chain | 16 | 5.0 | 15.0 | 2.50 [2.50, 2.50] | 1.67 [" in text


def test_a_clock_of_what_was_not_walked_is_refused(compare, files, tmp_path):
    clock = tmp_path / "clock.jsonl"
    clock.write_bytes(files[0].read_bytes())
    phases = {"draft": 1.0, "grow": None, "verify": 8.0, "commit": 1.0}
    row = results.Costs("rnn-0/drafter,tree=chain", "float32", 8, phases)
    results.append(clock, row)
    with pytest.raises(ValueError, match="rnn chain.*not walked"):
        compare.Compare(tuple(files), clock=(clock,)).run()


def test_another_seed_has_tables_of_its_own(compare, files, capsys):
    dflash, jetspec = files
    assert compare.Compare((dflash,), again=(jetspec,)).run() == 0
    first, second = capsys.readouterr().out.split("Another seed:")
    assert "DFlash" in first and "JetSpec" not in first
    assert "| JetSpec: causal slots | 2.50 [2.50, 2.50] |" in second and "DFlash" not in second


def test_a_document_and_a_picture_are_drawn(compare, files, tmp_path):
    document, picture = tmp_path / "README.md", tmp_path / "kinds.png"
    begin, end = compare.MARKS
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert compare.Compare(tuple(files), output=picture, into=document).run() == 0
    text = document.read_text()
    assert text.startswith(f"before\n{begin}\n| tokens") and text.endswith(f"|\n{end}\nafter\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_budget_that_was_not_walked_is_refused(compare, files):
    with pytest.raises(ValueError, match="no walk with budget 99"):
        compare.Compare(tuple(files), budget=99).run()
