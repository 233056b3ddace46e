"""The command line: what it prints for people and machines, and its exit codes."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import jaxspec
from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT, FAULT
from jaxspec.cli.generate import Generate
from jaxspec.cli.options import DrafterOptions
from jaxspec.config import TreeConfig
from jaxspec.data.jobs import read_jobs
from jaxspec.data.prompts import read_prompts, read_rows
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.loading import load_drafter, load_target
from jaxspec.prompts import as_token_ids, usable_prompts
from jaxspec.tokenizer import Tokenizer
from tests import tiny
from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.drafters import cases
from tests.test_stream import VOCABULARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"), DENSE, random_tensors(DENSE))


@pytest.fixture(autouse=True)
def no_cache_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)


def run(capsys, *arguments):
    exact = ("--dtype", "float32", "--schedule", "fixed")
    code = main(["generate", *map(str, arguments), *exact])
    return code, *capsys.readouterr()


def test_json_has_one_object_per_prompt(folder, tmp_path, capsys):
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 2, 3, 1, 2], [4, 5]]")
    common = ("--target", folder, "--prompt-ids", ids, "--max-new-tokens", 12, "--json")
    code, out, err = run(capsys, *common, "--drafter", "none")
    assert code == 0
    plain = [json.loads(line) for line in out.splitlines()]
    code, out, err = run(capsys, *common, "--drafter", "ngram", "--budget", 5)
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["token_ids"] for row in found] == [row["token_ids"] for row in plain]
    for row in found:
        assert row.keys() == {
            *("token_ids", "text", "rounds", "committed"),
            *("tau", "new_tokens", "seconds", "finish", "dtype"),
        }
        assert row["new_tokens"] == len(row["token_ids"]) == 12
        assert row["rounds"] == len(row["committed"])
        assert row["tau"] == sum(row["committed"]) / row["rounds"]
        assert row["text"] is None and row["seconds"] > 0


def test_a_prompt_that_cannot_be_used_is_named_and_the_others_are_answered(
    folder, tmp_path, capsys
):
    ids = tmp_path / "ids.json"
    common = ("--target", folder, "--prompt-ids", ids, "--max-new-tokens", 12, "--json")
    common = (*common, "--batch-size", 2)
    ids.write_text("[[1, 2], [99], [3], [5, 5]]")
    code, out, err = run(capsys, *common, "--temperature", 1.0)
    bad = "prompt 1 has token id 99; the target's vocabulary is 0 … 10. Was it encoded"
    assert code == FAULT and f"left out: {bad}" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[1]["error"].startswith(bad) and rows[1].keys() == {"error"}
    ids.write_text("[[1, 2], [4], [3], [5, 5]]")  # seeds follow the place
    code, out, _ = run(capsys, *common, "--temperature", 1.0)
    good = [json.loads(line)["token_ids"] for line in out.splitlines()]
    assert code == 0 and [rows[i]["token_ids"] for i in (0, 2, 3)] == [
        good[i] for i in (0, 2, 3)
    ]

    ids.write_text(f"[[1], {[2] * 60}]")
    code, out, err = run(capsys, *common)
    assert code == FAULT and "left out: prompt 1: a prompt of 60 tokens and 12 new ones" in err
    ids.write_text("[[99], [98]]")
    code, out, err = run(capsys, *common)
    assert code == BAD_INPUT and "none of the 2 prompts is usable; prompt 0 has token" in err


def test_spare_tokens_are_no_new_ones():
    prompts, options = [[1], [2] * 500], dict(raw=True, thinking=None, max_new_tokens=8)
    assert len(usable_prompts(tiny.target(), prompts, **options)[0]) == 2
    (reason,) = usable_prompts(tiny.target(), prompts, **options, spare=5)[1].values()
    assert reason.startswith(
        "prompt 1: a prompt of 500 tokens, 8 new ones and 5 more of the last round need 513 "
    )


def test_a_row_that_cannot_be_read_keeps_its_place(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["a"]}\n{"turn": 1}\n{not json\n{"prompt": "b"}\n')
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
    target = dataclasses.replace(tiny.target(), tokenizer=tokenizer)
    options = dict(raw=True, thinking=None, max_new_tokens=4)
    rows, refused = usable_prompts(target, list(read_rows(path)), **options)
    assert rows == {0: tokenizer.encode("a"), 3: tokenizer.encode("b")}
    assert "line 2: expected" in refused[1] and "line 3: not JSON" in refused[2]
    path.write_text('{"turn": 1}\n')
    with pytest.raises(ValueError, match="line 1: expected"):
        Generate(prompts=path)._prompts()
    path.write_text("\n")
    with pytest.raises(ValueError, match="prompts.jsonl holds no prompts"):
        Generate(prompts=path)._prompts()


@pytest.mark.parametrize("spec", ["nonsense", "nonsense::inner", "nonsense+ngram"])
def test_a_drafter_that_is_none_of_them(spec):
    alone = spec.removesuffix("+ngram")
    alone = alone.partition("::")[0]
    message = f"no drafter '{alone}'; expected shipped, the folder.*none, ngram, mtp, mtp:NAME"
    with pytest.raises(ValueError, match=message):
        load_drafter(spec, tiny.target())


def test_half_a_surrogate_pair_is_no_text():
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
    target = dataclasses.replace(tiny.target(), tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"prompt 1 holds half a surrogate pair, '\\ud83d', at"
    ):
        as_token_ids(target, ["ab", "ab\ud83d"], raw=True, thinking=None)


def test_a_seed_follows_the_prompts_place_not_its_batch(folder, tmp_path, capsys):
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 2], [3], [4, 5, 6]]")
    outputs = []
    for batch in (1, 2):
        code, out, _ = run(
            capsys,
            *("--target", folder, "--prompt-ids", ids, "--max-new-tokens", 8, "--json"),
            *("--temperature", 1.0, "--seed", 5, "--batch-size", batch),
        )
        assert code == 0
        outputs.append([json.loads(line)["token_ids"] for line in out.splitlines()])
    python = jaxspec.generate(
        load_target(folder),
        [[1, 2], [3], [4, 5, 6]],
        max_new_tokens=8,
        sampling=Sampling(1.0),
        seed=5,
        batch_size=2,
    )
    assert outputs[0] == outputs[1] == [list(answer.token_ids) for answer in python]


def test_people_see_tokens_rounds_and_tau(folder, tmp_path, capsys):
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 2, 3]]")
    code, out, _ = run(capsys, "--target", folder, "--prompt-ids", ids, "--max-new-tokens", 4)
    assert code == 0 and "[4 tokens, " in out and " tau " in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "0 of --prompt, --prompts and --prompt-ids were given; expected one"),
        (("--prompt", "a", "--prompts", "b"), "2 of --prompt, --prompts and"),
        (("--prompt", " "), "--prompt is empty; expected some text"),
        (("--prompts", "absent.jsonl"), "cannot read absent.jsonl"),
        (("--target", "./absent", "--prompt", "a"), "absent"),
        (("--prompt", "a", "--temperature", "-1"), "temperature is -1.0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == BAD_INPUT and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def never(*_, **__):
    raise AssertionError("nothing may be loaded before this is refused")


GENERATE = ["generate", "--prompt", "a"]
CHECK = ["check", "--drafter", "shipped"]
CALIBRATE = ["calibrate", "--drafter", "shipped", "--prompts", "prompts.jsonl"]
REGENERATE = ["regenerate", "--prompts", "prompts.jsonl", "--output", "data.jsonl"]
TRAIN = ["train", "--data", "prompts.jsonl", "--output", "run"]
BENCH = ["bench", "--drafters", "ngram", "--prompts", "prompts.jsonl"]
PLAN = ["plan", "--target", "qwen3-8b", "--no-compile"]
EVALUATE = ["evaluate", "--prompts", "prompts.jsonl"]
DECODERS = ["--output", "results.jsonl", "--decoders", "a=ngram"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*GENERATE, "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        ([*GENERATE, "--batch-size", "0"], "--batch-size is 0"),
        ([*GENERATE, "--devices", "0"], "--devices is 0"),
        ([*GENERATE, "--budget", "0"], "--budget is 0"),
        ([*GENERATE, "--tree", "chain", "--width", "0"], "--width is 0"),
        ([*GENERATE, "--survival", "2"], "--survival is 2.0; expected a probability, 0 … 1"),
        ([*GENERATE, "--width", "5"], "--width is for one kind of tree; give --tree too"),
        (
            [*GENERATE, "--tree", "chain", "--drafter", "ngram"],
            "drafter ngram does not use --tree, which a drafter with scores needs",
        ),
        (
            [*GENERATE, "--drafter", "none", "--width", "7", "--threshold", "0.5"],
            "drafter none does not use --width, --threshold",
        ),
        (
            [*GENERATE, "--tree", "chain", "--width", "9", "--candidates", "3"],
            "a chain tree does not use --width, --candidates: leave that out",
        ),
        ([*GENERATE, "--survival", "0.5", "--width", "9"], "a chain tree does not use --width"),
        (
            [*GENERATE, "--tree", "top_budget", "--width", "4"],
            "top_budget tree does not use",
        ),
        ([*GENERATE, "--tree", "best_first", "--threshold", "0.5"], "not use --threshold"),
        ([*PLAN, "--tree", "chain", "--width", "9"], "a chain tree does not use --width"),
        ([*PLAN, "--drafter", "ngram", "--width", "9"], "drafter ngram does not use --width"),
        ([*GENERATE, "--rejection"], "without lookup; --drafter is shipped+ngram"),
        (
            [*GENERATE, "--rejection", "--drafter", "shipped", "--tree", "best_first"],
            "--rejection needs a chain; --tree is best_first: leave it out",
        ),
        ([*GENERATE, "--target", "x", "--drafter", "nowhere"], "there is no drafter 'nowhere'"),
        ([*GENERATE, "--drafter", "mtp:nowhere"], "there is no file or folder nowhere"),
        ([*GENERATE, "--drafter", "small:nowhere"], "there is no file or folder nowhere"),
        ([*CHECK, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([*CHECK, "--target", "x", "--beside", "./absent"], "absent"),
        ([*CALIBRATE, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([*CALIBRATE, "--batch-size", "0"], "--batch-size is 0"),
        ([*CALIBRATE, "--temperature", "-1"], "temperature is -1.0"),
        ([*CALIBRATE, "--picture", "absent/x.png"], "--picture absent/x.png cannot be written"),
        ([*CALIBRATE, "--drafter", "nowhere"], "there is no drafter 'nowhere'"),
        ([*REGENERATE, "--drafter", "nowhere"], "there is no drafter 'nowhere'"),
        ([*TRAIN, "--max-length", "0"], "--max-length is 0"),
        ([*TRAIN, "--min-supervised", "0"], "--min-supervised is 0"),
        (
            [*TRAIN, "--resume-step", "7"],
            "resume_step is 7, but no run has begun in run; ",
        ),
        (["train", "--output", "run", "--data"], "nothing to train on: give --data"),
        (
            ["overlap", "--prompts", "prompts.jsonl", "--data"],
            "nothing to compare: give --data",
        ),
        (["report"], "no results: give at least one file that `evaluate` wrote"),
        ([*BENCH, "--output", "absent/x.jsonl"], "--output absent/x.jsonl cannot be written"),
        ([*EVALUATE, *DECODERS, "--timed", "-1"], "--timed is -1; expected at least 0"),
        ([*EVALUATE, *DECODERS, "a=shipped"], "two decoders are called 'a'"),
        (
            [*EVALUATE, *DECODERS, "b=run,tree=chain,width=9"],
            "decoder 'b': width is 9; expected it left out: a chain tree does not use it",
        ),
        (
            [*EVALUATE, *DECODERS, "b=none,tree=chain"],
            "expected it left out: 'none' has a fixed tree",
        ),
        (
            [*EVALUATE, *DECODERS, "b=ngram,width=2"],
            "expected it left out: 'ngram' has a fixed tree",
        ),
        ([*EVALUATE, *DECODERS, "--output", "."], "--output . cannot be written"),
    ],
)
def test_what_options_alone_tell_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, arguments, message
):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    monkeypatch.chdir(tmp_path)
    for loads in ("jaxspec.load_target", "jaxspec.evaluation.contenders.load_target"):
        monkeypatch.setattr(loads, never)
    assert main(arguments) == BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"turns": ["a"]}\n{"turn": 1}', 'line 2: expected {"turns": ["text", …]}'),
        ("{not json", "line 1: not JSON"),
        ("\n\n", "holds no prompts"),
        ('{"turns": []}', "line 1: expected"),
    ],
)
def test_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert message in str(error.value)


def test_a_line_separator_inside_a_prompt_is_no_new_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["one\u2028two"]}\n')
    assert read_prompts(path) == ["one\u2028two"]
    (job,) = read_jobs(path)
    assert job.turns == ["one\u2028two"]


def test_prompt_ids_must_be_lists_of_integers(folder, tmp_path, capsys):
    ids = tmp_path / "ids.json"
    for content in ("[1, 2]", '[["a"]]', "{}", "[]", "[[true]]"):
        ids.write_text(content)
        code, _, err = run(capsys, "--target", folder, "--prompt-ids", ids)
        assert code == BAD_INPUT and "expected a JSON list of lists of token ids" in err


def test_check_prints_a_report_and_exits_with_1_at_a_fault(tmp_path, monkeypatch, capsys):
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
    target = dataclasses.replace(tiny.target(), tokenizer=tokenizer)
    monkeypatch.setattr("jaxspec.load_target", lambda *_, **__: target)
    monkeypatch.setattr("jaxspec.check.report._alternatives", lambda *_: ())  # each compiles
    untrained = cases.loaded("dflash", TreeConfig("chain", size=8))
    save_drafter(tmp_path / "drafter", untrained)
    (tmp_path / "text.txt").write_text("abcde" * 6)
    common = ["check", "--drafter", str(tmp_path / "drafter"), "--text"]
    assert main([*common, str(tmp_path / "text.txt"), "--json"]) == FAULT
    report = json.loads(capsys.readouterr().out)
    assert report["rounds"] > 1 and len(report["differences"]) == untrained.drafter.depth
    assert max(report["differences"]) < report["tolerance"]
    assert report["findings"][0].startswith("almost nothing is accepted")

    (tmp_path / "short.txt").write_text("abc")
    assert main([*common, str(tmp_path / "short.txt")]) == BAD_INPUT
    assert "a text of 3 tokens from position 1 on is too short" in capsys.readouterr().err


def test_importing_jaxspec_is_quick():
    """Nothing heavy is imported until it is used."""
    heavy = "{'jax', 'flax', 'transformers'}"
    code = f"import sys, jaxspec; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_names_are_listed_before_their_first_use(monkeypatch):
    monkeypatch.delitem(vars(jaxspec), "Score", raising=False)
    assert {"Score", "generate", "__version__"} <= set(dir(jaxspec))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, tree",
    [
        ("dspark_vanilla", "path_conditioned"),
        ("dspark_rnn", "path_conditioned"),
        ("treeflash_a", "path_conditioned"),
        ("treeflash_a", "transitions"),
        ("jetspec_a", "best_first"),
        ("dflash_a", "top_budget"),
    ],
)
def test_trained_drafters_from_their_folders(golden, case, tree, tmp_path, capsys):
    folder, trace = golden(case)
    prompts = trace["prompts"]
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([prompt["prompt"] for prompt in prompts]))
    new_tokens = min(len(prompt["ar"]) for prompt in prompts)
    code, out, err = run(
        capsys,
        *("--target", folder / "target", "--drafter", folder / "draft", "--prompt-ids", ids),
        *("--tree", tree, "--budget", 16, "--max-new-tokens", new_tokens, "--json"),
    )
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["token_ids"] for row in rows] == [p["ar"][:new_tokens] for p in prompts]
    assert any(row["tau"] > 1.1 for row in rows)  # something was accepted


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("smollm2-135m", {}, ("shipped+ngram", None)),
        ("smollm2-135m", {"tree": "best_first"}, ("shipped+ngram", "best_first")),
        ("smollm2-135m", {"drafter": "shipped"}, ("shipped", None)),
        ("smollm2-135m", {"drafter": "ngram"}, ("ngram", None)),
        ("Qwen/Qwen3-8B", {"drafter": "org/drafter"}, ("org/drafter", None)),
    ],
)
def test_the_default_drafter_is_the_shipped_one_where_it_fits(
    target, options, expected, monkeypatch
):
    def load(name, _, *, tree=None, nodes=None, **rules):
        assert (tree.size if tree else nodes) == 8
        return name, tree and tree.kind

    monkeypatch.setattr("jaxspec.loading.load_drafter", load)
    assert DrafterOptions(**options).load(SimpleNamespace(name=target)) == expected


def test_the_default_drafter_of_other_targets_is_lookup(folder, tmp_path):
    target = load_target(folder)
    assert isinstance(DrafterOptions().load(target).drafter, PromptLookup)
