"""What the process has set for its own JAX, and what the machine lacks."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

import jaxspec
from jaxspec.checkpoints import catalog
from jaxspec.loading import enable_compilation_cache
from jaxspec.tokenizer import Tokenizer
from tests import tiny
from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.test_stream import VOCABULARY

LETTERS = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "another generator": lambda: jax.default_prng_impl("rbg"),
    "no compilation": lambda: jax.disable_jit(True),
    "no transfers": lambda: jax.transfer_guard("disallow"),
}


def answers(target):
    drafter = jaxspec.load_drafter("ngram", target)
    done = jaxspec.generate(
        target,
        [[1, 2, 3, 1, 2], [4, 5]],
        drafter=drafter,
        max_new_tokens=8,
        sampling=[jaxspec.Sampling(), jaxspec.Sampling(temperature=1.0, top_k=5)],
    )
    return [completion.token_ids for completion in done]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_answers_do_not_depend_on_the_settings_of_the_process(name):
    target = tiny.target()
    expected = answers(target)
    with SETTINGS[name]():
        assert answers(target) == expected
        wide = jax.numpy.arange(2).dtype
    assert wide == ("int64" if name == "x64" else "int32")  # they are back after each call


# A process of its own, because the number of devices is fixed when JAX starts.
MESHES = """
import dataclasses
import jax, numpy as np
from jax.sharding import AxisType
import jaxspec
from tests import tiny
from tests.test_settings import LETTERS, answers

target = dataclasses.replace(tiny.target(), tokenizer=LETTERS)
ids = np.array([[1, 2, 3, 1], [4, 5, 4, 5]])

def all_functions():
    text = "".join(jaxspec.stream(target, "ab", raw=True, max_new_tokens=8))
    scores = [score.total for score in jaxspec.score(target, ids)]
    logits = jax.jit(lambda ids: jaxspec.logits(target, ids))(ids)
    loaded = jaxspec.load_target("smollm2-135m").params.embed.devices()
    return (answers(target), text, len(loaded)), (np.array(scores), np.array(logits))

texts, numbers = all_functions()
for kind, name in ((AxisType.Auto, "data"), (AxisType.Explicit, "model")):
    with jax.set_mesh(jax.make_mesh((2,), (name,), axis_types=(kind,))):
        found, others = all_functions()
    assert found == texts, (kind, name, found)
    for a, b in zip(others, numbers):
        np.testing.assert_allclose(a, b, atol=2e-5)
"""


@pytest.mark.slow
@pytest.mark.real
def test_answers_do_not_depend_on_a_mesh_that_the_process_has_set():
    done = subprocess.run(
        [sys.executable, "-c", MESHES],
        env=os.environ | dict(JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_stream_has_them_only_while_it_computes():
    target = dataclasses.replace(tiny.target(), tokenizer=LETTERS)
    pieces = jaxspec.stream(target, "ab", raw=True, max_new_tokens=8)
    expected = "".join(jaxspec.stream(target, "ab", raw=True, max_new_tokens=8))
    with jax.enable_x64(True):
        found = []
        for piece in pieces:
            found.append(piece)
            assert jax.numpy.arange(2).dtype == "int64"
    assert "".join(found) == expected


@pytest.mark.slow
def test_a_command_under_all_of_them(tmp_path):
    folder = write_folder(tmp_path / "target", DENSE, random_tensors(DENSE))
    (tmp_path / "ids.json").write_text("[[1, 2, 3]]")
    settings = dict(
        JAX_ENABLE_X64="1",
        JAX_NUMPY_RANK_PROMOTION="raise",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_DISABLE_JIT="1",
        JAX_TRANSFER_GUARD="disallow",
        JAXSPEC_CACHE=os.devnull,
        PYTHONIOENCODING="latin-1",
    )
    words = ["generate", "--target", folder, "--prompt-ids", tmp_path / "ids.json"]
    words += ["--dtype", "float32", "--schedule", "fixed"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxspec", *words, "--max-new-tokens", "4"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        | settings,
    )
    assert done.returncode == 0, done.stderr
    assert "[4 tokens, " in done.stdout
    assert done.stderr.startswith("warning: compiled programs are not kept, and every start")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def no_cache():
    """JAX without a cache of compiled programs; the tests' own comes back."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_cache_that_the_user_chose_is_kept(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert enable_compilation_cache() == tmp_path
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize(
    "named, expected", [("", ".cache/jaxspec"), (None, ".cache/jaxspec"), ("~/kept", "kept")]
)
def test_where_files_are_kept(monkeypatch, no_cache, tmp_path, named, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXSPEC_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("JAXSPEC_CACHE", named)
    assert catalog.cache_dir() == tmp_path / expected
    assert enable_compilation_cache() == tmp_path / expected / "xla"


def test_without_a_home(monkeypatch, no_cache):
    def unknown(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAXSPEC_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", unknown)
    with pytest.warns(UserWarning, match="not kept.*determine home directory.*set JAXSPEC_CA"):
        assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
