"""Logit lens (nostalgebraist, 2020): each layer's prediction if it were the last one.

python examples/logit_lens.py ["A TEXT TO GO ON WITH"]
"""

import sys

import jax.numpy as jnp

import jaxspec
from jaxspec.models.decoder import unembed
from jaxspec.models.layers import rms_norm


def lens(target, ids):
    """Logits [L + 1, T, V] of the embedding and of every layer."""
    states = jaxspec.hidden_states(target, ids)
    norm, eps = target.params.final_norm, target.config.rms_norm_eps
    normed = jnp.concatenate([rms_norm(states[:-1], norm, eps), states[-1:]])  # the last is
    return unembed(target.params, normed)


def main(text="The capital of France is", name="smollm2-135m"):
    target = jaxspec.load_target(name)
    logits = lens(target, target.tokenizer.encode(text))[:, -1]
    for layer, best in enumerate(jnp.argsort(-logits, axis=-1)[:, :4].tolist(), start=-1):
        print(f"layer {layer:2d}", *(f"{target.tokenizer.decode([i])!r:>12}" for i in best))


if __name__ == "__main__":
    main(*sys.argv[1:2])
