"""Exit codes, and errors as one line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import tyro

from jaxspec.interrupts import INTERRUPTED as INTERRUPTED
from jaxspec.interrupts import bounded

DONE = 0
FAULT = 1  # done, and a check found a fault, or something was left out
BAD_INPUT = 2  # a file, an option or a model that cannot be used
FAILED = 3  # the machine (a full disk, no memory) or jaxspec itself
BROKEN_PIPE = 141  # nobody reads the output, as in `| head`: 128 + SIGPIPE

SEE = "--debug shows where it came from"


def run(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command; returns its exit code.

    An error becomes one line on standard error.

    Args:
      debug: print its traceback first.
    """
    raised: list[int] = []
    try:
        with bounded() as raised, _plain_output():
            code = command()
            sys.stdout.flush()  # a full disk raises here
            return code
    except BaseException as error:
        if raised or isinstance(error, KeyboardInterrupt):
            return _end(INTERRUPTED, "interrupted", debug)
        return _explain(error, debug)


def script(main: Callable[[Any], int | None], options: type, description: str) -> NoReturn:
    """Runs a script with the options of its command line; ends the process with its exit code.

    Args:
      main: computes from options; returns the exit code, None for `DONE`.
      options: dataclass of the options; `--debug` is understood besides.
      description: for --help.
    """
    words = [word for word in sys.argv[1:] if word != "--debug"]
    parse = functools.partial(tyro.cli, options, description=description, args=words)
    leave(run(lambda: main(parse()) or DONE, debug="--debug" in sys.argv))


def left_out(reasons: Iterable[str]) -> int:
    """Prints what could not be used to standard error; returns the exit code of a command that
    continues without it."""
    code = DONE
    for reason in reasons:
        print(" ".join(f"left out: {reason}".splitlines()), file=sys.stderr)
        code = FAULT
    return code


def _explain(error: BaseException, debug: bool) -> int:
    """Prints an error as one line; returns its exit code."""
    said = (str(error).strip() or "no reason given").splitlines()[0]
    match error:
        case BrokenPipeError():
            return BROKEN_PIPE
        case ValueError():
            return _end(BAD_INPUT, f"error: {error}", debug)
        case OSError():
            return _end(FAILED, f"error: {error}", debug)
        case MemoryError():
            return _end(FAILED, f"error: the machine is out of memory; {SEE}", debug)
        case Exception():
            return _end(FAILED, f"error: {type(error).__name__}: {said}; {SEE}", debug)
    raise error


def _end(code: int, line: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()  # of the error that is handled
    print(" ".join(line.splitlines()), file=sys.stderr)
    return code


@contextlib.contextmanager
def _plain_output() -> Iterator[None]:
    """Escapes characters that the output's encoding lacks; prints warnings as one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def leave(code: int) -> NoReturn:
    """Ends the process; after an interrupt, without waiting for the devices."""
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and exit with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
