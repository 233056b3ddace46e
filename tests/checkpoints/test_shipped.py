"""The drafter in the package: small, described beside it, lossless, and better than nothing."""

from pathlib import Path

import pytest

from jaxspec import checkpoints
from jaxspec.api import generate
from jaxspec.checkpoints.drafters import SHIPPED, drafter_folder
from jaxspec.config import TreeConfig
from jaxspec.evaluation.results import RunSettings, read_rows
from jaxspec.loading import load_drafter
from jaxspec.models.target import Target

RESULTS = Path(checkpoints.__file__).parents[2] / "docs/results.md"


def test_it_is_small_and_described():
    folder = drafter_folder(SHIPPED)
    assert (folder / "model.safetensors").stat().st_size < 40e6
    assert "recipe" in (folder / "README.md").read_text()
    setups = [
        row for row in read_rows(folder / "evaluation.jsonl") if isinstance(row, RunSettings)
    ]
    assert [row.fields["target"] for row in setups] == ["smollm2-135m"]


@pytest.mark.skipif(not RESULTS.is_file(), reason="installed without the repository")
def test_the_results_show_its_evaluation():
    """`jaxspec report checkpoints/smollm2-135m/evaluation.jsonl --into docs/results.md`"""
    from jaxspec.evaluation.report import into, summary
    from jaxspec.evaluation.view import View

    text = RESULTS.read_text(encoding="utf-8")
    assert (
        into(text, summary(View(read_rows(drafter_folder(SHIPPED) / "evaluation.jsonl"))))
        == text
    )


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", [SHIPPED, f"{SHIPPED}+ngram"])
def test_its_trees_change_no_token_and_save_forwards(smollm2, name):
    target = Target("smollm2-135m", smollm2.config, smollm2.params, smollm2.tokenizer)
    drafter = load_drafter(name, target, tree=TreeConfig("path_conditioned", size=8))
    prompt = "A farmer has 12 hens. Each lays 5 eggs a week. How many eggs are laid in 3 weeks?"
    (plain,) = generate(target, prompt, max_new_tokens=40)
    (drafted,) = generate(target, prompt, max_new_tokens=40, drafter=drafter)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.rounds < 0.8 * plain.stats.rounds
