"""Timing, compiling and recording of results for these scripts."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# Before a device is used: weights of 32B and their caches need nearly all of a card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp

from jaxspec.planning.floors import Floor

ROOT = Path(__file__).parents[2]
REPEATS = 3
COMPILING = 0.7  # share of the time left that programs compile in; the rest is for timing them
UNSHOWN = ("script", "card", "commit", "kernels", "tried")  # in the file alone


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that every script has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path(f"out/gpu/{name}.jsonl"),
        help="rows, appended; what it has of this card and commit is not measured again",
    )
    made.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="what is not begun after so many is reported as skipped",
    )
    made.add_argument(
        "--threads",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="programs compiled at a time",
    )
    return made


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, **tiny
) -> argparse.Namespace:
    """Parses options; with `--model tiny` those in `tiny` are the defaults, so that a CPU is
    soon done."""
    if parser.parse_known_args(arguments)[0].model == "tiny":
        parser.set_defaults(**tiny)
    return parser.parse_args(arguments)


class Rows:
    """A file of rows, each one JSON line, written as soon as it is known.

    A row has a key (script, card, commit and settings) and results.
    """

    def __init__(
        self,
        script: str,
        options: argparse.Namespace,
        *,
        rates: bool = True,
        on: str | None = None,
    ):
        """Writes the run's header.

        Args:
          rates: measure the device's rates.
          on: the card, if another library than JAX uses it.

        Raises:
          SystemExit: there is no GPU, and the model is not the tiny one.
        """
        if on is None and jax.default_backend() != "gpu" and options.model != "tiny":
            sys.exit(
                f"JAX runs on {card()}; this script expects an NVIDIA GPU. Check `nvidia-smi`, "
                "install JAX for CUDA (`pip install -e '.[cuda]'`), or give `--model tiny`, "
                "which a CPU can run"
            )
        self._start, self._seconds = time.monotonic(), options.seconds
        self._path, self._old = options.out, []
        self.failed = self.skipped = 0
        if self._path.exists():
            self._old = list(map(json.loads, self._path.read_text().splitlines()))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._of_all = dict(script=script, card=on or card(), commit=commit())
        header = dict(
            header=True,
            driver=driver(),
            jax=jax.__version__,
            python=platform.python_version(),
            command=" ".join(["python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]]),
            date=time.strftime("%Y-%m-%d %H:%M"),
        )
        self.rates = measure_rates() if rates else {}
        self._write(self._of_all | header | self.rates)

    @property
    def left(self) -> float:
        """Seconds left of the time budget."""
        return self._seconds - (time.monotonic() - self._start)

    def known(self, **settings) -> dict | None:
        """The row of these settings, if an earlier run measured it."""
        key = self._of_all | settings
        for row in reversed(self._old):
            done = not {"error", "skipped", "header"} & row.keys()
            if done and all(row.get(name) == value for name, value in key.items()):
                return row
        return None

    def measure(
        self, find: Callable[[], dict], *, begun: bool = False, **settings
    ) -> dict | None:
        """Writes the row `settings | find()` and returns it.

        A row that is known is only returned; without time left one is written as skipped,
        unless its work has `begun`, and so is one whose work raises TimeoutError. Any other
        exception is written and printed, and counts as a failure of the script.
        """
        if (row := self.known(**settings)) is not None:
            return row
        row = self._of_all | settings
        try:
            if self.left <= 0 and not begun:
                raise TimeoutError("no time was left")
            row |= find()
        except TimeoutError as error:
            self.skipped += 1
            self._write(row | dict(skipped=str(error)))
            return None
        except Exception as error:  # the next row may work; the exit status tells
            self.failed += 1
            self._write(row | dict(error=f"{type(error).__name__}: {error}"[:2000]))
            return None
        self._write(row)
        return row

    def finish(self) -> int:
        """The script's exit status: 1 where a row failed."""
        if self.failed:
            print(f"{self.failed} rows failed: see 'error' in {self._path}", file=sys.stderr)
        return int(self.failed > 0)

    def _write(self, row: dict) -> None:
        row = row | dict(at=round(time.monotonic() - self._start, 1))
        line = json.dumps(row)
        with self._path.open("a") as file:
            file.write(line + "\n")
        shown = {name: value for name, value in row.items() if name not in UNSHOWN}
        print(json.dumps(shown), flush=True)


def milliseconds(
    run: Callable[[], Any], units: Callable[[], float] | float = 1, repeats: int = REPEATS
) -> dict:
    """The median time of a unit of work, by the host's clock around finished device work.

    Args:
      run: starts the work of one repeat and returns arrays that are ready when it is done;
        enough of it that starting it costs nothing beside it. Called once more to warm up.
      units: units of work of the last run; called outside the timed section.
    """
    jax.block_until_ready(run())
    count = units if callable(units) else lambda: units
    count()
    runs = []
    for _ in range(repeats):
        runs.append(once(run) / count())
    return dict(ms=round(statistics.median(runs), 4), runs=[round(ms, 4) for ms in runs])


def once(run: Callable[[], Any]) -> float:
    """Milliseconds from starting a run to having its arrays."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start)


def compile_all(
    jobs: dict[Any, Callable[[], Any]], *, threads: int, seconds: float = float("inf")
) -> dict[Any, Callable[[], Any]]:
    """Compiles programs in parallel on the host's cores, and waits for them.

    Nothing is timed meanwhile, as XLA autotunes matrix products on the device while compiling.

    Args:
      jobs: by name, a function that compiles a program and returns it.
      seconds: for compiling and timing. Programs that are late after `COMPILING` of it are
        dropped; those that then still compile may slow down what is timed.

    Returns:
      By name, a function that returns the program, or raises what went wrong: TimeoutError
      where it was late.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max(1, threads))
    start = time.monotonic()
    futures = {name: pool.submit(job) for name, job in jobs.items()}
    done, late = concurrent.futures.wait(futures.values(), timeout(COMPILING * seconds))
    pool.shutdown(wait=False, cancel_futures=True)
    took = time.monotonic() - start
    print(f"compiled {len(done)} programs in {took:.1f} s, {len(late)} late", file=sys.stderr)
    return {name: _finished(future) for name, future in futures.items()}


def timeout(seconds: float) -> float | None:
    """Seconds as a timeout of `concurrent.futures`, where None is no limit."""
    return None if seconds == float("inf") else max(0.0, seconds)


def _finished(future):
    def result():
        if not future.done() or future.cancelled():
            raise TimeoutError("the time was over before it was compiled")
        return future.result()

    return result


def leave(status: int) -> NoReturn:
    """Ends the process at once: an ordinary exit would wait for threads that still work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def measure_rates() -> dict:
    """This device's rates: of a copy, in bytes read and written, and of a bfloat16 product."""
    gpu = jax.default_backend() == "gpu"
    size, width = (2**30, 8192) if gpu else (2**22, 256)
    steps = 10
    start = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    copy = milliseconds(lambda: _copies(start, steps), steps)["ms"]
    square = jax.random.normal(jax.random.key(1), (width, width), jnp.bfloat16)
    product = milliseconds(lambda: _products(square, steps), steps)["ms"]
    return dict(
        copy_gb_s=float(f"{2 * start.nbytes / copy / 1e6:.4g}"),
        product_tflop_s=float(f"{2 * width**3 / product / 1e9:.4g}"),
    )


@jax.jit
def _copies(x, steps):
    return jax.lax.fori_loop(0, steps, lambda i, x: -x, x)


@jax.jit
def _products(x, steps):
    return jax.lax.fori_loop(0, steps, lambda i, y: 0.01 * (x @ y), x)


def floor_ms(floor: Floor, rates: dict) -> float:
    """A floor in milliseconds, at measured rates."""
    reading = floor.bytes / rates["copy_gb_s"] / 1e6
    computing = floor.flops / rates["product_tflop_s"] / 1e9
    return max(reading, computing)


def card() -> str:
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else f"{platform.machine()} CPU"


def driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """Commit of the working tree; $JAXSPEC_COMMIT in a copy without its repository."""
    given = os.environ.get("JAXSPEC_COMMIT")
    return given or _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])


def _output(command: list[str]) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip().splitlines()[0]
