"""Greedy continuations of the golden targets, token for token."""

import pytest

import jaxspec
from tests.slow import slow_but

CASES = ("jetspec_a", "dflash_a", "dspark_vanilla", "dspark_rnn", "treeflash_a")


@pytest.mark.parametrize("name", slow_but(["jetspec_a"], CASES))
def test_greedy_continuation(golden, name):
    folder, trace = golden(name)
    target = jaxspec.load_target(folder / "target")
    prompts = [prompt["prompt"] for prompt in trace["prompts"]]
    expected = [prompt["ar"] for prompt in trace["prompts"]]
    (length,) = {len(ids) for ids in expected}
    found = jaxspec.generate(target, prompts, max_new_tokens=length)
    assert [completion.token_ids for completion in found] == expected
