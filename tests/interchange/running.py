"""Runs `other_programs.py` in its environment: `.venv-interchange`, which `make parity` makes,
or that of the Python that $INTERCHANGE_PYTHON names."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("INTERCHANGE_PYTHON", ROOT / ".venv-interchange/bin/python"))
MARKS = [
    pytest.mark.parity,
    pytest.mark.gate,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}: run make parity"),
]


def run(folder, jobs, **features) -> tuple[dict, dict]:
    """Answers and arrays of logits, by job.

    Args:
      folder: holds the target, and the drafters that are not made there.
      features: outputs of tapped layers [T, .], which jobs name.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    np.savez(folder / "features.npz", **features)
    script = Path(__file__).with_name("other_programs.py")
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([PYTHON, script, folder], check=True, env=environment)
    answers = json.loads((folder / "answers.json").read_text())
    return answers, dict(np.load(folder / "logits.npz"))
