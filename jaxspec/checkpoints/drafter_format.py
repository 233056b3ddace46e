"""The interface of published drafter formats; one object per format and kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints.drafter_files import DrafterTensors, Table
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.head import Vocabulary
from jaxspec.models.params import TargetParams

Config = DrafterConfig | EagleConfig


class DrafterFormat:
    """One published format of one kind of drafters.

    Attributes:
      name: name for users; formats of different kinds may share one.
      kind: type of its configurations.
      normed_last: whether a tap of the target's last layer is the output after the final norm,
        as in this package, rather than before it, which no drafter here reads.
      extra: names of tensors allowed besides the head's.
    """

    name: str
    kind: type
    normed_last = False
    extra: frozenset[str] = frozenset()

    def recognises(self, raw: dict[str, Any]) -> bool:
        """Whether a `config.json` that no earlier format recognises is of this format."""
        raise NotImplementedError

    def from_json(self, whole: JsonConfig, target: TargetConfig | None) -> Config:
        """The drafter that a `config.json` describes; see `drafter_config.from_json`."""
        raise NotImplementedError

    def to_json(
        self, c: Config, dtype: str, *, kept: int | None, verifier: str | None
    ) -> dict[str, Any]:
        """`config.json` of a drafter that the format can express."""
        raise NotImplementedError

    def missing(self, c: Config, kept: int | None) -> Mapping[str, Any]:
        """Features that the format has no key for, and whether the drafter needs each."""
        raise NotImplementedError

    def parts(self, c: Config) -> Table:
        """The head's tensors, by their current names."""
        raise NotImplementedError

    def todays_name(self, name: str) -> str:
        """The current name of a tensor in a file of any version or program."""
        return name

    def written_name(self, name: str) -> str:
        """The name of a tensor in a written file."""
        return name

    def repeated(self, tables: TargetParams | Vocabulary) -> Mapping[str, jax.Array]:
        """The target's arrays that a file repeats, which must equal the target's."""
        return {}

    def prepare(self, tensors: DrafterTensors, c: Config) -> None:
        """Gives a file's tensors the shapes of `parts`.

        Raises:
          ValueError: they belong to another kind of drafter with the same keys.
        """

    def arranged(
        self, tensors: dict[str, np.ndarray], kept: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The inverse of `prepare`: the head's tensors as in a file.

        Args:
          kept: the draft vocabulary, ids [V']; None for all.
        """
        return tensors

    def read_vocabulary(
        self,
        tensors: DrafterTensors,
        raw: dict[str, Any],
        c: Config,
        target: TargetParams,
        dtype,
    ) -> dict[str, Any]:
        """The file's own draft vocabulary, embedding and LM head, as arguments of
        `registry.trained`.

        Raises:
          ValueError: one is damaged, or its shape contradicts `raw`, the `config.json`.
        """
        raise NotImplementedError

    def vocabulary_tensors(
        self, vocabulary: Vocabulary, c: Config, dtype
    ) -> dict[str, np.ndarray]:
        """The tensors of a vocabulary, besides those of `repeated`.

        Raises:
          ValueError: the format cannot express it.
        """
        raise NotImplementedError

    def check_expressible(self, c: Config, kept: int | None) -> None:
        """Raises ValueError if the format cannot express the configuration."""
        tapped = not self.normed_last and c.target_layers is not None
        missing = self.missing(c, kept) | {
            "a tap of the last layer, after the final norm": tapped
            and c.target_layers - 1 in c.taps
        }
        for what, wanted in missing.items():
            if wanted:
                raise ValueError(
                    f"format {self.name!r} has no key for {what}, so other programs would run "
                    "the drafter differently; choose another format"
                )
