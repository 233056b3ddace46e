"""EAGLE-3 in NumPy, one row after another, without a cache: slow and obvious."""

from __future__ import annotations

import numpy as np
from flax import nnx

from jaxspec.drafters.eagle import EagleParams
from jaxspec.drafters.eagle_head import EagleConfig


class Rows:
    """Pairs of one sequence; each is run against those before it that it is given."""

    def __init__(self, config: EagleConfig, params: EagleParams):
        self.config = config
        flat = nnx.to_flat_state(params.head)
        self.weights = {path: np.asarray(x[...], np.float64) for path, x in flat}
        self.embed = np.asarray(params.vocabulary.embed, np.float64)
        self.unembed = np.asarray(params.vocabulary.unembed, np.float64)
        kept = params.vocabulary.kept
        self.kept = np.arange(config.vocab_size) if kept is None else np.asarray(kept)

    def norm(self, x, *path):
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.config.rms_norm_eps)
        return x * self.weights[path]

    def rotated(self, x, position):
        turn = self.config.rope_theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
        low, high = np.split(x, 2, -1)
        cos, sin = np.cos(position * turn), np.sin(position * turn)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def fuse(self, taps):
        c = self.config
        if c.tap_norm == "joined":
            taps = self.norm(taps, "tap_norm")
        if c.tap_norm == "each":
            parts, gains = (
                np.split(taps, len(c.taps)),
                np.split(self.weights["tap_norm",], len(c.taps)),
            )
            square = [np.sqrt(np.mean(x * x) + c.rms_norm_eps) for x in parts]
            taps = np.concatenate(
                [x / s * g for x, s, g in zip(parts, square, gains, strict=True)]
            )
        return taps @ self.weights["fc",]

    def run(self, feature, token, position, before, last=None):
        """(logits, next feature, (position, keys and values by layer)) of a pair.

        Args:
          before: the third results of the rows it sees.
          last: position of the last pair, where this is a drafted row.
        """
        last = position if last is None else last
        c, x, own = self.config, feature, []
        for i in range(c.num_layers):
            at = ("layers", i)
            w = {path[2]: v for path, v in self.weights.items() if path[:2] == at}
            residual = x
            if i == 0:
                hidden = self.norm(x, *at, "hidden_norm")
                inputs = np.concatenate([self.norm(self.embed[token], *at, "norm"), hidden])
                residual = hidden if c.residual_after_norm else x
            else:
                inputs = self.norm(x, *at, "norm")
            q = np.einsum("i,ikgd->kgd", inputs, w["q"])
            k, v = np.moveaxis(np.einsum("i,ikcd->kcd", inputs, w["kv"]), 1, 0)
            if c.qk_norm:
                q, k = self.norm(q, *at, "q_norm"), self.norm(k, *at, "k_norm")
            q, k = self.rotated(q, position), self.rotated(k, position)
            own.append((k, v))
            seen = [
                (keys[i] if keys is not None else own[i])
                for place, keys in [*before, (position, None)]
                if c.window[i] is None or last - place < c.window[i]
            ]
            scores = np.stack([np.einsum("kgd,kd->kg", q, k) for k, _ in seen], -1)
            scores = np.exp(scores / np.sqrt(c.head_dim))
            scores /= scores.sum(-1, keepdims=True)
            out = np.einsum("kgs,skd->kgd", scores, np.stack([v for _, v in seen]))
            x = residual + np.einsum("kgd,kgdm->m", out, w["out"])
            gate, up = np.einsum("m,mcf->cf", self.norm(x, *at, "mlp_norm"), w["gate_up"])
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]
        normed = self.norm(x, "norm")
        logits = self.unembed @ (normed if c.logits_after_norm else x)
        return logits, normed if c.feedback_after_norm else x, (position, own)

    def committed(self, taps, tokens):
        """Rows 0 … T - 2 of T tokens with the target's outputs [T, .]."""
        rows = []
        for i, token in enumerate(tokens[1:]):
            rows.append(self.run(self.fuse(taps[i]), token, i, rows)[2])
        return rows


def log_law(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def dynamic_tree(rows: Rows, taps, tokens, *, steps: int, k: int, size: int):
    """SGLang's tree after tokens whose last one is the anchor.

    Returns:
      Paths of token ids with their log-probabilities, the best of the pool in its order.
    """
    before, last = rows.committed(taps, tokens[:-1]), len(tokens) - 2
    # Frontier: (path, score, feature, rows seen).
    frontier, pool = [((), 0.0, rows.fuse(taps[last]), before)], []
    for step in range(steps):
        level = []
        for path, score, feature, seen in frontier:
            token = path[-1] if path else tokens[-1]
            logits, following, own = rows.run(feature, token, last + step, seen, last)
            law = log_law(logits)
            for index in np.argsort(-law, kind="stable")[:k]:
                node = (*path, int(rows.kept[index]))
                level.append((node, score + law[index], following, [*seen, own]))
        pool += [(path, score) for path, score, _, _ in level]
        frontier = sorted(level, key=lambda node: -node[1])[:k]
    return sorted(pool, key=lambda node: -node[1])[: size - 1]
