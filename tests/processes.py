"""Processes of their own: the number of devices, and of processes, is fixed when JAX starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def many_devices(count: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    return os.environ | dict(JAX_NUM_CPU_DEVICES=str(count), JAX_PLATFORMS="cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_script(script: str, argument: Any, processes: int) -> list[Any]:
    """What a script prints last, as JSON, in each of some processes with 8 devices together.

    Its arguments are `argument` and, where there are several processes, the address they meet
    at and the process's number.
    """
    where = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(argument)]
            + ([where, str(i)] if processes > 1 else []),
            env=many_devices(8 // processes),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    reports = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        reports.append(json.loads(out.splitlines()[-1]))
    return reports
