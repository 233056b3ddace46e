"""The gated steps are the programs that `plan` plans: the same shapes, floors and drafters."""

import pytest
from jax.sharding import AbstractMesh

from jaxspec.config import TreeConfig
from jaxspec.decoding.requests import MAX_STOP_IDS
from jaxspec.drafters.block import BlockDrafter
from jaxspec.models.presets import PRESETS
from jaxspec.planning.floors import program_floor
from jaxspec.planning.plan import floors, most_rows
from jaxspec.planning.setup import Setup, abstract_arguments, published_drafter
from jaxspec.planning.steps import Step, steps
from jaxspec.training import recipe
from pallas_kernels.h100.target import BYTES_PER_SECOND

STEPS = [Step("qwen3-8b", kind, nodes) for kind, nodes in (("decode", 1), ("verify", 64))]
STEPS += [Step("qwen3-30b-a3b", "round", 64), Step("qwen3-30b-a3b", "draft", 64)]


def test_a_step_takes_what_decoding_takes():
    mesh = AbstractMesh((1, 1), ("model", "rest"))
    _, requests, _ = abstract_arguments(STEPS[0].setup, mesh)
    assert requests.sampling.stop_ids.shape == (1, MAX_STOP_IDS)
    assert requests.tokens.shape == (1, 4096)


@pytest.mark.parametrize("name", PRESETS)
def test_the_planned_drafter_taps_what_a_trained_one_does(name):
    trained = recipe.drafter_config("jetspec", PRESETS[name], recipe.QWEN3)
    assert published_drafter(PRESETS[name]).taps == trained.taps


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_floors_are_those_of_a_plan(step):
    of_plan = floors(step.setup)["draft" if step.kind == "draft" else "round"]
    assert program_floor(step.setup, step.program).milliseconds == pytest.approx(of_plan)


def test_a_chunk_of_a_prompt_unembeds_one_token():
    chunk = program_floor(Step("qwen3-8b", "prefill").setup, "prefill")
    values = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288)
    attention = 4 * 512 * 32 * 128 * 4096 * 36
    assert chunk.flops == 2 * (512 * values + 4096 * 151_936) + attention
    assert chunk.milliseconds > 1e3 * chunk.bytes / BYTES_PER_SECOND  # bound by its products


def test_devices_share_a_floor():
    one, four = (
        program_floor(Step("qwen3-8b", "round", 64, devices=n).setup, "round") for n in (1, 4)
    )
    assert four.bytes == one.bytes / 4 and four.flops == one.flops / 4


def test_most_rows():
    target = PRESETS["qwen3-8b"]
    drafter = BlockDrafter(published_drafter(target), TreeConfig("best_first", size=64))
    setup = Setup(target, drafter, batch=4)
    gigabyte = 10**9
    assert most_rows(setup, 44 * gigabyte, growing=4 * gigabyte) == 4 + 40
    assert most_rows(setup, 90 * gigabyte, growing=4 * gigabyte) == 0
    assert most_rows(setup, 86 * gigabyte, growing=4 * gigabyte) == 2


def test_the_quick_steps_are_the_first_of_all():
    assert steps()[: len(steps(quick=True))] == steps(quick=True)
    assert len(steps()) == len(set(steps())) == 351


def test_every_step_is_a_setup_that_can_be():
    assert {step.setup.decoder.chunk for step in steps()} == {512}
