"""The training loop: resumable, interruptible, ending with a checkpoint that decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jaxspec.checkpoints.drafters import load_drafter, save_drafter
from jaxspec.checkpoints.store import Store
from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.interrupts import postponed
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt
from jaxspec.settings import own_settings
from jaxspec.sharding import DATA, mesh_of, place
from jaxspec.training import draft_vocabulary
from jaxspec.training.batches import Position
from jaxspec.training.feature_cache import open_features
from jaxspec.training.loading import Loader
from jaxspec.training.metrics import MetricsLog
from jaxspec.training.networks import network_of, trained_drafter
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.run_folder import DRAFTER, claimed, enter
from jaxspec.training.sharding import any_process, gather, state_shardings
from jaxspec.training.step import TrainState, init_state, learning_rate, train_step
from jaxspec.training.validation import walked_tau

METRICS, TENSORBOARD, CHECKPOINTS = "metrics.jsonl", "tensorboard", "checkpoints"
DRAFT_VOCABULARY = "draft_vocabulary.json"


@own_settings()
def train(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    folder: str | Path,
    *,
    prompts: Sequence[Prompt] = (),
    resume_step: int | None = None,
    features: str | Path | None = None,
    features_dtype: str | None = None,
    tensorboard: bool = False,
    mesh: Mesh | None = None,
) -> Path | None:
    """Trains a drafter, or resumes the run in the folder.

    The folder gets `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end, `drafter/`:
    the best weights by walked tau, or the last ones without prompts; with a draft vocabulary
    also `draft_vocabulary.json`, its tokens and the share of the target's that they cover. A
    run that was killed goes on from its newest checkpoint and ends with the same weights, bit
    for bit on the same devices. With more steps a finished run goes on: its schedule is longer,
    its optimizer the same, and the drafter it had stays as `drafter-STEPS`. SIGTERM or Ctrl-C
    ends it after the current step, with a checkpoint.

    Args:
      examples: from `data.rows.read_examples`.
      prompts: held out, for validation.
      resume_step: checkpoint to go on from, with another optimizer if need be; those after it
        are removed. The newest by default.
      features: folder of the target's features (`feature_cache`), filled first where it is not
        whole; by default they are computed with every step and not kept.
      features_dtype: what a new folder stores them in; the target's dtype by default.
      tensorboard: writes the metrics to `tensorboard/` too.
      mesh: devices to train on (`jaxspec.sharding`), of all processes if there are several:
        each calls this function with the same arguments and a folder they share. A run may go
        on with other devices.

    Returns:
      The folder of the drafter, or None if the run was interrupted.

    Raises:
      ValueError: the folder holds a run with other settings, of another target, on other data,
        or another process trains in it; the checkpoint is damaged; the loss is not a number;
        or several processes are asked to validate.
    """
    folder, leads = Path(folder), jax.process_index() == 0
    _check(config, prompts, mesh)
    with contextlib.ExitStack() as held:
        finished = False
        if leads:
            held.enter_context(claimed(folder))
            finished = enter(folder, config, target, examples, resume_step)
        if any_process(finished):
            steps = f"{folder} has taken its {config.steps} steps; more --steps go on with it"
            print(f"nothing to train: {steps}", file=sys.stderr)
            return folder / DRAFTER
        options = dict(resume_step=resume_step, tensorboard=tensorboard, mesh=mesh)
        options |= dict(features=features, features_dtype=features_dtype)
        return _train(config, target, examples, folder, prompts, **options)


def _train(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    resume_step: int | None,
    features: str | Path | None,
    features_dtype: str | None,
    tensorboard: bool,
    mesh: Mesh | None,
) -> Path | None:
    """`train`, in a folder whose run is of these settings and this data and goes on."""
    leads = jax.process_index() == 0
    store = Store(folder / CHECKPOINTS, keep=config.keep)
    run, state = _begin(config, target, examples, prompts, folder, mesh, new=not store.steps)
    cached = None
    if features is not None:
        taps = config.drafter.taps
        cached = open_features(features, run.target, examples, taps=taps, dtype=features_dtype)
    position = Position()
    if store.steps or resume_step is not None:
        step, state, saved = store.restore(state, resume_step)
        store.drop_after(step)
        position = Position(**saved)
    metrics = MetricsLog(
        folder / METRICS if leads else os.devnull,
        after=int(state.step),
        tensorboard=folder / TENSORBOARD if tensorboard and leads else None,
    )
    loader = Loader(config, examples, mesh=mesh, features=cached)
    with contextlib.closing(store), contextlib.closing(metrics):
        state = _take_steps(run, state, position, loader, store, metrics)
        if state is None:
            return None
        if store.best not in (None, config.steps):
            _, state, _ = store.restore(state, store.best)
    drafter = run.drafter(state, dtype=target.params.embed.dtype)
    if leads:
        export(config, drafter, folder / DRAFTER, target.name)
    return folder / DRAFTER


def _check(config: TrainConfig, prompts: Sequence[Prompt], mesh: Mesh | None) -> None:
    """Raises ValueError for what cannot be trained, before anything is written."""
    hosts = jax.process_count()
    if prompts and hosts > 1:
        raise ValueError(
            f"{hosts} processes cannot decode together; train without prompts and validate "
            "the drafter afterwards"
        )
    if mesh is None and hosts > 1:
        raise ValueError(
            f"{hosts} processes need a mesh over their {jax.device_count()} devices; give "
            f"--devices {jax.device_count()}"
        )
    if mesh is not None and config.micro_batch % mesh.shape[DATA]:
        raise ValueError(
            f"a micro-batch of {config.micro_batch} rows cannot be divided among the "
            f"{mesh.shape[DATA]} devices of the mesh's axis '{DATA}'"
        )
    # Fail now if no checkpoint format can hold the trained drafter.
    network_of(config.drafter).to_json(config.drafter, _format(config), "float32")


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every step and validation of a run reads.

    Attributes:
      target: its params are on `mesh`.
      prompts: held out, for validation.
      kept: the draft vocabulary, [V']; None for all tokens.
    """

    config: TrainConfig
    target: Target
    prompts: Sequence[Prompt]
    kept: jax.Array | None
    mesh: Mesh | None

    def drafter(self, state: TrainState, dtype: jnp.dtype | None = None) -> LoadedDrafter:
        """The drafter as decoding runs it, its weights in `dtype` where that is given."""
        weights = gather(self.mesh, state.weights)
        if dtype is not None:
            weights = jax.tree.map(lambda x: x.astype(dtype), weights)
        return trained_drafter(self.config.drafter, weights, self.target, kept=self.kept)

    def judged(self, step: int) -> bool:
        """Whether the weights after a step are validated."""
        due = step == self.config.steps or _due(step, self.config.validate_every)
        return bool(self.prompts) and due

    def validate(self, state: TrainState, metrics: MetricsLog) -> float:
        """Walked tau on the prompts."""
        with mesh_of(self.target.params):
            tau = walked_tau(self.target, self.drafter(state), self.prompts)
        metrics.write(int(state.step), tau=tau)
        return tau


def _begin(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    folder: Path,
    mesh: Mesh | None,
    *,
    new: bool,
) -> tuple[_Run, TrainState]:
    """The run and its state before the first step, placed on the mesh.

    Args:
      new: the folder has no checkpoint yet, so initial weights are read where they are named.
    """
    weights, known = None, draft_vocabulary.load_tokens(folder / DRAFT_VOCABULARY)
    if config.initial not in ("target", "random") and new:
        weights, known = initial_drafter(config, target)
    leads = jax.process_index() == 0
    kept = _draft_vocabulary(config, target, examples, known, folder if leads else None)
    state = init_state(config, target.params, weights)
    if mesh is not None:
        target = dataclasses.replace(target, params=place(mesh, target.params))
        state = jax.device_put(state, state_shardings(mesh, state))
        kept = place(mesh, kept)
    return _Run(config, target, prompts, kept, mesh), state


def _take_steps(
    run: _Run,
    state: TrainState,
    position: Position,
    loader: Loader,
    store: Store,
    metrics: MetricsLog,
) -> TrainState | None:
    """Trains to the last step, with checkpoints and validation; None if it was interrupted."""
    config, target, done = run.config, run.target, int(state.step)
    rate = learning_rate(config.optimizer, config.steps)
    progress = tqdm(total=config.steps, initial=done, unit="step", file=sys.stderr)
    with progress, _stopping() as stopping:
        if done and run.judged(done) and not store.scored(done):  # stopped while validated
            score = run.validate(state, metrics)
            store.save(done, state, dataclasses.asdict(position), score=score)
        upcoming = loader.at(position)
        while done < config.steps:
            epoch = position.epoch
            state, means = train_step(
                config, target.config, target.params, state, upcoming, run.mesh, run.kept
            )
            position = loader.after(position)
            upcoming = loader.at(position)  # while the devices compute
            means = jax.device_get(means)
            _check_finite(means, done + 1, config, store)
            metrics.write(
                done + 1, epoch=epoch, learning_rate=float(rate(done)), **_plain(means)
            )
            done += 1
            progress.update()
            progress.set_postfix(loss=f"{means['loss']:.3f}")

            last, stop = done == config.steps, any_process(bool(stopping))
            score = None
            if run.judged(done):
                try:
                    score = run.validate(state, metrics)
                except KeyboardInterrupt:  # of `generate`, at the signal that is in `stopping`
                    stop, last = True, False
            if last or score is not None or stop or _due(done, config.checkpoint_every):
                store.save(done, state, dataclasses.asdict(position), score=score)
            if stop and not last:
                return None
    return state


def _check_finite(means: dict[str, Any], step: int, config: TrainConfig, store: Store) -> None:
    """Raises ValueError, with the way to go on, for a step that spoilt the weights."""
    bad = next((x for x in ("loss", "gradient_norm") if not math.isfinite(means[x])), None)
    if bad is None:
        return
    rate = config.optimizer.learning_rate / 2
    remedy = f"start again in a new folder with a lower rate: --learning-rate {rate:g}"
    if store.steps:
        remedy = (
            f"go on from a checkpoint before it was lost ({', '.join(map(str, store.steps))}) "
            f"with a lower rate: --resume-step {store.steps[0]} --learning-rate {rate:g}"
        )
    raise ValueError(f"the {bad.replace('_', ' ')} of step {step} is {means[bad]}; {remedy}")


def export(config: TrainConfig, drafter: LoadedDrafter, folder: Path, target: str) -> None:
    """Writes a drafter's checkpoint, which names the target where its format can; it appears
    whole or not at all."""
    if Path(target).exists():
        target = os.path.relpath(target, folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_drafter(partial, drafter.drafter, drafter.params, _format(config), verifier=target)
    except ValueError as error:
        raise ValueError(
            f"{error}; go on from an earlier checkpoint with --resume-step"
        ) from error
    os.rename(partial, folder)


def initial_drafter(config: TrainConfig, target: Target) -> tuple[nnx.State, np.ndarray | None]:
    """The drafter that `config.initial` names: weights in float32, and the tokens it drafts.

    Raises:
      ValueError: it cannot be loaded, is not what `config.drafter` says, or has a draft
        vocabulary where `config` asks for another.
    """
    drafter, params = load_drafter(config.initial, target.config, target.params, TreeConfig())
    found, wanted = (dataclasses.asdict(c) for c in (drafter.config, config.drafter))
    other = [f"{x} {found[x]}, expected {wanted[x]}" for x in found if found[x] != wanted[x]]
    if other:
        raise ValueError(
            f"the drafter in {config.initial} is not the one to train ({'; '.join(other)})"
        )
    kept = params.vocabulary.kept
    if params.vocabulary.judge is not None:
        raise ValueError(
            f"the drafter in {config.initial} has an LM head of its own; training is with the "
            "target's, which is shared: start from another"
        )
    if kept is not None and config.draft_vocab:
        raise ValueError(
            f"draft_vocab is {config.draft_vocab}, but the drafter in {config.initial} has a "
            f"draft vocabulary, of {len(kept)} tokens, and keeps it; leave draft_vocab 0"
        )
    weights = network_of(config.drafter).weights(params)
    return weights, None if kept is None else np.asarray(kept)


def _draft_vocabulary(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    known: np.ndarray | None,
    folder: Path | None,
) -> jax.Array | None:
    """The tokens that the run drafts, [V'], written down and printed; None for all.

    Args:
      known: from the run's folder, or of the drafter to go on from.
      folder: of the run, in the process that leads.

    Raises:
      ValueError: the examples give others than those known.
    """
    vocab, kept = config.drafter.vocab_size, known
    if config.draft_vocab:
        kept = draft_vocabulary.most_frequent(
            examples, config.draft_vocab, vocab=vocab, always=target.config.eos_token_ids
        )
        if known is not None and not np.array_equal(kept, known):
            raise ValueError(
                f"{DRAFT_VOCABULARY} of the run holds other tokens than are most frequent in "
                "these examples; go on with the data that it began with"
            )
    if kept is None:
        return None
    if folder is not None:
        covered = draft_vocabulary.coverage(examples, kept, vocab=vocab)
        draft_vocabulary.save_tokens(folder / DRAFT_VOCABULARY, kept, covered)
        print(
            f"draft vocabulary: {len(kept)} of {vocab} tokens, {covered:.2%} of those that the "
            "target wrote",
            file=sys.stderr,
        )
    return jnp.asarray(kept)


def _format(config: TrainConfig) -> str:
    """Of the exported drafter."""
    return network_of(config.drafter).format(config.drafter)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _plain(means: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in means.items()}


def _stopping() -> contextlib.AbstractContextManager[list[int]]:
    """A list that is filled when SIGTERM or SIGINT arrives."""
    return postponed(
        signal.SIGTERM,
        signal.SIGINT,
        patient=True,
        says="stopping: the current step is saved first; once more to stop without",
    )
