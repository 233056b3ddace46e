"""float32 logits against PyTorch's transformers in float64, through checkpoints it saved."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.state import init_states

pytestmark = pytest.mark.parity

TOLERANCE = 2e-4
VOCABULARY = 97
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
EXPERTS = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16)
# The structures of published models (heads, key/value heads, tied head, mixture), made narrow
# and shallow. Heads are not an even share of the width, as in Qwen3.
CASES = {
    "qwen3-0.6b": ("Qwen3", dict(heads=16, kv_heads=8, tied=True)),
    "qwen3-4b": ("Qwen3", dict(heads=32, kv_heads=8, tied=True)),
    "qwen3-8b": ("Qwen3", dict(heads=32, kv_heads=8, tied=False)),
    "qwen3-14b": ("Qwen3", dict(heads=40, kv_heads=8, tied=False)),
    "qwen3-32b": ("Qwen3", dict(heads=64, kv_heads=8, tied=False)),
    "qwen3-30b-a3b": ("Qwen3Moe", dict(heads=32, kv_heads=4, norm_topk_prob=True, **EXPERTS)),
    "qwen3-235b-a22b": ("Qwen3Moe", dict(heads=64, kv_heads=4, norm_topk_prob=True, **EXPERTS)),
    "experts not renormalised": (
        "Qwen3Moe",
        dict(heads=4, kv_heads=2, norm_topk_prob=False, **EXPERTS),
    ),
    "some layers dense": (
        "Qwen3Moe",
        dict(heads=4, kv_heads=2, norm_topk_prob=True, mlp_only_layers=[1], **EXPERTS),
    ),
    "every second layer sparse": (
        "Qwen3Moe",
        dict(heads=4, kv_heads=2, norm_topk_prob=True, decoder_sparse_step=2, **EXPERTS),
    ),
    "llama": ("Llama", dict(heads=12, kv_heads=4, tied=True)),
    "llama, untied": ("Llama", dict(heads=8, kv_heads=8, tied=False)),
    "qwen2": ("Qwen2", dict(heads=6, kv_heads=2, tied=True)),
}


def random_model(family, *, heads, kv_heads, tied=False, **options):
    """A transformers model whose logits differ clearly from token to token."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **SMALL,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **options,
    )
    return with_random_weights(getattr(transformers, f"{family}ForCausalLM")(config))


def with_random_weights(model, center_of_norms=1.0):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.eval().named_parameters():
            center = center_of_norms if "norm" in name else 0.0
            weight.copy_(center + 0.15 * torch.randn(weight.shape, generator=generator))
    return model


def logits_of(target, tokens, *, chunk):
    """[B, T, V] for a prompt; each chunk sees those before it through the cache."""
    config = target.config
    batch, total = tokens.shape
    states = init_states(config, batch, total, jnp.float32)
    logits = []
    for start in range(0, total, chunk):
        tokens_now, lengths = tokens[:, start : start + chunk], jnp.full(batch, start)
        output = _forward(target.params, config, tokens_now, states, lengths)
        states = states.write(output.rows, jnp.int32(start), jnp.full(batch, chunk))
        logits.append(unembed(target.params, output.hidden))
    return np.concatenate(logits, axis=1)


_forward = jax.jit(forward_chain, static_argnames="config")


def torch_logits(model, tokens):
    """In float64, as rounding in float32 can exceed the tolerance."""
    import torch

    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, name):
    family, options = CASES[name]
    model = random_model(family, **options)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.5
    found = logits_of(checkpoints.load(tmp_path), tokens, chunk=6)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def smollm2_by_transformers(path):
    """The Llama model that transformers' own reader makes of the GGUF file."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    model = LlamaForCausalLM(config).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


TEXT = (
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n"
    "In 1969 — the 20th of July — they said: « One small step … » 🚀"
)


@pytest.mark.real
def test_logits_of_smollm2(smollm2, smollm2_path):
    tokens = np.array([smollm2.tokenizer.encode(TEXT)[:40]])
    expected = torch_logits(smollm2_by_transformers(smollm2_path), tokens)
    found = logits_of(smollm2, tokens, chunk=20)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.real
def test_tokenizer_of_smollm2(smollm2, smollm2_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert smollm2.tokenizer.encode(TEXT) == theirs.encode(TEXT)
    messages = [{"role": "user", "content": TEXT}]
    assert smollm2.tokenizer.chat(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
