"""Speed and acceptance on the small real target, in one run, against the best plain decoding.

    python examples/benchmark.py --drafter shipped

Three tables: tokens per second and tau per prompt set and decoder; what each phase of a round
costs; what verifying n nodes costs. Decoders take turns on each prompt. Without a trained
drafter, block drafters have random weights: their phases cost the same, but their tau is
meaningless and not shown. The questions are a few of our own, or with `--folder` those of the
evaluation (examples/shipped_drafter/README.md). PyTorch's `transformers` takes part if it is
installed (extra 'parity'). `python -m jaxspec evaluate` compares trained drafters in full.
"""

import dataclasses
import time
from pathlib import Path

import jax

import jaxspec
from jaxspec import checkpoints
from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts, spread
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.small_model import SmallModel
from jaxspec.drafters.weights import random_weights
from jaxspec.evaluation import measure
from jaxspec.evaluation.contenders import Contender, Entry
from jaxspec.evaluation.report import markdown
from jaxspec.evaluation.results import append
from jaxspec.evaluation.view import View
from jaxspec.models.target import Target
from jaxspec.prompts import as_token_ids
from jaxspec.results import Completion
from jaxspec.training.recipe import PRESETS, drafter_config

TARGET, HALF = "smollm2-135m", "bfloat16"
SETS = ("gsm8k", "humaneval", "mt-bench")
QUESTIONS = (
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "A train leaves at 9:40 and arrives at 12:15. How long does the journey take?",
    "Repeat this sentence three times: the quick brown fox jumps over the lazy dog.",
)


def prompts(folder: Path | None, count: int) -> dict[str, list[str]]:
    """The questions by set, `count` of each."""
    if folder is None:
        return {"questions": spread(list(QUESTIONS), count)}
    return {name: spread(read_prompts(folder / f"{name}.jsonl"), count) for name in SETS}


def untrained(target: Target, half: Target) -> list[Entry]:
    """Drafters that need no training; prompt lookup in bfloat16 as well."""
    config = dataclasses.replace(target.config, num_layers=6)
    layers = dataclasses.replace(target.params, layers=target.params.layers[:6])
    small = LoadedDrafter(SmallModel(config, depth=3), layers)
    lookup = LoadedDrafter(PromptLookup())
    return [
        Entry(Contender("lookup, 4 nodes", "ngram", budget=4), target, lookup),
        Entry(Contender("lookup, 8 nodes", "ngram", budget=8), target, lookup),
        Entry(Contender("lookup, 8 nodes, bf16", "ngram", budget=8, dtype=HALF), half, lookup),
        Entry(Contender("first 6 layers", "layers", "chain", budget=4), target, small),
    ]


def block_drafters(target: Target, folder: str | None) -> list[Entry]:
    """The published families and trees; with a trained drafter, its trees instead."""
    if folder:
        drafter = jaxspec.load_drafter(folder, target)
        trees = ("chain", "top_budget", "path_conditioned")
        return [
            Entry(Contender(tree, folder, tree, budget=16), target, drafter) for tree in trees
        ]
    entries = []
    for family, tree in (
        ("dflash", "top_budget"),
        ("jetspec", "best_first"),
        ("dspark", "chain"),
        ("dspark", "path_conditioned"),
        ("treeflash", "transitions"),
    ):
        corrected = family == "treeflash"  # DFlash's backbone and one more part
        config = drafter_config(
            "dflash" if corrected else family, target.config, PRESETS[TARGET]
        )
        config = dataclasses.replace(config, sequential="mlp") if corrected else config
        weights = random_weights(config, jax.random.key(0))
        drafter = BlockDrafter(config, jaxspec.TreeConfig())
        loaded = LoadedDrafter(drafter, block_params(weights, target.params))
        contender = Contender(f"{family}, {tree}, random", family, tree, budget=16)
        entries.append(Entry(contender, target, loaded))
    return entries


def torch_run(path, max_new_tokens: int):
    """`transformers` generate on the same weights; None without torch."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError:
        return None
    fields = load_gguf_checkpoint(str(path))["config"]
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    model.load_state_dict(read["tensors"], strict=False)

    def run(row: list[int], seed: int) -> Completion:
        began, ids = time.perf_counter(), torch.tensor([row])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        new = out[0, len(row) :].tolist()
        stats = DecodeStats((1,) * (len(new) - 1), len(new) - 1)
        return Completion(new, None, stats, time.perf_counter() - began, "length")

    return run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    prompts: int = 4
    """Per set."""
    folder: Path | None = None
    """Of the evaluation's sets as .jsonl files; a few questions of our own by default."""
    max_new_tokens: int = 128
    """Of an answer."""
    drafter: str | None = None
    """A trained one; random weights by default."""
    output: Path | None = None
    """File that also gets the results, as JSON lines."""


def main(options: Options) -> None:
    texts = prompts(options.folder, options.prompts)
    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target(TARGET)
    half = jaxspec.load_target(TARGET, dtype=HALF)
    plain, blocks = untrained(target, half), block_drafters(target, options.drafter)
    torch = torch_run(checkpoints.target_path(TARGET), options.max_new_tokens)
    sets = {
        name: as_token_ids(target, rows, raw=False, thinking=None)
        for name, rows in texts.items()
    }
    rows = [
        *measure.speed(
            plain + (blocks if options.drafter else []),
            sets,
            max_new_tokens=options.max_new_tokens,
            plain_targets={HALF: half},
            others={"transformers (torch)": torch} if torch else {},
        ),
        *measure.costs(plain + blocks),
    ]
    if options.output:
        for row in rows:
            append(options.output, row)
    print(markdown(View(rows)))


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
