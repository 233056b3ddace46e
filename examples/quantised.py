"""What fp8 costs: perplexity and tau of the default target in bfloat16, in fp8, and with its LM
head in fp8 too, on prompts that the drafter was not trained on.

python examples/quantised.py --prompts ../shared/prompts/*.jsonl
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec.checkpoints.convert import convert, save_safetensors
from jaxspec.checkpoints.fp8 import dequantised, quantise
from jaxspec.data.prompts import read_prompts, spread
from jaxspec.data.sources import open_source


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=8, help="prompts per set")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--decoder", default="shipped,tree=path_conditioned,budget=16")
    options = parser.parse_args()
    sources = [open_source(name) for name in options.prompts]
    sets = {x.label: spread(read_prompts(x), options.count) for x in sources}
    texts = [text for rows in sets.values() for text in rows]

    target = jaxspec.load_target(dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        fp8, errors = in_fp8(target, Path(folder))
    targets = {"bf16": target, "fp8": fp8, "fp8, LM head too": with_fp8_head(fp8)}
    print(f"rounding changed {min(errors):.2%} … {max(errors):.2%} of a layer's weights")
    print("| weights | perplexity | " + " | ".join(f"tau {name}" for name in sets) + " |")
    print("|---|" + "---|" * (1 + len(sets)))
    for name, own in targets.items():
        scores = jaxspec.score(own, texts)
        loss = -sum(sum(x.log_probs) for x in scores) / sum(len(x.log_probs) for x in scores)
        found = jaxspec.evaluate(
            own, {"tree": options.decoder}, sets, max_new_tokens=options.tokens, timed=0
        )
        taus = [f"{row['tau']:.2f}" for row in found.to_dicts()]
        print(f"| {name} | {np.exp(loss):.3f} | " + " | ".join(taus) + " |", flush=True)


def in_fp8(target, folder: Path):
    """The target as its fp8 checkpoint loads, dequantised; and the error of every layer."""
    source = folder / "bf16"
    source.mkdir()
    save_safetensors(source, target.config, target.params)
    (source / "config.json").write_text(json.dumps(hugging_face(target.config)))
    errors = convert(source, folder / "fp8", dtype="fp8").errors
    loaded = jaxspec.load_target(folder / "fp8", dtype="bfloat16")
    return dataclasses.replace(target, params=loaded.params), errors.values()


def hugging_face(c) -> dict:
    """config.json of the default target, a Llama."""
    return dict(
        model_type="llama",
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tie_embeddings,
        torch_dtype="bfloat16",
    )


def with_fp8_head(target):
    """The same with its LM head rounded as if it were stored in fp8; the embedding stays."""
    head = np.asarray(target.params.unembed, np.float32)
    head = jnp.asarray(dequantised(*quantise(head)), target.params.embed.dtype)
    return dataclasses.replace(
        target,
        config=dataclasses.replace(target.config, tie_embeddings=False),
        params=dataclasses.replace(target.params, lm_head=head),
    )


if __name__ == "__main__":
    main()
