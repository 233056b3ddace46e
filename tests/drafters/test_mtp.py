"""MTP layers draft as their rows run one after another would; the output is the target's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import Committed, LoadedDrafter
from jaxspec.drafters.eagle import eagle_params
from jaxspec.drafters.mtp import MtpDrafter, abstract_mtp, mtp_config
from jaxspec.drafters.rollout import greedy
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.params import TargetParams
from jaxspec.models.state import init_states
from tests import tiny
from tests.slow import slow_but

CHAIN = TreeConfig("chain", size=5)
TREE = TreeConfig("path_conditioned", size=12, width=3, candidates=3)
CONFIGS = {"dense": tiny.HYBRID, "mixture": tiny.HYBRID_MOE}
LENGTH = 7


@functools.cache
def params(name):
    """Weights large enough for every part to matter; no norm is one."""
    target = tiny.target(CONFIGS[name])
    random = np.random.default_rng(3)
    weights = jax.tree.map(
        lambda x: jnp.asarray(0.4 * random.standard_normal(x.shape), x.dtype),
        abstract_mtp(mtp_config(target.config)),
    )
    return eagle_params(weights, target.params)


def loaded(name, tree):
    return LoadedDrafter(MtpDrafter(mtp_config(CONFIGS[name]), tree), params(name))


def rows(name, features, tokens):
    """Outputs past the norm and logits of pairs, run at once by the target's own forward."""
    own, config = params(name), mtp_config(CONFIGS[name]).layer
    w, vocabulary, n = own.head, own.vocabulary, len(tokens)

    def norm(x, gain):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * gain

    embedded = norm(np.asarray(vocabulary.embed)[tokens], w.token_norm)
    joined = np.concatenate([embedded, norm(np.stack(features), w.feature_norm)], -1) @ w.fc
    layer = TargetParams(vocabulary.embed, (w.layer,), w.norm, vocabulary.unembed)
    states, start = init_states(config, 1, 1, "float32"), jnp.zeros(1, int)
    run = jax.jit(forward_chain, static_argnames="config")
    tokens = jnp.zeros((1, n), int)
    out = run(layer, config, tokens, states, start, embeddings=joined[None])
    return np.asarray(out.hidden)[0], np.asarray(unembed(layer, out.hidden))[0]


@pytest.mark.parametrize("name", slow_but(["dense"], CONFIGS))
def test_a_chain_is_rows_run_one_after_another(name):
    random = np.random.default_rng(1)
    features = list(random.standard_normal((LENGTH, CONFIGS[name].hidden_size), np.float32))
    tokens = tiny.prompts(LENGTH + 1)[0]
    drafter, own = loaded(name, CHAIN).drafter, params(name)
    state, observe = drafter.init(own, 1, LENGTH), jax.jit(drafter.observe)
    for start, count in ((0, 4), (4, 3)):  # as a prompt in chunks
        part = slice(start, start + count)
        arrays = jnp.array([tokens[part]]), jnp.asarray(np.stack(features[part]))[None]
        committed = Committed(*arrays, jnp.array([start]), jnp.array([count]))
        state = observe(own, state, committed)
    anchor, position = jnp.array(tokens[LENGTH:]), jnp.array([LENGTH])
    draft = jax.jit(drafter.rollout, static_argnums=4)
    chosen, laws = draft(own, state, anchor, position, greedy)
    after = tokens[1:]
    for step in range(drafter.depth):
        hidden, logits = rows(name, features, after)
        np.testing.assert_allclose(laws[0, step], logits[-1], rtol=1e-3, atol=1e-4)
        features.append(hidden[-1])
        after = [*after, int(logits[-1].argmax())]
    assert chosen[0].tolist() == after[LENGTH:]


@pytest.mark.slow
@pytest.mark.parametrize("name, tree", [("dense", CHAIN), ("mixture", TREE)])
def test_the_output_is_the_targets_own(name, tree):
    target = tiny.target(CONFIGS[name])
    options = dict(max_new_tokens=12, sampling=[Sampling(), Sampling(temperature=0.8)], seed=2)
    plain, speculative = (
        [c.token_ids for c in generate(target, tiny.prompts(3, 9), **options, **drafter)]
        for drafter in ({}, {"drafter": loaded(name, tree)})
    )
    assert speculative == plain


def test_it_reads_the_targets_last_layer_and_has_one_of_its_kind():
    config = mtp_config(tiny.HYBRID_MOE)
    assert config.taps == (tiny.HYBRID_MOE.num_layers - 1,)
    assert (config.layer.delta_layers, config.layer.sparse_layers) == ((), (0,))
    assert abstract_mtp(config).layer.attention.gated
    with pytest.raises(ValueError, match="'mtp' needs a hybrid target"):
        mtp_config(tiny.QWEN3)
