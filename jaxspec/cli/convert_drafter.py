"""`convert-drafter`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ConvertDrafter:
    """Convert a trained drafter to another published format, and list what is lost.

    The output is read back and compared before it appears. The command fails if the format
    cannot express the drafter.

    Examples:
      python -m jaxspec convert-drafter --drafter run/drafter --to speculators \\
          --target smollm2-135m --output for-vllm
      python -m jaxspec convert-drafter --drafter RedHatAI/Qwen3-8B-speculator.eagle3 \\
          --to eagle3 --output for-sglang
    """

    drafter: str
    """Folder or hub name of a trained drafter (repo::subfolder too)."""
    output: Path
    """A new folder."""
    to: Literal["dflash", "treeflash", "deepspec", "speculators", "eagle3"]
    """dflash: z-lab's format, for DFlash, DFlash2, JetSpec and DSpark; eagle3: the format of
    SpecForge and the EAGLE repository."""
    target: str | None = None
    """The drafter's target; by default the one that its files name."""
    json: bool = False
    """Print a summary as one JSON object on standard output."""

    def run(self) -> int:
        from jaxspec.checkpoints.convert_drafter import convert_drafter

        done = convert_drafter(self.drafter, self.output, format=self.to, target=self.target)
        if self.json:
            print(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}))
            return 0
        print(f"{done.folder}: from {done.source} to {done.format}, read back and equal")
        for what in done.lost:
            print(f"lost: {what}")
        return 0
