"""Golden cases of drafters: target and drafter from their files, and the rounds recorded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import checkpoints
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed, LoadedDrafter
from jaxspec.models.decoder import forward_chain
from jaxspec.models.state import init_states
from jaxspec.models.target import Target

CAPACITY = 96
TOLERANCE = dict(atol=2e-4, rtol=0)


def load(folder, tree: TreeConfig) -> tuple[Target, LoadedDrafter]:
    """What the files of a case hold."""
    target = checkpoints.load(folder / "target")
    return target, load_drafter(folder / "draft", target, tree)


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def tapped(params, config, tokens, taps):
    """Features [B, T, .] of whole sequences."""
    batch = tokens.shape[0]
    states, start = init_states(config, batch, 1, "float32"), jnp.zeros(batch, jnp.int32)
    return forward_chain(params, config, tokens, states, start, taps=taps).taps


def accepted(prompt):
    """Tokens committed by each recorded round."""
    return prompt["tree_accept"] if "tree_accept" in prompt else prompt["accept"]


def rounds(case, target, taps, count):
    """The first rounds of every prompt: number, what was recorded, what to draft from.

    Args:
      case: folder and trace.json (fixture `golden`).
      count: of a prompt's rounds.

    Yields:
      the round's number, its recorded arrays by name, and (tokens [1, T], features
      [1, T, .], position); the anchor is the token at `position`.
    """
    folder, trace = case
    recorded = np.load(folder / "arrays.npz")
    for i, prompt in enumerate(trace["prompts"]):
        sequence = np.array([*prompt["prompt"], *prompt["ar"]])[:CAPACITY]
        tokens = jnp.asarray(np.pad(sequence, (0, CAPACITY - len(sequence)))[None], jnp.int32)
        features = tapped(target.params, target.config, tokens, taps)
        # The prompt's own forward decides the first new token, the first round's anchor.
        position = len(prompt["prompt"])
        for r, committed in enumerate(accepted(prompt)[:count]):
            mark = f"p{i}_r{r}_"
            arrays = {k.removeprefix(mark): recorded[k] for k in recorded if k.startswith(mark)}
            yield r, arrays, (tokens, features, jnp.int32(position))
            position += committed


def observed(drafter, params, tokens, features, position):
    """The drafter's state after positions 0 … position - 1 of one sequence, and the anchor."""
    state = drafter.init(params, 1, CAPACITY)
    start, anchor = jnp.zeros(1, jnp.int32), tokens[:, position][0][None]
    committed = Committed(tokens, features, start, position[None])
    return drafter.observe(params, state, committed), anchor
