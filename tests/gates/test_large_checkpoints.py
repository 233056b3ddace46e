"""Checkpoints of published widths: memory while they load, and conversion bit for bit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxspec.checkpoints.huggingface import config_to_json
from jaxspec.models.presets import PRESETS
from tests.checkpoints.writing import write_large_folder

pytestmark = pytest.mark.gate

ROOT = Path(__file__).parents[2]
ALLOWED = 300_000_000  # bytes beside the weights, the interpreter and JAX included


def published(name: str, **changes) -> dict:
    """config.json of a preset, with some fields changed."""
    return config_to_json(dataclasses.replace(PRESETS[name], **changes))


SHORT_MIXTURE = dict(num_layers=2, sparse_layers=(0, 1), num_experts=8, experts_per_token=2)
MODELS = {
    "0.6b": (published("qwen3-0.6b"), 4),
    "8b-1-layer": (published("qwen3-8b", num_layers=1), 2),
    "30b-a3b-2-layers": (published("qwen3-30b-a3b", **SHORT_MIXTURE), 2),
}

# Peak memory over the weights' own, and a digest of every bit of them.
LOAD = r"""
import hashlib, json, re, sys
from jaxspec import checkpoints
params = checkpoints.load(sys.argv[1], "bfloat16").params
# Of this program alone: getrusage starts from what its parent held when it was started.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
import jax, numpy as np
size, digest = 0, hashlib.sha256()
for x in jax.tree.leaves(params):
    size += x.nbytes
    digest.update(np.asarray(x).reshape(-1).view(np.uint8))
print(json.dumps(dict(over=peak - size, size=size, digest=digest.hexdigest())))
"""


def run(*command) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("model", MODELS)
def test_load_convert_and_load_again(tmp_path, model):
    raw, shards = MODELS[model]
    source, store, again = tmp_path / "source", tmp_path / "store", tmp_path / "again"
    size = write_large_folder(source, raw, shards=shards)
    loaded = json.loads(run("-c", LOAD, source))
    print(f"{model}: {size / 1e6:.0f} MB, peak {loaded['over'] / 1e6:.0f} MB over the weights")
    assert loaded["size"] == size
    assert loaded["over"] < ALLOWED

    run("-m", "jaxspec", "convert", "--target", source, "--output", store)
    assert json.loads(run("-c", LOAD, store))["digest"] == loaded["digest"]
    run("-m", "jaxspec", "convert", "--target", store, "--output", again, "--to", "safetensors")
    assert json.loads(run("-c", LOAD, again))["digest"] == loaded["digest"]
