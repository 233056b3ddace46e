"""Lossless speculative decoding, from a shell. First steps:

  jaxspec doctor
  jaxspec generate --prompt "Why is the sky blue?"
  jaxspec serve

`jaxspec COMMAND --help` explains a command; `--debug` anywhere shows an error's traceback;
`jaxspec --tyro-print-completion bash` (or zsh) prints what tab completion needs.

Exit codes: 0 done, 1 a check found a fault or something was left out, 2 bad input, 3 the
machine failed, 130 interrupted, 141 nobody reads the output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Union

import tyro

from jaxspec.cli import exits
from jaxspec.cli.bench import Bench
from jaxspec.cli.calibrate import Calibrate
from jaxspec.cli.check import Check
from jaxspec.cli.convert import Convert
from jaxspec.cli.convert_drafter import ConvertDrafter
from jaxspec.cli.doctor import Doctor
from jaxspec.cli.evaluate import Evaluate
from jaxspec.cli.generate import Generate
from jaxspec.cli.overlap import OverlapCheck
from jaxspec.cli.plan import Plan
from jaxspec.cli.regenerate import Regenerate
from jaxspec.cli.report import Report
from jaxspec.cli.run_config import expanded
from jaxspec.cli.serve import Serve
from jaxspec.cli.train import Train

COMMANDS = {
    "generate": Generate,
    "check": Check,
    "regenerate": Regenerate,
    "train": Train,
    "bench": Bench,
    "evaluate": Evaluate,
    "report": Report,
    "calibrate": Calibrate,
    "serve": Serve,
    "overlap": OverlapCheck,
    "convert": Convert,
    "convert-drafter": ConvertDrafter,
    "plan": Plan,
    "doctor": Doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]

    def command() -> int:
        return _parse(words).run()

    return exits.run(command, debug=debug)


def _parse(words: list[str]):
    """The command with its options; exits with code 2, or 0 after help."""
    if words[0] in COMMANDS:
        command = COMMANDS[words[0]]
        whole = inspect.getdoc(command)  # tyro would leave out the examples
        prog = f"jaxspec {words[0]}"
        words = expanded(command, words[1:])
        return tyro.cli(command, prog=prog, description=whole, args=words)
    # All commands: for the list in --help, tab completion, and unknown commands.
    each = (
        Annotated[
            command, tyro.conf.subcommand(name, description=command.__doc__.splitlines()[0])
        ]
        for name, command in COMMANDS.items()
    )
    return tyro.cli(Union[tuple(each)], prog="jaxspec", description=__doc__, args=words)  # noqa: UP007
