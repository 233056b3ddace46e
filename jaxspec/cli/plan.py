"""`plan`, from a shell."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from jaxspec.cli import exits
from jaxspec.cli.options import check_tree_options
from jaxspec.config import TreeKind


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate a setup's memory and fastest possible step on H100s, without a GPU.

    Compiles the real programs from shapes alone, without weights. Needs the environment that
    `make h100` builds, or --no-compile, which does not count temporaries. Floors (lower bounds
    on time) are computed from datasheet numbers, not measured. Exit code 1 when something does
    not fit.

    Examples:
      .venv-h100/bin/python -m jaxspec plan --target Qwen/Qwen3-8B --context 32768 --batch 4 \\
          --budget 128 --devices 1 2
      python -m jaxspec plan --target qwen3-32b --devices 1 2 4 8 --no-compile
    """

    target: str
    """Hub name or preset of a Qwen3, smollm2-135m, a folder with a config.json, or a GGUF
    file."""
    drafter: str = "published"
    """published (sized as DFlash's and JetSpec's) | none | ngram | mtp (the
    multi-token-prediction layer of hybrids) | folder of a trained drafter. +ngram after any but
    none and ngram joins prompt lookup."""
    tree: TreeKind = "best_first"
    """How a tree grows from the drafter's scores."""
    width: int | None = None
    """Children per expanded node (best_first, path_conditioned of EAGLE-3) or per scored parent
    (transitions). Default: 4."""
    candidates: int | None = None
    """Parents scored per depth (path_conditioned, transitions). Default: 16."""
    budget: int = 64
    """Nodes verified per round, root included; rounded up to a power of two."""
    context: int = 4096
    """Tokens per sequence, prompt and answer together."""
    batch: int = 1
    """Sequences decoded together."""
    devices: tuple[int, ...] = (1,)
    """Numbers of H100s to plan for."""
    fp8: bool = False
    """Hold attention and feed-forward weights in fp8, with one scale per 128 x 128 block."""
    fp8_lm_head: bool = False
    """With --fp8: hold the LM head in fp8 too."""
    tau: tuple[float, ...] = (2.0, 4.0, 6.0)
    """Acceptance lengths (tokens per round) to report speedups for."""
    compile: bool = True
    """Compile a round and a prefill chunk to count their temporaries."""
    json: bool = False
    """Print one JSON object per number of devices on standard output."""

    def run(self) -> int:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plan is for GPUs that are not here
        from tqdm import tqdm

        from jaxspec.planning.plan import PLANNED, plan
        from jaxspec.planning.setup import Setup

        if self.budget < 1:
            raise ValueError(f"--budget is {self.budget}; expected at least 1 (the root)")
        target = _target_config(self.target)
        drafter = self._drafter(target)
        setups = [
            Setup(
                target,
                drafter,
                self.context,
                self.batch,
                count,
                fp8=self.fp8,
                fp8_lm_head=self.fp8_lm_head,
            )
            for count in self.devices
        ]
        fits = True
        programs = PLANNED if self.compile else ()
        for setup in tqdm(setups, unit="plan", file=sys.stderr, disable=len(setups) == 1):
            found = plan(setup, programs)
            fits &= found.fits
            print(json.dumps(self._row(found)) if self.json else self._text(found), flush=True)
        return exits.DONE if fits else exits.FAULT

    def _drafter(self, target):
        from jaxspec.config import TreeConfig, tree_size
        from jaxspec.drafters.joined import beside_lookup
        from jaxspec.drafters.mtp import mtp_config
        from jaxspec.drafters.ngram import PromptLookup
        from jaxspec.drafters.plain import Plain
        from jaxspec.drafters.registry import LOOKUP_TOO, of_config
        from jaxspec.planning.setup import published_drafter

        names = ("width", "candidates")
        shape = {name: x for name in names if (x := getattr(self, name)) is not None}
        check_tree_options(self.drafter, self.tree, list(shape))
        size = tree_size(self.budget)
        if self.drafter == "none":
            return Plain()
        if self.drafter == "ngram":
            return PromptLookup(size=size)
        name = self.drafter.removesuffix(LOOKUP_TOO)
        if name == "published":
            config = published_drafter(target)
        elif name == "mtp" or name.startswith("mtp:"):
            config = mtp_config(target)
        else:
            from jaxspec.checkpoints.drafters import read_drafter_config

            config = read_drafter_config(name, target)
        tree = TreeConfig(self.tree, size, **shape)
        drafter = of_config(config, tree)
        return drafter if name == self.drafter else beside_lookup(drafter)

    def _row(self, plan) -> dict:
        from pallas_kernels.h100.target import MEMORY_BYTES

        return dict(
            target=self.target,
            drafter=self.drafter,
            context=self.context,
            batch=self.batch,
            nodes=plan.setup.drafter.size,
            devices=plan.setup.devices,
            fp8=plan.setup.fp8,
            fp8_lm_head=plan.setup.fp8_lm_head,
            parts=plan.parts,
            repeated=plan.repeated,
            programs={n: dataclasses.asdict(p) for n, p in plan.programs.items()},
            peak=plan.peak,
            memory=MEMORY_BYTES,
            fits=plan.fits,
            most_rows=plan.most_rows,
            floor_ms=plan.floors,
            speedup_at_best={str(tau): plan.speedup(tau) for tau in self.tau},
        )

    def _text(self, plan) -> str:
        row = self._row(plan)
        gib = lambda size: f"{size / 2**30:9.2f} GiB"  # noqa: E731
        dtype = "fp8 and bfloat16" if self.fp8 else "bfloat16"
        lines = [
            f"{self.target}, {dtype}, on {row['devices']} H100: {row['batch']} rows of "
            f"{row['context']} tokens, {row['nodes']} nodes a round; per device",
            *(f"  {name:<34}{gib(size)}" for name, size in plan.parts.items() if size),
        ]
        if plan.repeated:
            lines.append(f"  {'embedding, LM head: counted twice':<34}{gib(-plan.repeated)}")
        for name, program in plan.programs.items():
            lines.append(f"  {name + ', temporaries':<34}{gib(program.temporaries)}")
        known = "at peak" if plan.programs else "without temporaries, not compiled"
        share = plan.peak / row["memory"]
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"  {known:<34}{gib(plan.peak)}  {share:.0%} of the memory: {verdict}")
        if 0.75 < share <= 1:
            lines.append(
                "  JAX takes 75% by itself: "
                f"set XLA_PYTHON_CLIENT_MEM_FRACTION={share + 0.01:.2f}"
            )
        lines.append(f"  batch that fits, an estimate       {row['most_rows']:9}")
        floors = ", ".join(f"{name} {ms:.2f}" for name, ms in plan.floors.items())
        lines.append(f"  floor in ms, estimates at full context: {floors}")
        speedups = ", ".join(f"{plan.speedup(tau):.2f}x at tau {tau:g}" for tau in self.tau)
        lines.append(f"  speedup at best over plain decoding: {speedups}\n")
        return "\n".join(lines)


def _target_config(name: str):
    """The configuration of a preset, of its hub name, or of a local checkpoint."""
    from jaxspec import checkpoints
    from jaxspec.checkpoints import catalog
    from jaxspec.models.presets import PRESETS

    presets = {hub.lower(): preset for preset, hub in catalog.HUB.items()}
    preset = presets.get(name.lower().replace("-thinking-2507", "-instruct-2507"), name.lower())
    if preset in PRESETS:
        return PRESETS[preset]
    if name != catalog.DEFAULT and not Path(name).exists():
        raise ValueError(
            f"no preset and no folder is called {name}; expected {', '.join(PRESETS)}, "
            f"their hub names, {catalog.DEFAULT}, a folder with a config.json, or a GGUF file"
        )
    return checkpoints.read_config(name)
