"""From a name or a path to a target."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from tests.checkpoints.writing import DENSE, random_tensors, write_folder


def test_folder(tmp_path):
    tensors = random_tensors(DENSE)
    target = checkpoints.load(write_folder(tmp_path, DENSE, tensors), "bfloat16")
    assert target.config.num_layers == 2
    assert target.params.embed.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        target.params.embed.astype(jnp.float32), tensors["model.embed_tokens.weight"], rtol=4e-3
    )
    assert target.tokenizer is None
    assert checkpoints.load_tokenizer(tmp_path) is None


def test_file_of_another_kind(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    with pytest.raises(ValueError, match=r"model.onnx is neither a folder nor a .gguf file"):
        checkpoints.load(path)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"there is no file or folder smollm3; expected a path"
    ):
        checkpoints.load("smollm3")


def test_importing_the_package_imports_no_format():
    formats = ("jax", "transformers", "gguf", "safetensors")
    code = (
        f"import sys, jaxspec.checkpoints; sys.exit(any(m in sys.modules for m in {formats}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
