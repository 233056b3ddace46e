"""`jaxspec.evaluate`: what it refuses, before anything runs."""

import pytest

import jaxspec
from tests import tiny

pytestmark = pytest.mark.usefixtures("models")


@pytest.mark.parametrize(
    "decoders, options, message",
    [
        ({}, {}, "nothing to compare: give at least one decoder and one prompt"),
        ({"a": "ngram,dtype=bfloat16"}, {}, "'a' asks for bfloat16, but the target was loaded"),
        ({"a": tiny.RANDOM}, {}, "RandomTrees.* has a fixed tree"),
        ({"a": tiny.RANDOM.drafter}, {}, "drafter is RandomTrees.* LoadedDrafter.drafter, par"),
        ({"a": "ngram"}, dict(max_new_tokens=1), "max_new_tokens is 1; expected at least 2"),
        ({"a": "ngram"}, dict(budgets=(0,)), "budgets is 0; expected at least 1"),
        ({"a": "ngram"}, dict(budgets=[8.0]), "budgets is 8.0; expected an integer"),
        ({"a": "ngram"}, dict(temperatures=0.0), "temperatures is 0.0; expected a sequence"),
        (
            {"a": "ngram"},
            dict(plain_dtypes="float32"),
            "plain_dtypes is 'float32'; expected a",
        ),
        (["ngram"], {}, r"decoders is \['ngram'\]; expected decoders by name: {'lookup'"),
        (
            {"a": "ngram"},
            dict(max_new_tokens=512),
            "of 3 tokens, 512 new ones and 8 more of the last round need 523 positions; the",
        ),
    ],
)
def test_python_refuses_what_the_command_does(decoders, options, message):
    target = jaxspec.load_target("target")
    with pytest.raises(ValueError, match=message):
        jaxspec.evaluate(target, decoders, ["sum"], **options)
