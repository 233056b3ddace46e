"""Drafting compiled for an H100 at published sizes: its cost beyond its weights.

Numbers are estimates from the compiled program: bytes over the memory's rate, and 1.6 us for
every kernel, the most that small ones took where they were measured (docs/h100.md).
"""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxspec.config import DrafterConfig, TreeConfig
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.eagle import EagleDrafter
from jaxspec.drafters.joined import beside_lookup
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.presets import PRESETS
from jaxspec.planning.programs import compile_program
from jaxspec.planning.setup import Setup, published_drafter
from jaxspec.planning.steps import Given
from jaxspec.training.recipe import eagle_config
from pallas_kernels.h100.target import BYTES_PER_SECOND

pytestmark = pytest.mark.h100

KERNEL_MS = 1.6e-3
DFLASH2 = DrafterConfig(  # as published for Qwen3.8-27B
    vocab_size=248_320,
    hidden_size=5120,
    intermediate_size=17_408,
    num_layers=5,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    target_layers=64,
    taps=(5, 19, 33, 47, 61),
    block_size=8,
    mask_token_id=0,
    window=2048,
    sequential="bilinear",
    rank=256,
    candidates=16,
    conv_taps=2,
    conv_group=16,
)


def bytes_of(tree) -> int:
    return sum(math.prod(x.shape) * 2 for x in jax.tree.leaves(tree))  # bfloat16


def read_once(config) -> int:
    """Bytes of weights that one pass of the drafter reads: all but the fusion of the taps, and
    but the codebooks, of which it gathers rows; and the LM head."""
    weights = abstract_weights(config, jnp.bfloat16)
    codebooks = 2 * config.vocab_size * getattr(config, "rank", 0) * 2
    head = config.vocab_size * config.hidden_size * 2
    return bytes_of(weights) - bytes_of(weights.fc) - codebooks + head


def compiled(model: str, drafter, name="draft"):
    program = compile_program(Setup(PRESETS[model], drafter, context=4096), name)
    assert program.module.large_copies(2**20) == [] and program.module.host_transfers() == []
    return program.module


def cost_ms(module) -> float:
    """Of the bytes it moves and its kernels, but for products, which bytes account for."""
    products = sum(times for op, _, times in module.walk() if op.code == "custom-call")
    moved = 1e3 * module.moved_bytes() / BYTES_PER_SECOND
    return moved + KERNEL_MS * (module.launches() - products)


def beyond_weights_ms(module, weights: int) -> float:
    return cost_ms(module) - 1e3 * weights / BYTES_PER_SECOND


@pytest.mark.parametrize(
    ("kind", "size", "launches"), [("chain", 8, 190), ("path_conditioned", 16, 240)]
)
def test_dflash2(kind, size, launches):
    module = compiled("qwen3.8-27b", BlockDrafter(DFLASH2, TreeConfig(kind, size)))
    large = DFLASH2.vocab_size * DFLASH2.depth  # logits of every slot
    heads = [op for op, _, _ in module.walk() if op.code != "fusion" and op.arrays[0] >= large]
    assert len(heads) == 1  # one pass of the LM head
    assert module.launches() <= launches
    assert beyond_weights_ms(module, read_once(DFLASH2)) <= 0.4


@pytest.mark.gate
def test_a_round_with_dflash2():
    """Beside one that verifies as many nodes and drafts nothing. The fusion of the taps belongs
    to it: of the tokens that the round before committed."""
    drafter = BlockDrafter(DFLASH2, TreeConfig("chain", 8))
    drafted, given = (compiled("qwen3.8-27b", x, "round") for x in (drafter, Given(8)))
    for module, passes in ((drafted, 2), (given, 1)):  # of an LM head, the target's the last
        wide = [op for op, _, times in module.walk() if times and "248320" in op.type]
        assert len([op for op in wide if op.code != "fusion"]) == passes  # but for the noise
    assert drafted.launches() - given.launches() <= 220
    fused = bytes_of(abstract_weights(DFLASH2, jnp.bfloat16).fc)
    weights_ms = 1e3 * (read_once(DFLASH2) + fused) / BYTES_PER_SECOND
    assert cost_ms(drafted) - cost_ms(given) - weights_ms <= 0.4


@pytest.mark.parametrize(("kind", "launches"), [("chain", 180), ("path_conditioned", 270)])
def test_eagle3(kind, launches):
    """Every level reads the layer and the LM head again; the tree runs four rows per level."""
    config = eagle_config(PRESETS["qwen3-8b"], steps=5)
    tree = TreeConfig(kind, 8 if kind == "chain" else 16, width=4, candidates=4)
    module = compiled("qwen3-8b", EagleDrafter(config, tree))
    assert module.launches() <= launches
    assert beyond_weights_ms(module, 5 * read_once(config)) <= 0.7


@pytest.mark.parametrize("nodes", [64, 256])
def test_lookup_behind_a_tree(nodes):
    """A few dozen kernels find the copies behind all nodes at once."""
    config = published_drafter(PRESETS["qwen3-8b"])
    alone = BlockDrafter(config, TreeConfig("path_conditioned", size=nodes))
    drafted, joined = (compiled("qwen3-8b", x) for x in (alone, beside_lookup(alone)))
    assert joined.launches() - drafted.launches() <= 40
    assert joined.moved_bytes() - drafted.moved_bytes() <= 30e6
