"""Small GGUF files for tests, named and ordered as llama.cpp's converter does."""

from __future__ import annotations

import re

import gguf
import numpy as np

from jaxspec.checkpoints.gguf import ARCHITECTURES

METADATA = {
    "llama.vocab_size": 11,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 0.5,
    "llama.context_length": 64,
    "tokenizer.ggml.eos_token_id": 2,
}


def rotate_neighbours(weight, heads):
    """llama.cpp's order of a head's rows: 0, D/2, 1, D/2 + 1, …"""
    dim = weight.shape[0] // heads
    order = [
        head * dim + half * dim // 2 + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in range(2)
    ]
    return weight[order]


def gguf_tensors(tensors, arch, layers=2):
    """The tensors as llama.cpp's converter stores them, under the names of its library."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), layers)
    stacks, found = {}, {}
    for name, tensor in tensors.items():
        if expert := re.search(r"\.experts\.(\d+)", name):
            stacks.setdefault(name.replace(expert[0], ".experts"), []).append(tensor)
    for name, tensor in (tensors | stacks).items():
        if re.search(r"\.experts\.\d", name):
            continue
        if arch == "llama":
            for old, heads in (("q_proj", 4), ("k_proj", 2)):
                tensor = rotate_neighbours(tensor, heads) if old in name else tensor
        alone, _, kind = name.rpartition(".")
        known = names.get_name(alone)
        found[name if known is None else f"{known}.{kind}"] = np.asarray(tensor)
    return found


def write_gguf(path, tensors, metadata=METADATA, *, arch="llama", kind=None, tokens=None):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        (writer.add_string if isinstance(value, str) else add)(key, value)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokens["pre"])
        writer.add_token_list(tokens["tokens"])
        writer.add_token_types(tokens["types"])
        writer.add_token_merges(tokens["merges"])
        writer.add_chat_template(tokens["template"])
    for name, tensor in gguf_tensors(
        tensors, arch if arch in ARCHITECTURES else "llama"
    ).items():
        quantise = kind is not None and tensor.ndim >= 2
        data = gguf.quantize(tensor, kind) if quantise else tensor
        writer.add_tensor(name, data, raw_dtype=kind if quantise else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
