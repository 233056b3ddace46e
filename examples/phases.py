"""What a round is made of, in milliseconds: each phase compiled and timed alone.

Used by `benchmark.py`. Times are medians; caches are filled to `length` rows.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.accept import accept
from jaxspec.decoding.commit import commit
from jaxspec.decoding.loop import Decoder, Params, prefill
from jaxspec.decoding.requests import capacity_for, pack
from jaxspec.decoding.sampling import Sampling, choose
from jaxspec.generation import LoadedDrafter, Target, request_keys
from jaxspec.models.cache import init_cache
from jaxspec.models.decoder import forward, unembed
from jaxspec.trees.tree import ancestors, causal_bits


@functools.partial(jax.jit, static_argnames="config")
def _verify_chain(params, config, tokens, cache, lengths):
    n = tokens.shape[1]
    depths = jnp.arange(n)[None]
    output = forward(params, config, tokens, depths, causal_bits(n)[None], cache, lengths)
    return jnp.argmax(unembed(params, output.hidden), axis=-1)


def verify_costs(target: Target, sizes, *, length: int = 200, capacity: int = 384) -> dict:
    """Milliseconds of one forward with its logits over n nodes, for each n."""
    c, params = target.config, target.params
    cache = init_cache(
        c.num_layers, 1, c.num_kv_heads, capacity, c.head_dim, params.embed.dtype
    )
    lengths = jnp.array([length])
    costs = {}
    for n in sizes:
        tokens = jnp.ones((1, n), jnp.int32)
        costs[n] = median_ms(_verify_chain, params, c, tokens, cache, lengths)
    return costs


@functools.partial(jax.jit, static_argnames="decoder")
def _draft(decoder, params, state):
    position = state.length - 1
    anchor = jnp.take_along_axis(state.tokens, position[:, None], axis=1)[:, 0]
    return decoder.drafter.draft(params.drafter, state.drafter, anchor, position, state.budget)


@functools.partial(jax.jit, static_argnames="decoder")
def _verify(decoder, params, state, tree, sampling):
    position = state.length - 1
    bits = ancestors(tree)
    output = forward(
        params.target,
        decoder.config,
        tree.tokens,
        tree.depths,
        bits,
        state.cache,
        position,
        taps=decoder.drafter.taps,
    )
    logits = unembed(params.target, output.hidden)
    depth = decoder.drafter.depth
    choices = choose(logits, tree.depths, position + 1, sampling, depth)
    return accept(tree, bits, choices, depth), output


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _commit(decoder, params, state, tree, acceptance, output, stop_ids):
    return commit(state, decoder.drafter, params.drafter, tree, acceptance, output, stop_ids)


def phase_costs(target: Target, drafter: LoadedDrafter, *, length: int = 200) -> dict:
    """Milliseconds of draft (with growth), verify (with acceptance) and commit, batch 1."""
    decoder = Decoder(target.config, drafter.drafter)
    params = Params(target.params, drafter.params)
    prompt = np.random.default_rng(0).integers(0, target.config.vocab_size, length).tolist()
    requests = pack(
        decoder,
        [prompt],
        batch=1,
        capacity=capacity_for(length + 64, decoder),
        max_new_tokens=64,
        budget=drafter.drafter.size,
        sampling=[Sampling(stop_ids=())],
        keys=request_keys(0, 1),
    )
    state = prefill(decoder, params, requests)
    tree, _ = _draft(decoder, params, state)
    acceptance, output = _verify(decoder, params, state, tree, requests.sampling)
    costs = dict(
        draft=median_ms(_draft, decoder, params, state),
        verify=median_ms(_verify, decoder, params, state, tree, requests.sampling),
    )
    times = []
    for _ in range(20):
        began = time.perf_counter()
        state = _commit(
            decoder, params, state, tree, acceptance, output, requests.sampling.stop_ids
        )
        jax.block_until_ready(state)
        times.append(time.perf_counter() - began)
    costs["commit"] = statistics.median(times[1:]) * 1e3
    return costs


def median_ms(function, *args, repeats: int = 20) -> float:
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3
