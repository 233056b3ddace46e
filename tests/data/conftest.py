"""Qwen3's real tokenizer here, too; and a tiny target with a tokenizer."""

import pytest

from jaxspec.models.target import Target
from tests.checkpoints.test_tokenizer import qwen3  # noqa: F401
from tests.data.test_conversations import PLAIN, tokenizer
from tests.training import tiny


@pytest.fixture(scope="session")
def target() -> Target:
    plain = tiny.target()
    return Target("tiny", plain.config, plain.params, tokenizer(PLAIN))
