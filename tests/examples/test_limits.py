"""`examples/shipped_drafter`'s limits and long prompts: counts, tables, pictures, prompts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.drafters.joined import with_lookup
from jaxspec.evaluation import results
from jaxspec.evaluation import walk as w
from jaxspec.evaluation.contenders import Contender, Entry
from jaxspec.evaluation.speed import plain_forms
from tests import tiny
from tests.drafters import cases

FOLDER = Path(__file__).parents[2] / "examples/shipped_drafter"
ROUNDS = [[0, 0, 6, 2], [0, 2, 4, 2]]  # 2.25 and 2 tokens a round: 34 / 16 in all


@pytest.fixture(scope="module")
def scripts():
    found = {}
    for name in ("oracle", "limits", "draw_limits", "long", "draw_long"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    return found


def row(name, decoder, budget, rounds=ROUNDS, **more):
    labels = dict(set=name, temperature=0.0, drafter=decoder.partition(",")[0], tree=None)
    fixed = dict(head="own", dtype="float32", nodes=[9, 9], tokens=[20, 20])
    fixed |= dict(how="walk", committed=rounds)
    return results.Rounds(**labels, decoder=decoder, budget=budget, **(fixed | more))


def walked(limits, name):
    """Rows of a set; trees of 128 nodes and the oracle over all candidates do best."""
    most = [[0, 0, 0, 8], [0, 0, 0, 8]]
    for decoder in (limits.LOOKUP, "x, drafter", "x, both"):
        for budget in limits.BUDGETS:
            yield row(name, decoder, budget, most if budget == 128 else ROUNDS)
    for decoder in ("x, oracle", "x, oracle and lookup"):
        for k in (*limits.CANDIDATES, limits.ANY):
            yield row(name, decoder, k, most if k == limits.ANY else ROUNDS)
    counts = [[[4, 1], [2, 1]], [[4, 1], [2, 1]]]
    yield limits.Joint(name, 0.0, "x, both", 16, "x", "lookup", counts)
    yield limits.Copies(name, 0.0, 8, [20, 20], [5, 5], [3, 1])


@pytest.mark.parametrize("name", ["limits", "long"])
def test_what_was_measured_is_known_to_a_run_that_resumes(scripts, name):
    path, kinds = scripts[name].RESULTS, scripts["limits"].KINDS
    rows = results.read_rows(path, kinds)
    setup = next(row for row in rows if isinstance(row, results.RunSettings))
    done = results.held(path, setup, kinds)
    assert len(done) == len(rows) and {"joint", "copies"} <= {kind for kind, *_ in done}


def test_rounds_are_counted_by_what_each_accepts(scripts):
    """Both's walk visits anchors 0 and 2; at 0 the drafter accepts one token, at 2 lookup two,
    one of them within 16 nodes."""
    answer = w.RecordedAnswer(tuple(range(6)), start=1, limit=5)
    drafter, lookup = (
        w.Table(np.array(nodes), np.full(5, 99), np.zeros((5, 1)))
        for nodes in (
            [[1, 99], [1, 2], [99, 99], [1, 2], [1, 2]],
            [[99, 99], [1, 2], [5, 20], [1, 2], [1, 2]],
        )
    )
    both = w.Table(np.minimum(drafter.nodes, lookup.nodes), drafter.sizes, drafter.scores)
    assert scripts["limits"].joint(answer, both, drafter, lookup) == [
        [0, 1, 0],
        [1, 0, 0],
        [0, 0, 0],
    ]


def test_shares_of_rounds(scripts):
    counts = [[[4, 1], [2, 1]]]
    rows = [scripts["limits"].Joint("sums", 0.0, "x, both", 16, "x", "lookup", counts)]
    found = scripts["draw_limits"].shares(rows, 1)
    assert {who: share.value for who, share in found.items()} == {
        "both": 0.125,
        "drafter": 0.25,
        "lookup": 0.125,
        "neither": 0.5,
    }


def test_copies_of_prompt_and_answer(scripts):
    prompt = tuple(range(10))
    answer = (*range(9), *range(20, 28), *range(20, 28))
    whole = w.RecordedAnswer((*prompt, *answer), start=10, limit=len(answer))
    found = scripts["limits"].copies("sums", 0.0, [whole])
    # Tokens 7 and 8 end grams of the prompt; the last one ends the gram 20 … 27 again.
    assert (found.tokens, found.from_prompt, found.from_answer) == ([25], [2], [1])


def test_limits_are_drawn(scripts, tmp_path):
    draw = scripts["draw_limits"]
    file, document = tmp_path / "limits.jsonl", tmp_path / "report.md"
    for found in walked(scripts["limits"], "sums"):
        results.append(file, found)
    pairs = draw.TAU_MARKS, draw.DEPTH_MARKS, draw.SHARE_MARKS
    marks = [mark for pair in pairs for mark in pair]
    document.write_text("\n".join(marks))
    draw.Draw(file, into=document, output=tmp_path).run()
    text = document.read_text()
    value, most = "2.12 [2.00, 2.25]", "3.00 [3.00, 3.00]"
    assert f"| x | {value} | {most} | {value} |" in text
    assert f"{value} | {most} |\n| x and lookup | {value} | {most} | {value} |" in text
    assert (
        "| x | 1 or more | 12% [12, 12] | 25% [25, 25] | 12% [12, 12] | 50% [50, 50] |" in text
    )
    assert (tmp_path / "limits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was walked at temperature 1"):
        draw.Draw(file, temperature=1.0).run()


def test_long_prompts_are_drawn(scripts, tmp_path, capsys):
    limits, long = scripts["limits"], scripts["long"]
    file = tmp_path / "long.jsonl"
    for task in long.TASKS:
        for length in long.LENGTHS:
            name = f"{task} {length}"
            for found in walked(limits, name):
                results.append(file, found)
            clock = dict(how="decode", equal=[True, True], prompt_seconds=[1.0, 3.0])
            for decoder in (limits.LOOKUP, "x, drafter", "x, both"):
                for nodes in (8, 16):
                    timed = row(name, decoder, nodes, seconds=[0.5, 0.5], **clock)
                    results.append(file, timed)
            for decoder, seconds in {"plain, 1 row": 1.0, "plain, 2 rows": 2.0}.items():
                timed = row(name, decoder, 1, seconds=[seconds] * 2, **clock)
                results.append(file, timed)
    scripts["draw_long"].Draw(file, drafter="x", output=tmp_path).run()
    text = capsys.readouterr().out
    taus = " | ".join(["2.12 [2.00, 2.25]"] * 4)
    assert f"| 0 | copy | 7,000 | {taus} | 25% | 10% |" in text
    # 16 rounds in 1 second, and in 2 plainly.
    assert f"| ask | 512 | 2.0 | 125 |{' 4.25x (62) |' * 6}" in text
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_clock_runs_what_decoding_runs(scripts):
    limits, long = scripts["limits"], scripts["long"]
    target, rows = tiny.target(), tiny.prompts(5, 21)
    joined = with_lookup(cases.loaded("dspark", TreeConfig("chain", size=8)))
    entry = Entry(Contender("x", "x+ngram", tree="chain"), target, joined)
    rivals = {(name, 1): form for name, form in plain_forms().items()}
    rivals |= {(name, 8): form for name, form in limits.forms(entry, 8).items()}
    answers, prompt_seconds = long.race([entry], rivals, rows, 24)
    assert list(answers) == list(rivals) and len(prompt_seconds) == 2
    for (name, nodes), own in answers.items():
        options = dict(drafter=rivals[name, nodes], max_new_tokens=24, budget=nodes)
        expected = generate(target, rows, **options)
        assert [x.token_ids for x in own] == [x.token_ids for x in expected], name
        assert [x.stats for x in own] == [x.stats for x in expected], name


def test_a_prompt_holds_as_many_texts_as_fit(scripts):
    long, texts = scripts["long"], ["one two", "three", "four", "five six seven", "eight"]

    def count(text):
        return len(text.split())

    listed = (
        "Problem 1:\nfour\n\nProblem 2:\nfive six seven\n\nProblem 3:\neight\n\n"
        "Problem 4:\none two\n\n"
    )
    asked = long.prompt("Problem", texts, 2, "ask", 24, count)
    assert asked == f"{listed}Solve Problem 2. Please reason step by step."
    assert count(asked) == 23  # the fifth text has three words with its number
    asked = long.prompt("Problem", texts, 2, "copy", 27, count)
    assert asked == f"{listed}Write Problem 2 and Problem 3 again, word for word."
