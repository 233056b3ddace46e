"""From prompts to a served drafter in a few minutes on a laptop.

The target answers prompts, a drafter learns from the answers, and both decode together a
prompt that neither has seen. A few minutes teach it one kind of text, no more.

    python examples/train_drafter.py
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jaxspec
from jaxspec.cli import exits
from jaxspec.data.jobs import read_jobs
from jaxspec.data.rows import read_examples
from jaxspec.decoding.stats import pooled_tau
from jaxspec.training.losses import LossConfig
from jaxspec.training.networks import trained_drafter
from jaxspec.training.recipe import PRESETS, OptimizerConfig, TrainConfig, drafter_config
from jaxspec.training.regenerate import RegenerateConfig, regenerate
from jaxspec.training.step import init_state
from jaxspec.training.trainer import train
from jaxspec.training.vocabulary_loss import Mixture

QUESTION = "Write the numbers from {} to {}, separated by commas."
HELD_OUT = (4, 17, 31, 48)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options."""

    steps: int = 45
    """Of the optimizer."""
    folder: Path | None = None
    """Gets the data and the run; a temporary one by default."""


def main(options: Options) -> None:
    folder = options.folder or Path(tempfile.mkdtemp(prefix="drafter-"))
    folder.mkdir(parents=True, exist_ok=True)

    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target()

    prompts, data = folder / "prompts.jsonl", folder / "data.jsonl"
    with prompts.open("w") as stream:
        for first in sorted(set(range(1, 61)) - set(HELD_OUT)):
            stream.write(json.dumps({"prompt": QUESTION.format(first, first + 30)}) + "\n")
    answers = RegenerateConfig(max_new_tokens=64, max_length=127, rows=32)
    regenerate(answers, target, read_jobs(prompts), data)

    drafter = drafter_config("dspark", target.config, PRESETS[target.name], block_size=5)
    config = TrainConfig(
        drafter=dataclasses.replace(drafter, confidence=None),
        loss=LossConfig(Mixture(cross_entropy=1.0, total_variation=0.0), confidence=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.2),
        steps=options.steps,
        batch_size=4,
        micro_batch=4,
        anchors=32,
    )
    held_out = [QUESTION.format(first, first + 30) for first in HELD_OUT]

    def answer(drafter):
        return jaxspec.generate(target, held_out, drafter=drafter, max_new_tokens=64)

    untrained = trained_drafter(
        config.drafter, init_state(config, target.params).weights, target
    )
    before = answer(untrained)

    examples = read_examples(data, target, max_length=128)
    trained = train(config, target, examples, folder / "run")
    drafter = jaxspec.load_drafter(str(trained), target, tree=untrained.drafter.tree)
    after = answer(drafter)

    print(f"\n{held_out[0]}\n{after[0].text}\n")
    print(f"drafter: {trained}")
    for name, completions in (("untrained", before), ("trained", after)):
        tau = pooled_tau([completion.stats for completion in completions])
        print(f"{name}: {tau:.2f} tokens per forward of the target, on prompts not trained on")


if __name__ == "__main__":
    exits.script(main, Options, __doc__)
