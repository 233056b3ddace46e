"""The target's own answers, whatever the batching, once each."""

import dataclasses
import json

import jax
import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.generation import generate
from jaxspec.training.regenerate import (
    Job,
    RegenerateConfig,
    own_questions,
    read_jobs,
    regenerate,
    user_header,
)
from jaxspec.training.slots import Request, Slots
from tests.training import tiny


class Letters:
    """Token 2 + i is the i-th letter; 0 opens a turn, 1 ends it."""

    eos_token_ids = (1,)

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


def test_rows_are_refilled_and_answers_are_those_of_generate(target):
    prompts = [[0, 2 + i, 3, 1, 0] for i in range(9)]
    keys = [jax.random.fold_in(jax.random.key(5), i) for i in range(9)]
    sampling = Sampling(temperature=1.0)
    slots = Slots(target, room=100, rows=4, refill=2, rounds=3)
    for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        slots.add(Request(i, prompt, 4 + i, sampling, key))
    answers = {}
    while slots.busy:
        answers |= {answer.label: answer.token_ids for answer in slots.step()}
    # `generate` folds its seed with the prompt's place, as the keys above are.
    options = dict(max_new_tokens=12, sampling=sampling, seed=5, batch_size=9)
    for i, expected in enumerate(generate(target, prompts, **options)):
        assert answers[i] == expected.token_ids[: 4 + i]


def test_requests_that_do_not_fit_are_refused(target):
    slots = Slots(target, room=20)
    with pytest.raises(ValueError, match="prompt of 15 tokens and 6 new ones need 21 places"):
        slots.add(Request(0, [0] * 15, 6, Sampling(), jax.random.key(0)))


def rows_of(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def jobs():
    few = [Job(i, i, [], ["ab", "cd"] if i % 3 == 0 else ["e" * (i + 1)]) for i in range(7)]
    return [*few, Job("long", 7, [], ["x" * 95])]


def test_a_killed_run_neither_repeats_nor_loses_a_row(target, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert regenerate(CONFIG, target, jobs(), whole) == 7
    expected = rows_of(whole)
    assert [m["role"] for m in expected[0]["conversations"]] == ["user", "assistant"] * 2
    assert list(rows_of(tmp_path / "whole.errors.jsonl")) == ["long"]

    lines = whole.read_text().splitlines(keepends=True)
    killed.write_text("".join(lines[:3]) + lines[3][:25])  # as kill -9 leaves it
    assert regenerate(CONFIG, target, jobs(), killed) == 7
    assert killed.read_text().count("\n") == 7
    assert rows_of(killed) == expected
    before = killed.read_bytes()
    assert regenerate(CONFIG, target, jobs(), killed) == 7
    assert killed.read_bytes() == before


def test_the_target_writes_its_own_questions(target, tmp_path):
    assert user_header(target.tokenizer) == [0]
    output = tmp_path / "own.jsonl"
    count = regenerate(CONFIG, target, own_questions(6), output)
    questions = [row["conversations"][0]["content"] for row in rows_of(output).values()]
    assert count == len(questions) and len(set(questions)) > 1
    assert all(question.isalpha() for question in questions)


def test_the_target_goes_on_with_an_opening(target, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    rows = [{"opening": "abc", "ending": "xyz"}, {"opening": "de"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    assert regenerate(CONFIG, target, read_jobs(prompts), output) == 2
    first, second = (rows_of(output)[i]["conversations"][0]["content"] for i in range(2))
    assert first.startswith("abc") and first.endswith("xyz") and len(first) > 6
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
    got = [(job.id, job.messages, job.turns) for job in read_jobs(path)]
    assert got == [(0, [], ["a", "b"]), ("x", [], ["c"]), (2, talk[:1], ["q"])]
    for line in ('{"turns": []}', '{"opening": 1}', "[1]", '{"text": "x"}', "{"):
        path.write_text(line)
        with pytest.raises(ValueError, match="line 1: expected"):
            read_jobs(path)
    path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}')
    with pytest.raises(ValueError, match="id 1 was used before"):
        read_jobs(path)


def test_foreign_output_files_are_left_alone(target, tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="line 1 was not written by regenerate"):
        regenerate(CONFIG, target, jobs(), path)
    assert path.read_text() == "my notes\n"
