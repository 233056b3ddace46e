"""The target's own answers, whatever the batching, once each."""

import dataclasses
import json

import jax
import pytest

from jaxspec.api import generate
from jaxspec.data.jobs import Job, own_questions, read_jobs
from jaxspec.data.rows import read_examples
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import Request
from jaxspec.training.answers_file import AnswersFile
from jaxspec.training.regenerate import RegenerateConfig, regenerate, user_header
from tests.training import tiny


class Letters:
    """Token 2 + i is the i-th letter; 0 opens a turn, 1 ends it."""

    eos_token_ids = (1,)
    chat_template = "letters"

    def chat(self, messages, *, thinking=None):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = []
        for message in messages:
            ids += [0, *(2 + ord(x) - ord("a") for x in message["content"]), 1]
        return [*ids, 0]

    def encode(self, text, *, special=True):
        return [2 + ord(x) - ord("a") for x in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 2) for i in ids if i > 1)


@pytest.fixture(scope="module")
def target():
    config = dataclasses.replace(tiny.TARGET_CONFIG, eos_token_ids=(1,))
    return dataclasses.replace(tiny.target(), config=config, tokenizer=Letters())


CONFIG = RegenerateConfig(
    max_new_tokens=12,
    sampling=Sampling(temperature=1.0),
    max_length=100,
    question_tokens=6,
    rows=4,
)


def answers(target, requests, **options):
    """Token ids by the requests' place, from an engine that is filled for throughput."""
    config = EngineConfig(room=100, schedule=Fixed(), throughput=True, **options)
    engine = Engine(target, config=config)
    ids = {engine.submit(request): i for i, request in enumerate(requests)}
    found = [[] for _ in requests]
    while engine.busy:
        for update in engine.step():
            found[ids[update.id]] += update.tokens
    return found


@pytest.mark.slow
def test_rows_are_refilled_and_answers_are_those_of_generate(target):
    prompts = [[0, 2 + i, 3, 1, 0] for i in range(9)]
    keys = [jax.random.fold_in(jax.random.key(5), i) for i in range(9)]
    sampling = Sampling(temperature=1.0)
    requests = [
        Request(prompt, 4 + i, sampling, key)
        for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
    ]
    found = answers(target, requests, slots=4, rounds=3)
    # `generate` folds its seed with the prompt's place, as the keys above are.
    options = dict(max_new_tokens=12, sampling=sampling, seed=5, batch_size=9)
    for i, expected in enumerate(generate(target, prompts, **options)):
        assert found[i] == expected.token_ids[: 4 + i]


def rows_of(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def jobs():
    few = [Job(i, i, [], ["ab", "cd"] if i % 3 == 0 else ["e" * (i + 1)]) for i in range(7)]
    return [*few, Job("long", 7, [], ["u" * 95])]


def test_a_killed_run_neither_repeats_nor_loses_a_row(target, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    outcome = regenerate(CONFIG, target, jobs(), whole)
    assert (outcome.rows, outcome.answered, outcome.failed) == (7, 7, 1)
    assert outcome.errors == tmp_path / "whole.errors.jsonl"
    expected = rows_of(whole)
    assert [m["role"] for m in expected[0]["conversations"]] == ["user", "assistant"] * 2
    assert list(rows_of(outcome.errors)) == ["long"]

    lines = whole.read_text().splitlines(keepends=True)
    killed.write_text("".join(lines[:3]) + lines[3][:25])  # as kill -9 leaves it
    outcome = regenerate(CONFIG, target, jobs(), killed)
    assert (outcome.rows, outcome.answered) == (7, 4)
    assert killed.read_text().count("\n") == 7
    assert rows_of(killed) == expected
    before = killed.read_bytes()
    outcome = regenerate(CONFIG, target, jobs(), killed)
    assert (outcome.rows, outcome.answered, outcome.failed) == (7, 0, 1)
    assert killed.read_bytes() == before


def test_rows_hold_the_tokens_that_the_target_saw_and_wrote(target, tmp_path):
    output = tmp_path / "data.jsonl"
    regenerate(CONFIG, target, [Job(0, 0, [], ["ab"])], output)
    row = rows_of(output)[0]
    key = jax.random.fold_in(jax.random.key(CONFIG.seed), 0)
    prompt = [0, 2, 3, 1, 0]
    request = Request(prompt, 12, CONFIG.sampling, jax.random.fold_in(key, 0))
    ids = prompt + answers(target, [request], slots=4)[0]
    assert row["sequences"] == [{"token_ids": ids, "answers": [[5, len(ids)]]}]
    # Ids above 27 are no letters, and Z is one: text alone could not say what was written.
    (example,) = read_examples(output, target, max_length=100, min_supervised=1)
    assert example.tokens.tolist() == ids


def test_failed_rows_are_tried_again(target, tmp_path):
    output = tmp_path / "data.jsonl"
    short = dataclasses.replace(CONFIG, max_length=20)
    outcome = regenerate(short, target, jobs()[-1:], output)
    assert (outcome.rows, outcome.failed) == (0, 1) and not output.exists()
    (error,) = rows_of(outcome.errors).values()
    assert "a prompt of 98 tokens and 12 new ones exceed the" in error["error"]
    outcome = regenerate(dataclasses.replace(CONFIG, max_length=120), target, jobs(), output)
    assert (outcome.rows, outcome.failed) == (8, 0)
    assert not outcome.errors.exists()


def test_the_command_reports_how_it_read_its_sources(target, tmp_path, monkeypatch, capsys):
    import jaxspec
    from jaxspec.cli import main

    monkeypatch.setattr(jaxspec, "load_target", lambda *_, **__: target)
    prompts, output = tmp_path / "prompts.json", tmp_path / "data.jsonl"
    prompts.write_text(json.dumps([{"prompt": "ab", "completion": "c"}]))
    options = ["--max-new-tokens", "12", "--max-length", "100", "--rows", "4", "--json"]
    assert (
        main(["regenerate", "--prompts", str(prompts), "--output", str(output), *options]) == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "rows": 1,
        "answered": 1,
        "failed": 0,
        "errors": None,
        "output": str(output),
        "sources": [
            {
                "source": str(prompts),
                "format": "a JSON array",
                "rows": {"prompts with completions": 1},
            }
        ],
    }
    assert f"{prompts}: read as a JSON array, prompts with completions\n" in err


def test_rows_that_cannot_be_asked_fail_alone(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "ab"}', '{"prompt": "a\\ud83d"}', '{"prompt": 3, "id": "x"}', "{"]
    prompts.write_text("\n".join(lines))
    outcome = regenerate(CONFIG, target, read_jobs(prompts), tmp_path / "data.jsonl")
    assert (outcome.rows, outcome.failed) == (1, 3)
    errors = {name: row["error"] for name, row in rows_of(outcome.errors).items()}
    assert "line 2: turn 0: the content has a lone surrogate" in errors[1]
    assert "line 3: expected" in errors["x"] and "line 4: not JSON" in errors[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampling=Sampling(temperature=0.5)), "temperature 1.0, now 0.5"),
        (dict(sampling=Sampling(temperature=1.0, top_k=3)), "top_k 0, now 3"),
        (dict(sampled=0.0), "sampled 1.0, now 0.0"),
        (dict(seed=1), "seed 0, now 1"),
        (dict(max_new_tokens=13), "max_new_tokens 12, now 13"),
        (dict(thinking=True), "thinking None, now True"),
        (dict(question_tokens=7), "question_tokens 6, now 7"),
        (dict(question=Sampling(temperature=0.5)), "question {.*1.0.*}, now {.*0.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_options_do_not_go_on_with_a_file(target, tmp_path, change, message):
    output = tmp_path / "data.jsonl"
    regenerate(CONFIG, target, jobs()[:2], output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=f"line 1 was made with other settings .*{message}"):
        regenerate(dataclasses.replace(CONFIG, **change), target, jobs(), output)
    assert output.read_bytes() == before


def test_another_target_or_template_does_not_go_on_with_a_file(target, tmp_path):
    output = tmp_path / "data.jsonl"
    regenerate(CONFIG, target, jobs()[:1], output)
    tuned = jax.tree.map(lambda x: x * 1.1, target.params)
    with pytest.raises(ValueError, match="other settings .*fingerprint .* now"):
        regenerate(CONFIG, dataclasses.replace(target, params=tuned), jobs(), output)
    other = Letters()
    other.chat_template = "letters, otherwise"
    with pytest.raises(ValueError, match="other settings .*template .* now"):
        regenerate(CONFIG, dataclasses.replace(target, tokenizer=other), jobs(), output)
    moved = dataclasses.replace(target, name="/elsewhere/model")
    assert regenerate(CONFIG, moved, jobs()[:2], output).rows == 2


@pytest.mark.parametrize(
    "other",
    [
        Job(0, 0, [], ["ab", "xy"]),
        Job(0, 0, [], ["ab"]),
        Job(0, 0, [{"role": "system", "content": "s"}], ["ab", "cd"]),
    ],
    ids=["another turn", "one turn less", "a system message"],
)
def test_other_prompts_do_not_go_on_with_a_file(target, tmp_path, other):
    output = tmp_path / "data.jsonl"
    regenerate(CONFIG, target, jobs()[:1], output)
    with pytest.raises(ValueError, match="line 1: row 0 answers 'ab', but this id"):
        regenerate(CONFIG, target, [other], output)


def test_prompts_of_other_ids_are_added(target, tmp_path):
    output = tmp_path / "data.jsonl"
    regenerate(CONFIG, target, jobs()[:2], output)
    outcome = regenerate(CONFIG, target, [Job("new", 0, [], ["b"])], output)
    assert (outcome.rows, outcome.answered) == (3, 1)


def test_one_process_writes_a_file(target, tmp_path):
    output = tmp_path / "data.jsonl"
    first = AnswersFile(output)
    with pytest.raises(ValueError, match="another process is writing .*data.jsonl; wait"):
        regenerate(CONFIG, target, jobs(), output)
    first.close()
    assert regenerate(CONFIG, target, jobs()[:1], output).rows == 1


def test_the_target_writes_its_own_questions(target, tmp_path):
    assert user_header(target.tokenizer) == [0]
    output = tmp_path / "own.jsonl"
    count = regenerate(CONFIG, target, own_questions(6), output).rows
    questions = [row["conversations"][0]["content"] for row in rows_of(output).values()]
    assert count == len(questions) and len(set(questions)) > 1
    assert all(question.isalpha() for question in questions)


def test_the_target_goes_on_with_an_opening(target, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    rows = [{"opening": "abc", "ending": "rst"}, {"opening": "de"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    assert regenerate(CONFIG, target, read_jobs(prompts), output).rows == 2
    assert regenerate(CONFIG, target, read_jobs(prompts), output).answered == 0
    first, second = (rows_of(output)[i]["conversations"][0]["content"] for i in range(2))
    assert first.startswith("abc") and first.endswith("rst") and len(first) > 6
    assert second.startswith("de") and len(second) > 2


def test_prompts_are_read_in_three_shapes(tmp_path):
    path = tmp_path / "prompts.jsonl"
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "dropped"},
    ]
    rows = [{"turns": ["a", "b"]}, {"prompt": "c", "id": "x"}, {"conversations": talk}]
    path.write_text("\n".join(map(json.dumps, rows)))
    rows.append(
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": ""}]}
    )
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    got = [(job.id, job.messages, job.turns) for job in read_jobs(path)]
    assert got == [
        (0, [], ["a", "b"]),
        ("x", [], ["c"]),
        (2, talk[:1], ["q"]),
        (3, [], ["h"]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": []}', "expected .*found no text"),
        ('{"turns": [" "]}', "expected .*found no text"),
        ('{"opening": 1}', "'opening': the content is 1; expected text"),
        ("[1]", "expected a JSON object"),
        ('{"text": "x"}', "expected"),
        ("{", "not JSON"),
        ('{"prompt": "a", "id": [1]}', r"'id' is \[1\]; expected text or a whole number"),
        ('{"prompt": "a", "id": null}', "'id' is None"),
        ('{"prompt": "a", "id": "b\\ud83d"}', "'id': the content has a lone surrogate"),
    ],
)
def test_files_without_a_prompt_say_what_they_hold(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=f"(line 1|row 0): {message}"):
        read_jobs(path)


def test_ids_are_used_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}')
    with pytest.raises(ValueError, match="id 1 occurs twice"):
        read_jobs(path)


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"prompt": "x"}\n', '{"x": 1}'])
@pytest.mark.parametrize("name", ["notes.jsonl", "notes.errors.jsonl"])
def test_foreign_output_files_are_left_alone(target, tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1 was not written by regenerate"):
        regenerate(CONFIG, target, jobs(), tmp_path / "notes.jsonl")
    assert path.read_text() == text
