"""`bench`: drafters of one target in one table."""

import dataclasses
import json

import pytest

from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.evaluation import results
from jaxspec.evaluation.bench import bench_rows, bench_table
from jaxspec.evaluation.report import acceptance_table
from jaxspec.evaluation.results import Costs, Rounds
from jaxspec.evaluation.view import View

pytestmark = pytest.mark.usefixtures("models")


def rounds(decoder, drafter, tree, budget, set, committed, seconds):
    tokens = [sum(i * n for i, n in enumerate(row)) for row in committed]
    counts = [sum(row) for row in committed]
    labels = dict(set=set, temperature=0.0, head="own", dtype="float32", how="decode")
    return Rounds(
        decoder=decoder,
        drafter=drafter,
        tree=tree,
        budget=budget,
        committed=committed,
        nodes=[budget * n for n in counts],
        tokens=tokens,
        seconds=seconds,
        equal=[True] * len(tokens),
        **labels,
    )


ROWS = [
    rounds("plain, 1 row", "plain", None, 1, "sums", [[0, 10], [0, 10]], [1.0, 1.0]),
    rounds("plain, 1 row", "plain", None, 1, "code", [[0, 20]], [2.0]),
    rounds("plain, 2 rows", "plain", None, 1, "sums", [[0, 10], [0, 10]], [2.0, 2.0]),
    rounds("plain, 2 rows", "plain", None, 1, "code", [[0, 20]], [4.0]),
    rounds("x, 4 nodes", "x", "chain", 4, "sums", [[0, 2, 4], [0, 2, 4]], [0.5, 0.5]),
    rounds("x, 4 nodes", "x", "chain", 4, "code", [[0, 0, 1, 6]], [0.6]),
    Costs("plain", "float32", 1, {"draft": 0.0, "grow": None, "verify": 90.0, "commit": 1.0}),
    Costs("x, 4 nodes", "float32", 4, dict(draft=5.0, grow=2.5, verify=95.0, commit=1.5)),
]


def test_the_table():
    plain, own = bench_rows(View(ROWS))
    assert (plain["drafter"], plain["tokens_per_second"], plain["speedup"]) == ("plain", 10, 1)
    assert own["tau"] == {"sums": 20 / 12, "code": 20 / 7, "all": 40 / 19}
    assert own["ms"] == dict(draft=5.0, grow=2.5, verify=95.0, commit=1.5, round=104.0)
    assert own["tokens_per_second"] == 25 and own["speedup"] == 2.5
    head, _, first, second = bench_table([plain, own]).splitlines()[:4]
    assert head == (
        "| drafter | tree | nodes | tau, sums | tau, code | tau, all | ms, draft | ms, grow "
        "| ms, verify | ms, commit | ms, round | tokens/s | speedup [95%] | same output |"
    )
    assert first.startswith("| plain |  | 1 | 1.00 | 1.00 | 1.00 | 0.0 |  | 90.0 | 1.0 | 91.0 ")
    assert second.startswith("| x | chain | 4 | 1.67 | 2.86 | 2.11 | 5.0 | 2.5 | 95.0 | 1.5 ")
    assert " | 104.0 | 25.0 | 2.50 [" in second and second.endswith("] | 3/3 |")


@pytest.mark.filterwarnings("error")
def test_answers_of_one_token_have_no_tau():
    """They come from the prompt's forward, without a round."""
    rows = [
        dataclasses.replace(x, committed=[[0, 0]], nodes=[0], tokens=[1])
        if getattr(x, "set", "") == "code"
        else x
        for x in ROWS
    ]
    _, own = bench_rows(View(rows))
    assert own["tau"] == {"sums": 20 / 12, "code": None, "all": 20 / 12}
    assert " | 1.67 |  | 1.67 | " in bench_table([own])
    depths = acceptance_table(View(rows).lines)
    assert "| x, 4 nodes | chain | 4 | code | nan | nan |  |" in depths


def words(folder, **changes):
    options = {
        "--target": "target",
        "--prompts": str(folder / "sums.jsonl"),
        "--drafters": "ngram run/a",
        "--budgets": "4",
        "--max-new-tokens": "12",
        "--dtype": "float32",
    } | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return ["bench", *(word for key, x in options.items() for word in (key, *x.split(" ")))]


@pytest.fixture
def folder(tmp_path):
    rows = [{"turns": [f"sum number {i}"]} for i in range(2)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.slow
def test_one_command_measures_them_all(folder, capsys):
    output = folder / "rows.jsonl"
    assert main([*words(folder, output=str(output)), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = [(row["drafter"], row["tree"], row["nodes"]) for row in found]
    assert labels == [
        ("plain", None, 1),
        ("ngram", None, 4),
        ("run/a", "path_conditioned", 4),  # has a sequential head
    ]
    assert all(row["same_output"] == "2/2" for row in found)
    assert found[0]["tau"] == {"sums": 1.0, "all": 1.0} and found[0]["speedup"] == 1
    assert all(row["tau"]["all"] >= 1 and row["ms"]["verify"] > 0 for row in found)
    assert found[2]["ms"]["grow"] is not None and found[1]["ms"]["grow"] is None
    kept = results.read_rows(output)
    assert bench_rows(View(kept)) == found
    assert not any(row.kind == "verify" for row in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(drafters="run/a,budget=4"), "use --budgets and --dtype"),
        (dict(drafters="run/a,tree=oak"), "tree is 'oak'; expected one of"),
        (dict(drafters="run/a run/a"), "two decoders are called 'run/a, 4 nodes'"),
        (dict(drafters="nowhere"), "no drafter 'nowhere'"),
        (dict(drafters="run/b,tree=transitions"), "needs a sequential head"),
        (dict(budgets="1"), "expected at least 2 each"),
        (dict(count="-1"), "--count is -1; expected at least 0"),
        (dict(temperature="-1"), "temperature is -1.0"),
        (dict(top_p="0"), "top_p is 0.0"),
        (dict(output="{folder}/sums.jsonl"), "sums.jsonl exists already"),
    ],
)
def test_bad_input(folder, capsys, change, message):
    change = {key: value.format(folder=folder) for key, value in change.items()}
    assert main(words(folder, **change)) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
