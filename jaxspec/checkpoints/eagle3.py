"""EAGLE-3 drafters' files, both ways (`eagle3_config` tells the formats apart).

Every format's tensors are read under speculators' names: a layer is `layers.0`, prefixes are
taken off. The embedding and the LM head of a file are used where they are not the target's own.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints import speculators
from jaxspec.checkpoints.drafter_files import (
    DrafterTensors,
    Table,
    check_names,
    equal_as_stored,
    expected_shapes,
    linear,
    read_weights,
    same,
    write_folder,
    written_tensors,
)
from jaxspec.checkpoints.eagle3_config import from_json, to_json
from jaxspec.checkpoints.fuse import Part, check_weights
from jaxspec.config import TargetConfig, TreeConfig
from jaxspec.drafters.eagle import EagleDrafter, EagleParams, eagle_params
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.params import TargetParams

EMBEDDING, HEAD = "embed_tokens.weight", speculators.HEAD
OFFSETS, MEMBERS = speculators.OFFSETS, speculators.MEMBERS
INTEGERS = (OFFSETS, MEMBERS)
OLD_NAMES = {
    r"^(draft_model\.|model\.)": "",
    r"^midlayer\.": "layers.0.",
    r"^aux_norm_low\.": "fc_norm.0.",
    r"^aux_norm_mid\.": "fc_norm.1.",
    r"^aux_norm_high\.": "fc_norm.2.",
}


def load(
    folder: Path,
    raw: dict[str, Any],
    target: TargetConfig,
    params: TargetParams,
    tree: TreeConfig,
    dtype,
) -> tuple[EagleDrafter, EagleParams]:
    """A drafter from a folder whose `config.json` holds `raw`; errors as `load_drafter`."""
    config = from_json(raw, folder, target)
    tensors = DrafterTensors(folder, INTEGERS, _today)
    table = eagle_parts(config)
    joined = tensors.shapes.get("fc.weight") == (config.hidden_size, 2 * config.hidden_size)
    if joined and len(config.taps) != 2:
        raise ValueError(
            f"{folder}: tensor 'fc.weight' joins one feature and an embedding, as EAGLE-1 and "
            "EAGLE-2 do; expected an EAGLE-3 drafter"
        )
    check_names(tensors, expected_shapes(table), {EMBEDDING, HEAD, *INTEGERS})
    kept = _draft_tokens(tensors, config, raw)
    embed, unembed = _own_tables(tensors, config, raw, params, kept, dtype)
    weights = read_weights(tensors, table, abstract_weights(config, dtype))
    own = dict(kept=kept, embed=embed, unembed=unembed)
    return EagleDrafter(config, tree), eagle_params(weights, params, **own)


def save(
    folder: Path,
    drafter: EagleDrafter,
    params: EagleParams,
    format: str | None,
    verifier: str | None,
) -> None:
    """Writes a folder in one of `eagle3_config.FORMATS`, by default speculators'; errors as
    `save_drafter`."""
    config, vocabulary = drafter.config, params.vocabulary
    kept = None if vocabulary.kept is None else np.asarray(vocabulary.kept)
    format, dtype = format or "speculators", np.dtype(params.head.fc.dtype)
    size = None if kept is None else len(kept)
    raw = to_json(config, format, str(dtype), kept=size, verifier=verifier)
    tensors = written_tensors(params.head, eagle_parts(config))
    tensors[HEAD] = np.asarray(vocabulary.unembed).astype(dtype)
    if format != "eagle3" or vocabulary.embed.shape[1] != config.target_hidden_size:
        tensors[EMBEDDING] = np.asarray(vocabulary.embed).astype(dtype)
    if kept is not None:
        tensors |= speculators.vocabulary_tensors(kept, tensors[HEAD], config.vocab_size)
    if format == "eagle3":
        tensors = {name.replace("layers.0.", "midlayer."): x for name, x in tensors.items()}
    write_folder(folder, raw, tensors, INTEGERS)


def eagle_parts(config: EagleConfig) -> Table:
    """For every weight, by its path in the head, the tensors it is made of."""
    c = config
    width, dim, each = c.hidden_size, c.head_dim, c.target_hidden_size
    queries, keys = c.num_heads * dim, c.num_kv_heads * dim
    table = {
        ("fc",): linear("fc.weight", width, len(c.taps) * each),
        ("norm",): same("norm.weight", width),
    }
    if c.tap_norm == "joined":
        table["tap_norm",] = same("input_norm.weight", len(c.taps) * each)
    elif c.tap_norm == "each":
        table["tap_norm",] = tuple(
            Part(f"fc_norm.{i}.weight", (each,), np.s_[i * each : (i + 1) * each], (0,))
            for i in range(len(c.taps))
        )
    for i in range(c.num_layers):
        layer, inputs = f"layers.{i}.", 2 * width if i == 0 else width
        a, inner = f"{layer}self_attn.", (c.intermediate_size, width)
        weights = {
            "norm": same(f"{layer}input_layernorm.weight", width),
            # [inputs, K, G, D]
            "q": (Part(f"{a}q_proj.weight", (queries, inputs), np.s_[...], (1, 2, 3, 0)),),
            "kv": (  # [inputs, K, 2, D]
                Part(f"{a}k_proj.weight", (keys, inputs), np.s_[:, :, 0], (1, 2, 0)),
                Part(f"{a}v_proj.weight", (keys, inputs), np.s_[:, :, 1], (1, 2, 0)),
            ),
            # [K, G, D, M]
            "out": (Part(f"{a}o_proj.weight", (width, queries), np.s_[...], (3, 0, 1, 2)),),
            "mlp_norm": same(f"{layer}post_attention_layernorm.weight", width),
            "gate_up": (  # [M, 2, F]
                Part(f"{layer}mlp.gate_proj.weight", inner, np.s_[:, 0], (1, 0)),
                Part(f"{layer}mlp.up_proj.weight", inner, np.s_[:, 1], (1, 0)),
            ),
            "down": linear(f"{layer}mlp.down_proj.weight", *reversed(inner)),
        }
        if i == 0:
            weights["hidden_norm"] = same(f"{layer}hidden_norm.weight", width)
        if c.qk_norm:
            weights["q_norm"] = same(f"{a}q_norm.weight", dim)
            weights["k_norm"] = same(f"{a}k_norm.weight", dim)
        table |= {("layers", i, name): parts for name, parts in weights.items()}
    return table


def _today(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def _draft_tokens(
    tensors: DrafterTensors, config: EagleConfig, raw: dict[str, Any]
) -> np.ndarray | None:
    """The draft vocabulary, ascending ids [V']; None for the whole one."""
    kept, size = speculators.draft_tokens(tensors, config.vocab_size), config.vocab_size
    wanted = raw.get("draft_vocab_size") or size
    found = size if kept is None else len(kept)
    if found != wanted:
        raise ValueError(
            f"{tensors.origin}: 'draft_vocab_size' is {wanted}, the tensors "
            + (
                f"'{OFFSETS}' names {found} tokens"
                if kept is not None
                else f"hold no '{OFFSETS}'"
            )
            + "; expected as many"
        )
    if kept is None or found == size:
        return None
    if kept[-1] == found - 1:
        warnings.warn(
            f"{tensors.origin}: tensor '{OFFSETS}' is all zeros, so that the first {found} "
            "tokens alone are drafted; SpecForge writes that where no vocabulary was given",
            stacklevel=2,
        )
    return kept


def _own_tables(
    tensors: DrafterTensors,
    config: EagleConfig,
    raw: dict[str, Any],
    target: TargetParams,
    kept: np.ndarray | None,
    dtype,
) -> tuple[np.ndarray | jax.Array | None, np.ndarray | jax.Array | None]:
    """The file's embedding and LM head; None where the target's do, which are not copied."""
    width = config.hidden_size
    rows = config.vocab_size if kept is None else len(kept)
    judge = target.unembed if kept is None else target.unembed[kept]
    embed = _table(tensors, EMBEDDING, (config.vocab_size, width), target.embed, dtype)
    if raw.get("tie_word_embeddings") and HEAD not in tensors.shapes:
        table = target.embed if embed is None else embed
        return embed, table if kept is None else table[kept]
    if kept is not None and HEAD not in tensors.shapes:
        raise ValueError(
            f"{tensors.origin}: tensor '{HEAD}' is missing; a draft vocabulary of {rows} "
            f"tokens asks for {(rows, width)}"
        )
    return embed, _table(tensors, HEAD, (rows, width), judge, dtype)


def _table(tensors: DrafterTensors, name: str, shape, theirs: jax.Array, dtype):
    """A table of the file, or None for the target's where it has none or the same."""
    found = tensors.shapes.get(name)
    if found is None and theirs.shape == shape:
        return None
    if found != shape:
        raise ValueError(
            f"{tensors.origin}: tensor '{name}' "
            + (
                f"has shape {found}"
                if found
                else "is missing, and the target's has another width"
            )
            + f"; its configuration asks for {shape}"
        )
    stored = tensors.read(name)
    if equal_as_stored(stored, theirs):
        return None
    with np.errstate(over="ignore"):
        stored = stored.astype(dtype)
    check_weights(stored, name, tensors.origin)
    return stored
