"""The one forward: trees, prefixes, chunks, taps and architectures against plain sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.models import attention, decoder
from jaxspec.models.cache import KVRows, init_cache
from jaxspec.models.decoder import forward, forward_chain, unembed
from jaxspec.models.layers import rms_norm, rotate
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import MoeParams, abstract_params
from jaxspec.models.rope import rotary_angles
from jaxspec.models.state import init_states
from jaxspec.trees.packing import pack_nodes
from jaxspec.trees.tree import ancestors
from pallas_kernels.rotary_heads import rotary_heads
from tests import tiny
from tests.slow import slow_but

CONFIGS = {"qwen3": tiny.QWEN3, "llama": tiny.LLAMA, "moe": tiny.MOE, "hybrid": tiny.HYBRID}
PREFIX = tiny.prompts(13)[0]


def empty_cache(config, capacity=32, batch=1):
    return init_states(config, batch, capacity, jnp.float32)


run = jax.jit(forward, static_argnames=("config", "taps"))
_run_chain = jax.jit(forward_chain, static_argnames=("config", "taps"))


def run_chain(target, tokens, cache, start, taps=()):
    tokens, start = jnp.array([tokens]), jnp.array([start])
    return _run_chain(target.params, target.config, tokens, cache, start, taps=taps)


def after(target, tokens):
    """The states after up to 16 tokens; what is past them is of other tokens."""
    padded = [*tokens, *[0] * (16 - len(tokens))]
    rows = run_chain(target, padded, empty_cache(target.config), 0).rows
    return _write(empty_cache(target.config), rows, jnp.array([len(tokens)]))


@jax.jit
def _write(states, rows, count):
    return states.write(rows, jnp.int32(0), count)


@pytest.mark.parametrize("name", slow_but(["qwen3", "hybrid"], CONFIGS))
def test_every_node_equals_the_sequence_of_its_path(name):
    target = tiny.target(CONFIGS[name])
    # The last prefix token is the anchor: the cache holds the others.
    cache = after(target, PREFIX[:-1])
    root = jnp.int32(PREFIX[-1])
    tree = tiny.random_tree(12, 4, 11, jax.random.key(3), root, jnp.int32(10))
    tree = jax.tree.map(lambda x: x[None], tree)
    length = jnp.array([len(PREFIX) - 1])
    out = run(
        target.params, target.config, tree.tokens, tree.depths, ancestors(tree), cache, length
    )
    found = np.asarray(unembed(target.params, out.hidden))[0]
    assert np.isfinite(found).all()  # padding too
    for node in range(10):
        path, at = [], node
        while at >= 0:
            path.insert(0, int(tree.tokens[0, at]))
            at = int(tree.parents[0, at])
        expected = tiny.logits(target, PREFIX[:-1] + path)[-1]
        np.testing.assert_allclose(found[node], expected, atol=2e-5)


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    target, tokens = tiny.target(), tiny.prompts(12)[0]
    whole = run_chain(target, tokens, empty_cache(target.config), 0, taps=(-1, 0, 2))
    cache, parts = empty_cache(target.config), []
    for start in range(0, 12, 4):
        out = run_chain(target, tokens[start : start + 4], cache, start, taps=(-1, 0, 2))
        cache = cache.write(out.rows, jnp.int32(start), jnp.array([4]))
        parts.append(out)
    for field in ("hidden", "taps"):
        joined = jnp.concatenate([getattr(p, field) for p in parts], axis=1)
        np.testing.assert_allclose(joined, getattr(whole, field), atol=1e-5)


def test_rows_of_a_batch_have_their_own_lengths():
    target = tiny.target()
    sequences = [tiny.prompts(n, seed=n)[0] for n in (3, 9)]
    # What `after` leaves past a length must not be seen.
    states = [after(target, tokens[:-1]) for tokens in sequences]
    out = run(
        target.params,
        target.config,
        jnp.array([[tokens[-1]] for tokens in sequences]),
        jnp.zeros((2, 1), int),
        jnp.ones((2, 1, 1), jnp.uint32),
        jax.tree.map(lambda *rows: jnp.concatenate(rows), *states),
        jnp.array([2, 8]),
    )
    for row, tokens in enumerate(sequences):
        found = unembed(target.params, out.hidden[row, 0])
        np.testing.assert_allclose(found, tiny.logits(target, tokens)[-1], atol=2e-5)


def test_taps_are_the_layers_outputs():
    target = tiny.target()
    tokens = tiny.prompts(5)[0]
    out = run_chain(target, tokens, empty_cache(target.config), 0, taps=(-1, 1, 2))
    embedding, middle, last = jnp.split(out.taps, 3, axis=-1)
    np.testing.assert_array_equal(embedding[0], target.params.embed[jnp.array(tokens)])
    np.testing.assert_array_equal(last, out.hidden)
    # A model cut after layer 1 ends with what layer 1 gives, normed.
    config = dataclasses.replace(target.config, num_layers=2)
    params = dataclasses.replace(target.params, layers=target.params.layers[:2])
    cut = run_chain(tiny.Target("cut", config, params), tokens, empty_cache(config), 0)
    normed = rms_norm(middle, params.final_norm, config.rms_norm_eps)
    np.testing.assert_allclose(normed, cut.hidden, atol=1e-6)


def test_rows_are_written_where_they_belong():
    cache = init_cache(1, 2, 1, 6, 2, jnp.float32)
    rows = KVRows((jnp.ones((2, 2, 1, 2)),), (jnp.full((2, 2, 1, 2), 2.0),))
    out = cache.write(rows, jnp.array([1, 4]))
    assert out.keys[0][:, 0, :, 0].tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert out.values[0][:, 0, :, 1].tolist() == [[0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 2, 2]]
    assert cache.write(rows, jnp.int32(3)).keys[0][1, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("start", [jnp.array([3, 4]), jnp.int32(3)], ids=["rows", "scalar"])
@pytest.mark.parametrize(
    "value",
    [jnp.nan, -jnp.inf, 0.0, -0.0, jnp.bfloat16(jnp.nan), jnp.int32(0), jnp.int32(-1), True],
)
def test_what_a_write_waits_for_does_not_move_it(start, value):
    """A target that gives NaN for row 0 must not overwrite the other rows' prefixes."""
    cache = init_cache(1, 2, 1, 6, 2, jnp.float32)
    rows = KVRows((jnp.ones((2, 2, 1, 2)),), (jnp.ones((2, 2, 1, 2)),))
    write = jax.jit(lambda after: cache.write(rows, start, after=after))
    written = write(jnp.full((2, 3), value)).keys[0][:, 0, :, 0].tolist()
    second = [0, 0, 0, 0, 1, 1] if start.ndim else [0, 0, 0, 1, 1, 0]
    assert written == [[0, 0, 0, 1, 1, 0], second]


def test_rotary_positions_are_relative():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 16))

    def score(i, j):
        left = rotate(q, *rotary_angles(jnp.array([i]), 16, 1e4)[0:2])
        right = rotate(k, *rotary_angles(jnp.array([j]), 16, 1e4)[0:2])
        return float(jnp.sum(left * right))

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(4, 1), abs=1e-2)


def test_experts_equal_a_loop_over_tokens_and_choices():
    config = tiny.MOE
    e, m, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
    random = np.random.default_rng(0)
    draw = lambda *shape: np.float32(random.standard_normal(shape))  # noqa: E731
    params = MoeParams(
        norm=np.ones(m, np.float32),
        router=draw(m, e),
        gate_up=draw(e, m, 2, f),
        down=draw(e, f, m),
    )
    x = draw(7, m)
    router, gate_up, down = params.router, params.gate_up, params.down
    for norm in (True, False):
        own = dataclasses.replace(config, norm_topk_prob=norm)
        found = jax.jit(mixture_of_experts, static_argnums=1)(params, own, x)
        for token in range(7):
            p = np.exp(x[token] @ router)
            p = p / p.sum()
            best = np.argsort(-p)[: config.experts_per_token]
            total = p[best].sum() if norm else 1.0
            expected = 0
            for i in best:
                gate, up = np.einsum("m,mcf->cf", x[token], gate_up[i])
                hidden = gate / (1 + np.exp(-gate)) * up
                expected = expected + p[i] / total * (hidden @ down[i])
            np.testing.assert_allclose(found[token], expected, atol=2e-3, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_gpu_layout_computes_the_same(name, packed, monkeypatch):
    """Nodes side by side, padded to 8, one call for what follows a projection; here by XLA."""
    target, n = tiny.target(CONFIGS[name]), 3
    cache, length = after(target, PREFIX[:-1]), jnp.array([len(PREFIX) - 1])
    tree = tiny.random_tree(n, 4, 2, jax.random.key(1), jnp.int32(5), jnp.int32(n))
    tree = jax.tree.map(lambda x: x[None], tree)
    packing = pack_nodes(tree.valid, 4) if packed else None
    arrays = (tree.tokens, tree.depths, ancestors(tree), cache, length)

    def outputs():
        return forward(target.params, target.config, *arrays, taps=(-1, 0), packing=packing)

    plain = outputs()
    monkeypatch.setattr(decoder, "fuses", lambda *_: True)
    monkeypatch.setattr(
        attention,
        "rotary_heads",
        lambda *args, implementation, **options: rotary_heads(*args, **options),
    )
    for found, expected in zip(jax.tree.leaves(outputs()), jax.tree.leaves(plain), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("head_dim, expected", [(64, True), (256, True), (80, False)])
def test_kernels_around_the_products_take_heads_of_a_power_of_two(head_dim, expected):
    config = dataclasses.replace(tiny.QWEN3, head_dim=head_dim)
    narrow = abstract_params(config, jnp.bfloat16)
    assert decoder.fuses(narrow, config, "triton") is expected
    assert not decoder.fuses(narrow, config, "xla")
    assert not decoder.fuses(abstract_params(config), config, "triton")  # float32
