"""Hybrids in float32 against PyTorch's transformers, through checkpoints it saved."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed
from jaxspec.drafters.rollout import greedy
from jaxspec.loading import load_drafter, load_target
from jaxspec.models import delta_net as ours
from jaxspec.trees.tree import chain_nodes
from pallas_kernels.tree_delta_rule import tree_delta_rule
from tests import tiny
from tests.models import test_delta_net as reference
from tests.models.test_parity import (
    TOLERANCE,
    VOCABULARY,
    logits_of,
    torch_logits,
    with_random_weights,
)

pytestmark = pytest.mark.parity

TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    layer_types=["linear_attention"] * 3 + ["full_attention", "linear_attention"],
    eos_token_id=None,
)
DENSE = TEXT | dict(intermediate_size=80)
EXPERTS = TEXT | dict(
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
MROPE = ROPE | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
VISION = dict(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48, patch_size=4
)


def qwen3_5(rope):
    import transformers as t

    return t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(**DENSE, rope_parameters=rope))


def multimodal(kind):
    import transformers as t

    text = (EXPERTS if kind == "Moe" else DENSE) | dict(rope_parameters=MROPE)
    config = getattr(t, f"Qwen3_5{kind}Config")(text_config=text, vision_config=VISION)
    return getattr(t, f"Qwen3_5{kind}ForConditionalGeneration")(config)


def qwen3_next(**options):
    import transformers as t

    options = EXPERTS | dict(intermediate_size=80, rope_parameters=ROPE) | options
    return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**options))


CASES = {
    "qwen3.5": lambda: qwen3_5(ROPE),
    "qwen3.5, mrope, half a head": lambda: qwen3_5(MROPE | {"partial_rotary_factor": 0.5}),
    "qwen3.5 with a vision tower": lambda: multimodal(""),
    "qwen3.5-moe with a vision tower": lambda: multimodal("Moe"),
    "qwen3-next": qwen3_next,
    "qwen3-next, one layer dense": lambda: qwen3_next(
        mlp_only_layers=[1], norm_topk_prob=False
    ),
}


def random_case(name):
    """Norms are stored less one, except for those of the outputs of gated delta nets."""
    model = with_random_weights(CASES[name](), center_of_norms=0.0)
    for parameter, weight in model.named_parameters():
        if parameter.endswith("linear_attn.norm.weight"):
            weight.data += 1
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(their model, ours, prompts longer than chunks of both)."""
    folder, model = tmp_path_factory.mktemp("saved"), random_case(request.param)
    model.save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 150))
    return model, checkpoints.load(folder), tokens


@pytest.mark.parametrize("chunk", [150, 25])
def test_logits(case, chunk):
    model, target, tokens = case
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.5
    found = logits_of(target, tokens, chunk=chunk)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_continuations(case):
    """Greedy, through their cache one token at a time and through our trees."""
    import torch

    model, target, tokens = case
    prompts = [tokens[0, :140].tolist(), tokens[1, :9].tolist()]
    done = generate(target, prompts, drafter=tiny.RANDOM, max_new_tokens=24)
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


def test_the_state_after_4000_tokens_is_as_exact_as_theirs():
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    total = 4096
    arrays = reference.random_nodes(np.random.default_rng(0), total, 0.98)
    shape = (reference.J, reference.DK, reference.R * reference.DV)
    exact = reference.recurrence(np.zeros(shape), zip(*arrays, strict=True))[1]

    def by_value_head(x):  # [1, T, J * R, ...]
        return torch.from_numpy(x.reshape(1, total, -1, *x.shape[3:]))

    q, k = (torch.from_numpy(x[None]) for x in arrays[:2])
    v, g, beta = map(by_value_head, arrays[2:])
    scale = reference.DK**0.5
    theirs = torch_chunk_gated_delta_rule(
        q * scale, k, v, g=g, beta=beta, output_final_state=True
    )[1].reshape(reference.J, reference.R, reference.DK, reference.DV)
    theirs = theirs.transpose(1, 2).reshape(shape)

    chunk = 64
    chunks = [x.reshape(total // chunk, 1, chunk, *x.shape[1:]) for x in arrays]
    inputs = jnp.zeros((1, chunk, reference.J, reference.CHANNELS))
    bits, counts = chain_nodes(1, chunk)[1], jnp.array([chunk])

    def step(carry, part):
        state, length = carry
        _, updates = tree_delta_rule(*part, state.memory, bits, length > 0)
        rows = ours.DeltaRows(part[1], updates, part[3], inputs)
        return (state.write(rows, length, counts), length + chunk), None

    start = ours.DeltaState(jnp.zeros((1, *shape)), inputs[:, : reference.TAPS - 1])
    (found, _), _ = jax.lax.scan(step, (start, jnp.zeros(1, int)), tuple(chunks))

    def error(memory):
        return np.abs(np.asarray(memory) - exact).max() / np.abs(exact).max()

    assert error(found.memory[0]) < max(1.5 * error(theirs), 1e-6)


def test_an_mtp_layer_is_their_layer_after_norms_and_a_product(tmp_path):
    """Checkpoints hold it and transformers leaves it out: it is made of their modules here."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    model = random_case("qwen3.5")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    width, eps = config.hidden_size, config.rms_norm_eps
    parts = torch.nn.ModuleDict(
        dict(
            trunk=theirs.Qwen3_5TextModel(config),
            fc=torch.nn.Linear(2 * width, width, bias=False),
            pre_fc_norm_embedding=theirs.Qwen3_5RMSNorm(width, eps),
            pre_fc_norm_hidden=theirs.Qwen3_5RMSNorm(width, eps),
        )
    )
    with_random_weights(parts, center_of_norms=0.0)
    model.save_pretrained(tmp_path)
    own = {
        f"mtp.{name.removeprefix('trunk.')}": x.numpy()
        for name, x in parts.state_dict().items()
        if "embed_tokens" not in name
    }
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | own, file, metadata={"format": "pt"})
    target = load_target(tmp_path)
    loaded = load_drafter("mtp", target, tree=TreeConfig("chain", 4))

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 12).tolist()
    with torch.no_grad():
        features = model.model(torch.tensor([tokens[:-1]])).last_hidden_state
        taps = jnp.asarray(features.numpy())
        committed = Committed(jnp.array([tokens[:-1]]), taps, *jnp.array([[0], [11]]))
        state = loaded.drafter.init(loaded.params, 1, 16)
        state = loaded.drafter.observe(loaded.params, state, committed)
        anchor, position = jnp.array([tokens[-1]]), jnp.array([11])
        chosen, laws = loaded.drafter.rollout(loaded.params, state, anchor, position, greedy)
        following = tokens[1:]
        for step in range(3):
            embedded = model.model.embed_tokens(torch.tensor([following]))
            pair = parts.pre_fc_norm_embedding(embedded), parts.pre_fc_norm_hidden(features)
            joined = parts.fc(torch.cat(pair, dim=-1))
            hidden = parts.trunk(inputs_embeds=joined).last_hidden_state
            expected = model.lm_head(hidden[0, -1]).numpy()
            np.testing.assert_allclose(laws[0, step], expected, atol=TOLERANCE, rtol=0)
            following = [*following, int(expected.argmax())]
            features = torch.cat([features, hidden[:, -1:]], dim=1)
    assert chosen[0].tolist() == following[-3:]
