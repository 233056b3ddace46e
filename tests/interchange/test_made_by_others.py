"""Drafters that z-lab's `dflash` and vLLM's `speculators` make and save, of many settings, load
here and draft what they draft there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import Committed
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from tests.drafters.goldens import CAPACITY, tapped
from tests.interchange.cases import (
    ANCHOR,
    LAYERS,
    LENGTH,
    MASK,
    TOKENS,
    VOCAB,
    WIDTH,
    features,
    make_target,
    prompts,
    unrolled_logits,
)
from tests.interchange.running import MARKS, run

pytestmark = MARKS
CHAIN, NEW, STEPS, DEPTHS = TreeConfig("chain", 8), 40, 3, 4
LAYER = dict(
    model_type="qwen3",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-4,
    rope_parameters={"rope_theta": 700.0, "rope_type": "default"},
)
YARN = dict(
    rope_type="yarn",
    rope_theta=300.0,
    factor=3.0,
    original_max_position_embeddings=64,
    truncate=False,
    beta_fast=8.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=1.5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=300.0,
    factor=4.0,
    low_freq_factor=2.0,
    high_freq_factor=5.0,
    original_max_position_embeddings=64,
)


def layers(kinds: str, window: int = 0) -> dict:
    """F is a full layer, S one that slides."""
    names = {"F": "full_attention", "S": "sliding_attention"}
    found = dict(num_hidden_layers=len(kinds), layer_types=[names[kind] for kind in kinds])
    return found | (dict(sliding_window=window, use_sliding_window=True) if window else {})


def zlab(kind: str, top: dict, **own) -> dict:
    own = dict(target_layer_ids=[0, 2, 4], mask_token_id=MASK, block_size=6) | own
    config = LAYER | dict(num_target_layers=LAYERS, dflash_config=own) | top
    return dict(program="dflash", kind=kind, config=config)


def zlab2(top: dict, **own) -> dict:
    sizes = dict(conv_kernel_size=2, conv_group_size=8, selector_rank=6, selector_top_k=4)
    return zlab("dflash2", top, **(sizes | own))


SCALES = dict(output_multiplier=0.2, final_logit_softcapping=1.5, input_embedding_scale=3.0)
ZLAB = {
    "causal": zlab("dflash", layers("FF") | dict(is_causal=True, rope_parameters=LLAMA3)),
    "window decides": zlab("dflash", layers("SFS", 5)),
    "windows both ways": zlab("dflash", layers("SS", 3) | dict(is_causal=False), block_size=7),
    "causal and full": zlab("dflash", layers("SF", 9) | dict(is_causal=True)),
    "embeddings scaled": zlab("dflash", {}, input_embedding_scale=0.3, target_layer_ids=[3]),
    "defaults of windows": zlab(
        "dflash", dict(num_hidden_layers=2, use_sliding_window=True, sliding_window=4)
    ),
    "selector": zlab2(dict(is_causal=False), selector_top_k=VOCAB),
    "selector, causal": zlab2(dict(is_causal=True, rope_parameters=YARN), selector_rank=1),
    "selector, windows": zlab2(layers("SFS", 4), conv_kernel_size=3, conv_group_size=1),
    "selector, windows both ways": zlab2(
        layers("SSF", 4) | dict(is_causal=False), conv_kernel_size=1, conv_group_size=WIDTH
    ),
    "scales": zlab2({}, **SCALES),
    "keys at the top": zlab2(SCALES | dict(block_size=4), block_size=4, selector_top_k=2),
}


def speculators(kind: str, layer: dict, **own) -> dict:
    aux = "aux_hidden_state_layer_ids"
    drafts = ("eagle_" if "eagle" in kind else "") + aux
    proposal = dict(proposal_type="greedy", speculative_tokens=5)
    config = dict(
        speculators_model_type=kind,
        speculators_config=dict(
            algorithm=kind,
            default_proposal_method="greedy",
            proposal_methods=[proposal],
            verifier=dict(name_or_path="../target", architectures=["Qwen3ForCausalLM"]),
        ),
        draft_vocab_size=VOCAB,
        transformer_layer_config=LAYER | layer,
        **{drafts: [1, 2, 5]},
    )
    return dict(
        program="speculators", config=config | own, taps=f"{len(own.get(drafts, '123'))}"
    )


def blocks(kind: str, layer: dict, **own) -> dict:
    job = speculators(kind, layer, block_size=5, mask_token_id=MASK, **own)
    return job | dict(tokens=TOKENS, anchors=[ANCHOR], options={"max_anchors": 1})


def eagle(kind: str, layer: dict, **own) -> dict:
    """Rows are pairs of a feature and the token after it."""
    options = {"ttt_steps": STEPS}
    if kind == "peagle":  # all depths of all anchors, none sampled
        options = {"num_depths": DEPTHS} | dict.fromkeys(
            ("down_sample_ratio", "down_sample_ratio_min"), 1.0
        )
    job = speculators(kind, dict(num_hidden_layers=1) | layer, **own)
    return job | dict(tokens=[*TOKENS[1:], 0], anchors=list(range(LENGTH)), options=options)


WIDE = (
    LENGTH  # windows that no slot leaves: training there and drafting here differ at their end
)
SELECTOR = dict(conv_kernel_size=3, conv_group_size=4, selector_rank=5, selector_top_k=6)
LLAMA = dict(model_type="llama", attention_bias=False, mlp_bias=False)
BLOCKS = {
    "full": blocks("dflash", dict(rope_parameters=YARN)),
    "some vocabulary": blocks("dflash", layers("F"), draft_vocab_size=17),
    "causal windows": blocks("dflash", layers("SF", WIDE)),
    "windows both ways": blocks("dflash", layers("SF", WIDE), sliding_window_non_causal=True),
    "next": blocks("dflash", layers("FF"), sample_from_anchor=True),
    "selector": blocks("dflash2", layers("FS", WIDE), **SELECTOR),
    "selector, causal": blocks(
        "dflash2", layers("FS", WIDE), sliding_window_non_causal=False, **SELECTOR
    ),
    "markov": blocks("dspark", layers("F"), markov_rank=4),
    "markov, some vocabulary": blocks(
        "dspark", layers("F"), markov_rank=4, draft_vocab_size=17
    ),
    "gated": blocks("dspark", layers("F"), markov_rank=4, markov_head_type="gated"),
    "rnn": blocks("dspark", layers("F"), markov_rank=4, markov_head_type="rnn"),
    "markov, own positions": blocks(
        "dspark", layers("SF", WIDE), markov_rank=4, sample_from_anchor=False
    ),
}
EAGLES = {
    "eagle3": eagle("eagle3", LLAMA),
    "qwen": eagle("eagle3", dict(rope_parameters=LLAMA3), norm_before_residual=True),
    "as trained there": eagle(
        "eagle3",
        LLAMA,
        draft_vocab_size=17,
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
    ),
    "each tap normed": eagle("eagle3", LLAMA, fc_norm=True, norm_output=True),
    "two layers": eagle("eagle3", LLAMA | dict(num_hidden_layers=2), norm_before_fc=True),
    "one tap": eagle("eagle3", LLAMA, eagle_aux_hidden_state_layer_ids=[3], fc_norm=True),
    "peagle": eagle("peagle", LLAMA | dict(num_hidden_layers=2), mask_token_id=MASK),
    "peagle, normed": eagle(
        "peagle",
        LLAMA,
        mask_token_id=3,
        draft_vocab_size=17,
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    target, jobs = make_target(folder), {}
    for group in (ZLAB, BLOCKS, EAGLES):
        for name, job in group.items():
            draft = f"{job['program']} {name}".replace(" ", "-").replace(",", "")
            jobs[f"{job['program']} {name}"] = job | dict(draft=draft)
    for name, job in jobs.items():
        if job["program"] == "dflash":
            jobs[name] = job | dict(prompt=prompts(1)[0], max_new_tokens=NEW)
    taps = {str(n): features(n) for n in (1, 3)}
    return folder, target, jobs, *run(folder, jobs, **taps)


def load(case, name):
    folder, target, jobs, *_ = case
    return load_drafter(folder / jobs[name]["draft"], target, CHAIN)


@functools.partial(jax.jit, static_argnames="drafter")
def drafts(drafter, params, tokens, taps, position):
    start, at = jnp.zeros(1, jnp.int32), position[None]
    state = drafter.init(params, 1, CAPACITY)
    state = drafter.observe(params, state, Committed(tokens, taps, start, at))
    anchor = tokens[:, position][0][None]
    tree, _ = drafter.draft(params, state, anchor, at, jnp.array([drafter.size]))
    return tree.tokens[0, 1 : drafter.depth + 1]


@pytest.mark.parametrize("name", ZLAB)
def test_zlab_drafts_what_we_draft(case, name):
    """In every round of a whole block; and decoding commits as much."""
    target, theirs, prompt = case[1], case[3][f"dflash {name}"], prompts(1)[0]
    loaded = load(case, f"dflash {name}")
    drafter, params = loaded.drafter, loaded.params
    size, position = drafter.config.block_size, len(prompt)
    sequence = np.array([*prompt, *theirs["tokens"]])[:CAPACITY]
    tokens = jnp.asarray(np.pad(sequence, (0, CAPACITY - len(sequence)))[None], jnp.int32)
    taps = tapped(target.params, target.config, tokens, drafter.taps)
    whole = 0
    for block, committed in zip(theirs["blocks"], theirs["committed"], strict=True):
        if len(block) < size:
            break
        assert block[1:] == drafts(drafter, params, tokens, taps, jnp.int32(position)).tolist()
        position, whole = position + committed, whole + 1
    assert whole > 5
    (ours,) = generate(target, [prompt], drafter=loaded, max_new_tokens=NEW)
    assert ours.token_ids == theirs["tokens"]
    assert list(ours.stats.committed)[:whole] == theirs["committed"][:whole]


def outputs_of(case, name, module):
    """Of all calls, one after another."""
    mark = f"speculators {name}/{module}/"
    calls = [case[4][key] for key in case[4] if key.startswith(mark)]
    return np.concatenate([np.atleast_2d(x) for x in calls])


@pytest.mark.parametrize("name", BLOCKS)
def test_speculators_blocks_have_our_logits(case, name):
    loaded = load(case, f"speculators {name}")
    drafter, params = loaded.drafter, loaded.params
    head = bind(drafter.config, params.head)
    block = run_blocks(
        head,
        params.vocabulary,
        jnp.array([TOKENS]),
        jnp.asarray(features(3))[None],
        jnp.array([[ANCHOR]]),
    )
    base = head.logits(params.vocabulary, block.stream)
    ours = {"lm_head": base}
    if drafter.config.sequential not in (None, "bilinear"):
        ours["markov_head.markov_w2"] = block.logits(head, params.vocabulary) - base
    if drafter.config.confidence:
        found = head.confidence_logits(block.stream, block.previous)
        ours["confidence_head.proj"] = found[..., None]
    for module, values in ours.items():
        theirs = outputs_of(case, name, module)
        np.testing.assert_allclose(theirs[-drafter.depth :], values[0, 0], atol=2e-4)


@pytest.mark.parametrize("name", [name for name in EAGLES if "peagle" not in name])
def test_speculators_steps_have_our_logits(case, name):
    ours = unrolled_logits(load(case, f"speculators {name}"), steps=STEPS)
    for step in range(STEPS):
        inside = LENGTH - 1 - step
        theirs = case[4][f"speculators {name}/lm_head/{step}"]
        np.testing.assert_allclose(theirs[:inside], ours[step, :inside], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in EAGLES if "peagle" in name])
def test_speculators_depths_have_our_logits(case, name):
    """Their rows are in an order of their own: each of ours is among those of its depth."""
    loaded = load(case, f"speculators {name}")
    drafter, params = loaded.drafter, loaded.params
    pair, tokens, taps = 60, jnp.array([TOKENS]), jnp.asarray(features(3))[None]
    count = jnp.array([pair + 1])
    state = drafter.observe(
        params, drafter.init(params, 1, LENGTH), Committed(tokens, taps, 0 * count, count)
    )
    ours = drafter.logits(params, state, tokens[:, pair + 1], count)[0]
    theirs, start = case[4][f"speculators {name}/lm_head/0"], 0
    for depth in range(DEPTHS):
        rows = theirs[start : start + LENGTH - depth]
        distances = np.sort(np.abs(rows - ours[depth]).max(axis=1))
        assert distances[0] < 2e-5 < 1e-3 < distances[1]
        start += len(rows)
