"""Common parts of the formats of EAGLE-3 drafters.

A file's embedding and LM head are used if they differ from the target's. Tensors are read under
speculators' names: a layer is `layers.0`, and prefixes are removed.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from jaxspec.checkpoints import draft_vocabulary, layer_sizes, speculators, visibility
from jaxspec.checkpoints.draft_vocabulary import EMBEDDING, HEAD, MEMBERS, OFFSETS
from jaxspec.checkpoints.drafter_format import DrafterFormat
from jaxspec.checkpoints.head_tensors import eagle_parts
from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.checkpoints.rope import read_rope
from jaxspec.config import TargetConfig
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.models.scaled import by_value

TAPS, OWN = "eagle_aux_hidden_state_layer_ids", "eagle_config"
# Harmless keys: training, the target's vocabulary, and those without effect on one layer.
EAGLE_HARMLESS = HARMLESS | {
    *("eos_token_id", "embed_requires_grad", "step_loss_decay", "draft_num_hidden_layers"),
    *("speculators_model_type", "speculators_config", "speculators_version"),
    "tie_word_embeddings",
}
EAGLE_NEUTRAL = NEUTRAL | {"parallel_drafting": (False,), "mask_token_id": (), "num_depths": ()}
OLD_NAMES = {
    r"^(draft_model\.|model\.)": "",
    r"^midlayer\.": "layers.0.",
    r"^aux_norm_low\.": "fc_norm.0.",
    r"^aux_norm_mid\.": "fc_norm.1.",
    r"^aux_norm_high\.": "fc_norm.2.",
}


class EagleFormat(DrafterFormat):
    """A format of EAGLE-3 drafters.

    Attributes:
      repeats_embedding: whether files hold the embedding even if it is the target's.
    """

    kind = EagleConfig
    repeats_embedding = True
    extra = frozenset({EMBEDDING, HEAD, OFFSETS, MEMBERS})

    def parts(self, c):
        return eagle_parts(c)

    def todays_name(self, name):
        for old, new in OLD_NAMES.items():
            name = re.sub(old, new, name)
        return name

    def read_vocabulary(self, tensors, raw, c, target, dtype):
        kept, width = draft_vocabulary.draft_tokens(tensors, raw, c.vocab_size), c.hidden_size
        embed = draft_vocabulary.own_table(tensors, EMBEDDING, target.embed, width, dtype)
        found = {"kept": kept, "embed": embed}
        if raw.get("tie_word_embeddings") and HEAD not in tensors.shapes:
            table = target.embed if embed is None else embed
            return found | {"unembed": table if kept is None else table[kept]}
        own = draft_vocabulary.own_table(tensors, HEAD, target.unembed, width, dtype, kept)
        return found | {"unembed": own}

    def vocabulary_tensors(self, vocabulary, c, dtype):
        tensors = {HEAD: np.asarray(by_value(vocabulary.unembed)).astype(dtype)}
        if self.repeats_embedding or vocabulary.own_embed:
            tensors[EMBEDDING] = np.asarray(vocabulary.embed).astype(dtype)
        if vocabulary.kept is not None:
            kept = np.asarray(vocabulary.kept)
            tensors |= draft_vocabulary.vocabulary_tensors(kept, c.vocab_size)
        return tensors

    def prepare(self, tensors, c):
        one = (c.hidden_size, 2 * c.hidden_size)
        if len(c.taps) != 2 and tensors.shapes.get("fc.weight") == one:
            raise ValueError(
                f"{tensors.origin}: tensor 'fc.weight' joins one feature and an embedding, as "
                "EAGLE-1 and EAGLE-2 do; expected an EAGLE-3 drafter"
            )


def layers_from_json(layer: JsonConfig) -> dict[str, Any]:
    """Fields of the drafter's layers, from the keys of a Llama or a Qwen3."""
    normed = layer.one_of("model_type", ("llama", "qwen3"), "llama") == "qwen3"
    layer.one_of("use_qk_norm", (normed,), normed)
    layer.one_of("hidden_act", ("silu",), "silu")
    layer.one_of("attention_bias", (False,), False)
    layer.one_of("mlp_bias", (False,), False)
    sizes = layer_sizes.from_json(layer)
    layers = layer.count("num_hidden_layers", 1)
    window = (None,) * layers
    if layer.has("layer_types") or normed:
        window = visibility.windows(layer, layers, switched=normed)
    elif layer.flag("use_sliding_window", True):  # without the key any window counts
        layer.one_of("sliding_window", (None,), None)
    else:
        layer.has("sliding_window")  # read, and without effect
    theta, scaling = read_rope(layer, full_rotary=True)
    return sizes | dict(
        num_layers=layers,
        head_dim=layer.integer("head_dim", sizes["hidden_size"] // sizes["num_heads"]),
        qk_norm=normed,
        window=window,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def layers_to_json(c: EagleConfig) -> dict[str, Any]:
    """The inverse of `layers_from_json`."""
    raw = layer_sizes.to_json(c) | {
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "model_type": "qwen3" if c.qk_norm else "llama",
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    windows = visibility.to_json(c.window)
    if c.qk_norm:
        return raw | windows | {"max_window_layers": c.num_layers}
    raw |= {"mlp_bias": False, "pretraining_tp": 1}
    if any(c.window):
        raw |= {key: windows[key] for key in ("layer_types", "sliding_window")}
    return raw


def norms_from_json(whole: JsonConfig) -> dict[str, Any]:
    """Fields of the norms, except `norm_output`, from keys at the top and inside."""
    places = [whole]
    if whole.has(OWN):
        places.append(whole.section(OWN))
        places[1].one_of("use_aux_hidden_state", (True,), True)
    joined = any([place.flag("norm_before_fc") for place in places])
    each = any([place.flag(key) for place in places for key in ("fc_norm", "use_aux_norm")])
    if joined and each:
        raise whole.refusal("fc_norm", "one of 'fc_norm' and 'norm_before_fc' alone")
    return dict(
        tap_norm="joined" if joined else "each" if each else None,
        residual_after_norm=whole.flag("norm_before_residual"),
    )


def norms_to_json(c: EagleConfig) -> dict[str, Any]:
    """The keys of the taps' norms."""
    return {"fc_norm": c.tap_norm == "each", "norm_before_fc": c.tap_norm == "joined"}


def taps_from_json(whole: JsonConfig, target: TargetConfig | None) -> tuple[int, ...]:
    """The taps, 0-based; without a key, the default of EAGLE's own programs."""
    found = {}
    if whole.has(TAPS):
        found["at the top"] = tuple(i - 1 for i in whole.items(TAPS, int))
    if whole.has(OWN) and whole.section(OWN).has(TAPS):
        found[f"in '{OWN}'"] = whole.section(OWN).items(TAPS, int)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{whole.origin}: '{TAPS}' at the top means outputs of layers "
            f"{list(found['at the top'])}, in '{OWN}' {list(found[f'in {OWN!r}'])}; expected "
            "the same, the one at the top higher by one"
        )
    if found:
        return next(iter(found.values()))
    return speculators.taps_from_json(whole, TAPS, target)


def make(
    kind: type[EagleConfig],
    whole: JsonConfig,
    layer: JsonConfig,
    taps: tuple[int, ...],
    **fields: Any,
) -> EagleConfig:
    """Makes the configuration, after checking that every key is known.

    Args:
      kind: type of the configuration.
      layer: the object with the keys of the layers.
    """
    shape = layers_from_json(layer)
    config = whole.make(
        kind,
        target_hidden_size=whole.integer("target_hidden_size", shape["hidden_size"]),
        target_layers=whole.integer("num_target_layers", None),
        taps=taps,
        **shape,
        **norms_from_json(whole),
        **fields,
    )
    # `draft_vocabulary` compares both with the tensors.
    whole.integer("draft_vocab_size", config.vocab_size)
    whole.flag("tie_word_embeddings")
    whole.finish(EAGLE_HARMLESS, EAGLE_NEUTRAL)
    return config
