"""Which training texts share something with evaluation prompts."""

import json

import pytest

from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.evaluation.overlap import Index, overlaps, texts_of, words

FORMAT = "\nPlease reason step by step, and put your final answer within \\boxed{}."
STORY = (
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of "
    "babysitting. How much did she earn?"
)
SAID = {"role": "assistant", "content": STORY}
PROMPTS = [
    STORY + FORMAT,
    "A merchant wants to make a choice of purchase between 2 purchase plans." + FORMAT,
    "Ken created a care package to send to his brother, who was away." + FORMAT,
    "Write a function to reverse words.",
]


@pytest.mark.parametrize(
    "text, prompt",
    [
        (STORY + FORMAT, 0),
        (STORY.upper().replace(",", " -"), 0),  # format, case and punctuation do not matter
        ("Tell me: " + STORY + " And then?", 0),
        ("yesterday she just did 50 minutes of babysitting how much did she earn", 0),
        ("yesterday she just did 50 minutes of babysitting how much did he earn", None),
        ("write a function to reverse words", 3),
        ("Please write a function to reverse words of a text.", 3),  # short prompts: all of it
        ("Write a function to reverse lists of words.", None),
        ("What is 3 + 4?" + FORMAT, None),  # what prompts share is their format
        ("", None),
    ],
)
def test_find(text, prompt):
    found = Index(PROMPTS).find(text)
    assert (None if found is None else found[0]) == prompt
    if found:
        assert found[1] in " ".join(words(text))


@pytest.mark.parametrize("ngram", [1, 2, 3, 4, 5, 13])
def test_runs_of_any_length_are_found(ngram):
    run = " ".join(STORY.split()[5 : 5 + ngram])
    (found,) = overlaps([["zero", f"so {run} then"]], [STORY], ngram=ngram)
    assert found.words == " ".join(words(run))


@pytest.mark.parametrize(
    "prompt",
    [
        "小明有五个苹果他又买了三个苹果请问他现在一共有多少个苹果？",
        "みかんを五つ持っています。三つ食べると、残りはいくつでしょうか？",
        "𠮷野家で牛丼を三杯食べました。全部でいくらになりますか？",
    ],
)
def test_texts_without_spaces_are_searched_within(prompt):
    index = Index([prompt, "今日の天気を教えてください。"])
    assert index.find(f"请回答:{prompt}谢谢") is not None
    assert index.find(f"abc{prompt[3:-3]}def") is not None
    assert index.find(prompt[:9] + "。" + prompt[-9:]) is None


def test_overlaps_look_at_every_part():
    texts = [["nothing", "in common"], ["a", STORY]]
    (found,) = overlaps(texts, PROMPTS)
    assert (found.text, found.prompt) == (1, 0)
    assert len(found.words.split()) == 13


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_the_command_names_lines_and_writes_the_clean_ones(tmp_path, capsys):
    good = {"conversations": [{"role": "user", "content": "one line\u2028another"}]}
    bad = {"conversations": [{"from": "human", "value": STORY}]}
    data = write(tmp_path / "data.jsonl", good, bad)
    prompts = write(tmp_path / "prompts.jsonl", *({"turns": [p]} for p in PROMPTS))
    clean = tmp_path / "clean.jsonl"
    arguments = ["overlap", "--data", str(data), "--prompts", str(prompts)]
    assert main([*arguments, "--clean", str(clean)]) == 1
    out = capsys.readouterr().out
    assert "line 2: 'weng earns 12 an hour" in out
    assert "1 of 2 rows overlap with 4 prompts" in out
    assert [texts.row for texts in texts_of(clean, [])] == [good]
    arguments[2] = str(clean)
    assert main(arguments) == 0
    assert main([*arguments, "--clean", str(clean)]) == BAD_INPUT
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How much?", "answer": STORY},
        {"messages": [{"role": "user", "content": "How much?"}, SAID]},
    ],
    ids=["answer", "messages"],
)
def test_answers_of_evaluation_rows_are_no_prompts(tmp_path, capsys, row):
    data = write(tmp_path / "data.jsonl", {"conversations": [SAID]})
    prompts = write(tmp_path / "prompts.jsonl", row)
    assert main(["overlap", "--data", str(data), "--prompts", str(prompts)]) == 0
    assert "0 of 1 rows overlap with 1 prompts\n" in capsys.readouterr().out
    assert main(["overlap", "--data", str(prompts), "--prompts", str(prompts)]) == 1


def test_rows_that_cannot_be_read_are_named_and_the_others_searched(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", {"text": "?"}, {"prompt": STORY})
    prompts = write(
        tmp_path / "prompts.jsonl", {"prompt": "q"}, {"prompt": 1}, {"prompt": STORY}
    )
    clean = tmp_path / "clean.jsonl"
    arguments = [
        "--data",
        str(data),
        "--prompts",
        str(prompts),
        "--clean",
        str(clean),
        "--json",
    ]
    assert main(["overlap", *arguments]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [x["where"] for x in report["overlaps"]] == [f"{data}, line 2"]
    assert [x.partition(": ")[0] for x in report["refused"]] == [
        f"{prompts}, line 2",
        f"{data}, line 1",
    ]
    assert report["sources"][0] == {
        "source": str(data),
        "format": "JSON lines",
        "rows": {"prompts": 1},
    }
    assert err.count("left out: ") == 2
    assert clean.read_text() == ""


@pytest.mark.parametrize(
    "row", ["{", '{"text": "a"}', '{"turns": [1]}', '{"conversations": [1]}']
)
def test_other_rows_are_refused(tmp_path, row):
    path = tmp_path / "data.jsonl"
    path.write_text(row)
    with pytest.raises(ValueError, match="line 1: (expected|not JSON|message 0 is 1)"):
        list(texts_of(path, []))
