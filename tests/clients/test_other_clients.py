"""litellm and lm-evaluation-harness, unchanged, against a server of a tiny target.

They run in `.venv-clients`, which `make gates` makes, or in the environment of the Python that
$CLIENTS_PYTHON names.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jaxspec
from jaxspec.serving.connections import Limits
from tests.checkpoints.writing import write_tokenizer
from tests.serving import servers, structured

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", ROOT / ".venv-clients/bin/python"))
pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}: run make gates"),
]

QUESTIONS = [
    {"question": "the sky is", "choices": ["blue", "made of tools"], "answer": 0},
    {"question": "two and two", "choices": ["make five", "4"], "answer": 1},
]
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ANSWER = """
task: answer
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["!!"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def url():
    room = dict(room=900, chunk=32)
    with servers.serve(limits=Limits(), target=structured.target(), **room) as (port, _):
        yield f"http://127.0.0.1:{port}/v1"


def run(*arguments, **environment) -> str:
    alone = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [PYTHON, *map(str, arguments)],
        env=os.environ | alone | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_litellm(url):
    found = json.loads(run(Path(__file__).with_name("with_litellm.py"), url).splitlines()[-1])
    assert found["whole"] == found["streamed"] and 0 < found["tokens"] <= 150
    assert found["schema"]["city"] in ("Rome", "Oslo")
    name, arguments = found["call"]
    assert (name, found["finish"]) == ("weather", "tool_calls")
    assert arguments["city"] in ("Rome", "Oslo")
    (plain,) = jaxspec.generate(structured.target(), ["hello"], raw=True, max_new_tokens=8)
    assert found["text"] == plain.text


@pytest.fixture(scope="module")
def evaluated(url, tmp_path_factory):
    """What lm-evaluation-harness asked and was answered, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tokenizer(folder / "tokenizer", structured.tokenizer())
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    data = {"data_files": {"test": str(folder / "questions.jsonl")}}
    for name, task in (("choice", CHOICE), ("answer", ANSWER)):
        own = f"dataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(task.lstrip() + own)
    model = dict(
        model="tiny",
        base_url=f"{url}/completions",
        tokenizer=folder / "tokenizer",
        max_length=900,
    )
    run(
        *("-m", "lm_eval", "--model", "local-completions", "--tasks", "choice,answer"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in model.items())),
        *("--include_path", folder, "--output_path", folder / "out", "--log_samples"),
        HF_DATASETS_CACHE=str(folder / "datasets"),
        HF_HOME=str(folder / "home"),
    )

    def samples(task):
        (path,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        found = map(json.loads, path.read_text().splitlines())
        return sorted(found, key=lambda sample: sample["doc_id"])

    return {task: samples(task) for task in ("choice", "answer")}


def test_log_likelihoods_of_lm_evaluation_harness(evaluated):
    target = structured.target()
    for sample, asked in zip(evaluated["choice"], QUESTIONS, strict=True):
        found = [float(answers[0][0]) for answers in sample["resps"]]
        for likelihood, choice in zip(found, asked["choices"], strict=True):
            before = len(target.tokenizer.encode(asked["question"]))
            ids = target.tokenizer.encode(f"{asked['question']} {choice}")
            (score,) = jaxspec.score(target, ids)
            assert likelihood == pytest.approx(score.log_probs[before - 1 :].sum(), abs=1e-3)
        assert sample["acc"] == float(np.argmax(found) == asked["answer"])


def test_generations_of_lm_evaluation_harness(evaluated):
    for sample, asked in zip(evaluated["answer"], QUESTIONS, strict=True):
        ((found,),) = sample["resps"]
        (plain,) = jaxspec.generate(
            structured.target(), [asked["question"]], raw=True, max_new_tokens=12
        )
        assert found == plain.text.split("!!")[0]
