"""Training configurations, and the published recipes."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import PurePath
from typing import Any

from jaxspec.arguments import at_least, check_field, check_seed
from jaxspec.config import LOW_RANK, DrafterConfig, TargetConfig, spaced_taps
from jaxspec.drafters.eagle_head import EagleConfig, ParallelEagleConfig
from jaxspec.training.batches import PACKED_UNIT
from jaxspec.training.losses import LossConfig
from jaxspec.training.unrolled_loss import check_loss
from jaxspec.training.vocabulary_loss import Mixture

# What each family adds to a bidirectional block whose slots predict their own positions, and
# its published losses.
BACKBONES = {
    "dspark": dict(
        block_size=7,
        predict_next=True,
        sequential="markov",
        confidence="hidden_and_previous",
    ),
    "dflash": dict(block_size=16),
    "jetspec": dict(block_size=16, causal=True),
    "treeflash": dict(block_size=16, sequential="mlp"),
    "dflash2": dict(
        block_size=8, sequential="bilinear", candidates=16, conv_taps=2, conv_group=16
    ),
}
LOSSES = {
    "dspark": LossConfig(),
    "dflash": LossConfig(Mixture(1.0, 0.0, 0.0), confidence=0.0, decay=7.0),
    "jetspec": LossConfig(Mixture(0.0, 1.0, 0.0), confidence=0.0, weighting="uniform"),
    "treeflash": LossConfig(Mixture(1.0, 0.0, 0.0), confidence=0.0, decay=7.0),
    # As `speculators` trains it; NeMo has missing="skip" and cross-entropy on the data.
    "dflash2": LossConfig(Mixture(0.0, 1.0, 0.0), confidence=0.0, truth="target"),
    # Step j has weight 0.8^j, as in SpecForge, NeMo and DeepSpec.
    "eagle3": LossConfig(
        Mixture(0.0, 1.0, 0.0), confidence=0.0, truth="target", decay=-1 / math.log(0.8)
    ),
    # The mean over all depths, as in `speculators`, which draws a part of the deeper rows.
    "peagle": LossConfig(
        Mixture(0.0, 1.0, 0.0),
        confidence=0.0,
        truth="target",
        weighting="uniform",
        reduction="weights",
    ),
}
BLOCKS = tuple(BACKBONES)  # families of the block drafter
FAMILIES = (*BLOCKS, "eagle3", "peagle")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine to zero.

    Attributes:
      warmup: share of the steps.
      clip: largest global norm of the gradient.
    """

    learning_rate: float = 6e-4
    warmup: float = 0.04
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0

    def __post_init__(self):
        at_least(0, self, "learning_rate", "weight_decay")
        check = functools.partial(check_field, self)
        check("warmup", 0 <= self.warmup <= 1, "a share of the steps, 0 … 1")
        for name in ("beta1", "beta2"):
            check(name, 0 <= getattr(self, name) < 1, "at least 0, less than 1")
        check("clip", self.clip > 0, "more than 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Runs with equal settings and data end with equal weights.

    Attributes:
      steps: updates of the weights.
      batch_size: rows per update.
      micro_batch: rows per forward; the gradients of a batch are summed in float32.
      anchors: tokens per row after which is drafted: blocks, or unrolled steps of EAGLE-3 and
        P-EAGLE. These take every token with 0, as published.
      packed: length of rows that hold several sequences; 0 puts one sequence in each row.
      draft_vocab: size of the draft vocabulary, the examples' most frequent tokens; 0 drafts
        all tokens, or those of the initial drafter.
      initial: "target" copies the target's last layers, "random" draws weights; else the folder
        or hub name of an initial drafter, whose configuration must be `drafter`.
      validate_every, checkpoint_every: interval in steps; 0: only at the end.
      keep: number of newest checkpoints to keep, besides the best.
    """

    drafter: DrafterConfig | EagleConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    batch_size: int = 8
    micro_batch: int = 8
    anchors: int = 512
    packed: int = 0
    draft_vocab: int = 0
    initial: str = "target"
    seed: int = 0
    validate_every: int = 0
    checkpoint_every: int = 100
    keep: int = 2

    def __post_init__(self):
        at_least(1, self, "steps", "batch_size", "micro_batch", "keep")
        unrolled = isinstance(self.drafter, EagleConfig)
        at_least(0 if unrolled else 1, self, "anchors")
        check_seed(self)
        if unrolled:
            check_loss(self.loss)
        selects = getattr(self.drafter, "sequential", None) == "bilinear"
        if self.loss.missing != LossConfig.missing and not selects:
            raise ValueError(
                f"LossConfig.missing is {self.loss.missing!r}, which needs dflash2's selector; "
                f"expected {LossConfig.missing!r} with this drafter"
            )
        check = functools.partial(check_field, self)
        even = self.batch_size % self.micro_batch == 0
        check("batch_size", even, f"a multiple of micro_batch = {self.micro_batch}")
        vocabulary = self.drafter.vocab_size
        good = self.draft_vocab == 0 or 2 <= self.draft_vocab <= vocabulary
        check(
            "draft_vocab",
            good,
            f"2 … {vocabulary}, the target's vocabulary, or 0 for all of it",
        )
        whole = self.packed >= 0 and self.packed % PACKED_UNIT == 0
        check("packed", whole, f"a multiple of {PACKED_UNIT}, or 0")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a drafter for one target.

    Attributes:
      mask_token_id: token id that no text uses.
      rank: of the sequential head, if there is one.
    """

    mask_token_id: int
    layers: int = 5
    taps: int = 5
    rank: int = 256


QWEN3 = Preset(mask_token_id=151_669)
PRESETS = {
    "smollm2-135m": Preset(mask_token_id=16, layers=3, rank=128),
    "qwen3-0.6b": QWEN3,
    "qwen3-1.7b": QWEN3,
    "qwen3-4b": QWEN3,
    "qwen3-8b": QWEN3,
    "qwen3-14b": QWEN3,
    "qwen3-32b": QWEN3,
    "qwen3-30b-a3b": QWEN3,
}


def find_preset(target: str) -> Preset | None:
    """The preset of a target, by the last part of its name or path, in lower case.

    >>> find_preset("Qwen/Qwen3-8B") == QWEN3
    True
    """
    return PRESETS.get(PurePath(target).name.lower())


def drafter_config(
    family: str, target: TargetConfig, preset: Preset, **changes: Any
) -> DrafterConfig:
    """A drafter of one of the families `BLOCKS`, with layers shaped like the target's.

    Args:
      changes: fields of `DrafterConfig` instead of the family's; a sequential head's rank is
        always the preset's.

    Raises:
      ValueError: the family is unknown, or the changes do not fit it.
    """
    if family not in BLOCKS:
        raise ValueError(f"the drafter family is {family!r}; expected one of {BLOCKS}")
    own = BACKBONES[family] | changes
    if own.get("sequential") != "bilinear":
        own.pop("candidates", None)
    low_rank = own.get("sequential") in LOW_RANK
    shape = dict(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=preset.layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        target_layers=target.num_layers,
        taps=spaced_taps(target.num_layers, preset.taps),
        mask_token_id=preset.mask_token_id,
        rank=preset.rank if low_rank else 0,
        rope_theta=target.rope_theta,
        rms_norm_eps=target.rms_norm_eps,
        max_positions=target.max_positions,
    )
    return DrafterConfig(**(shape | own))


def eagle_config(target: TargetConfig, **changes: Any) -> EagleConfig:
    """An EAGLE-3 drafter with a layer of the target's sizes, unrolled for 7 steps.

    All its formats can express it: a Llama layer, and only the published norms.

    Args:
      changes: fields of `EagleConfig`.

    Raises:
      ValueError: the changes are inconsistent.
    """
    layers = target.num_layers
    taps = (1, layers // 2 - 1, layers - 4) if layers >= 8 else spaced_taps(layers, 3)
    shape = dict(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        target_layers=layers,
        taps=tuple(tap for tap in taps if tap < layers - 1),
        steps=7,
        rope_theta=target.rope_theta,
        rope_scaling=target.rope_scaling,
        rms_norm_eps=target.rms_norm_eps,
        max_positions=target.max_positions,
    )
    return EagleConfig(**(shape | changes))


def parallel_eagle_config(
    target: TargetConfig, mask_token_id: int, **changes: Any
) -> ParallelEagleConfig:
    """A P-EAGLE drafter of 7 tokens at once: the layers of `eagle_config`, and a mask.

    Args:
      mask_token_id: token id that no text uses.
      changes: other fields of `ParallelEagleConfig`.

    Raises:
      ValueError: the changes are inconsistent.
    """
    shape = vars(eagle_config(target, **changes))
    return ParallelEagleConfig(**shape, mask_token_id=mask_token_id)


def loss_config(family: str) -> LossConfig:
    """The published loss of each of `FAMILIES`; DFlash's for TreeFlash, whose paper names none.

    Raises:
      ValueError: the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"the drafter family is {family!r}; expected one of {FAMILIES}")
    return LOSSES[family]
