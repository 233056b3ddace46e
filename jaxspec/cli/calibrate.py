"""`calibrate`, from a shell."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jaxspec.cli import exits
from jaxspec.cli.options import NewTokens, Thinking, check_least, check_writable, target_name
from jaxspec.data.prompts import read_prompts


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Fit the temperatures of a drafter's confidence head, and store them in its config.

    The target answers the prompts; temperatures are fitted on half of the answers and assessed
    on the other half. The table gives, per slot, the calibration error (ECE), the error that a
    perfectly calibrated head would show by chance on as many rounds, AUROC and Brier score.
    Temperatures are stored only if they lower the mean ECE on that other half.

    Examples:
      python -m jaxspec calibrate --drafter run/drafter --prompts prompts.jsonl
    """

    drafter: Path
    """Folder of a trained drafter with a confidence head."""
    prompts: str
    """Prompts, in any format of docs/training.md."""
    target: str = "smollm2-135m"
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and caches."""
    max_new_tokens: NewTokens = 128
    temperature: float = 0.0
    """Sampling temperature of the answers; 0 is greedy."""
    batch_size: int = 8
    """Prompts decoded together."""
    thinking: Thinking = None
    picture: Path | None = None
    """Write a reliability diagram to this file; needs the extra 'plots'."""
    dry_run: bool = False
    """Measure only; store nothing."""

    def run(self) -> int:
        import numpy as np

        import jaxspec
        from jaxspec.checkpoints.drafters import save_temperatures
        from jaxspec.evaluation import calibration
        from jaxspec.evaluation.plots import check_matplotlib
        from jaxspec.evaluation.walk import record

        check_least(self, max_new_tokens=1, batch_size=1)
        check_writable("picture", self.picture)
        if self.picture is not None:
            check_matplotlib()
        sampling = jaxspec.Sampling(temperature=self.temperature)
        name = target_name(self.target, str(self.drafter))
        unread: list[str] = []
        prompts = read_prompts(self.prompts, unread)
        if len(prompts) < 2:
            raise ValueError(
                f"{self.prompts} holds one prompt; expected at least two: half are held out"
            )
        jaxspec.enable_compilation_cache()
        target = jaxspec.load_target(name, dtype=self.dtype)
        drafter = jaxspec.load_drafter(str(self.drafter), target)
        config = drafter.drafter.head_config
        if config is None or config.confidence is None:
            raise ValueError(
                f"--drafter {self.drafter} has no confidence head: nothing to calibrate"
            )
        spare = drafter.drafter.depth + 1
        rows, code = self._usable(target, prompts, unread, spare)
        answers = record(
            target,
            rows,
            max_new_tokens=self.max_new_tokens,
            spare=spare,
            sampling=sampling,
            batch_size=self.batch_size,
        )

        def rounds(part):
            return calibration.rollouts(target, drafter, part, batch=self.batch_size)

        fitted, held_out = rounds(answers[::2]), rounds(answers[1::2])
        temperatures = calibration.fit_temperatures(fitted)
        raw = calibration.assess(held_out)
        scaled = calibration.assess(held_out, temperatures)
        _print_slots(temperatures, raw, scaled)
        before, after = (float(np.nanmean([q.ece for q in rows])) for rows in (raw, scaled))
        print(f"mean ECE on held-out answers: {before:.4f} -> {after:.4f}")
        if self.picture is not None:
            calibration.draw_reliability([("raw", raw), ("scaled", scaled)], self.picture)
        if not after < before:
            print("nothing stored: the temperatures do not lower the mean ECE")
        elif not self.dry_run:
            save_temperatures(self.drafter, temperatures)
            print(f"stored in {self.drafter}/config.json")
        return code

    def _usable(self, target, prompts, unread, spare) -> tuple[list, int]:
        """The prompts that the target can answer, and the exit code; others are printed."""
        from jaxspec.prompts import usable_prompts

        options = dict(thinking=self.thinking, max_new_tokens=self.max_new_tokens, spare=spare)
        rows, refused = usable_prompts(target, prompts, raw=False, **options)
        code = exits.left_out([*unread, *refused.values()])
        if len(rows) < 2:
            raise ValueError(
                f"{self.prompts}: {len(rows)} of {len(prompts)} prompts can be used; expected "
                "at least two: half are held out"
            )
        return list(rows.values()), code


def _print_slots(temperatures, raw, scaled) -> None:
    """One line per slot: its temperature, and its calibration before and after scaling."""
    print("slot  temperature  rounds  survival  ECE raw  ECE scaled  by chance  AUROC  Brier")
    for slot, (t, r, s) in enumerate(zip(temperatures, raw, scaled, strict=True), 1):
        print(
            f"{slot:4d}  {t:11.3f}  {r.rounds:6d}  {r.happened:8.3f}  {r.ece:7.4f}  "
            f"{s.ece:10.4f}  {s.chance:9.4f}  {s.auroc:5.3f}  {s.brier:.4f}"
        )
