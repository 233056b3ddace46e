"""Sequential heads, which correct a slot's logits given the token before it.

A head turns the slot's hidden state, the previous token and its own state into a short vector,
the latent; the corrected logits are affine in it (`DraftHead.correct`). So any subset of the
vocabulary can be re-scored by multiplying the latent with the subset's rows.

All methods take any leading axes. Equations: DSpark, section 3.1 (arXiv 2607.05147); TreeFlash
(arXiv 2606.03819); DFlash2 ("Keep Drafting Parallel", Inco AI, August 2026).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.config import DrafterConfig
from jaxspec.models.layers import lookup_whole, project, rms_norm


class Markov(nnx.Module):
    """latent = W1[x_{k-1}]: the bias W2 · latent is a low-rank table of token pairs.

    It has no state. Base class of the heads that modify this latent.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        table = (config.vocab_size, config.rank)
        self.previous = weight(rngs, dtype, *table)  # W1, [V, R]
        self.output = weight(rngs, dtype, *table)  # W2, [V, R]

    def initial_state(self, shape: tuple[int, ...]):
        """The state at the anchor, for blocks of the given leading axes."""
        return ()

    def embed(self, previous: jax.Array) -> jax.Array:
        """W1[previous], float32 [..., R]."""
        return lookup_whole(self.previous[...], previous)

    def advance(self, hidden: jax.Array, previous: jax.Array, state):
        """One slot: hidden [..., M], previous [...] -> (latent [..., R], state)."""
        return self.embed(previous), state


class Gated(Markov):
    """latent = sigmoid(G [h_k; w] + b) * w with w = W1[x_{k-1}]."""

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.gate = weight(rngs, dtype, config.hidden_size + config.rank, config.rank)
        self.bias = zeros(dtype, config.rank)

    def advance(self, hidden, previous, state):
        embedded = self.embed(previous)
        gate = _affine(join(hidden, embedded), self.gate, self.bias)
        return jax.nn.sigmoid(gate) * embedded, state


class Recurrent(Markov):
    """A gated memory s of the block; with z = [s_{k-1}; w; h_k] and (g, c, o) = J z + b:

    s_k = sigmoid(g) s_{k-1} + (1 - sigmoid(g)) tanh(c), latent = tanh(o), s at the anchor 0.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        rank = config.rank
        self.joint = weight(rngs, dtype, 2 * rank + config.hidden_size, 3 * rank)
        self.bias = zeros(dtype, 3 * rank)

    def initial_state(self, shape):
        return jnp.zeros((*shape, self.output.shape[-1]), jnp.float32)

    def advance(self, hidden, previous, state):
        joint = _affine(join(state, self.embed(previous), hidden), self.joint, self.bias)
        gate, candidate, output = jnp.split(joint, 3, axis=-1)
        keep = jax.nn.sigmoid(gate)
        return jnp.tanh(output), keep * state + (1 - keep) * jnp.tanh(candidate)


class Bilinear(Markov):
    """latent = W1[x_{k-1}] * (H h_k): DFlash2's selector, whose W1 and W2 are its codebooks.

    Its correction applies only to the likeliest tokens of a slot (`drafters.selector`).
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.hidden = weight(rngs, dtype, config.hidden_size, config.rank)  # H

    def advance(self, hidden, previous, state):
        # Without the barrier XLA joins this product with the LM head's, and copies that for it.
        hidden, kernel = jax.lax.optimization_barrier((hidden, self.hidden[...]))
        return self.embed(previous) * project("...m,mr->...r", hidden, kernel), state


class Mlp(nnx.Module):
    """TreeFlash's correction of the hidden state, before the final norm.

    (u, g) = UG [RMSNorm(e); h_k] + b with e the target's embedding of x_{k-1};
    correction = D (silu(g) * u). D starts at zero.
    """

    def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs, dtype):
        width, inner = config.hidden_size, config.intermediate_size
        self.eps = 1e-6
        self.norm = ones(dtype, width)
        self.up_gate = weight(rngs, dtype, 2 * width, 2, inner)
        self.bias = zeros(dtype, 2, inner)
        self.down = zeros(dtype, inner, width)

    def initial_state(self, shape):
        return ()

    def __call__(self, hidden: jax.Array, embedded: jax.Array) -> jax.Array:
        """hidden [..., M], embedded [..., M] -> what to add before the final norm [..., M]."""
        joined = join(rms_norm(embedded, self.norm[...], self.eps), hidden)
        both = project("...m,mcf->...cf", joined, self.up_gate[...])
        both = both + self.bias[...].astype(jnp.float32)
        inner = jax.nn.silu(both[..., 1, :]) * both[..., 0, :]
        return project("...f,fm->...m", inner, self.down[...])


HEAD_MODULES = {
    "markov": Markov,
    "gated": Gated,
    "rnn": Recurrent,
    "mlp": Mlp,
    "bilinear": Bilinear,
}


def weight(rngs: nnx.Rngs, dtype, *shape: int) -> nnx.Param:
    """Gaussian, standard deviation 0.02, as Hugging Face initialises."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


def ones(dtype, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype))


def zeros(dtype, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def join(*parts: jax.Array) -> jax.Array:
    """Concatenates the last axis; leading axes broadcast."""
    shape = jnp.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in parts], -1)


def _affine(x: jax.Array, kernel: nnx.Param, bias: nnx.Param) -> jax.Array:
    return project("...i,io->...o", x, kernel[...]) + bias[...].astype(jnp.float32)
