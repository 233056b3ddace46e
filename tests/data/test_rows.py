"""Files of training data: stored tokens, rendered text, and what is skipped."""

import dataclasses
import datetime
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.data.identity import fingerprint, same_model
from jaxspec.data.rows import read_examples, read_sequences, stored_sequences
from jaxspec.models.target import Target
from tests.data.test_conversations import PLAIN, TALK, shown, tokenizer
from tests.drafters import cases
from tests.training import tiny

DAY = datetime.date(2020, 1, 2)  # parquet has such values
SHIPPED = Path(__file__).parents[2] / "examples/shipped_drafter/data-1.jsonl.xz"


def write(path, rows, **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), **options)
    return path


def read(path, target, **options):
    return read_examples(path, target, **dict(max_length=16, min_supervised=1) | options)


def test_tokens_and_ranges_come_back():
    example = Example(np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 1, 1, 0, 1], bool))
    raw = json.loads(json.dumps(stored_sequences([example])))
    assert raw == [{"token_ids": [5, 6, 7, 8, 9], "answers": [[1, 3], [4, 5]]}]
    (found,) = read_sequences(raw, 10)
    np.testing.assert_array_equal(found.tokens, example.tokens)
    np.testing.assert_array_equal(found.supervised, example.supervised)


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        (
            {"token_ids": [1, 24], "answers": []},
            "token id 24; the target's vocabulary is 0 … 23",
        ),
        ({"token_ids": [1, True], "answers": []}, "not a list of token ids"),
        ({"token_ids": "12", "answers": []}, "not a list of token ids"),
        ({"token_ids": [1, 2], "answers": [[1, 3]]}, "ascending ranges .* within the 2 ids"),
        ({"token_ids": [1, 2], "answers": [[1, 2], [0, 1]]}, "ascending ranges"),
        ({"token_ids": [1, 2], "answers": [[0, 1.5]]}, "ascending ranges"),
        ({"token_ids": [1, 2]}, "'answers' has null"),
        ({"token_ids": [1], "answers": [DAY]}, "'answers' has \"2020-01-02\""),
        (DAY, "'sequences' is \\[\"2020-01-02\"\\]; expected objects"),
    ],
)
def test_damaged_sequences_are_named(sequence, error):
    with pytest.raises(ValueError, match=error):
        read_sequences([sequence], 24)


def test_stored_tokens_are_trained_on_whatever_the_text(target, tmp_path):
    """The template cannot render this text, and another tokenisation of it was sampled."""
    row = {
        "conversations": [*TALK[:1], {"role": "assistant", "content": "<end> c"}],
        "finished": False,
        "sequences": [{"token_ids": [3, 3, 7, 7, 7], "answers": [[2, 5]]}],
        "metadata": {"target": "elsewhere/tiny-2", "fingerprint": fingerprint(target)},
    }
    (example,) = read(write(tmp_path / "data.jsonl", [row]), target)
    assert example.tokens.tolist() == [3, 3, 7, 7, 7]
    assert example.supervised.tolist() == [False, False, True, True, True]


def test_rows_that_cannot_be_used_are_skipped_counted_and_shown(target, tmp_path, capsys):
    rows = [
        {"conversations": TALK[:2]},
        "{",
        {"conversations": [TALK[0], {"role": "assistant", "content": None}]},
        {"conversations": [TALK[0], {"role": "assistant", "content": "a <end> b"}]},
        {"conversations": TALK[:1]},
        {"conversations": TALK[:2], "finished": "yes"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    ]
    first, second = read(write(tmp_path / "data.jsonl", rows), target)
    assert shown(target.tokenizer, second) == "user q <end> nl assistant R <END>"
    told = capsys.readouterr().err
    assert "2 sequences of 7 conversations; 5 skipped:" in told
    assert "data.jsonl, line 2: not JSON" in told
    assert "data.jsonl, line 3: message 1: the content is null" in told
    assert "data.jsonl, line 4: message 1: the chat template renders" in told
    assert told.endswith("and 2 more\n")


def test_sequences_are_cut_and_short_ones_left_out(target, tmp_path, capsys):
    long = {"role": "assistant", "content": " ".join("w" * 20)}
    rows = [{"conversations": TALK[:2]}, {"conversations": [TALK[0], long]}]
    path = write(tmp_path / "data.jsonl", rows)
    (example,) = read(path, target, min_supervised=5)
    assert (len(example), example.supervised.sum()) == (16, 10)
    assert capsys.readouterr().err.endswith(
        "data.jsonl: 1 sequences of 2 conversations; 1 dropped, with fewer than 5 answer "
        "tokens; 1 truncated to 16 tokens\n"
    )
    message = (
        "none of 2 conversations can be trained on; 2 sequences have fewer than 90 "
        r"answer tokens within 16 tokens \(see --max-length, --min-supervised\)"
    )
    with pytest.raises(ValueError, match=message):
        read(path, target, min_supervised=90)


@pytest.mark.parametrize("name", ["max_length", "min_supervised"])
def test_lengths_are_at_least_1(target, tmp_path, name):
    path = write(tmp_path / "data.jsonl", [{"conversations": TALK[:2]}])
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        read(path, target, **{name: 0})


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_empty_files(target, tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="data.jsonl: no conversations; expected one JSON"):
        read(path, target)


def test_a_file_of_other_rows_says_what_the_first_is(target, tmp_path):
    path = write(tmp_path / "data.jsonl", [{"turns": ["x"]}])
    with pytest.raises(ValueError, match=r"1 skipped:\n.*line 1: expected .*keys \['turns'\]"):
        read(path, target)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_marks_and_windows_lines(target, tmp_path, encoding):
    path = tmp_path / "data.jsonl"
    line = json.dumps({"conversations": TALK[:2]})
    path.write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
    assert len(read(path, target)) == 2


def test_several_files(target, tmp_path):
    paths = [write(tmp_path / name, [{"conversations": TALK[:2]}]) for name in ("a", "b")]
    assert len(read(paths, target)) == 2


@pytest.mark.parametrize(
    "metadata",
    [{"target": "other-1b"}, {"target": "tiny", "fingerprint": "0123"}],
    ids=["name", "fingerprint"],
)
def test_rows_of_another_target_are_refused_or_rendered(target, tmp_path, metadata):
    row = {
        "conversations": TALK[:2],
        "sequences": [{"token_ids": [1, 2], "answers": [[1, 2]]}],
        "metadata": metadata,
    }
    path = write(tmp_path / "data.jsonl", [row])
    message = f"line 1: '{metadata['target']}' wrote this row, but the target is 'tiny'"
    with pytest.raises(ValueError, match=message + ".*--any-target"):
        read(path, target)
    (example,) = read(path, target, any_target=True)
    assert shown(target.tokenizer, example) == "user a b <end> nl assistant C D <END>"


def test_a_target_that_was_moved_cast_or_turned_is_the_same():
    import jax
    import jax.numpy as jnp

    from jaxspec.models.params import outputs_first

    target = tiny.target()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), target.params)
    for turned in (lambda params: params, outputs_first):
        moved = Target("elsewhere", target.config, turned(half))
        assert fingerprint(moved) == fingerprint(target)
    tuned = jax.tree.map(lambda x: x * 1.01, target.params)
    assert fingerprint(Target("tiny", target.config, tuned)) != fingerprint(target)


@pytest.mark.parametrize(
    "written, same",
    [
        ({"target": "Qwen/Qwen3-8B", "fingerprint": "0123"}, True),
        ({"target": "qwen3-4b", "fingerprint": "0123"}, True),
        ({"target": "qwen3-8b", "fingerprint": "4567"}, False),
        ({"target": "Qwen/Qwen3-8B"}, True),
        ({"target": "qwen3-4b"}, False),
        ({}, True),
    ],
)
def test_a_model_is_known_by_its_weights_else_by_the_end_of_its_name(written, same):
    assert same_model(written, "/models/qwen3-8b", "0123") == same


def test_a_calibrated_drafter_is_another():
    drafter = cases.loaded("dspark", TreeConfig())
    params = dataclasses.replace(drafter.params, temperatures=np.float32([1, 1, 1, 1.1]))
    calibrated = dataclasses.replace(drafter, params=params)
    assert fingerprint(calibrated) != fingerprint(drafter) == fingerprint(drafter)


THINKING = PLAIN.replace(
    "assistant {% endif %}",
    "assistant {{ '' if enable_thinking is not defined or enable_thinking else 'none' }}"
    "{% endif %}",
).replace(
    "{{ m.content }}",
    "{{ '' if m.role == 'user' or 'think' in m.content else 'none' }} {{ m.content }}",
)


def test_answers_without_thoughts_are_read_as_of_that_mode(target, tmp_path):
    """People's data does not say how an answer was written; a row of ours does."""
    plain = tiny.target()
    target = Target("tiny", plain.config, plain.params, tokenizer(THINKING))
    thought = [TALK[0], {"role": "assistant", "content": "think c"}]
    path = write(tmp_path / "data.jsonl", [{"messages": TALK[:2]}, {"messages": thought}])
    first, second = read(path, target)
    assert shown(target.tokenizer, first) == "user a b <end> nl assistant none C D <END>"
    assert shown(target.tokenizer, second) == "user a b <end> nl assistant THINK C <END>"
    assert (first.thinking, second.thinking) == (False, None)
    stored = {"token_ids": [1, 2, 3], "answers": [[1, 3]]}
    write(path, [{"messages": TALK[:2], "sequences": [stored], "thinking": True}])
    (ours,) = read(path, target)
    assert ours.thinking is True
    write(path, [{"messages": TALK[:2], "thinking": None}])
    with pytest.raises(ValueError, match="1 skipped.*\n.*'none c d' for 'c d'"):
        read(path, target)


@pytest.mark.real
def test_the_shipped_drafters_data_is_readable(smollm2, tmp_path, capsys):
    with lzma.open(SHIPPED, "rt", encoding="utf-8") as stream:
        lines = [next(stream) for _ in range(200)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(lines))
    target = Target("smollm2-135m", smollm2.config, smollm2.params, smollm2.tokenizer)
    examples = read(path, target, max_length=384, min_supervised=14)
    assert len(examples) > 150
