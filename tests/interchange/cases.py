"""A tiny target, and sequences, that this program and the others run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.unrolled import unroll
from jaxspec.drafters.weights import bind
from jaxspec.loading import load_target
from jaxspec.models.target import Target
from tests.checkpoints.writing import DENSE, random_tensors, write_folder

LAYERS, WIDTH, VOCAB, MASK = 6, 32, 40, 39
TARGET = DENSE | dict(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=512,
)
LENGTH, ANCHOR = 128, 20
TOKENS = np.random.default_rng(2).integers(0, MASK, LENGTH).tolist()


def make_target(folder: Path) -> Target:
    """Random weights, such that texts vary."""
    tensors = random_tensors(TARGET)
    small = {name: x if x.ndim == 1 else 0.3 * x for name, x in tensors.items()}
    return load_target(str(write_folder(folder / "target", TARGET, small)))


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, MASK, n).tolist() for n in random.integers(8, 24, count)]


def features(taps: int) -> np.ndarray:
    """Outputs of so many tapped layers, of any target."""
    random = np.random.default_rng(0)
    return random.standard_normal((LENGTH, taps * WIDTH)).astype(np.float32)


def whole_rounds(completion, block: int) -> list[int]:
    """Tokens committed by every round that z-lab's loop runs with a whole block.

    It shortens the last ones to the tokens still wanted, which a bidirectional block notices.
    """
    committed = completion.stats.committed
    begins = np.cumsum([1, *committed[:-1]])
    return list(committed[: int(np.sum(begins <= len(completion.token_ids) - block))])


def unrolled_logits(loaded: LoadedDrafter, *, steps: int) -> jax.Array:
    """Logits [steps, LENGTH, V'] of an EAGLE-3 drafter that reads its own outputs."""
    drafter, params = loaded.drafter, loaded.params
    head = bind(drafter.config, params.head)
    taps = jnp.asarray(features(len(drafter.taps)))[None]
    outputs = unroll(head, params.vocabulary, jnp.array([TOKENS]), taps, steps=steps)
    return head.logits(params.vocabulary, outputs)[0]
