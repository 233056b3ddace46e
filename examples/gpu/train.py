"""Trains a drafter for the small target within some minutes: more data, then more steps.

    python examples/gpu/train.py --out out/gpu/train --seconds 480
    python examples/gpu/train.py --out out/gpu/more --initial out/gpu/train/run/drafter

For half of the time the target answers the questions of the shipped drafter's data again, with
another seed; then a drafter, by default the shipped one, is trained on the answers. Both are
commands that the script prints and that can be run by hand. Stopped, or out of time,
the same command goes on. At the end `OUT/parts` has the drafter in files of less than 16 MB
with their SHA-256: `cat OUT/parts/model.safetensors.* > model.safetensors` joins the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from timing import ROOT

QUESTIONS = sorted((ROOT / "examples" / "shipped_drafter").glob("data-*.jsonl.xz"))
PART = 15 * 2**20  # bytes
INTERRUPTED = 130  # exit code of a command that was asked to stop


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()

    def command(*words, until: float = math.inf) -> int:
        """Runs jaxspec, and asks it to stop once so many seconds have passed in all."""
        line = [sys.executable, "-m", "jaxspec", *map(str, words)]
        print("+", " ".join(line[1:]), file=sys.stderr, flush=True)
        with subprocess.Popen(line) as running:
            try:
                return running.wait(max(1.0, start + until - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGINT)
                return running.wait()
            except KeyboardInterrupt:  # it got the signal, too
                sys.exit(running.wait())

    data, run, whole = options.out / "data.jsonl", options.out / "run", options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    if not run.exists():  # else its data is complete
        made = regenerate(options, data)
        status = command(*made, until=whole * options.data_share)
        if status not in (0, 1, INTERRUPTED):  # 1: some conversations do not fit
            return status
    status = command(*training(options, data, run), until=whole)
    if status == 0:
        split(run / "drafter", options.out / "parts")
    return status


def regenerate(options, data: Path) -> list:
    """Words of the command that makes the data."""
    return [
        *("regenerate", "--prompts", *options.prompts, "--output", data),
        *("--target", options.target, "--dtype", "bfloat16", "--rows", options.rows),
        *("--max-new-tokens", 208, "--max-length", 382),
        *("--temperature", 0.7, "--sampled", options.sampled, "--seed", options.seed),
    ]


def training(options, data: Path, run: Path) -> list:
    """Words of the command that trains, by KL as the shipped drafter was."""
    return [
        *("train", "--data", data, "--output", run, "--initial", options.initial),
        *("--target", options.target, "--dtype", "bfloat16", "--max-length", 384),
        *("--kl", 1, "--cross-entropy", 0, "--total-variation", 0),
        *("--weighting", "exponential", "--learning-rate", options.rate),
        *("--batch-size", options.batch, "--micro-batch", options.batch, "--anchors", 24),
        *("--steps", options.steps, "--checkpoint-every", 500, "--seed", options.seed),
    ]


def split(drafter: Path, parts: Path) -> None:
    """Copies a drafter with its weights cut into parts, beside a list of their SHA-256."""
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    sums = []
    for file in sorted(path for path in drafter.iterdir() if path.is_file()):
        content = file.read_bytes()
        count = -(-len(content) // PART)
        for i in range(count):
            name = file.name if count == 1 else f"{file.name}.{i:02}"
            part = content[i * PART : (i + 1) * PART]
            (parts / name).write_bytes(part)
            sums.append(f"{hashlib.sha256(part).hexdigest()}  {name}\n")
    (parts / "SHA256SUMS").write_text("".join(sums))


def parse(arguments: list[str] | None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu/train"))
    parser.add_argument(
        "--seconds", type=float, default=480, help="for data and steps together"
    )
    parser.add_argument(
        "--data-share", type=float, default=0.5, help="of the seconds, for data"
    )
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--prompts", nargs="+", default=QUESTIONS, help="as for regenerate")
    parser.add_argument("--initial", default="shipped", help="drafter to go on from")
    parser.add_argument("--sampled", type=float, default=0.5, help="share of sampled answers")
    parser.add_argument("--rows", type=int, default=512, help="answered together")
    parser.add_argument("--batch", type=int, default=64, help="rows per step")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if not 0 < options.data_share < 1:
        parser.error(f"--data-share {options.data_share}: expected more than 0 and less than 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
