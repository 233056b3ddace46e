"""Weights read straight to the shards of a mesh, by one process and by two."""

import pytest

from jaxspec.checkpoints.tensors import SafetensorsFolder
from tests.checkpoints.writing import DENSE, MIXTURE, QWEN2, random_tensors, write_folder
from tests.processes import run_script

WIDE = dict(
    vocab_size=48,
    intermediate_size=32,
    num_attention_heads=8,
    num_key_value_heads=4,
)
MODELS = {
    "dense": DENSE | WIDE,
    "mixture": MIXTURE | WIDE | dict(num_experts=8, moe_intermediate_size=4),
    "stacked": MIXTURE | WIDE | dict(num_experts=8, moe_intermediate_size=4),
    "biases": QWEN2 | WIDE,
}

# Loads on a mesh, checks every shard against the checkpoint loaded whole, and reports.
SCRIPT = """
import json, sys
import jax, numpy as np
from pathlib import Path
if len(sys.argv) > 2:
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from jaxspec.checkpoints import target_weights
from jaxspec.checkpoints.huggingface import load_params, read_config
from jaxspec.checkpoints.tensors import SafetensorsFolder
from jaxspec.sharding import decoding_mesh

folder = Path(sys.argv[1])
config = read_config(folder)
mesh = decoding_mesh(8, config.num_kv_heads)
assert dict(mesh.shape) == dict(data=1, model=4, rest=2), mesh
tensors = SafetensorsFolder(folder)
params = target_weights.load(config, tensors, "float32", mesh)
whole = load_params(folder, config)

def check(cut, expected):
    expected = np.asarray(expected)
    for shard in cut.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])

jax.tree.map(check, params, whole)
held = 0  # copies of a shard on several devices counted once
for x in jax.tree.leaves(params):
    held += sum({str(s.index): s.data.nbytes for s in x.addressable_shards}.values())
total = sum(x.nbytes for x in jax.tree.leaves(whole))
print(json.dumps(dict(read=tensors.bytes_read, held=held, total=total)))
"""


@pytest.mark.parametrize("model", MODELS)
def test_one_process_reads_every_byte_once(tmp_path, model):
    raw = MODELS[model]
    write_folder(tmp_path, raw, random_tensors(raw, stacked_experts=model == "stacked"))
    (report,) = run_script(SCRIPT, tmp_path, 1)
    assert report["read"] == report["held"] == report["total"]


def test_two_processes_read_their_own_shards(tmp_path):
    raw = MODELS["mixture"]
    write_folder(tmp_path, raw, random_tensors(raw), shards=3)
    reports = run_script(SCRIPT, tmp_path, 2)
    for report in reports:
        assert report["read"] == report["held"] < 0.7 * report["total"]
    assert sum(report["held"] for report in reports) >= reports[0]["total"]


@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_pieces_make_up_the_box(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("jaxspec.checkpoints.tensors.PIECE", piece)
    tensors = random_tensors(DENSE)
    folder = SafetensorsFolder(write_folder(tmp_path, DENSE, tensors))
    name = "model.layers.0.self_attn.o_proj.weight"  # [12, 24]
    shape, box = (12, 2, 3, 4), ((2, 9), (1, 2), (0, 3), (1, 4))
    values = tensors[name].reshape(shape)
    covered = 0
    for part, found in folder.pieces(name, shape, box):
        expected = values[tuple(slice(*ends) for ends in part)]
        assert (found == expected).all() and found.shape == expected.shape
        covered += found.size
    assert covered == 7 * 1 * 3 * 3
    assert folder.bytes_read == 4 * covered
