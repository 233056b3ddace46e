"""Measures the quality cost of fp8: perplexity and tau of the default target in bfloat16, in
fp8, and with its LM head in fp8 too, on prompts that the drafter was not trained on.

    python examples/quantised.py --prompts gsm8k.jsonl humaneval.jsonl

examples/shipped_drafter/README.md says where such files come from.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

import jaxspec
from jaxspec.checkpoints.convert import convert, save_safetensors
from jaxspec.checkpoints.huggingface import config_to_json
from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts, spread
from jaxspec.data.sources import open_source
from jaxspec.evaluation.metrics import estimate, ratio, resamplings
from jaxspec.evaluation.results import Rounds


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    prompts: tuple[str, ...]
    """Sets of prompts, in any format of docs/training.md."""
    count: int = 8
    """Prompts per set, evenly apart."""
    tokens: int = 128
    """Of an answer."""
    decoder: str = "shipped,tree=path_conditioned,budget=16"
    """As for `jaxspec bench --drafters`."""


def main(options: Options) -> None:
    sources = [open_source(name) for name in options.prompts]
    sets = {x.label: spread(read_prompts(x), options.count) for x in sources}
    texts = [text for rows in sets.values() for text in rows]

    target = jaxspec.load_target(dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        source = by_value(target, Path(folder))
        fp8 = in_fp8(target, source)
        targets = {
            "bf16": target,
            "fp8": fp8,
            "fp8, LM head too": in_fp8(target, source, head=True),
        }
    weights, plain = resamplings([len(rows) for rows in sets.values()]), None
    print("| weights | perplexity | " + " | ".join(f"tau {name}" for name in sets), end=" | ")
    print("tau, all | of bf16's, paired by prompt |\n|---|" + "---|" * (3 + len(sets)))
    for name, own in targets.items():
        scores = jaxspec.score(own, texts)
        loss = -sum(sum(x.log_probs) for x in scores) / sum(len(x.log_probs) for x in scores)
        found = jaxspec.evaluate(
            own, {"tree": options.decoder}, sets, max_new_tokens=options.tokens, timed=0
        )
        rows = [row for row in found.rows if isinstance(row, Rounds)]
        taus = [f"{row.to_dict()['tau']:.2f}" for row in rows]
        decided, rounds = ([x(row) for row in rows] for x in (Rounds.decided, Rounds.rounds))
        whole = ratio(np.concatenate(decided), np.concatenate(rounds), weights)
        plain = whole if plain is None else plain
        taus += [f"{whole[0]:.3f}", f"{estimate(whole / plain):.3f}"]
        print(f"| {name} | {np.exp(loss):.3f} | " + " | ".join(taus) + " |", flush=True)


def by_value(target, folder: Path) -> Path:
    """The target's weights as a Hugging Face folder."""
    source = folder / "bf16"
    source.mkdir()
    save_safetensors(source, target.config, target.params)
    raw = config_to_json(target.config) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(raw))
    return source


def in_fp8(target, source: Path, *, head: bool = False):
    """The target from its fp8 checkpoint, dequantised; prints its layers' rounding errors."""
    folder = source.with_name(f"fp8-{head}")
    errors = convert(source, folder, dtype="fp8", fp8_lm_head=head).errors.values()
    print(f"rounding changed {min(errors):.2%} … {max(errors):.2%} of a layer's weights")
    loaded = jaxspec.load_target(folder, dtype="bfloat16")
    config = dataclasses.replace(target.config, tie_embeddings=loaded.config.tie_embeddings)
    return dataclasses.replace(target, config=config, params=loaded.params)


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
