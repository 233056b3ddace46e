"""`convert`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a target to an Orbax store (loads fast, on any mesh), safetensors, or fp8.

    Every command takes the output folder as --target. The output is read back and compared bit
    for bit. Vision towers and MTP layers of hybrids are left out, except for fp8.

    Examples:
      python -m jaxspec convert --target Qwen/Qwen3-8B --output qwen3-8b
      python -m jaxspec convert --target qwen3-8b --output back --to safetensors
      python -m jaxspec convert --target Qwen/Qwen3-8B --output qwen3-8b-fp8 --dtype fp8
    """

    target: str
    """Hugging Face folder or hub name, or a folder that `convert` wrote."""
    output: Path
    """A new folder."""
    to: Literal["orbax", "safetensors"] | None = None
    """Output format; orbax by default, safetensors with --dtype fp8."""
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] | None = None
    """Dtype of the written weights; the input's by default. fp8 stores linear layers in 8 bits
    with one scale per 128 x 128 block, as Qwen3-*-FP8 does (docs/quantised.md)."""
    fp8_lm_head: bool = False
    """With --dtype fp8: store the LM head in fp8 too, untied from the embedding."""
    json: bool = False
    """Print a summary as one JSON object on standard output."""

    def run(self) -> int:
        from jaxspec.checkpoints.convert import convert

        done = convert(
            self.target,
            self.output,
            format=self.to,
            dtype=self.dtype,
            fp8_lm_head=self.fp8_lm_head,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}))
        else:
            for layer, error in (done.errors or {}).items():
                print(f"{layer}: relative rounding error {error:.2%}")
            print(
                f"{done.folder}: {done.bytes / 1e9:.2f} GB of {done.dtype}, {done.arrays} "
                "arrays read back and equal bit for bit"
            )
            if done.left_out:
                counts = (f"{count} {part}" for part, count in done.left_out.items())
                print(f"left out: {', '.join(counts)} tensors")
        return 0
