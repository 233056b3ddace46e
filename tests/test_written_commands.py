"""The commands of the documents, of `--help` and of the shell scripts are ones that run.

Nothing is computed: each command is parsed, and what it says of drafters is read as the command
would read it, for the small target.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from jaxspec import cli
from jaxspec.checkpoints import read_config
from jaxspec.cli.bench import Bench
from jaxspec.cli.evaluate import Evaluate
from jaxspec.cli.train import Train
from jaxspec.evaluation.contenders import Contender

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "shipped_drafter"
COMMAND = re.compile(r"(?:^|\s)(?:python (?:-m )?)?(jaxspec [a-z].*|[\w/]+\.py( .*|$))")
LEFT_OUT = "--…"  # dots outside quotes: options that the text does not discuss


class Parsed(BaseException):
    """Raised in place of running a script whose options were understood."""


def commands_of(text: str) -> list[str]:
    """The commands in blocks of code, and those with options that a sentence quotes."""
    text = re.sub(r"\\+\n\s*", " ", text)
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S))
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = [line for line in rest.splitlines() if line.startswith("  ")]
    quoted = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    lines = [line for line in (*blocks.splitlines(), *indented) if "`" not in line]
    lines += [span for span in quoted if " --" in span]
    return [found[1] for found in map(COMMAND.search, lines) if found]


def words_of(command: str) -> list[str]:
    """Its words, without comments; the documents' drafter is the shipped one."""
    command = re.sub(r" …(?= |$)", f" {LEFT_OUT}", command)
    words = shlex.split(command.removesuffix("&"), comments=True)
    return ["shipped" if word == "run/drafter" else word for word in words]


def documented() -> list[tuple[str, str]]:
    """(where, command) of every document, example script and command's help."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "examples", "checkpoints"):
        documents += sorted((ROOT / folder).rglob("*.md"))
    scripts = sorted((ROOT / "examples").rglob("*.py"))
    job = ROOT / "examples" / "cluster" / "slurm.sh"
    texts = {path: path.read_text() for path in documents}
    texts[job] = f"```\n{job.read_text()}```"
    texts |= {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in scripts}
    found = [
        (str(p.relative_to(ROOT)), c) for p, text in texts.items() for c in commands_of(text)
    ]
    for name, command in cli.COMMANDS.items():
        found += [(f"{name} --help", c) for c in commands_of(inspect.getdoc(command))]
    return found


@functools.cache
def small_target():
    return read_config("smollm2-135m")


def check_jaxspec(words: list[str]) -> None:
    """The command line takes the words, and their drafters can be made for the small target."""
    name, *options = words
    assert name in cli.COMMANDS
    if "--help" in options:
        return
    kind = cli.COMMANDS[name]
    partly = "--config" in options or LEFT_OUT in options
    options = [word for word in options if word != LEFT_OUT]
    if partly:
        needed = [x for x in dataclasses.fields(kind) if x.default is dataclasses.MISSING]
        flags = [f"--{field.name.replace('_', '-')}" for field in needed]
        options += [word for flag in flags if flag not in options for word in (flag, "x=y")]
    command = tyro.cli(kind, args=options)
    if isinstance(command, Train) and command.config is None:
        command._config(small_target())
    if isinstance(command, Evaluate):
        [Contender.parse(x) for x in command.decoders]
    if isinstance(command, Bench):
        [Contender.parse(f"x={x}") for x in command.drafters]


def check_script(words: list[str], monkeypatch) -> None:
    """The script takes its options; it is left before it does anything."""

    def then_leave(parse):
        @functools.wraps(parse)
        def parsed(*args, **options):
            raise Parsed(parse(*args, **options))

        return parsed

    (path,) = ROOT.glob(f"examples/**/{words[0].removeprefix('examples/')}")
    parser = argparse.ArgumentParser
    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(sys, "argv", words)
        patched.syspath_prepend(str(path.parent))
        patched.setattr(tyro, "cli", then_leave(tyro.cli))
        patched.setattr(parser, "parse_args", then_leave(parser.parse_args))
        runpy.run_path(str(path), run_name="__main__")


def check(words: list[str], monkeypatch) -> None:
    if words[0] == "jaxspec":
        check_jaxspec(words[1:])
    else:
        check_script(words, monkeypatch)


@pytest.mark.parametrize("where, command", documented())
def test_a_documented_command(where, command, monkeypatch):
    check(words_of(command), monkeypatch)


def test_documents_are_searched():
    places = {where for where, _ in documented()}
    assert {"README.md", "docs/training.md", "docs/h100.md", "train --help"} <= places
    assert len(documented()) > 60


def recorded(
    script: str, tmp_path: Path, *arguments: str, **environment: str
) -> list[list[str]]:
    """The Python commands that a shell script runs, named from examples/shipped_drafter."""
    log = tmp_path / "commands"
    python = tmp_path / "python"
    writes = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{writes}" {log} "$@"\n')
    python.chmod(0o755)
    environment |= dict(PYTHON=str(python), PATH="/usr/bin:/bin")
    done = subprocess.run([RECIPES / script, *arguments], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [words[1:] if words[0] == "-m" else words for words in lines]


@pytest.mark.parametrize("environment", [{}, dict(INITIAL="shipped", CLOCK="1")])
def test_the_recipe(tmp_path, monkeypatch, environment):
    kinds = [
        "dflash",
        "jetspec",
        "markov",
        "rnn",
        "treeflash",
        "ours",
        "dflash2",
        "dflash2-data",
    ]
    kinds += ["eagle3", "dflash-tv", "jetspec-tv", "markov-tv", "rnn-tv", "treeflash-tv"]
    kinds = ["markov", "markov-tv"] if environment else kinds
    commands = recorded("recipe.sh", tmp_path, str(tmp_path), *kinds, **environment)
    assert sum(words[1] == "train" for words in commands) == len(kinds)
    for words in commands:
        check(words, monkeypatch)


def test_the_curves(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("{}\n")
    commands = recorded("curves.sh", tmp_path, str(tmp_path))
    assert sum(words[1] == "train" for words in commands) == 10
    for words in commands:
        check(words, monkeypatch)


def test_the_evaluation_of_the_shipped_drafter(tmp_path, monkeypatch):
    commands = recorded("evaluate.sh", tmp_path, "shipped", str(tmp_path / "results.jsonl"))
    assert [words[1] for words in commands] == ["evaluate", "evaluate"]
    for words in commands:
        check(words, monkeypatch)


def test_the_campaign_on_a_gpu(tmp_path, monkeypatch):
    stages = ["check", "tiles", "steps", "replay", "small", "mosaic", "peer", "flags"]
    commands = recorded("../gpu/campaign.sh", tmp_path, *stages, OUT=str(tmp_path), GOLDEN="x")
    assert len(commands) == 11
    for words in commands:
        check(words, monkeypatch)
