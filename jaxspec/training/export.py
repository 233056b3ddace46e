"""The end of a run: its drafter in a published format, with a model card."""

from __future__ import annotations

from pathlib import Path

from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.checkpoints.speculators import verifier_name
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.training.model_card import model_card
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.run_folder import DRAFTER
from jaxspec.whole_files import new_folder


def export(
    config: TrainConfig, drafter: LoadedDrafter, run: Path, *, target: str, step: int
) -> None:
    """Writes a run's drafter, atomically.

    Args:
      target: name or folder, which the checkpoint records if its format can.
      step: step after which the weights were taken.

    Raises:
      ValueError: a weight is not finite.
    """
    folder = run / DRAFTER
    target = verifier_name(target, folder)
    with new_folder(folder) as partial:
        try:
            save_drafter(partial, drafter, verifier=target)
        except ValueError as error:
            raise ValueError(
                f"{error}; resume from an earlier checkpoint with --resume-step"
            ) from error
        (partial / "README.md").write_text(model_card(run, config, step=step), encoding="utf-8")
