"""A block drafter as its papers' equations, one number after another, in float64 NumPy.

Nothing is cached, batched or fused: one block after one context, projected from scratch.
"""

from __future__ import annotations

import numpy as np
from flax import nnx

from jaxspec.config import DrafterConfig


class Oracle:
    """A drafter of one configuration.

    Args:
      weights: of the head.
      embed, unembed: [V, M], the target's.
    """

    def __init__(self, config: DrafterConfig, weights: nnx.State, embed, unembed):
        self.config = config
        self.weights = nnx.to_pure_dict(weights)
        self.embed, self.unembed = np.float64(embed), np.float64(unembed)

    def norm(self, x, *path):
        return rms_norm(x, self.get(*path), self.config.rms_norm_eps)

    def get(self, *path):
        value = self.weights
        for name in path:
            value = value[name]
        return np.float64(value)

    def stream(self, features, anchor: int) -> np.ndarray:
        """[P, M] of a block whose anchor follows features [position, taps * M]."""
        c, position = self.config, len(features)
        fused = self.norm(np.float64(features) @ self.get("fc"), "hidden_norm")
        tokens = [anchor] + [c.mask_token_id] * (c.block_size - 1)
        x = c.embedding_scale * self.embed[tokens]
        for i in range(c.num_layers):
            normed = self.norm(x, "layers", i, "norm")
            inner = self.convolved(i, "attention_conv", 0, normed, normed)
            x = x + self.convolved(
                i, "attention_conv", 1, normed, self.attention(i, inner, fused)
            )
            normed = self.norm(x, "layers", i, "mlp_norm")
            inner = self.convolved(i, "mlp_conv", 0, normed, normed)
            gate, up = np.moveaxis(
                np.einsum("tm,mcf->tcf", inner, self.get("layers", i, "gate_up")), 1, 0
            )
            out = (silu(gate) * up) @ self.get("layers", i, "down")
            x = x + self.convolved(i, "mlp_conv", 1, normed, out)
        assert position + c.block_size == len(fused) + len(x)
        return x[c.block_size - c.depth :]

    def convolved(self, i, name, side, normed, y):
        """Slot j: the sum over taps t of (base_t + delta_{j,t}) y_{j-t}, within the block."""
        c = self.config
        if not c.conv_taps:
            return y
        base = self.get("layers", i, name, "base")[side]  # [K, M]
        projection = self.get("layers", i, name, "projection")[:, side]  # [M, K, G]
        result = np.zeros_like(y)
        for j in range(len(y)):
            for t in range(min(c.conv_taps, j + 1)):
                delta = np.repeat(normed[j] @ projection[:, t], c.conv_group)
                result[j] += (base[t] + delta) * y[j - t]
        return result

    def attention(self, i, x, fused):
        """Of the block's slots x, normed, over context rows `fused` and themselves."""
        c, position, normed = self.config, len(fused), x
        q, kv = self.get("layers", i, "q"), self.get("layers", i, "kv")
        out, rows = self.get("layers", i, "out"), np.concatenate([fused, normed])
        result = np.zeros_like(x)
        for slot in range(c.block_size):
            for head in range(c.num_heads):
                kv_head, group = divmod(head, c.group_size)
                query = self.norm(normed[slot] @ q[:, kv_head, group], "layers", i, "q_norm")
                query = rotate(query, position + slot, c.rope_theta)
                scores, values = [], []
                for at, row in enumerate(rows):  # context first, then the block
                    later = at > position + slot
                    far = c.window[i] and abs(at - position - slot) >= c.window[i]
                    if far or (c.causal[i] and later):
                        continue
                    key = self.norm(row @ kv[:, kv_head, 0], "layers", i, "k_norm")
                    key = rotate(key, at, c.rope_theta)
                    scores.append(query @ key / np.sqrt(c.head_dim))
                    values.append(row @ kv[:, kv_head, 1])
                result[slot] += (
                    softmax(np.array(scores)) @ np.array(values) @ out[kv_head, group]
                )
        return result

    def chain(self, features, anchor: int, choose=None):
        """Tokens, logits [P, V] and confidence logits [P], slot after slot.

        Args:
          choose: (slot, logits) -> token; the likeliest by default.
        """
        choose = choose or (lambda slot, logits: int(np.argmax(logits)))
        tokens, laws, confidences = [], [], []
        previous, state = anchor, np.zeros(self.config.rank)
        for slot, x in enumerate(self.stream(features, anchor)):
            logits, state = self.slot(x, previous, state)
            confidences.append(self.confidence(x, previous))
            previous = choose(slot, logits)
            tokens.append(previous)
            laws.append(logits)
        return tokens, np.array(laws), np.array(confidences)

    def slot(self, x, previous: int, state):
        kind, hidden = self.config.sequential, self.norm(x, "norm")
        base = self.logits(hidden)
        if kind is None:
            return base, state
        if kind == "mlp":
            own = rms_norm(self.embed[previous], self.get("sequential", "norm"), 1e-6)
            joined = np.concatenate([own, hidden])
            up, gate = np.einsum(
                "i,icf->cf", joined, self.get("sequential", "up_gate")
            ) + self.get("sequential", "bias")
            moved = x + (silu(gate) * up) @ self.get("sequential", "down")
            return self.logits(self.norm(moved, "norm")), state
        w = latent = self.get("sequential", "previous")[previous]
        if kind == "gated":
            joined = np.concatenate([hidden, w])
            latent = w * sigmoid(
                joined @ self.get("sequential", "gate") + self.get("sequential", "bias")
            )
        if kind == "rnn":
            joined = np.concatenate([state, w, hidden])
            joined = joined @ self.get("sequential", "joint") + self.get("sequential", "bias")
            gate, candidate, output = np.split(joined, 3)
            state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(candidate)
            latent = np.tanh(output)
        if kind == "bilinear":
            latent = w * (hidden @ self.get("sequential", "hidden"))
        corrected = base + self.get("sequential", "output") @ latent
        if kind == "bilinear":
            corrected[np.argsort(-base)[self.config.candidates :]] = -np.inf
        return corrected, state

    def logits(self, hidden):
        c = self.config
        z = c.logit_scale * (self.unembed @ hidden)
        return c.logit_softcap * np.tanh(z / c.logit_softcap) if c.logit_softcap else z

    def confidence(self, x, previous: int):
        inputs = self.norm(x, "norm")
        if self.config.confidence is None:
            return np.nan
        if self.config.confidence == "hidden_and_previous":
            inputs = np.concatenate([inputs, self.get("sequential", "previous")[previous]])
        return inputs @ self.get("confidence", "kernel") + self.get("confidence", "bias")[0]


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x, position, theta):
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    low, high = x[:half], x[half:]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)]
    )


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)
