"""`serve` and `calibrate` as commands."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from jaxspec.checkpoints.drafters import load_drafter, save_drafter, save_temperatures
from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.cli.serve import Serve
from jaxspec.config import TreeConfig
from jaxspec.drafters.joined import with_survival
from jaxspec.serving.server import bind, listen
from tests import tiny
from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.drafters import cases
from tests.serving import engines


@pytest.fixture
def folder(tmp_path):
    save_drafter(tmp_path / "drafter", cases.loaded("dspark", TreeConfig()))
    return tmp_path / "drafter"


def load(folder):
    return load_drafter(folder, tiny.target(), TreeConfig("chain", size=5))


def test_temperatures_are_stored_with_the_drafter(folder, tmp_path):
    assert load(folder).params.temperatures == 1.0
    save_temperatures(folder, [0.5, 1.0, 2.0, 3.0])
    loaded = load(folder)
    assert loaded.params.temperatures.tolist() == [0.5, 1.0, 2.0, 3.0]
    save_drafter(tmp_path / "again", loaded)
    assert load(tmp_path / "again").params.temperatures.tolist() == [0.5, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, np.inf]])
def test_temperatures_that_do_not_fit_are_refused(folder, values):
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="expected 4 positive numbers"):
        save_temperatures(folder, values)
    assert (folder / "config.json").read_text() == before


def test_confidence_scores_chains_where_there_is_a_head(folder):
    loaded = load(folder)
    for kind in ("chain", "path_conditioned"):
        drafter = dataclasses.replace(loaded.drafter, tree=TreeConfig(kind, 8))
        scored = with_survival(dataclasses.replace(loaded, drafter=drafter))
        assert scored.drafter.survival_scores == (kind == "chain")
    for name in ("lookup", "itself"):
        assert with_survival(engines.DRAFTERS[name]) is engines.DRAFTERS[name]


def never(*_, **__):
    raise AssertionError("nothing may be loaded or computed before this is refused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "70000"], "--port is 70000"),
        (["serve", "--body-bytes", "0"], "Limits.body_bytes is 0"),
        (["serve", "--api-key", ""], "the API key must be ASCII and not empty"),
        (["serve", "--drain-seconds", "-1"], "--drain-seconds is -1.0"),
        (["serve", "--drain-seconds", "inf"], "--drain-seconds is inf"),
        (["serve", "--slots", "0"], "EngineConfig.slots is 0; expected at least 1"),
        (["serve", "--prefix-cache-mb", "-1"], "EngineConfig.prefix_cache_mb is -1.0"),
        (["serve", "--curve", "/nowhere/curve.json"], "--curve /nowhere/curve.json cannot be"),
        (["serve", "--curve", f"{__file__}/curve.json"], "expected a path in a folder that"),
        (
            ["calibrate", "--drafter", "shipped", "--prompts", "/nowhere"],
            "cannot read /nowhere",
        ),
        (["serve", "--budget", "0"], "--budget is 0; expected at least 1"),
        (["serve", "--threshold", "-1"], "--threshold is -1.0; expected a probability, 0 … 1"),
        (["serve", "--rejection"], "--rejection needs a trained drafter without lookup"),
        (["serve", "--target", "x", "--drafter", "nowhere"], "there is no drafter 'nowhere'"),
    ],
)
def test_bad_options(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("jaxspec.load_target", never)
    assert main(arguments) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_an_address_in_use_is_refused_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--target", "nothing"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert f"cannot serve on 127.0.0.1, port {port}" in error and error.count("\n") == 1


def test_of_two_bound_sockets_only_the_first_can_listen():
    """Both bind while neither listens, as two servers do that compile at the same time."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, bind("127.0.0.1", port) as second:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        listen(first)
        with pytest.raises(ValueError, match=f"cannot serve on 127.0.0.1, port {port}: Addr"):
            listen(second)
        with pytest.raises(ValueError, match="cannot serve"):
            bind("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_a_curve_file_is_checked_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "curve.json").write_text("{}")
    assert main(["serve", "--curve", str(tmp_path / "curve.json")]) == BAD_INPUT
    assert "is not a step-time curve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "key", "warned"),
    [
        (["--host", "0.0.0.0"], None, True),
        (["--host", "0.0.0.0", "--api-key", "secret"], None, False),
        (["--host", "0.0.0.0"], "secret", False),
        ([], None, False),
    ],
)
def test_others_without_a_key_are_warned_of(arguments, key, warned, monkeypatch, capsys):
    monkeypatch.delenv("JAXSPEC_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("JAXSPEC_API_KEY", key)
    assert main(["serve", "--port", "0", "--target", "nothing", *arguments]) == BAD_INPUT
    said = "warning: --host 0.0.0.0 may be reached by others" in capsys.readouterr().err
    assert said == warned


def test_a_room_beyond_the_targets_positions_is_refused_before_weights_are_loaded(
    tmp_path, monkeypatch, capsys
):
    target = write_folder(tmp_path / "target", DENSE, random_tensors(DENSE))
    monkeypatch.setattr("jaxspec.load_target", never)
    assert main(["serve", "--port", "0", "--target", str(target), "--room", "65"]) == BAD_INPUT
    assert "room is 65 tokens per request; the target has 64" in capsys.readouterr().err


def test_a_target_without_a_tokenizer_is_refused_before_anything_is_compiled(
    tmp_path, monkeypatch, capsys
):
    target = write_folder(tmp_path / "target", DENSE, random_tensors(DENSE))
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    monkeypatch.setattr("jaxspec.serving.engine.Engine", never)
    arguments = ["--target", str(target), "--port", "0", "--room", "64"]
    assert main(["serve", *arguments]) == BAD_INPUT
    assert "has no tokenizer; a server needs one" in capsys.readouterr().err


def test_a_drafter_without_confidence_is_refused_before_answers_are_recorded(
    tmp_path, monkeypatch, capsys
):
    target = write_folder(tmp_path / "target", DENSE, random_tensors(DENSE))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    monkeypatch.setattr("jaxspec.evaluation.walk.record", never)
    arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--drafter", "ngram"]
    assert main(["calibrate", "--target", str(target), *arguments]) == BAD_INPUT
    assert "--drafter ngram has no confidence head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "given", "names"),
    [
        ("Qwen/Qwen3-8B", (), ("Qwen/Qwen3-8B", "Qwen3-8B")),
        ("smollm2-135m", (), ("smollm2-135m",)),
        ("Qwen/Qwen3-8B", ("small", "default"), ("small", "default")),
    ],
)
def test_names_of_the_model(target, given, names):
    assert Serve(served_model_name=given)._names(target) == names


def test_a_folders_path_is_not_told(tmp_path):
    names = Serve()._names(str(tmp_path))
    assert names == (tmp_path.name, str(tmp_path))


@pytest.mark.gate
def test_the_real_small_target_is_served(smollm2_path, tmp_path):
    """From a shell: compile, answer, and end on a signal."""
    arguments = ["--slots", "1", "--room", "128", "--budget", "4", "--max-nodes", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxspec", "serve", "--port", "8765", *arguments,
         "--target", str(smollm2_path), "--curve", str(tmp_path / "curve.json")],
        env=os.environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("serving"):
                break
        body = {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 16}
        request = urllib.request.Request(
            "http://127.0.0.1:8765/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(50):
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=120))
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
            except urllib.error.URLError:
                time.sleep(0.1)
        assert answer["usage"]["completion_tokens"] >= 1
        assert answer["choices"][0]["message"]["content"]
        assert (tmp_path / "curve.json").exists()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
