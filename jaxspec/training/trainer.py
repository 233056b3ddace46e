"""The training loop: resumable, interruptible, ending with a checkpoint that decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from jaxspec.checkpoints.drafter_config import default_format, to_json
from jaxspec.checkpoints.store import Store
from jaxspec.data.conversations import Example
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.interrupts import postponed
from jaxspec.locks import claimed
from jaxspec.models.scaled import is_scaled
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt
from jaxspec.settings import own_settings
from jaxspec.sharding import DATA, any_process, check_mesh, mesh_of, place
from jaxspec.training.batches import Position
from jaxspec.training.draft_vocabulary import load_tokens, most_frequent, save_tokens
from jaxspec.training.export import export
from jaxspec.training.feature_cache import open_features
from jaxspec.training.loading import Loader
from jaxspec.training.metrics import MetricsLog, check_writers, logged, peak_memory
from jaxspec.training.networks import trained_drafter
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.run_folder import (
    DRAFTER,
    METRICS,
    check_begun,
    check_run,
    described,
    enter,
)
from jaxspec.training.sharding import gather, state_shardings
from jaxspec.training.start import initial_drafter
from jaxspec.training.step import TrainState, init_state, learning_rate, train_step
from jaxspec.training.validation import prompt_rows, walked_tau

TENSORBOARD, CHECKPOINTS = "tensorboard", "checkpoints"


@own_settings()
@mesh_of(None)  # not the caller's
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
    wandb: str | None = None,
    flags: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Path | None:
    """Trains a drafter, or resumes the run in the folder.

    The folder gets `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end, `drafter/`
    with a model card: the weights of best tau on the prompts, or the last ones without prompts.
    With a draft vocabulary it also gets `draft_vocabulary.json`: the tokens, and the share of
    the target's output that they cover. A killed run resumes from its newest checkpoint and
    ends with the same weights, bit for bit on the same devices. A finished run resumes when
    given more steps: its schedule is extended, its optimizer state kept, and its earlier
    drafter moved to `drafter-STEPS`. SIGTERM or Ctrl-C ends a run after the current step, with
    a checkpoint.

    Args:
      examples: from `data.rows.read_examples`.
      prompts: held-out prompts for validation, as for `jaxspec.generate`; texts are rendered in
        the thinking mode of the examples, if all have the same.
      resume_step: step of the checkpoint to resume from, possibly with another optimizer; later
        checkpoints are deleted. The newest by default.
      features: folder of the target's features (`feature_cache`), completed first; by default
        every step computes its own.
      features_dtype: storage dtype of a new folder; the target's by default.
      tensorboard: also write the metrics to `tensorboard/`.
      wandb: Weights & Biases project that also gets the metrics.
      flags: flags of the command, written as `run.toml` into the folder and its model card.
      mesh: devices to train on (`sharding.make_mesh`), of all processes if there are several:
        each calls this function with the same arguments and a shared folder. A run may resume
        on other devices.

    Returns:
      The folder of the drafter, or None if the run was interrupted.

    Raises:
      ValueError: the folder holds a run with other settings, of another target, on other data,
        or another process trains in it; a prompt cannot be used; a checkpoint is damaged; or
        the loss is not a number. A run that cannot start leaves its folder as it was.
    """
    folder, leads = Path(folder), jax.process_index() == 0
    check_begun(folder, resume_step)
    _check(config, target, mesh)
    check_writers(tensorboard=tensorboard, wandb=wandb is not None)
    if prompts:
        prompts = prompt_rows(target, prompts, examples)
    cached, taps = None, config.drafter.taps
    if features is not None:
        cached = open_features(features, target, examples, taps=taps, dtype=features_dtype)
    of_features = None if cached is None else cached.dtype
    settings = described(config, target, examples, prompts, features_dtype=of_features)
    with contextlib.ExitStack() as held:
        if leads:
            remedy = "wait until it is done, or train in a new folder"
            held.enter_context(claimed(folder, remedy))
        store = Store(folder / CHECKPOINTS, keep=config.keep)
        held.enter_context(contextlib.closing(store))
        begun = bool(store.steps) or (folder / DRAFTER).exists()
        if any_process(leads and begun and check_run(folder, settings, resume_step)):
            steps = f"{folder} has finished its {config.steps} steps; more --steps extend it"
            print(f"nothing to train: {steps}", file=sys.stderr)
            return folder / DRAFTER
        run, state = _begin(config, target, examples, prompts, folder, mesh, new=not begun)
        position = Position()
        if begun or resume_step is not None:
            _, state, saved = store.restore(state, resume_step)
            position = Position(**saved)
        loader, step = Loader(config, examples, mesh=mesh, features=cached), int(state.step)
        loader.plan(position.epoch)
        if cached is not None:
            cached.complete(run.target, examples)
        path, writers = os.devnull, {}
        if leads:
            path, board = folder / METRICS, folder / TENSORBOARD if tensorboard else None
            writers = dict(tensorboard=board, wandb=wandb, settings=dataclasses.asdict(config))
        metrics = MetricsLog(path, after=step, **writers)
        held.enter_context(contextlib.closing(metrics))
        # Nothing later fails. Deleted first: a run that is killed here mixes no two optimizers.
        store.drop_after(step)
        if leads:
            enter(folder, settings, flags)
            kept = jax.device_get(run.kept)
            save_tokens(folder, kept, examples, vocab=config.drafter.vocab_size)
        state = _take_steps(run, state, position, loader, store, metrics)
        return None if state is None else _export(run, state, store, folder)


def _check(config: TrainConfig, target: Target, mesh: Mesh | None) -> None:
    """Raises ValueError for what cannot be trained, before anything is written."""
    hosts = jax.process_count()
    if mesh is None and hosts > 1:
        raise ValueError(
            f"{hosts} processes need a mesh over their {jax.device_count()} devices; give "
            f"--devices {jax.device_count()}"
        )
    if mesh is not None:
        check_mesh(mesh)
        if config.micro_batch % mesh.shape[DATA]:
            raise ValueError(
                f"micro_batch is {config.micro_batch}; expected a multiple of the "
                f"{mesh.shape[DATA]} devices of the mesh's axis '{DATA}'"
            )
    if is_scaled(target.params.unembed):
        raise ValueError(
            f"the LM head of {target.name} is in 8 bits, which training does not support; load "
            "the target with weights 'dequantised'"
        )
    # Fail now if no checkpoint format can hold the trained drafter.
    to_json(config.drafter, default_format(config.drafter), "float32")


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every step and validation of a run reads.

    Attributes:
      target: the target, with params on `mesh`.
      prompts: held-out prompts for validation, token ids.
      kept: the draft vocabulary, [V']; None for all tokens.
    """

    config: TrainConfig
    target: Target
    prompts: Sequence[Sequence[int]]
    kept: jax.Array | None
    mesh: Mesh | None

    def drafter(self, state: TrainState, dtype: jnp.dtype | None = None) -> LoadedDrafter:
        """The drafter for decoding. Args: dtype: of its weights; the state's by default."""
        weights = gather(self.mesh, state.weights)
        if dtype is not None:
            weights = jax.tree.map(lambda x: x.astype(dtype), weights)
        return trained_drafter(self.config.drafter, weights, self.target, kept=self.kept)

    def judged(self, step: int) -> bool:
        """Whether the weights after a step are validated."""
        due = step == self.config.steps or _due(step, self.config.validate_every)
        return bool(self.prompts) and due

    def validate(self, state: TrainState, store: Store, metrics: MetricsLog) -> None:
        """Writes tau on the prompts to the metrics; it is the score of the checkpoint."""
        with mesh_of(self.target.params):
            drafter, leads = self.drafter(state), jax.process_index() == 0
            tau = walked_tau(self.target, drafter, self.prompts, shown=leads)
        step = int(state.step)
        metrics.write(step, tau=tau)
        store.scores[step] = tau


def _begin(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    folder: Path,
    mesh: Mesh | None,
    *,
    new: bool,
) -> tuple[_Run, TrainState]:
    """The run and its state before the first step, placed on the mesh.

    Args:
      new: whether the folder holds no run yet, so that initial weights are loaded.
    """
    weights, kept = None, None if new else load_tokens(folder)
    if config.initial not in ("target", "random") and new:
        weights, kept = initial_drafter(config, target)
    if config.draft_vocab and kept is None:
        vocab, stops = config.drafter.vocab_size, target.config.eos_token_ids
        kept = most_frequent(examples, config.draft_vocab, vocab=vocab, always=stops)
    kept = jax.tree.map(jnp.asarray, kept)
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
    # In every process, which all choose the same best checkpoint.
    store.scores = logged(store.folder.parent / METRICS, "tau", until=done)
    progress = tqdm(total=config.steps, initial=done, unit="step", file=sys.stderr)
    with progress, _stopping() as stopping:
        if done and run.judged(done) and done not in store.scores:  # stopped during validation
            run.validate(state, store, metrics)
        upcoming = loader.at(position)
        while done < config.steps:
            epoch, tokens, began = position.epoch, loader.tokens(position), time.perf_counter()
            state, means = train_step(
                config, target.config, target.params, state, upcoming, run.mesh, run.kept
            )
            position = loader.after(position)
            upcoming = loader.at(position)  # while the devices compute
            means = jax.device_get(means)
            _check_finite(means, done + 1, config, store)
            speed = tokens / (time.perf_counter() - began)
            metrics.write(
                done + 1,
                epoch=epoch,
                learning_rate=float(rate(done)),
                **{name: value.tolist() for name, value in means.items()},
                tokens_per_second=round(speed, 1),
                peak_memory=peak_memory(),
            )
            done += 1
            progress.update()
            seen = f"epoch {epoch}, loss {means['loss']:.3f}"
            progress.set_postfix_str(f"{seen}, {speed:.0f} tokens/s")

            last, stop = done == config.steps, any_process(bool(stopping))
            due = last or stop or _due(done, config.checkpoint_every)
            if due or run.judged(done):  # validation may fail
                store.save(done, state, dataclasses.asdict(position))
            if run.judged(done):
                try:
                    run.validate(state, store, metrics)
                except KeyboardInterrupt:  # from `generate`; `stopping` has the signal too
                    return None
            if stop and not last:
                return None
    return state


def _export(run: _Run, state: TrainState, store: Store, folder: Path) -> Path:
    """Exports the weights of the best score, or the last ones; returns the drafter's folder."""
    step = run.config.steps if store.best is None else store.best
    if step != run.config.steps:
        _, state, _ = store.restore(state, step)
    drafter = run.drafter(state, dtype=run.target.params.embed.dtype)
    if jax.process_index() == 0:
        export(run.config, drafter, folder, target=run.target.name, step=step)
    return folder / DRAFTER


def _check_finite(means: dict[str, Any], step: int, config: TrainConfig, store: Store) -> None:
    """Raises ValueError, with a remedy, if a step made the weights non-finite."""
    bad = next((x for x in ("loss", "gradient_norm") if not math.isfinite(means[x])), None)
    if bad is None:
        return
    rate = config.optimizer.learning_rate / 2
    remedy = f"start again in a new folder with a lower rate: --learning-rate {rate:g}"
    if store.steps:
        remedy = (
            f"resume from an earlier checkpoint ({', '.join(map(str, store.steps))}) with a "
            f"lower rate: --resume-step {store.steps[0]} --learning-rate {rate:g}"
        )
    raise ValueError(f"the {bad.replace('_', ' ')} of step {step} is {means[bad]}; {remedy}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stopping() -> contextlib.AbstractContextManager[list[int]]:
    """A list that is filled when SIGTERM or SIGINT arrives."""
    return postponed(
        signal.SIGTERM,
        signal.SIGINT,
        patient=True,
        says="stopping after saving the current step; press again to stop without saving",
    )
