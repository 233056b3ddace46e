"""A jitted evaluation loop: accuracy of the target's next token on given texts.

python examples/score_texts.py
"""

import jax
import jax.numpy as jnp

import jaxspec

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def reverse(items):\n    return items[::-1]\n",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
)


@jax.jit
def accuracy(target, ids):
    """Share of the tokens that were the target's first choice."""
    choices = jnp.argmax(jaxspec.logits(target, ids)[:-1], axis=-1)
    return jnp.mean(choices == ids[1:])


def main(name="smollm2-135m"):
    target = jaxspec.load_target(name)
    for text, scored in zip(TEXTS, jaxspec.score(target, TEXTS), strict=True):
        right = accuracy(target, jnp.array(scored.token_ids))
        print(f"{right:4.0%} right, perplexity {scored.perplexity:6.2f}: {text[:40]!r}")


if __name__ == "__main__":
    main()
