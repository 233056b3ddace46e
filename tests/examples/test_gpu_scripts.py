"""The scripts of examples/gpu, end to end on a CPU with the tiny model."""

import json
import os
import subprocess
import threading

import pytest

from tests.examples.conftest import FOLDER

STEPS = ("--model", "tiny", "--length", 20, "--cases")


@pytest.mark.slow
def test_steps_times_each_case_beside_its_floor_and_goes_on_where_it_stopped(run):
    status, rows = run("steps", *STEPS, "plain", "verify4", "pass", "--profile", "plain")
    assert status == 0
    assert [row["case"] for row in rows] == ["plain", "verify4", "pass"]
    for row in rows:
        assert row["ms"] > 0 and len(row["runs"]) == 3
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"], abs=1e-3)
        assert row["model"] == "tiny" and row["commit"] and row["card"].endswith("CPU")
    plain, verify, drafter = rows
    assert plain["tau"] == 1 and plain["kernels"]["launches"] > 8
    assert verify["floor_ms"] >= plain["floor_ms"] > 0 < drafter["floor_ms"]
    assert run("steps", *STEPS, "plain", "verify4", "pass") == (0, [])
    _, (added,) = run("steps", *STEPS, "plain", "prefill32")
    assert added["case"] == "prefill32" and added["tokens_per_second"] > 0


@pytest.mark.slow
def test_steps_times_whole_rounds(run):
    status, rows = run("steps", *STEPS, "path_conditioned8", "draft-chain4")
    assert status == 0 and [row["case"] for row in rows] == [
        "path_conditioned8",
        "draft-chain4",
    ]


@pytest.mark.slow
def test_what_is_not_begun_in_time_is_reported_and_done_the_next_time(run):
    status, rows = run("steps", *STEPS, "plain", "--seconds", 0)
    assert status == 0
    assert [row["skipped"] for row in rows] == ["no time was left"]
    _, (row,) = run("steps", *STEPS, "plain")
    assert row["ms"] > 0


def test_the_tiny_model_has_small_defaults_which_options_replace(script):
    parse = script("replay").parse
    assert (parse([]).new_tokens, parse([]).nodes) == (1024, [16, 64, 256])
    tiny = parse(["--model", "tiny", "--new-tokens", "7"])
    assert (tiny.new_tokens, tiny.nodes) == (7, [8])


def test_a_large_model_is_refused_where_there_is_no_gpu(run):
    with pytest.raises(
        SystemExit, match="JAX runs on .* CPU; .* expects .* GPU.* `--model tiny`"
    ):
        run("steps", "--cases", "plain")


def test_what_is_compiled_in_time_is_timed_and_what_is_late_is_skipped(script, tmp_path):
    timing, never = script("timing"), threading.Event()
    options = timing.parser("", "steps").parse_args(["--out", str(tmp_path / "rows.jsonl")])
    options.seconds, options.model = 0.5, "tiny"
    rows = timing.Rows("steps", options, rates=False)
    jobs = {"plain": lambda: 6.3, "late": never.wait}
    programs = timing.compile_all(jobs, threads=2, seconds=rows.left)
    found = {
        case: rows.measure(lambda case=case: dict(ms=programs[case]()), case=case)
        for case in jobs
    }
    never.set()
    assert found["plain"]["ms"] == 6.3 and found["late"] is None
    last = json.loads(options.out.read_text().splitlines()[-1])
    assert last["skipped"] == "the time was over before it was compiled"
    assert (rows.skipped, rows.finish()) == (1, 0)


@pytest.mark.slow
def test_a_row_that_fails_is_written_and_makes_the_script_fail(run, script, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script("steps"), "measure_draft", fail)
    status, rows = run("steps", *STEPS, "pass")
    assert status == 1
    assert [row["error"] for row in rows] == ["RuntimeError: out of memory"]


def test_a_case_that_is_none_is_named(run):
    with pytest.raises(SystemExit, match="case 'verify' is not known; expected plain, pass"):
        run("steps", *STEPS, "verify")


REPLAY = ("--model", "tiny", "--length", 12, "--new-tokens", 40)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_decodes_the_plain_continuation_at_the_acceptance_asked_for(run, dtype):
    options = (*REPLAY, "--dtype", dtype, "--nodes", 8, "--tau", 1, 2.5, 8)
    status, (plain, *rows) = run("replay", *options, "--draft", "path_conditioned")
    assert status == 0
    assert plain["nodes"] == plain["tau"] == 1 and plain["tokens"] == 39
    assert [row["asked_tau"] for row in rows] == [1, 2.5, 8]
    assert all(row["equal"] and row["replay"] for row in rows)
    # At 8 the last of five rounds is cut short.
    assert rows[0]["tau"] == 1 and rows[2]["tau"] == pytest.approx(39 / 5, abs=1e-3)
    assert 1.5 < rows[1]["tau"] < 4


@pytest.mark.slow
def test_replay_takes_a_survival_profile(run):
    status, (_, row) = run(
        "replay", *REPLAY, "--nodes", 4, "--survival", 1, 1, 0, "--draft", "none"
    )
    assert status == 0 and row["asked_tau"] == 3 and row["tau"] == 3


def test_a_survival_profile_that_grows_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("replay", *REPLAY, "--survival", 0.5, 0.9)
    assert "expected 1 >= q_1 >= q_2" in capsys.readouterr().err


def test_the_geometric_profile_has_the_tau_asked_for(script):
    geometric = script("replay").geometric
    assert 1 + geometric(4.0, 15).sum() == pytest.approx(4, abs=1e-4)
    assert geometric(3.0, 2).tolist() == [1, 1]
    assert geometric(1.0, 3).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(ValueError, match="tau is 5; with 3 drafted tokens it is 1 … 4"):
        geometric(5, 3)


@pytest.mark.slow
def test_small_compares_each_tree_with_plain_decoding(run):
    options = ("--model", "tiny", "--count", 2, "--new-tokens", 12, "--dtype", "float32")
    status, (plain, chain) = run("small", *options, "--trees", "chain4")
    assert status == 0 and plain["tree"] == "plain" and plain["tokens"] == 24
    assert chain["equal"] == "2 of 2" and chain["tau"] > plain["tau"] == 1


@pytest.mark.slow
def test_check_compares_every_drafter_with_plain_decoding(run):
    status, rows = run("check", "--model", "tiny")
    assert status == 0
    assert rows[0]["check"] == "ties"
    assert {row["check"] for row in rows} == {"ties", "kernels", "lossless"}
    assert rows[-1]["case"] == "mosaic"
    trees = {row["tree"] for row in rows if row.get("drafter") == "dspark"}
    assert trees == {"chain", "best_first", "top_budget", "path_conditioned", "transitions"}


def test_check_keeps_what_has_begun_and_fails_for_what_it_skips(run, script, monkeypatch):
    check, never = script("check"), threading.Event()
    works = {
        "ends in time": dict,
        "ends later": lambda: never.wait(0.8) or {},
        "never ends": never.wait,
        "does not begin": dict,
    }
    monkeypatch.setattr(check, "ties", dict)
    monkeypatch.setenv("JAXSPEC_COMMIT", "c")
    monkeypatch.setattr(check, "GRACE", 1 - 5)  # five more are for pytest to be killed
    monkeypatch.setattr(
        check, "jobs", lambda *_: ((dict(check=name), work) for name, work in works.items())
    )
    status, rows = run("check", "--model", "tiny", "--seconds", 0.5)
    never.set()
    assert status == 1
    assert {row["check"]: row.get("skipped") for row in rows} == {
        "ties": None,
        "ends in time": None,
        "ends later": None,
        "does not begin": "no time was left",
        "never ends": "the time was over before it was done",
        "kernels": "no time was left",
    }


def test_tests_of_kernels_that_hang_are_killed(script):
    with pytest.raises(subprocess.TimeoutExpired):
        script("check").kernels("mosaic", lambda: 0.01)


def test_check_names_the_first_token_that_differs(script, monkeypatch):
    class Done:
        def __init__(self, *token_ids):
            self.token_ids = list(token_ids)

        def result(self):
            return [self]

    check = script("check")
    monkeypatch.setattr(check, "completions", lambda *_, **__: [Done(1, 2, 3)])
    with pytest.raises(AssertionError, match="prompt 0 differs .* at token 2"):
        check.lossless(Done(1, 2, 4), "dense", object)


ROWS = [
    dict(script="steps", header=True, driver="580", jax="0.11.2", date="d", command="python s"),
    dict(script="steps", model="m", batch=1, length=3500, case="plain", ms=9, share=0.5),
    dict(script="steps", model="m", batch=1, length=3500, case="plain", ms=6.3, share=0.917),
    dict(script="steps", model="m", batch=1, length=3500, case="verify64", ms=7.58, share=0.8),
    dict(script="steps", model="m", batch=8, length=900, case="plain", ms=6.53, share=0.9),
    dict(script="steps", model="m", batch=8, length=900, case="chain16", error="no memory"),
    dict(script="steps", model="m", batch=1, length=3500, case="pass", ms=0.5, share=0.7),
]


def test_report_puts_tables_between_the_markers_and_draws(script, tmp_path):
    of_all = dict(card="card", commit="c", floor_ms=5.8, dtype="bfloat16")
    runs = [ROWS[0] | {"date": "c"}, *ROWS]
    lines = [json.dumps(row | of_all) for row in runs]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n<!-- begin setup -->\n<!-- end setup -->\n"
        "<!-- begin rounds -->\nold\n<!-- end rounds -->\nbetween\n"
        "<!-- begin replay -->\nkept\n<!-- end replay -->\n"
    )
    main = script("report").main
    options = ["--rows", str(tmp_path), "--into", str(page), "--pictures", str(tmp_path)]
    assert main(options) == 0
    written = page.read_text()
    assert written == (
        "# Page\n<!-- begin setup -->\n"
        "| script, on one card | driver | JAX | commit | date | command |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| steps | 580 | 0.11.2 | c | c | `python s` |\n"
        "| steps | 580 | 0.11.2 | c | d | `python s` |\n"
        "<!-- end setup -->\n<!-- begin rounds -->\n"
        "| model, batch, tokens behind | plain | verify64 |\n"
        "| --- | ---: | ---: |\n"
        "| m, 1, 3,500 | 6.30 (92%) | 7.58 (80%) |\n"
        "| m, 8, 900 | 6.53 (90%) |  |\n"
        "<!-- end rounds -->\nbetween\n<!-- begin replay -->\nkept\n<!-- end replay -->\n"
    )
    assert (tmp_path / "rounds.png").stat().st_size > 1000
    assert main(options) == 0 and page.read_text() == written
    with pytest.raises(SystemExit, match="no rows of other; it has those of"):
        main([*options, "--card", "other"])


@pytest.mark.parametrize(
    "given, taken",
    [(None, "H200"), ("H100", "H100"), ("x86_64 CPU", "x86_64 CPU")],
)
def test_report_takes_the_gpu_that_was_used_last_and_a_cpu_only_if_named(
    script, tmp_path, given, taken
):
    starts = (
        ("steps", "H200", "2026-11-28 10:00"),
        ("steps", "H100", "2026-11-26 09:00"),
        ("steps", "H200", "2026-11-28 12:00"),
        ("tune", "H100", "2026-11-28 11:00"),
        ("tune", "x86_64 CPU", "2026-11-29 08:00"),
    )
    for name, card, date in starts:
        row = dict(script=name, card=card, header=True, date=date)
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    read = script("report").read
    assert read(tmp_path, given)[0] == taken
    (tmp_path / "steps.jsonl").unlink()
    assert read(tmp_path, None)[0] == "H100"


def test_the_campaign_checks_first_bounds_each_script_and_takes_the_commit_once(tmp_path):
    stub = tmp_path / "timeout"
    stub.write_text(f'#!/bin/sh\necho "$JAXSPEC_COMMIT|$@" >> {tmp_path}/log\n')
    stub.chmod(0o755)
    own = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", OUT=str(tmp_path), PYTHON="python")
    done = subprocess.run([FOLDER / "campaign.sh"], env=os.environ | own, capture_output=True)
    assert done.returncode == 0, done.stderr
    commits, lines = zip(
        *(line.split("|") for line in (tmp_path / "log").read_text().splitlines()), strict=True
    )
    assert len(set(commits)) == 1
    run = [(words[4].split("/")[-1], int(words[2])) for words in map(str.split, lines)]
    assert run == [
        ("check.py", 210),
        ("products.py", 160),
        ("tune.py", 160),
        ("steps.py", 160),
        ("steps.py", 160),
        ("replay.py", 160),
        ("small.py", 160),
        ("tune.py", 160),
    ]
    assert "--kernels triton" in lines[2] and "--kernels" not in lines[-1]


@pytest.mark.slow
def test_train_makes_data_and_a_drafter_in_parts_and_goes_on(script, tmp_path, monkeypatch):
    train = script("train")
    monkeypatch.setattr(train, "PART", 2**20)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(4))
    )
    small = ("--prompts", prompts, "--rows", 4, "--batch", 2, "--steps", 1)
    words = [*map(str, ("--out", tmp_path / "out", *small))]
    assert train.main([*words, "--seconds", "1200", "--data-share", "0.4"]) == 0
    parts = tmp_path / "out" / "parts"
    sums = dict(reversed(line.split()) for line in (parts / "SHA256SUMS").open())
    assert sums.keys() == {path.name for path in parts.iterdir()} - {"SHA256SUMS"}
    cut = sorted(parts.glob("model.safetensors.*"))
    assert len(cut) > 5 and max(part.stat().st_size for part in cut) == 2**20
    drafter = tmp_path / "out" / "run" / "drafter"
    joined = b"".join(part.read_bytes() for part in cut)
    assert joined == (drafter / "model.safetensors").read_bytes()
    # The data is kept, and training goes on.
    data = (tmp_path / "out" / "data.jsonl").read_bytes()
    assert train.main([*words, "--steps", "2"]) == 0
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == data
    assert (drafter / "model.safetensors").read_bytes() != joined
