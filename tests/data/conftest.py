"""Qwen3's real tokenizer here, too."""

from tests.checkpoints.test_tokenizer import qwen3  # noqa: F401
