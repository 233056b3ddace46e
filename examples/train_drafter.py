"""From prompts to a served drafter in a few minutes on a laptop.

The target answers prompts, a drafter learns from the answers, and both decode together a
prompt that neither has seen. A few minutes teach it one kind of text, no more.

  python examples/train_drafter.py
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import jaxspec
from jaxspec.training.conversations import read_examples
from jaxspec.training.recipe import (
    PRESETS,
    OptimizerConfig,
    TrainConfig,
    drafter_config,
    loss_config,
)
from jaxspec.training.regenerate import RegenerateConfig, read_jobs, regenerate
from jaxspec.training.step import init_state
from jaxspec.training.trainer import train
from jaxspec.training.validation import trained_drafter, walked_tau

QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "Why is {} important?",
)
TOPICS = (
    "the sun,the moon,the ocean,a river,a forest,a desert,a volcano,an island,a mountain,rain,"
    "snow,wind,fire,ice,gold,iron,glass,paper,bread,rice,milk,salt,sugar,tea,a cat,a dog,"
    "a horse,a whale,an eagle,a bee,a school,a library,a hospital,a bridge,a train,a bicycle,"
    "music,painting,history,mathematics,sleep,friendship"
).split(",")
HELD_OUT = ("coffee", "an elephant", "a museum", "chemistry")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--folder", type=Path, help="a temporary one by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="drafter-"))
    folder.mkdir(parents=True, exist_ok=True)

    jaxspec.enable_compilation_cache()
    target = jaxspec.load_target()

    prompts, data = folder / "prompts.jsonl", folder / "data.jsonl"
    with prompts.open("w") as stream:
        for question, topic in itertools.product(QUESTIONS, TOPICS):
            stream.write(json.dumps({"prompt": question.format(topic)}) + "\n")
    answers = RegenerateConfig(max_new_tokens=64, max_length=127, rows=32)
    regenerate(answers, target, read_jobs(prompts), data)

    family = "dspark"
    config = TrainConfig(
        drafter=drafter_config(family, target.config, PRESETS[target.name], block_size=5),
        loss=loss_config(family),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        steps=options.steps,
        batch_size=8,
        micro_batch=8,
        anchors=16,
    )
    held_out = [QUESTIONS[0].format(topic) for topic in HELD_OUT]
    measure = dict(max_new_tokens=64, batch_size=len(held_out))
    untrained = trained_drafter(
        config.drafter, init_state(config, target.params).weights, target
    )
    before = walked_tau(target, untrained, held_out, **measure)

    examples = read_examples(data, target.tokenizer, max_length=128)
    trained = train(config, target, examples, folder / "run")

    drafter = jaxspec.load_drafter(str(trained), target, tree=untrained.drafter.tree)
    after = walked_tau(target, drafter, held_out, **measure)
    (answer,) = jaxspec.generate(target, held_out[0], drafter=drafter, max_new_tokens=64)
    print(f"\n{held_out[0]}\n{answer.text}\n")
    print(f"drafter: {trained}")
    print(f"tokens per forward of the target: {before:.2f} untrained, {after:.2f} trained")


if __name__ == "__main__":
    main()
