"""How a command ends: one line and an exit code for whatever a user can cause."""

import dataclasses
import os
import subprocess
import sys

import pytest

from jaxspec.cli import COMMANDS, exits, main
from jaxspec.interrupts import GRACE

CODES = dict(
    DONE=0, FAULT=1, BAD_INPUT=2, FAILED=3, INTERRUPTED=130, BROKEN_PIPE=141
)  # scripts rely on them


def raising(error):
    def command():
        raise error

    return command


def test_codes():
    assert {name: getattr(exits, name) for name in CODES} == CODES


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("a.json: bad"), 2, "error: a.json: bad"),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (OSError(28, "No space left on device", "/x"), 3, "error: [Errno 28] No space left on"),
        (PermissionError(13, "Permission denied", "/x"), 3, "error: [Errno 13] Permission den"),
        (MemoryError(), 3, "error: the machine is out of memory; --debug shows where"),
        (TypeError("can only join\nmore"), 3, "error: TypeError: can only join; --debug shows"),
        (AttributeError(), 3, "error: AttributeError: no reason given; --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_is_one_line_and_its_code(capsys, error, code, line):
    assert exits.run(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


@dataclasses.dataclass(frozen=True)
class Root:
    """Options of a script."""

    of: float


def root(options):
    if options.of < 0:
        raise ValueError(f"--of is {options.of}; expected at least 0")
    print(options.of**0.5)
    return None if options.of else exits.FAULT


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--of", "4"], exits.DONE, "2.0\n"),
        (["--of", "0"], exits.FAULT, "0.0\n"),
        (["--of=-4"], exits.BAD_INPUT, "error: --of is -4.0; expected at least 0\n"),
        (["--of=-4", "--debug"], exits.BAD_INPUT, "Traceback"),
        (["--on", "4"], 2, "Unrecognized options"),
        (["--help"], 0, "Square roots."),
    ],
)
def test_a_script_ends_like_a_command(monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(sys, "argv", ["root.py", *words])
    with pytest.raises(SystemExit) as ended:
        exits.script(root, Root, "Square roots.")
    assert ended.value.code == code
    assert said in "".join(capsys.readouterr())


def test_debug_shows_where(capsys, monkeypatch):
    monkeypatch.setattr(
        "jaxspec.cli.overlap.OverlapCheck.run", lambda _: raising(ValueError("x"))()
    )
    words = ["overlap", "--data", "a", "--prompts", "b"]
    assert main(words) == 2 and "Traceback" not in capsys.readouterr().err
    assert main([*words, "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in raising" not in err.splitlines()[0]
    assert err.endswith("error: x\n")


def test_a_warning_is_one_line(capsys, recwarn):
    def command():
        import warnings

        sys.stderr.write(warnings.formatwarning("careful", UserWarning, "file.py", 3))
        return 0

    assert exits.run(command) == 0
    assert capsys.readouterr().err == "warning: careful\n"


def script(code, *, wait=None, encoding="utf-8", **options):
    """A command of a program of its own; `code` is the body of the function."""
    body = "\n".join(f"    {line}" for line in code.splitlines())
    program = (
        f"from jaxspec.cli import exits\ndef command():\n{body}\n    return 0\n"
        "exits.leave(exits.run(command))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        **options,
    )


def test_nobody_reads_the_output():
    process = script("for i in range(10**6): print(i)")
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk():
    program = "from jaxspec.cli import exits; exits.leave(exits.run(lambda: print('x') or 0))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "encoding, shown", [("utf-8", "é→"), ("latin-1", "é\\u2192"), ("ascii", "\\xe9\\u2192")]
)
def test_output_that_the_encoding_lacks_is_escaped(encoding, shown):
    process = script("print('é→')", encoding=encoding)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, f"{shown}\n".encode(encoding), b"")


# Signals do not end it, as they do not end a compilation.
LONG = "import hashlib; hashlib.pbkdf2_hmac('sha512', b'', b'', 10**8)"


@pytest.mark.parametrize(
    "code, code_after",
    [
        ("import time; print('on', flush=True); time.sleep(60)", 130),
        (f"print('on', flush=True); {LONG}", 130),
        (
            "import time; print('on', flush=True)\ntry: time.sleep(60)\n"
            "except KeyboardInterrupt: raise ImportError('a library') from None",
            130,
        ),
    ],
    ids=["in Python", "inside a library that does not return", "turned into another error"],
)
def test_an_interrupt_ends_any_command_within_two_seconds(code, code_after):
    process = script(code)
    assert process.stdout.readline() == b"on\n"
    process.send_signal(2)
    _, err = process.communicate(timeout=2 + 3)  # GRACE, and a busy machine
    assert process.returncode == code_after and err.strip() == b"interrupted"
    assert GRACE < 2


def test_without_a_command_there_is_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: jaxspec [-h] {generate,") and "First steps" in out
    for name, command in COMMANDS.items():
        assert name in out and len(command.__doc__.splitlines()[0]) < 96


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: jaxspec {name} [-h]") and f"jaxspec {name}" in out[40:]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completion(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", shell])
    assert not ended.value.code
    assert "max-new-tokens" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nonsense"], ["generate", "--nonsense"], ["train"]])
def test_words_that_are_none_of_the_commands(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
