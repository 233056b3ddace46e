"""`generate`, from a shell."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxspec.checkpoints import Weights
from jaxspec.cli import exits
from jaxspec.cli.options import (
    DrafterOptions,
    Dtype,
    MinP,
    NewTokens,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_least,
    chosen_dtype,
    target_name,
)
from jaxspec.data.prompts import read_prompt_ids, read_rows


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer prompts by speculative decoding; the output is exactly the target model's.

    Tau, printed with every answer, is the mean number of tokens that a round committed; a last
    round that --max-new-tokens cuts short counts in full.

    Examples:
      python -m jaxspec generate --prompt "Why is the sky blue?"
      python -m jaxspec generate --prompts prompts.jsonl --drafter ngram --budget 8 --json
      python -m jaxspec generate --target Qwen/Qwen3-8B --drafter JetSpec/jetspec-qwen3-8b \\
          --tree best_first --width 7 --budget 128 --prompt "Prove that 2 is prime."
    """

    drafter: Annotated[DrafterOptions, tyro.conf.arg(name="")] = DrafterOptions()
    target: TargetName = None
    dtype: Dtype = "auto"
    """Dtype of weights and caches. float32 reproduces plain decoding token for token, on GPUs
    too (products do not use TF32); bfloat16 may flip near-ties. auto takes the faster one on
    this machine, measured once and kept, and prints its choice."""
    weights: Weights = "dequantised"
    """How to hold an fp8 target's weights: dequantised to --dtype, or stored in 8 bits with
    their scales, which halves memory and, on a GPU, the bytes read per step."""
    prompt: str | None = None
    """One prompt, as a user's turn."""
    prompts: Path | None = None
    """Prompts, in any format of docs/training.md; the first turn of every row is used."""
    prompt_ids: Path | None = None
    """File with a JSON list of lists of token ids; needs no tokenizer."""
    raw: bool = False
    """Pass the text to the model as it is, without the chat template."""
    thinking: Thinking = None
    max_new_tokens: NewTokens = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    seed: int = 0
    """Seed of sampling; prompt i uses it folded with i, as in `jaxspec.generate`."""
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: each round verifies as many nodes as pay for their time, down to the root alone
    (plain decoding); round times are measured at the first start and kept. fixed: each round
    verifies the whole budget, which compiles fewer programs. Several devices always use
    fixed."""
    rejection: bool = False
    """Sample chains from a trained drafter and verify them by rejection sampling."""
    batch_size: int = 1
    """Prompts decoded together; the printed time is the whole batch's."""
    devices: int = 1
    """Devices of all processes to shard the target and its caches over."""
    distributed: bool = False
    """Run as one of several processes (docs/multi-host.md); the first one prints."""
    json: bool = False
    """Print one JSON object per prompt on standard output, and nothing else; {"error": ...} for
    a prompt that cannot be used."""

    def run(self) -> int:
        import jaxspec
        from jaxspec.sharding import join_processes, mesh_of

        prompts = self._prompts()
        check_least(self, max_new_tokens=1, batch_size=1, devices=1)
        if self.distributed:
            join_processes()
        sampling = jaxspec.Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )
        name = target_name(self.target, self.drafter.drafter)
        self.drafter.check(name, rejection=self.rejection)
        jaxspec.enable_compilation_cache()
        dtype = chosen_dtype(self.dtype)
        target = jaxspec.load_target(
            name, dtype=dtype, devices=self.devices, weights=self.weights
        )
        options = dict(
            drafter=self.drafter.load(target, chain=self.rejection),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            sampling=sampling,
            batch_size=self.batch_size,
            rejection=self.rejection,
        )
        with mesh_of(target.params):
            return self._decode(target, prompts, options)

    def _decode(self, target, prompts: list, options: dict) -> int:
        import jax
        import numpy as np
        from tqdm import tqdm

        import jaxspec
        from jaxspec.decoding.requests import request_keys
        from jaxspec.prompts import usable_prompts
        from jaxspec.results import Interrupted

        rows, refused = usable_prompts(
            target,
            prompts,
            raw=self.raw,
            thinking=self.thinking,
            max_new_tokens=self.max_new_tokens,
        )
        leads = jax.process_index() == 0
        code = exits.left_out(refused.values() if leads else ())
        places, keys = list(rows), request_keys(self.seed, len(prompts))
        pace = self._prepare(target, list(rows.values()), options)
        starts = range(0, len(places), self.batch_size)
        hidden = len(starts) == 1 or not leads
        for start in tqdm(starts, unit="batch", disable=hidden, file=sys.stderr):
            batch = places[start : start + self.batch_size]
            own = keys[np.array(batch)]  # by the place in the file, whatever the batch
            ids, interrupt = [rows[place] for place in batch], None
            try:
                done = jaxspec.generate(target, ids, seed=own, **options)
            except Interrupted as early:
                done, interrupt = early.completions, early
            for place, completion in zip(batch, done, strict=True) if leads else ():
                self._print_refused(refused, before=place)
                self._print(target, completion)
            if interrupt is not None:
                raise interrupt
        if leads:
            self._print_refused(refused, before=len(prompts))
            if pace is not None:
                print(pace, file=sys.stderr)
        return code

    def _prepare(self, target, rows: list[list[int]], options: dict):
        """Compiles what `generate` runs, and sets its budget in the options: a number, or a
        measured `Pace` on one device, which is returned too."""
        import jaxspec
        from jaxspec.drafters.joined import with_survival

        drafter = options["drafter"]
        options["budget"] = min(self.drafter.budget, drafter.drafter.size)
        several = self.distributed or self.devices > 1
        if self.schedule == "fixed" or several or drafter.drafter.size < 2:
            options["capacity"] = jaxspec.warm_up(target, rows, **options)
            return None
        options["drafter"] = with_survival(drafter)
        names = ("drafter", "max_new_tokens", "budget", "batch_size", "rejection")
        pace = jaxspec.measure_pace(target, rows, **{name: options[name] for name in names})
        options["budget"] = pace
        jaxspec.warm_up(target, rows, **options)
        return pace

    def _prompts(self) -> list:
        given = [x is not None for x in (self.prompt, self.prompts, self.prompt_ids)]
        if sum(given) != 1:
            raise ValueError(
                f"{sum(given)} of --prompt, --prompts and --prompt-ids were given; expected one"
            )
        if self.prompt is not None:
            if not self.prompt.strip():
                raise ValueError("--prompt is empty; expected some text")
            return [self.prompt]
        if self.prompts is None:
            return read_prompt_ids(self.prompt_ids)
        rows = list(read_rows(self.prompts))
        if not any(isinstance(row, str) for row in rows):
            raise rows[0] if rows else ValueError(f"{self.prompts} holds no prompts")
        return rows

    def _print_refused(self, refused: dict[int, str], *, before: int) -> None:
        """Prints an error object per refused prompt, so that line i answers prompt i; removes
        them from `refused`."""
        for place in [place for place in refused if place < before]:
            reason = refused.pop(place)
            if self.json:
                print(json.dumps({"error": reason}), flush=True)

    def _print(self, target, completion) -> None:
        stats, cut = completion.stats, completion.finish == "interrupted"
        new_tokens = len(completion.token_ids)
        if self.json:
            row = dict(
                token_ids=completion.token_ids,
                text=completion.text,
                rounds=stats.rounds,
                committed=list(stats.committed),
                tau=stats.tau,
                new_tokens=new_tokens,
                seconds=completion.seconds,
                finish=completion.finish,
                dtype=str(target.params.embed.dtype),
            )
            if cut:
                row["interrupted"] = True
            print(json.dumps(row), flush=True)
            return
        print(completion.text if completion.text is not None else completion.token_ids)
        print(
            f"[{new_tokens} tokens, {stats.rounds} rounds, tau {stats.tau:.2f}, "
            f"{new_tokens / completion.seconds:.1f} tokens/s{', interrupted' * cut}]\n",
            flush=True,
        )
