"""Decoding trees over a mesh, tensor and expert parallel, gives the tokens of one device."""

import pytest

from tests.processes import run_script

SCRIPT = """
import dataclasses, json, sys
import jax
from jax.sharding import PartitionSpec as P

name, *where = sys.argv[1:]
if where:
    jax.distributed.initialize(where[0], num_processes=2, process_id=int(where[1]))

from jaxspec.config import TreeConfig
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import Decoder, Params
from jaxspec.api import generate
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.sharding import RULES, decoding_mesh, place
from tests import tiny
from tests.drafters import cases, test_mtp

WIDE = dict(num_heads=8, num_kv_heads=4, vocab_size=16)
random_trees = LoadedDrafter(tiny.RandomTrees(vocab=16))
config, drafter = {
    "tensor": (dataclasses.replace(tiny.QWEN3, **WIDE), random_trees),
    "expert": (dataclasses.replace(tiny.MOE, **WIDE, num_experts=8), random_trees),
    "hybrid": (tiny.HYBRID, test_mtp.loaded("dense", test_mtp.TREE)),
    "drafter": (tiny.QWEN3, cases.loaded("jetspec", TreeConfig("best_first", size=8, width=2))),
}[name]
target, prompts = tiny.target(config), tiny.prompts(5, 9, 3, 12)
mesh = decoding_mesh(8, config.num_kv_heads)

def tokens(target, drafter):
    done = generate(target, prompts, drafter=drafter, max_new_tokens=20, batch_size=4)
    return [completion.token_ids for completion in done]

alone = tokens(target, drafter)
cut = dataclasses.replace(target, params=place(mesh, target.params))
for i in config.attention_layers:
    assert cut.params.layers[i].attention.qkv.sharding.spec == P(None, "model")
rules = {"sharded": RULES, "replicated": ()} if name == "drafter" else {"": ()}
with jax.set_mesh(mesh):
    together = {
        how: tokens(cut, LoadedDrafter(drafter.drafter, place(mesh, drafter.params, rule)))
        for how, rule in rules.items()
    }
    requests = pack(
        decoder := Decoder(config, drafter.drafter),
        prompts, batch=4, capacity=256, max_new_tokens=4, budget=8,
        sampling=[Sampling()] * 4, keys=request_keys(0, 4),
    )
    params = Params(cut.params, place(mesh, drafter.params, ()))
    state = jax.eval_shape(prefill, decoder, params, requests)
    compiled = prefill.lower(decoder, params, requests).compile()
    caches = jax.tree.leaves(compiled.output_shardings.cache.kv)
    whole = state.cache.kv.keys[0].shape
    shards = {sharding.shard_shape(whole) for sharding in caches}
print(json.dumps(dict(alone=alone, together=together, cache=[whole, *shards])))
"""


@pytest.mark.parametrize(
    "name, processes",
    [
        # Its layers are mixtures, and one dense layer.
        pytest.param("expert", 2, marks=pytest.mark.slow),
        pytest.param("expert", 1, marks=pytest.mark.gate),
        pytest.param("tensor", 1, marks=pytest.mark.gate),
        pytest.param("hybrid", 1, marks=pytest.mark.gate),  # and its MTP layer
        pytest.param("drafter", 1, marks=pytest.mark.gate),
    ],
)
def test_eight_devices_decode_as_one(name, processes):
    for report in run_script(SCRIPT, name, processes):
        assert [len(row) for row in report["alone"]] == [20] * 4
        for how, tokens in report["together"].items():
            assert tokens == report["alone"], how
        whole, shard = report["cache"]
        heads = {"tensor": 4, "expert": 4, "hybrid": 2, "drafter": 2}[name]
        assert whole[1] == heads and shard == [whole[0], 1, *whole[2:]]
