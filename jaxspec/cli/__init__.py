"""`python -m jaxspec`: what the library does, from a shell.

Exit codes: 0 done, 1 a check found a fault, 2 bad input (one line on standard error).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from jaxspec.cli.calibrate import Calibrate
from jaxspec.cli.check import Check
from jaxspec.cli.convert import Convert
from jaxspec.cli.evaluate import Evaluate
from jaxspec.cli.generate import Generate
from jaxspec.cli.overlap import OverlapCheck
from jaxspec.cli.plan import Plan
from jaxspec.cli.regenerate import Regenerate
from jaxspec.cli.report import Report
from jaxspec.cli.serve import Serve
from jaxspec.cli.train import Train

FAULT, BAD_INPUT = 1, 2

COMMANDS = {
    "generate": Generate,
    "check": Check,
    "regenerate": Regenerate,
    "train": Train,
    "evaluate": Evaluate,
    "report": Report,
    "calibrate": Calibrate,
    "serve": Serve,
    "overlap": OverlapCheck,
    "convert": Convert,
    "plan": Plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m jaxspec", description=__doc__, args=arguments
    )
    try:
        return command.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
