"""The commands, from folders of weights and files of prompts to tables and pictures."""

import json
import shutil

import pytest

import jaxspec
from jaxspec.checkpoints.drafters import save_drafter, save_temperatures
from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT, FAULT
from jaxspec.config import TreeConfig
from jaxspec.evaluation import measure, results
from jaxspec.evaluation.view import View, best_plain, pairs
from tests.checkpoints.writing import random_tensors, write_folder
from tests.drafters import cases
from tests.evaluation.conftest import CONFIG

pytestmark = [pytest.mark.usefixtures("models"), pytest.mark.slow]


@pytest.fixture(scope="module")
def file(tmp_path_factory, models):
    """Results of one run of `evaluate` with everything on."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("sums", "code"):
        rows = [{"turns": [f"{name} number {i}" * (i + 1)]} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = folder / "results.jsonl"
    assert evaluate(folder, output) == 0
    return output


def evaluate(folder, output, *more):
    return main(
        [
            *(
                "evaluate",
                "--target",
                "target",
                "--prompts",
                str(folder / "sums.jsonl"),
                str(folder / "code.jsonl"),
            ),
            *("--output", str(output), "--count", "2", "--max-new-tokens", "12"),
            *("--temperatures", "0", "1", "--budgets", "2", "--batch-size", "2"),
            *("--decoders", "lookup=ngram,budget=4", "chain=run/a,tree=chain,budget=4"),
            *("marginal=run/a,tree=top_budget,head=none,budget=4",),
            *("path=run/a,tree=path_conditioned,budget=4,candidates=6", *more),
        ]
    )


def test_every_row_reads_back(file):
    rows = results.read_rows(file)
    with file.open() as lines:
        assert [json.loads(line) for line in lines] == [
            json.loads(json.dumps(results.dataclasses.asdict(row))) for row in rows
        ]
    kinds = [row.kind for row in rows]
    walks = 2 * 2 * 4 * 2  # temperatures, sets, decoders, budgets
    decodes = 2 * 2 * (4 + 2)  # two forms of plain decoding
    assert kinds.count("rounds") == walks + decodes
    assert kinds.count("branches") == 2 * 2
    assert kinds.count("reliability") == 2 * 2 * 4
    assert kinds.count("costs") == 5 and kinds.count("verify") == 1
    (verify,) = (row for row in rows if row.kind == "verify")
    assert list(verify.ms) == ["1", "8"] and min(verify.ms.values()) > 0


def chosen(folder, name):
    """The two prompts of three that `--count 2` takes."""
    rows = (folder / f"{name}.jsonl").read_text().splitlines()[:2]
    return [json.loads(row)["turns"][0] for row in rows]


def test_python_gives_the_rows_of_the_command(file, tmp_path):
    target = jaxspec.load_target("target")
    marginal = "run/a,tree=top_budget,head=none,budget=4"
    own = jaxspec.load_drafter("run/a", target, tree=TreeConfig("path_conditioned", 4, 4, 6))
    found = jaxspec.evaluate(
        target,
        {"lookup": "ngram,budget=4", "chain": "run/a,tree=chain,budget=4", "marginal": marginal}
        | {"path": own},
        {name: chosen(file.parent, name) for name in ("sums", "code")},
        max_new_tokens=12,
        temperatures=(0.0, 1.0),
        budgets=(2,),
        batch_size=2,
    )
    saved = tmp_path / "new/results.jsonl"
    found.save(saved)
    with pytest.raises(ValueError, match="results.jsonl exists already; choose another name"):
        found.save(saved)

    def rounds(path):  # the drafter of "path" has no name here
        rows = [row for row in without_clock(path) if row["kind"] == "rounds"]
        return [row | {"drafter": None} if row["decoder"] == "path" else row for row in rows]

    assert rounds(saved) == rounds(file)
    table = found.to_dicts()
    assert len(table) == 2 * 2 * (4 * 2 + 4 + 2)
    walked = next(row for row in table if row["decoder"] == "path" and row["budget"] == 4)
    assert (walked["how"], walked["prompts"], walked["seconds"]) == ("walk", 2, None)
    decoded = next(row for row in table if (row["decoder"], row["how"]) == ("path", "decode"))
    assert decoded["tau"] == walked["tau"] > 1 and decoded["equal"] == 2
    assert decoded["tokens_per_second"] == decoded["tokens"] / decoded["seconds"]
    assert "## Speed, temperature 1" in repr(found)


def test_filters_hold_at_every_temperature(file):
    """Of one token there is nothing to sample: rounds are the greedy ones."""
    found = jaxspec.evaluate(
        jaxspec.load_target("target"),
        {"lookup": "ngram,budget=4"},
        chosen(file.parent, "sums"),
        max_new_tokens=12,
        temperatures=(0.0, 1.0),
        top_k=1,
        timed=0,
        batch_size=2,
    )
    assert found.rows[0].fields["top_k"] == 1
    taus = {row["temperature"]: row["tau"] for row in found.to_dicts()}
    assert taus[0.0] == taus[1.0]


class Calls:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)


def without_clock(path):
    """The rows of a file; of what was timed, only what it was."""
    rows = [json.loads(line) for line in path.open()]
    return [row | {name: [*row.get(name, ())] for name in ("ms", "phases")} | {"seconds": None}
            for row in rows]  # fmt: skip


@pytest.mark.parametrize(
    "last, walked, decoded",
    [
        (("rounds", "walk", "sums", 1.0, "chain"), 2, 4),  # in the middle of a set
        (("rounds", "decode", "sums", 1.0, "path"), 0, 1),  # between two sets
        (("costs", "chain"), 0, 0),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_an_interrupted_run_goes_on(file, tmp_path, monkeypatch, last, walked, decoded):
    """The result is that of one run, and no set is measured twice."""
    kept, lines = [], file.read_text().splitlines(keepends=True)
    while (
        not kept
        or results.key(results.KINDS[kept[-1]["kind"]](**kept[-1]))[: len(last)] != last
    ):
        kept.append(json.loads(lines[len(kept)]))
    output = tmp_path / "results.jsonl"
    output.write_text("".join(lines[: len(kept)]) + lines[len(kept)][:40])  # a torn line
    record, turns = Calls(measure.w.record), Calls(measure.take_turns)
    monkeypatch.setattr(measure.w, "record", record)
    monkeypatch.setattr(measure, "take_turns", turns)
    assert evaluate(file.parent, output) == 0
    assert (record.count, turns.count) == (walked, decoded)
    assert output.read_text().startswith("".join(lines[: len(kept)]))
    assert without_clock(output) == without_clock(file)


def test_a_finished_run_is_left_alone(file, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(measure.w, "record")  # nothing is measured
    monkeypatch.delattr(measure, "take_turns")
    before = file.read_bytes()
    assert evaluate(file.parent, file) == 0
    assert file.read_bytes() == before
    assert "Tokens per round (tau)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (("--batch-size", "1"), "batch_size was 2, now it is 1"),
        (("--budgets", "2", "3"), "budgets was [2], now it is [2, 3]"),
        (("--top-k", "3"), "it does not say top_k, which now is 3"),
        (("--count", "1"), "prompts was {'sums': 2, 'code': 2}, now it is {'sums': 1, 'code'"),
    ],
)
def test_another_setup_does_not_go_on(file, capsys, change, message):
    before = file.read_bytes()
    assert evaluate(file.parent, file, *change) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert file.read_bytes() == before


def test_other_prompts_of_the_same_names_do_not_go_on(file, tmp_path, capsys):
    for name in ("sums", "code"):
        text = (file.parent / f"{name}.jsonl").read_text().replace("number", "under")
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert evaluate(tmp_path, file) == BAD_INPUT
    assert "prompts_sha256 was" in capsys.readouterr().err


def calibrated(folder):
    save_temperatures(folder / "run/a", [2.0, 1.0, 1.0, 1.0])


def other_weights(folder):
    tensors = {name: 2 * x for name, x in random_tensors(CONFIG).items()}
    write_folder(folder / "target", CONFIG, tensors)


def other_template(folder):
    path = folder / "target/chat_template.jinja"
    path.write_text(path.read_text().replace("{{ m.content }}", "s{{ m.content }}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (calibrated, "drafter_fingerprints was {'ngram': "),
        (other_weights, "fingerprint was "),
        (other_template, "prompts_sha256 was "),
    ],
)
def test_other_models_of_the_same_names_do_not_go_on(
    file, tmp_path, monkeypatch, capsys, change, message
):
    shutil.copytree(".", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    change(tmp_path)
    before = file.read_bytes()
    assert evaluate(file.parent, file) == BAD_INPUT
    assert f"results of another setup: {message}" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_results_that_do_not_name_their_models_do_not_go_on(file, tmp_path, capsys):
    first, *rest = file.read_text().splitlines(keepends=True)
    setup = json.loads(first)
    del setup["fields"]["fingerprint"], setup["fields"]["drafter_fingerprints"]
    output = tmp_path / "results.jsonl"
    output.write_text(json.dumps(setup) + "\n" + "".join(rest))
    assert evaluate(file.parent, output) == BAD_INPUT
    assert "it does not say fingerprint, which now is" in capsys.readouterr().err
    assert main(["report", str(output)]) == 0


@pytest.mark.parametrize("content", ["nonsense", "nonsense\n", '{"kind": "verify", "dtype"'])
def test_a_file_of_something_else_is_not_written_to(file, tmp_path, capsys, content):
    output = tmp_path / "results.jsonl"
    output.write_text(content)
    assert evaluate(file.parent, output) == BAD_INPUT
    assert str(output) in capsys.readouterr().err
    assert output.read_text() == content


def long_and_short(folder):
    """Prompts of 496 and 3 tokens; the target has 512 positions."""
    rows = [json.dumps({"prompt": text}) for text in ("sum" * 165 + "s", "sum")]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return ["--target", "target", "--prompts", str(folder / "prompts.jsonl")]


def test_a_prompt_without_room_for_its_last_round_is_left_out(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "results.jsonl"), "--tau-only"]
    arguments += ["--max-new-tokens", "12", "--decoders", "lookup=ngram,budget=4"]
    assert main(["evaluate", *long_and_short(tmp_path), *arguments]) == FAULT
    assert "left out: prompts: prompt 0: a prompt of 496 tokens" in capsys.readouterr().err


def test_such_a_prompt_is_not_calibrated_on(tmp_path, capsys):
    loaded = cases.loaded("dspark", TreeConfig())
    save_drafter(tmp_path / "drafter", loaded)
    arguments = ["--drafter", str(tmp_path / "drafter"), "--max-new-tokens", "12"]
    assert main(["calibrate", *long_and_short(tmp_path), *arguments]) == BAD_INPUT
    assert "1 of 2 prompts can be used; expected at least two" in capsys.readouterr().err


def test_walks_and_decoding_agree_and_outputs_are_plain(file):
    view = View(results.read_rows(file))
    for temperature in (0.0, 1.0):
        walked = {
            (x.label.decoder, x.label.budget): x for x in view.select("walk", temperature)
        }
        decoded = view.select("decode", temperature)
        assert len(decoded) == 6
        for line in decoded:
            assert line.equal == "4/4"
            if line.label.drafter != "plain":
                twin = walked[line.label.decoder, line.label.budget]
                assert line.tau[0] == twin.tau[0] and line.nodes == twin.nodes
        assert best_plain(decoded).label.decoder.startswith("plain, ")


def test_contenders_that_differ_in_budget_share_a_walk(file, tmp_path):
    output = tmp_path / "results.jsonl"
    arguments = [
        *(
            "evaluate",
            "--target",
            "target",
            "--prompts",
            str(file.parent / "sums.jsonl"),
            "--count",
            "2",
        ),
        *("--output", str(output), "--max-new-tokens", "12", "--batch-size", "2", "--tau-only"),
        *("--decoders", "small=run/a,tree=chain,budget=2"),
        "large=run/a,tree=chain,budget=4",
    ]
    assert main(arguments) == 0
    walks = {
        (row.decoder, row.budget) for row in results.read_rows(output) if row.kind == "rounds"
    }
    assert walks == {("small", 2), ("large", 4)}
    before = output.read_bytes()
    assert main(arguments) == 0  # all of it is known
    assert output.read_bytes() == before


def test_pairs_compare_trees_of_one_drafter(file):
    view = View(results.read_rows(file))
    lines = [x for x in view.tau_lines(0.0) if x.label.budget == 4]
    names = {(a.label.decoder, b.label.decoder) for a, b in pairs(lines)}
    assert names == {("marginal", "chain"), ("path", "chain"), ("path", "marginal")}
    names = {(a.label.decoder, b.label.decoder) for a, b in pairs(lines, ["lookup"])}
    assert {(x, "lookup") for x in ("chain", "marginal", "path")} < names


def test_report_draws_it_again(file, tmp_path, capsys):
    capsys.readouterr()
    assert main(["report", str(file), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "tables.md").read_text()
    for heading in (
        *("Tokens per round (tau), temperature 0", "Ratios of tau", "Acceptance"),
        *("Speed, temperature 1", "Milliseconds of a round", "verifying n nodes"),
        "Drafters' own probabilities",
    ):
        assert heading in text
    for block in text.split("\n\n"):  # every table row has as many cells as its heading
        if block.startswith("| "):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    # Speed, acceptance and faithfulness over all prompts and by set.
    for row in ("| path | path_conditioned | 4 | {} |", "| run/a | 1 |  | {} |"):
        for name in ("all", "sums", "code"):
            assert text.count(row.format(name)) >= 1
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    kinds = ("acceptance-by-depth", "reliability", "speedup", "tau-by-budget")
    assert pictures == sorted(f"{kind}-t{t}.png" for kind in kinds for t in (0, 1))
    assert main(["report", str(file)]) == 0
    assert text in capsys.readouterr().out


def test_report_writes_its_summary_into_a_document(file, tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text("# Title\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    for _ in range(2):
        assert main(["report", str(file), "--into", str(document)]) == 0
    lines = document.read_text().splitlines()
    assert lines[:2] == ["# Title", "<!-- results -->"]
    assert lines[-2:] == ["<!-- end of results -->", "after"] and "old" not in lines
    table = [line.split(" | ") for line in lines[2:-2]]
    assert len(table) == 2 + 6 and {len(row) for row in table} == {8}
    assert all("4/4" in row[-1] for row in table[2:])
    document.write_text(document.read_text() + "<!-- taus -->\n<!-- end of taus -->\nlast\n")
    assert main(["report", str(file), "--into", str(document)]) == 0
    taus = document.read_text().split("<!-- taus -->\n")[1].splitlines()
    assert taus[0] == "| nodes | 2 | 4 |" and taus[-2:] == ["<!-- end of taus -->", "last"]
    assert all(line.count("|") == 4 for line in taus[:-2]) and len(taus) == 2 + 4 + 2
    document.write_text("no marks")
    assert main(["report", str(file), "--into", str(document)]) == BAD_INPUT
    assert "<!-- results -->" in capsys.readouterr().err
    assert document.read_text() == "no marks"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--output": "{file}"}, "holds results of another setup: decoders was"),
        ({"--decoders": "run/a"}, "expected NAME=DRAFTER,…; for example ours="),
        ({"--decoders": "a=run/a,size=3"}, "option 'size=3' is not one of tree=…"),
        ({"--decoders": "a=run/a,budget=x"}, "option 'budget=x'"),
        ({"--decoders": "a=run/a,budget=0"}, "budget is 0; expected at least 1"),
        ({"--decoders": "a=run/a,tree=oak"}, "tree is 'oak'; expected one of chain"),
        ({"--decoders": "a=run/a,head=no"}, "head is 'no'; expected own or none"),
        (
            {"--decoders": "a=ngram,tree=chain"},
            "expected it left out: 'ngram' has a fixed tree",
        ),
        ({"--decoders": "a=run/b,tree=transitions"}, "needs a sequential head"),
        ({"--decoders": "a=run/a a=run/b"}, "two decoders are called 'a'"),
        ({"--max-new-tokens": "1"}, "--max-new-tokens is 1; expected at least 2"),
        ({"--budgets": "0"}, "--budgets has 0"),
        ({"--temperatures": "-1"}, "temperature is -1.0"),
    ],
)
def test_bad_input(file, tmp_path, capsys, change, message):
    arguments = {
        "--target": "target",
        "--prompts": str(file.parent / "sums.jsonl"),
        "--output": str(tmp_path / "new.jsonl"),
        "--decoders": "a=run/a",
    } | {key: value.format(file=file) for key, value in change.items()}
    words = [word for key, value in arguments.items() for word in (key, *value.split(" "))]
    assert main(["evaluate", *words]) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "rounds"}', "nonsense"])
def test_other_files_are_no_results(tmp_path, content, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    assert main(["report", str(path)]) == BAD_INPUT
    assert "python -m jaxspec evaluate" in capsys.readouterr().err


def test_rows_that_cannot_be_compared_are_refused(file):
    rows = results.read_rows(file)
    last = max(i for i, row in enumerate(rows) if row.kind == "rounds")
    with pytest.raises(ValueError, match="a run was cut short"):
        View(rows[:last] + rows[last + 1 :])
    with pytest.raises(ValueError, match="walk rows of one set twice"):
        View(rows + rows)
