"""The command line over several processes, started as docs/multi-host.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.processes import free_port, many_devices

ROOT = Path(__file__).parents[1]
RAW = DENSE | dict(vocab_size=16, intermediate_size=24, max_position_embeddings=512)


def start(folder, *options, **variables):
    command = ["generate", "--target", folder, "--prompt-ids", folder / "ids.json", "--json"]
    command += ["--max-new-tokens", "12", "--dtype", "float32", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxspec", *map(str, command)],
        env=many_devices(4) | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> list[list[int]]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    # Gloo, which joins CPUs and no GPUs, announces itself on standard output, in pieces.
    rows = [line for line in out.splitlines() if line.startswith("{")]
    return [json.loads(line)["token_ids"] for line in rows]


@pytest.mark.slow
def test_two_processes_print_what_one_device_does(tmp_path):
    write_folder(tmp_path, RAW, random_tensors(RAW), shards=2)
    (tmp_path / "ids.json").write_text("[[1, 2, 3], [5, 4, 3, 2, 5, 4]]")
    alone = finish(start(tmp_path))
    where = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}", JAX_NUM_PROCESSES="2")
    many = ("--distributed", "--devices", "8", "--batch-size", "2")
    started = [start(tmp_path, *many, **where, JAX_PROCESS_ID=str(i)) for i in range(2)]
    first, second = map(finish, started)
    assert len(alone) == 2 and first == alone
    assert second == []


def test_processes_that_cannot_meet(tmp_path):
    write_folder(tmp_path, RAW, random_tensors(RAW))
    (tmp_path / "ids.json").write_text("[[1]]")
    process = start(tmp_path, "--distributed")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "error: the other processes cannot be found" in errors and "srun" in errors


def test_more_devices_than_there_are(tmp_path):
    write_folder(tmp_path, RAW, random_tensors(RAW))
    (tmp_path / "ids.json").write_text("[[1]]")
    process = start(tmp_path, "--devices", "6")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "needs 6 devices; there are 4" in errors


@pytest.mark.parametrize("name", ["kubernetes.yaml", "slurm.sh"])
def test_examples_use_options_that_exist(name):
    path = ROOT / "examples" / "cluster" / name
    text = path.read_text()
    help_text = subprocess.run(
        [sys.executable, "-m", "jaxspec", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=many_devices(1) | {"COLUMNS": "200"},
    ).stdout
    text_of_command = text.partition("jaxspec generate")[2]
    options = {word for word in text_of_command.split() if word.startswith("--")}
    ours = {o for o in options if "=" not in o}
    assert {"--distributed", "--devices", "--target"} <= ours
    assert all(option in help_text for option in ours)
    if name.endswith("yaml"):
        service, job = yaml.safe_load_all(text)
        pod = job["spec"]["template"]["spec"]
        (environment,) = [c["env"] for c in pod["containers"]]
        values = {entry["name"]: entry["value"] for entry in environment}
        host, _ = values["JAX_COORDINATOR_ADDRESS"].split(":")
        assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert values["JAX_NUM_PROCESSES"] == str(job["spec"]["completions"])
    else:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
