"""Models on disk for the commands that measure."""

import pytest

import jaxspec
from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.config import TreeConfig
from jaxspec.evaluation import phases
from jaxspec.tokenizer import Tokenizer
from tests.checkpoints.writing import DENSE, random_tensors, write_folder, write_tokenizer
from tests.drafters import cases

FOLDERS = {"run/a": "rnn", "run/b": "dflash"}


VOCABULARY = ["<end>", "s", "u", "m", "c", "o", "d", "e", "n", "b", "r"]
CONFIG = DENSE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target and two drafters, run/a with a sequential head and run/b without, in the folder
    that the commands run in."""
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "target", CONFIG, random_tensors(CONFIG))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=template)
    write_tokenizer(folder / "target", tokenizer)
    for name, kind in FOLDERS.items():
        loaded = cases.loaded(kind, TreeConfig())
        save_drafter(folder / name, loaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jaxspec, "enable_compilation_cache", lambda: None)
        patch.setattr(phases, "VERIFY_SIZES", (1, 8))  # few programs to compile
        patch.setattr(phases, "REPEATS", 2)
        yield
