"""From a name or a path to a target."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.tokenizer import Tokenizer
from tests.checkpoints.writing import DENSE, random_tensors, write_folder, write_tokenizer


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


def with_tokenizer(folder, end):
    """A tokenizer of five words, of which one ends a text."""
    words = ["a", "b", "c", "d", "e"]
    tokenizer = Tokenizer.from_bpe(words, [], special=[], eos=end, chat_template=None)
    return write_tokenizer(folder, tokenizer)


@pytest.mark.parametrize(
    "config, generation, tokenizer, ends",
    [(None, None, 3, (3,)), (1, None, 3, (1, 3)), ([1, 3], [2], 3, (1, 3, 2)), (3, 3, 3, (3,))],
)
def test_a_text_ends_where_any_of_three_files_says(
    tmp_path, config, generation, tokenizer, ends
):
    raw = DENSE | {"eos_token_id": config}
    write_folder(with_tokenizer(tmp_path, tokenizer), raw, random_tensors(DENSE))
    text = json.dumps({"eos_token_id": generation})
    (tmp_path / "generation_config.json").write_text(text)
    target = checkpoints.load(tmp_path)
    assert target.config.eos_token_ids == target.tokenizer.eos_token_ids == ends


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path):
    raw = DENSE | {"vocab_size": 3}
    write_folder(with_tokenizer(tmp_path, 4), raw, random_tensors(raw))
    message = r"the tokenizer in .* does not fit: .*eos_token_ids names \[4\]"
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


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
