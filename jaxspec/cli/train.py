"""`train`, from a shell."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jaxspec.cli import exits
from jaxspec.cli.options import check_least
from jaxspec.cli.run_config import settings_of

EAGLES = ("eagle3", "peagle")  # families without blocks


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a drafter on the target's own answers.

    An interrupted run resumes when started again, and so does a finished one with more --steps.

    Examples:
      python -m jaxspec train --data data.jsonl --output run --steps 2000
      python -m jaxspec generate --drafter run/drafter --prompt "Why is the sky blue?"
      python -m jaxspec train --data data.jsonl --output causal --family jetspec \\
          --sequential rnn --features features --steps 2000
      python -m jaxspec train --data more.jsonl --output again --initial run/drafter
      python -m jaxspec train --config run/run.toml --output repeated
    """

    data: tuple[str, ...]
    """Conversations, in any format of docs/training.md: from `regenerate`, with token ids, or
    from elsewhere, as text that the target's chat template renders."""
    output: Path
    """Folder of the run: run.toml, metrics.jsonl, checkpoints, and at the end `drafter` with
    its model card."""
    config: Path | None = None
    """TOML file of these flags (`batch_size = 8`), such as the run.toml of another run; flags
    on the command line win."""
    target: str = "smollm2-135m"
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and of the exported weights; training weights are always
    float32."""
    family: Literal[
        "dspark", "dflash", "jetspec", "treeflash", "dflash2", "eagle3", "peagle"
    ] = "dspark"
    """Published recipe for slots, heads and losses. The next four options change the drafter,
    except eagle3 and peagle."""
    sequential: Literal["none", "markov", "gated", "rnn", "mlp"] | None = None
    """Sequential head, which conditions each slot on the token before it."""
    confidence_head: Literal["none", "hidden", "hidden_and_previous"] | None = None
    """Inputs of the confidence head: the slot's hidden state, or also the token before it."""
    causal: bool | None = None
    """Let a slot attend to earlier slots of its block only, rather than to all."""
    block_size: int | None = None
    """Slots per block, the anchor's included; the family's by default."""
    taps: tuple[int, ...] = ()
    """Target layers that the drafter reads, 0-based; the family's by default."""
    unroll: int | None = None
    """Tokens that eagle3 (one after another) and peagle (all at once) are trained to draft; 7
    by default."""
    validation: str | None = None
    """Held-out prompts, in any format of docs/training.md; the weights with the best tau on
    them are exported."""
    thinking: bool | None = None
    """Thinking mode of the validation prompts (Qwen3); by default the data's, or the chat
    template's default if the rows differ."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 8
    """Rows per optimizer step."""
    micro_batch: int = 8
    """Rows per forward; gradients are accumulated over the batch."""
    anchors: int | None = None
    """Training blocks per row, 512 by default; for eagle3 and peagle the tokens after which
    is drafted, all by default."""
    packed: int = 0
    """Tokens per row into which several sequences are packed; 0 gives each its own row."""
    max_length: int = 1024
    """Maximum tokens per sequence; longer ones are truncated."""
    min_supervised: int = 14
    """Minimum answer tokens per sequence; shorter ones are dropped."""
    any_target: bool = False
    """Also train on answers that another model wrote."""
    draft_vocab: int = 0
    """Size of the draft vocabulary, the most frequent tokens of the data; 0 drafts all tokens.
    A smaller one trains and drafts faster; output stays lossless."""
    learning_rate: float = 6e-4
    """Peak rate of AdamW, after a linear warm-up of 4% of the steps; then a cosine to zero.
    Gradients are clipped at a global norm of 1."""
    weight_decay: float = 0.0
    """Of AdamW, on all weights."""
    initial: str = "target"
    """Initial weights: target (its last layers) | random | folder or hub name of a drafter,
    whose configuration is then used; the losses remain the family's."""
    layers: int | None = None
    """Layers of the drafter; the family's by default."""
    rank: int | None = None
    """Width of the sequential head's token embedding; the family's by default."""
    mask_token_id: int | None = None
    """Token id that no text uses, whose embedding fills the slots; needed for targets without a
    preset."""
    cross_entropy: float | None = None
    """Weight of the cross-entropy loss; the family's by default."""
    kl: float | None = None
    """Weight of the KL divergence from the target; the family's by default."""
    total_variation: float | None = None
    """Weight of the total variation distance from the target; the family's by default."""
    weighting: Literal["exponential", "uniform", "dpace"] | None = None
    """Weighting of a block's slots; the family's by default."""
    truth: Literal["data", "target"] | None = None
    """Label of each slot: the token in the data, or the target's argmax; the family's by
    default."""
    missing: Literal["inject", "skip"] | None = None
    """For slots of dflash2's selector whose label is not a candidate: replace the last
    candidate by the label, or skip the slot."""
    validate_every: int = 0
    """Steps between validations; 0 validates only at the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    resume_step: int | None = None
    """Step of the checkpoint to resume from, the newest by default; later checkpoints are
    deleted. The learning rate may be changed. Leave it out to resume that run after an
    interruption."""
    tensorboard: bool = False
    """Also write the metrics to OUTPUT/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project that also receives the metrics."""
    devices: int = 1
    """Devices of all processes to train on; rows, the drafter and its optimizer are sharded
    over them."""
    target_devices: int = 1
    """Devices that share one copy of the target (tensor parallelism)."""
    distributed: bool = False
    """Run as one of several processes (docs/multi-host.md), which all share OUTPUT."""
    features: Path | None = None
    """Folder that caches the target's features, for data used more than once. Missing features
    are computed first, and their size is printed. Without it every step computes its own."""
    features_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of a new feature cache; the target's dtype by default."""
    seed: int = 0
    """Of the weights, the order of the data and the anchors; 0 … 4294967295."""

    def run(self) -> int:
        import jaxspec
        from jaxspec import checkpoints
        from jaxspec.data.rows import read_examples
        from jaxspec.data.sources import open_source
        from jaxspec.sharding import join_processes
        from jaxspec.training.trainer import train

        if self.distributed:
            join_processes()
        mesh = self._mesh()
        jaxspec.enable_compilation_cache()
        self._check()
        config = self._config(checkpoints.read_config(self.target))
        data = [open_source(name) for name in self.data]
        validation = None if self.validation is None else open_source(self.validation)
        target = jaxspec.load_target(self.target, dtype=self.dtype)
        if target.tokenizer is None:
            raise ValueError(f"target {self.target!r} has no tokenizer to read the data with")
        examples = read_examples(
            data,
            target,
            max_length=self.max_length,
            min_supervised=self.min_supervised,
            any_target=self.any_target,
        )
        folder = train(
            config,
            target,
            examples,
            self.output,
            prompts=self._prompts(validation, target, examples),
            resume_step=self.resume_step,
            features=self.features,
            features_dtype=self.features_dtype,
            tensorboard=self.tensorboard,
            wandb=self.wandb,
            flags=settings_of(self),
            mesh=mesh,
        )
        if folder is None:
            back = "" if self.resume_step is None else " without --resume-step"
            print(f"interrupted, saved in {self.output}; the same command{back} resumes")
            return exits.INTERRUPTED
        print(f"drafter: {folder}")
        return exits.DONE

    def _check(self) -> None:
        """Refuses missing data, lengths out of range, options that would have no effect, a step
        of a run that has not begun, and loggers that are not installed."""
        from jaxspec.training.metrics import check_writers
        from jaxspec.training.run_folder import check_begun

        if not self.data:
            raise ValueError("nothing to train on: give --data, at least one source")
        check_begun(self.output, self.resume_step)
        check_least(self, max_length=1, min_supervised=1)
        check_writers(tensorboard=self.tensorboard, wandb=self.wandb is not None)
        if self.validate_every and self.validation is None:
            raise ValueError(
                "--validate-every has no prompts; give --validation, or leave it out"
            )
        if self.features_dtype is not None and self.features is None:
            raise ValueError("--features-dtype has no cache; give --features, or leave it out")

    def _prompts(self, validation, target, examples) -> list[list[int]]:
        """The validation prompts that the target can answer; the others are printed."""
        from jaxspec.data.prompts import read_prompts
        from jaxspec.prompts import usable_prompts
        from jaxspec.training.validation import NEW_TOKENS, thinking_of

        if validation is None:
            return []
        unread: list[str] = []
        rows, refused = usable_prompts(
            target,
            read_prompts(validation, unread),
            raw=False,
            thinking=thinking_of(examples) if self.thinking is None else self.thinking,
            max_new_tokens=NEW_TOKENS,
        )
        exits.left_out([*unread, *refused.values()])
        return list(rows.values())

    def _config(self, target):
        from jaxspec.drafters.eagle_head import EagleConfig
        from jaxspec.training.recipe import OptimizerConfig, TrainConfig

        drafter = self._drafter(target)
        anchors = 0 if isinstance(drafter, EagleConfig) else TrainConfig.anchors
        return TrainConfig(
            drafter=drafter,
            loss=self._loss(),
            optimizer=OptimizerConfig(self.learning_rate, weight_decay=self.weight_decay),
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            anchors=anchors if self.anchors is None else self.anchors,
            packed=self.packed,
            draft_vocab=self.draft_vocab,
            initial=self.initial,
            seed=self.seed,
            validate_every=self.validate_every,
            checkpoint_every=self.checkpoint_every,
        )

    def _mesh(self):
        from jaxspec.sharding import make_mesh

        if self.devices < 1 or self.target_devices < 1 or self.devices % self.target_devices:
            raise ValueError(
                f"--devices is {self.devices} and --target-devices {self.target_devices}; "
                "expected a multiple of --target-devices"
            )
        if self.devices == 1:
            return None
        return make_mesh(data=self.devices // self.target_devices, model=self.target_devices)

    def _drafter(self, target):
        from jaxspec.checkpoints.drafters import read_drafter_config
        from jaxspec.training.recipe import Preset, drafter_config, find_preset

        if self.family in EAGLES and self.initial in ("target", "random"):
            return self._eagle(target)
        sizes = _given(mask_token_id=self.mask_token_id, layers=self.layers, rank=self.rank)
        changes = _given(
            sequential=self.sequential,
            confidence=self.confidence_head,
            causal=self.causal,
            block_size=self.block_size,
            taps=self.taps or None,
            unroll=self.unroll,
        )
        if self.initial not in ("target", "random"):
            if sizes or changes:
                raise ValueError(
                    f"--initial {self.initial} fixes the drafter's configuration; leave out "
                    f"{', '.join(sizes | changes)}"
                )
            return read_drafter_config(self.initial, target)
        if self.unroll is not None:
            raise ValueError(
                f"--unroll is for --family eagle3 and peagle, not {self.family}; leave it out"
            )
        sizes["mask_token_id"] = self._mask()
        preset = dataclasses.replace(find_preset(self.target) or Preset(**sizes), **sizes)
        changes = {name: None if x == "none" else x for name, x in changes.items()}
        config = drafter_config(self.family, target, preset, **changes)
        if self.rank not in (None, config.rank):
            raise ValueError(
                f"--rank is {self.rank}, but this drafter has no head of low rank; leave it "
                "out, or give --sequential markov, gated or rnn"
            )
        return config

    def _eagle(self, target):
        from jaxspec.training.recipe import eagle_config, parallel_eagle_config

        masked = self.family == "peagle"
        names = ("sequential", "confidence_head", "causal", "block_size", "rank")
        names += () if masked else ("mask_token_id",)
        foreign = [name for name in names if getattr(self, name) is not None]
        if foreign:
            raise ValueError(
                f"--family {self.family} has no blocks or separate heads; leave out "
                f"{', '.join(foreign)}"
            )
        changes = dict(taps=self.taps or None, steps=self.unroll, num_layers=self.layers)
        if masked:
            return parallel_eagle_config(target, self._mask(), **_given(**changes))
        return eagle_config(target, **_given(**changes))

    def _mask(self) -> int:
        """The mask token id: as given, or of the target's preset.

        Raises:
          ValueError: there is neither.
        """
        from jaxspec.training.recipe import PRESETS, find_preset

        preset = find_preset(self.target)
        if preset is None and self.mask_token_id is None:
            raise ValueError(
                f"target {self.target!r} has no preset (only {', '.join(PRESETS)}); give "
                "--mask-token-id, a token id that no text uses"
            )
        return preset.mask_token_id if self.mask_token_id is None else self.mask_token_id

    def _loss(self):
        from jaxspec.training.recipe import loss_config

        loss = loss_config(self.family)
        given = _given(
            cross_entropy=self.cross_entropy, kl=self.kl, total_variation=self.total_variation
        )
        loss = dataclasses.replace(loss, mixture=dataclasses.replace(loss.mixture, **given))
        given = _given(weighting=self.weighting, truth=self.truth, missing=self.missing)
        return dataclasses.replace(loss, **given)


def _given(**options):
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
