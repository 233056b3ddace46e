"""What a run tells about itself when it is done: metrics, flags and the model card."""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from jaxspec.training.model_card import model_card, target_metadata
from jaxspec.training.run_folder import data_hash, described, enter, write_flags
from jaxspec.training.trainer import train
from tests.training import tiny

PROMPTS = [[1, 2, 3], [4, 5]]
FLAGS = {"data": ["chats.jsonl", "owner/chats::train"], "steps": 2, "output": "run"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, the first of which is validated too."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(tiny.CONFIG, steps=2, validate_every=1)
    train(config, tiny.target(), tiny.examples(), folder, prompts=PROMPTS, flags=FLAGS)
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_say_speed_memory_and_how_training_goes(run):
    steps = [line for line in lines_of(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert len(line["acceptance"]) == tiny.DRAFTER.depth
        assert line["tokens_per_second"] > 0 and line["peak_memory"] > 10**7
        assert line["gradient_norm"] > 0 and line["learning_rate"] >= 0


def test_progress_is_shown(run, tmp_path, capsys):
    config = dataclasses.replace(tiny.CONFIG, steps=2, validate_every=1)
    train(config, tiny.target(), tiny.examples(), tmp_path, prompts=PROMPTS)
    told = capsys.readouterr().err
    assert "validation:   0%|" in told and "| 0/128 [" in told
    assert "epoch 0, loss " in told and " tokens/s" in told


def test_the_card_beside_the_drafter_is_ready_for_the_hub(run):
    card = ModelCard.load(run / "drafter" / "README.md")
    assert card.data.library_name == "jaxspec"
    assert card.data.tags == ["speculative-decoding", "drafter", "dflash"]
    assert card.data.datasets == ["owner/chats"]
    assert "the target's layers 0, 1, 3 tokens deep, all tokens drafted; " in card.text
    assert "; predict_next True; sequential markov; rank 4; confidence hidden" in card.text
    taus = {line["step"]: line["tau"] for line in lines_of(run) if "tau" in line}
    assert set(taus) == {1, 2}
    for step, tau in taus.items():
        assert f"| {step} | {tau:.2f} |" in card.text
    best = max(taus, key=lambda step: (taus[step], -step))
    assert f"these weights are of step {best} |" in card.text
    assert f"20 sequences, hash `{data_hash(tiny.examples())}`, from `chats.jsonl`" in card.text
    assert '```toml\ndata = [\n    "chats.jsonl",' in card.text
    assert "The target's licence is not known" in card.text


def test_a_card_without_validation_or_flags(tmp_path):
    enter(tmp_path, described(tiny.CONFIG, tiny.target(), tiny.examples()))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 12, "loss": 1, "acceptance": [0.5, 0.25]}\n'
    )
    text = model_card(tmp_path, tiny.CONFIG, step=12)
    assert "Not validated" in text and "| 2 | 0.250 |" in text and "toml" not in text


def test_the_targets_licence(tmp_path):
    apache = {"license": "apache-2.0"}
    assert target_metadata("qwen3-8b") == apache | {"base_model": "Qwen/Qwen3-8B"}
    assert target_metadata("smollm2-135m") == apache | {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"
    }
    assert target_metadata("owner/unknown") == {"base_model": "owner/unknown"}
    assert target_metadata(str(tmp_path / "nothing")) == {}
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nbase_model: owner/it\ntags: [x]\n---\n# It\n"
    )
    assert target_metadata(str(tmp_path)) == {
        "license": "other",
        "license_name": "mine",
        "base_model": "owner/it",
    }
    target = dataclasses.replace(tiny.target(), name=str(tmp_path))
    enter(tmp_path, described(tiny.CONFIG, target, []))
    (tmp_path / "metrics.jsonl").write_text("")
    write_flags(tmp_path, {"data": []})
    text = model_card(tmp_path, tiny.CONFIG, step=12)
    metadata, _, body = text.partition("\n---\n")
    assert "\nlicense: other\nlicense_name: mine\n" in metadata and "datasets" not in metadata
    assert "As the target's: mine." in body
