"""Speed and acceptance on the small real target, in one run, against the best plain decoding.

    python examples/benchmark.py [--prompts 4] [--max-new-tokens 128] [--json FILE]

Three tables: tokens per second and tau per prompt set and decoder; what verifying n nodes
costs; what each phase of a round costs. Every decoder answers the same prompts, and they take
turns on each prompt, so that a busy moment of the machine does not fall on one of them alone.
PyTorch's `transformers` joins in when it is installed (extra 'parity').
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from phases import phase_costs, verify_costs
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jaxspec
from jaxspec.cli import read_prompts
from jaxspec.decoding.stats import pooled_tau
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import Plain
from jaxspec.drafters.small_model import SmallModel
from jaxspec.generation import LoadedDrafter, as_token_ids

PROMPTS = Path(__file__).parents[1].parent / "shared" / "prompts"
SETS = ("gsm8k", "humaneval", "mt-bench")


def decoders() -> dict:
    """Everything that is compared: name -> (target, drafter)."""
    full = jaxspec.load_target("smollm2-135m")
    half = jaxspec.load_target("smollm2-135m", dtype="bfloat16")
    config = dataclasses.replace(full.config, num_layers=6)
    layers = dataclasses.replace(full.params, layers=full.params.layers[:6])
    small = SmallModel(config, jaxspec.TreeConfig("chain", size=4), depth=3)
    return {
        "plain": (full, LoadedDrafter(Plain(1))),
        "plain, 2 rows": (full, LoadedDrafter(Plain(2))),
        "plain, 2 rows, bf16": (half, LoadedDrafter(Plain(2))),
        "lookup, 4 nodes": (full, LoadedDrafter(PromptLookup(size=4, depth=3))),
        "lookup, 8 nodes": (full, LoadedDrafter(PromptLookup(size=8, depth=7))),
        "first 6 layers, chain of 3": (full, LoadedDrafter(small, layers)),
    }


def torch_decoder(path):
    """`transformers` generate on the same weights: (ids, count) -> ids; None without torch."""
    try:
        import torch
        from transformers import LlamaForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError:
        return None
    from transformers import LlamaConfig

    fields = load_gguf_checkpoint(str(path))["config"]
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    model.load_state_dict(read["tensors"], strict=False)

    def generate(ids: list[int], count: int) -> list[int]:
        ids = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, ids.shape[1] :].tolist()

    return generate


def compare(prompts: list[str], runs: dict, torch_generate, max_new_tokens: int) -> dict:
    """Tokens per second and tau of every decoder over the same prompts, one at a time."""
    target = runs["plain"][0]
    rows = as_token_ids(target, prompts, raw=False, thinking=None)
    capacity = {}
    for name, (own, drafter) in runs.items():
        capacity[name] = jaxspec.warm_up(
            own, rows, drafter=drafter, max_new_tokens=max_new_tokens, batch_size=1
        )
    seconds, stats = ({name: [] for name in (*runs, "transformers")} for _ in range(2))
    tokens, equal = {name: 0 for name in seconds}, {name: 0 for name in seconds}
    for row in tqdm(rows, leave=False):
        for name, (own, drafter) in runs.items():
            (done,) = jaxspec.generate(
                own,
                row,
                drafter=drafter,
                max_new_tokens=max_new_tokens,
                capacity=capacity[name],
            )
            if name == "plain":
                reference = done.token_ids
            seconds[name].append(done.seconds)
            stats[name].append(done.stats)
            tokens[name] += len(done.token_ids)
            equal[name] += done.token_ids == reference
        if torch_generate:
            began = time.perf_counter()
            ids = torch_generate(row, max_new_tokens)
            seconds["transformers"].append(time.perf_counter() - began)
            tokens["transformers"] += len(ids)
            equal["transformers"] += ids == reference
    return {
        name: dict(
            tokens_per_second=tokens[name] / sum(seconds[name]),
            tau=pooled_tau(stats[name]) if stats[name] else 1.0,
            same_output=f"{equal[name]}/{len(rows)}",
        )
        for name in seconds
        if seconds[name]
    }


def show(results: dict, console: Console) -> None:
    speed = Table(title="tokens/s (tau), times the best plain decoding")
    speed.add_column("decoder")
    for name in results["sets"]:
        speed.add_column(name, justify="right")
    best = {
        name: max(r["tokens_per_second"] for d, r in rows.items() if d.startswith("plain"))
        for name, rows in results["sets"].items()
    }
    for decoder in next(iter(results["sets"].values())):
        cells = []
        for name, rows in results["sets"].items():
            row = rows[decoder]
            rate, tau = row["tokens_per_second"], row["tau"]
            cells.append(
                f"{rate:.1f} ({tau:.2f}) {rate / best[name]:.2f}x {row['same_output']}"
            )
        speed.add_row(decoder, *cells)
    console.print(speed)

    verify = Table(title="verifying n nodes, ms (times n = 1)")
    for n in results["verify_ms"]:
        verify.add_column(str(n), justify="right")
    costs = list(results["verify_ms"].values())
    verify.add_row(*(f"{c:.1f} ({c / costs[0]:.2f})" for c in costs))
    console.print(verify)

    phases = Table(title="phases of a round, ms")
    phases.add_column("decoder")
    for name in next(iter(results["phases_ms"].values())):
        phases.add_column(name, justify="right")
    for decoder, row in results["phases_ms"].items():
        phases.add_row(decoder, *(f"{c:.2f}" for c in row.values()))
    console.print(phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="per set")
    parser.add_argument("--folder", type=Path, default=PROMPTS, help="holds gsm8k.jsonl, …")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    import checkpoints

    jaxspec.enable_compilation_cache()
    runs = decoders()
    torch_generate = torch_decoder(checkpoints.locate("smollm2-135m"))
    results = dict(sets={})
    for name in SETS:
        prompts = read_prompts(args.folder / f"{name}.jsonl")
        chosen = prompts[:: max(1, len(prompts) // args.prompts)][: args.prompts]
        results["sets"][name] = compare(chosen, runs, torch_generate, args.max_new_tokens)
    target = runs["plain"][0]
    results["verify_ms"] = verify_costs(target, sizes=(1, 2, 4, 8, 16, 32, 64, 128))
    results["phases_ms"] = {
        name: phase_costs(own, drafter) for name, (own, drafter) in runs.items()
    }
    show(results, Console(width=160))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
