"""Published draft heads, both ways: z-lab DFlash and JetSpec, TreeFlash, DeepSpec, EAGLE-3.

The formats are told apart by their configuration, never by the name of the architecture, which
several of them share. What an import reads an export writes: the same tensors and keys.

==========  ===================  =========================================================
format      recognised by        differs in
==========  ===================  =========================================================
dflash      `dflash_config`      slots predict their own position, unless it says
                                 `sample_from_anchor`; causal if it says so (JetSpec)
treeflash   `treeflash_config`   backbone under `model.`, MLP under `ar_approximation.`
deepspec    `markov_rank`        slots predict the next position; carries the target's
                                 embedding and LM head; DFlash is rank 0
speculators `speculators_model_type`  see `checkpoints.speculators`
EAGLE-3     see `eagle3_config`  another network, of three formats
==========  ===================  =========================================================

A draft vocabulary (`drafters.head.Vocabulary`) is one more tensor, its token ids. A program
that ignores it drafts from the whole one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints import dflash2, eagle3, eagle3_config, speculators
from jaxspec.checkpoints.drafter_config import TEMPERATURES, from_json, recognise, to_json
from jaxspec.checkpoints.drafter_files import (
    DrafterTensors,
    check_names,
    check_unused,
    equal_as_stored,
    expected_shapes,
    linear,
    read_weights,
    same,
    write_folder,
    written_tensors,
)
from jaxspec.checkpoints.fuse import Part, check_dtype
from jaxspec.checkpoints.huggingface import resolve
from jaxspec.checkpoints.tensors import read_json
from jaxspec.config import DrafterConfig, TargetConfig, TreeConfig
from jaxspec.drafters.block import BlockDrafter, BlockParams, block_params, whole_weights
from jaxspec.drafters.eagle import EagleDrafter, EagleParams
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.head import Vocabulary, abstract_weights
from jaxspec.models.params import TargetParams

LEGACY_PREFIX = "logit_head."
DRAFT_TOKENS = "draft_token_ids"  # a tensor, int32 [V']
INTEGERS = (DRAFT_TOKENS, speculators.OFFSETS, speculators.MEMBERS)
SHIPPED = "shipped"  # name of the drafter in this package, for the catalog's default target


def load_drafter(
    name_or_path: str | Path,
    target_config: TargetConfig,
    target_params: TargetParams,
    tree: TreeConfig,
    dtype=jnp.float32,
) -> tuple[BlockDrafter, BlockParams] | tuple[EagleDrafter, EagleParams]:
    """A published drafter for a target.

    Args:
      name_or_path: a folder or a hub name, either with `::subfolder` after it.
      tree: what it shall draft.
      dtype: of its weights in memory.

    Raises:
      ValueError: it is not a drafter of a known format, is damaged, or was made for another
        target.
    """
    dtype, folder = check_dtype(dtype), locate(name_or_path)
    raw = read_json(folder / "config.json")
    if eagle3_config.recognise(raw):
        return eagle3.load(folder, raw, target_config, target_params, tree, dtype)
    config, format = (
        for_target(from_json(raw, folder), target_config, folder),
        recognise(raw, folder),
    )
    drafter = BlockDrafter(config, tree)
    tensors = DrafterTensors(folder, INTEGERS, _renamed)
    own = {}
    if format == "speculators":
        kept = speculators.draft_tokens(tensors, config.vocab_size)
        if kept is not None:
            rows = speculators.head(tensors, kept, config.hidden_size, dtype)
            if not equal_as_stored(rows, target_params.unembed[kept]):
                own["unembed"] = rows
        if kept is not None and config.sequential:
            raise ValueError(
                f"{folder}: a sequential head with a reduced vocabulary in speculators' format "
                "is not supported; expected the target's vocabulary"
            )
    else:
        kept = _draft_tokens(tensors, config.vocab_size)
    weights = _load(tensors, config, format, target_params, dtype)
    temperatures = _temperatures(raw.get(TEMPERATURES), config, folder)
    own |= dict(kept=kept, temperatures=temperatures)
    return drafter, block_params(weights, target_params, **own)


def read_drafter_config(
    name_or_path: str | Path, target: TargetConfig
) -> DrafterConfig | EagleConfig:
    """The configuration alone of a published drafter for a target; errors as `load_drafter`."""
    folder = locate(name_or_path)
    raw = read_json(folder / "config.json")
    if eagle3_config.recognise(raw):
        return eagle3_config.from_json(raw, folder, target)
    return for_target(from_json(raw, folder), target, folder)


def save_drafter(
    folder: str | Path,
    drafter: BlockDrafter | EagleDrafter,
    params: BlockParams | EagleParams,
    format: str | None = None,
    verifier: str | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` as the original stack reads them.

    Args:
      folder: must not hold a checkpoint yet.
      params: the weights' dtype is the file's.
      format: one of `drafter_config.FORMATS`, or for EAGLE-3 of `eagle3_config.FORMATS`; None
        takes the one that can express the configuration, without the target's vocabulary where
        the format leaves it out.
      verifier: the target's hub name or path from the folder, which speculators' format names.

    Raises:
      ValueError: the format cannot express the configuration, the folder is in use, or a weight
        is no finite number or absurdly large.
    """
    folder, config = Path(folder), drafter.config
    if format is None:
        format = "treeflash" if config.sequential == "mlp" else "dflash"
    check_unused(folder)
    if isinstance(drafter, EagleDrafter):
        return eagle3.save(folder, drafter, params, format, verifier)
    kept = params.vocabulary.kept
    if kept is not None and format == "deepspec":
        raise ValueError(
            "format 'deepspec' repeats the target's LM head, of which a drafter with a draft "
            "vocabulary has some rows; choose another format"
        )
    dtype = np.dtype(params.head.fc.dtype)
    if params.vocabulary.judge is not None and format != "speculators":
        raise ValueError(
            "the drafter has an LM head of its own, for which format "
            f"{format!r} has no tensor; save it as 'speculators'"
        )
    size = None if kept is None else len(kept)
    raw = to_json(config, format, str(dtype), kept=size, verifier=verifier)
    if np.any(np.asarray(params.temperatures) != 1):
        values = np.broadcast_to(params.temperatures, config.depth)
        raw[TEMPERATURES] = [float(x) for x in values]
    tensors = written_tensors(whole_weights(params), destinations(config, format))
    if format == "deepspec":
        for name, array in _vocabulary(params.vocabulary):
            tensors[name] = np.asarray(array).astype(dtype)
    if kept is not None and format == "speculators":
        rows = np.asarray(params.vocabulary.unembed).astype(dtype)
        tensors |= speculators.vocabulary_tensors(np.asarray(kept), rows, config.vocab_size)
    elif kept is not None:
        tensors[DRAFT_TOKENS] = np.asarray(kept)
    write_folder(folder, raw, tensors, INTEGERS)


def save_temperatures(folder: str | Path, temperatures: Sequence[float]) -> None:
    """Writes the confidence head's temperatures into the `config.json` of a drafter's folder.

    Raises:
      ValueError: the folder holds no drafter, or one that they do not fit.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    config = from_json(raw, folder)
    raw[TEMPERATURES] = _temperatures([float(x) for x in temperatures], config, folder)
    fresh = path.with_name("config.json.new")
    fresh.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    fresh.replace(path)


def _temperatures(found: Any, config: DrafterConfig, origin: Any) -> Any:
    if found is None:
        return 1.0
    good = (
        isinstance(found, list)
        and len(found) == config.depth
        and all(isinstance(x, (int, float)) and 0 < x < float("inf") for x in found)
    )
    if not good or config.confidence is None:
        raise ValueError(
            f"{origin}: '{TEMPERATURES}' is {found!r}; expected {config.depth} positive "
            "numbers and a drafter with a confidence head"
        )
    return found


def _draft_tokens(tensors: DrafterTensors, vocab: int) -> np.ndarray | None:
    """The draft vocabulary, ascending ids [V'], if there is one."""
    if DRAFT_TOKENS not in tensors.shapes:
        return None
    shape = tensors.shapes[DRAFT_TOKENS]

    def refuse(found: str) -> ValueError:
        return ValueError(
            f"{tensors.origin}: tensor '{DRAFT_TOKENS}' {found}; expected 2 … {vocab} token "
            f"ids, all different, 0 … {vocab - 1}, in ascending order"
        )

    if len(shape) != 1 or not 2 <= shape[0] <= vocab:
        raise refuse(f"has shape {shape}")
    ids = tensors.read(DRAFT_TOKENS)
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise refuse(f"names token {outside[0]}")
    for before, token in itertools.pairwise(ids.tolist()):
        if token == before:
            raise refuse(f"names token {token} twice")
        if token < before:
            raise refuse(f"has {before} before {token}")
    return ids


def locate(name_or_path: str | Path) -> Path:
    """The folder of a drafter: `shipped`, `path`, `hub/name`, or one with `::subfolder`.

    Raises:
      ValueError: there is none, or the subfolder leads out of it.
    """
    if name_or_path == SHIPPED:
        return Path(__file__).parents[1] / "shipped" / "smollm2-135m"
    name, separator, inner = str(name_or_path).partition("::")
    path = PurePosixPath(inner)
    if "/" not in name and not Path(name).exists():
        raise ValueError(
            f"there is no drafter {name!r}; expected {SHIPPED}, the folder or hub name of a "
            "trained drafter (name::subfolder too), or one that needs no checkpoint: none, "
            "ngram, small:NAME, python:MODULE:FUNCTION"
        )
    if separator and (path.is_absolute() or ".." in path.parts or not path.parts):
        raise ValueError(
            f"the subfolder in {str(name_or_path)!r} is {inner!r}; expected one inside {name}"
        )
    folder = resolve(name) / path
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected a drafter's checkpoint")
    return folder


def for_target(config: DrafterConfig, target: TargetConfig, origin: Any) -> DrafterConfig:
    """The configuration, which may not name the target's depth, with this target's.

    Raises:
      ValueError: it was made for a target of another shape.
    """
    if config.target_layers is None:
        try:
            config = dataclasses.replace(config, target_layers=target.num_layers)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        if target.num_layers - 1 in config.taps:
            raise ValueError(
                f"{origin}: 'aux_hidden_state_layer_ids' names {target.num_layers}, the last "
                "layer's output before the target's final norm; expected layers before it"
            )
    check_target(config, target, origin)
    return config


def check_target(config: DrafterConfig, target: TargetConfig, origin: Any) -> None:
    """Raises ValueError when a drafter was made for a target of another shape."""
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("number of target layers", config.target_layers, target.num_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"{origin}: the drafter's {name} is {ours}, the target's is {theirs}; "
                "use the target that it was trained for"
            )


def destinations(config: DrafterConfig, format: str) -> dict[tuple, tuple[Part, ...]]:
    """For every weight, by its path in the head, the tensors it is made of."""
    c = config
    width, dim = c.hidden_size, c.head_dim
    queries, keys = c.num_heads * dim, c.num_kv_heads * dim
    backbone = "model." if format == "treeflash" else ""

    table = {
        ("fc",): linear(f"{backbone}fc.weight", width, len(c.taps) * width),
        ("hidden_norm",): same(f"{backbone}hidden_norm.weight", width),
        ("norm",): same(f"{backbone}norm.weight", width),
    }
    for i in range(c.num_layers):
        layer = f"{backbone}layers.{i}."
        a, inner = f"{layer}self_attn.", (c.intermediate_size, width)
        weights = {
            "norm": same(f"{layer}input_layernorm.weight", width),
            # [M, K, G, D]
            "q": (Part(f"{a}q_proj.weight", (queries, width), np.s_[...], (1, 2, 3, 0)),),
            "kv": (  # [M, K, 2, D]
                Part(f"{a}k_proj.weight", (keys, width), np.s_[:, :, 0], (1, 2, 0)),
                Part(f"{a}v_proj.weight", (keys, width), np.s_[:, :, 1], (1, 2, 0)),
            ),
            "q_norm": same(f"{a}q_norm.weight", dim),
            "k_norm": same(f"{a}k_norm.weight", dim),
            # [K, G, D, M]
            "out": (Part(f"{a}o_proj.weight", (width, queries), np.s_[...], (3, 0, 1, 2)),),
            "mlp_norm": same(f"{layer}post_attention_layernorm.weight", width),
            "gate_up": (  # [M, 2, F]
                Part(f"{layer}mlp.gate_proj.weight", inner, np.s_[:, 0], (1, 0)),
                Part(f"{layer}mlp.up_proj.weight", inner, np.s_[:, 1], (1, 0)),
            ),
            "down": linear(f"{layer}mlp.down_proj.weight", *reversed(inner)),
        }
        table |= {("layers", i, name): parts for name, parts in weights.items()}
        convolutions = dflash2.convolutions(c, layer)
        table |= {("layers", i, *path): parts for path, parts in convolutions.items()}

    if c.sequential == "mlp":
        both = 2 * c.intermediate_size
        weights = {
            "norm": same("ar_approximation.norm.weight", width),
            # [2 M, 2, F] and [2, F]
            "up_gate": (
                Part("ar_approximation.ug.weight", (both, 2 * width), np.s_[...], (1, 2, 0)),
            ),
            "bias": (Part("ar_approximation.ug.bias", (both,), np.s_[...], (0, 1)),),
            "down": linear("ar_approximation.d.weight", width, c.intermediate_size),
        }
    elif c.sequential == "bilinear":
        weights = dflash2.selector(c)
    elif c.sequential:
        weights = {
            "previous": same("markov_head.markov_w1.weight", c.vocab_size, c.rank),
            "output": same("markov_head.markov_w2.weight", c.vocab_size, c.rank),
        }
        if c.sequential == "gated":
            weights["gate"] = linear("markov_head.gate_proj.weight", c.rank, width + c.rank)
            weights["bias"] = same("markov_head.gate_proj.bias", c.rank)
        if c.sequential == "rnn":
            joint = (3 * c.rank, 2 * c.rank + width)
            weights["joint"] = linear("markov_head.joint_proj.weight", *joint)
            weights["bias"] = same("markov_head.joint_proj.bias", 3 * c.rank)
    else:
        weights = {}
    table |= {("sequential", name): parts for name, parts in weights.items()}

    if c.confidence:
        inputs = width + (c.rank if c.confidence == "hidden_and_previous" else 0)
        kernel = Part("confidence_head.proj.weight", (1, inputs), np.s_[None], (0, 1))
        table["confidence", "kernel"] = (kernel,)
        table["confidence", "bias"] = same("confidence_head.proj.bias", 1)
    return table


def _load(
    tensors: DrafterTensors, config: DrafterConfig, format: str, target: TargetParams, dtype
) -> nnx.State:
    table = destinations(config, format)
    expected = expected_shapes(table)
    vocabulary = _vocabulary(target) if format == "deepspec" else ()
    expected |= {name: array.shape for name, array in vocabulary}
    known = {DRAFT_TOKENS}
    if format == "speculators":
        known = {speculators.OFFSETS, speculators.MEMBERS, speculators.HEAD}
        known |= set(speculators.COPIES)
    check_names(tensors, expected, known)
    for name, array in vocabulary:
        if not equal_as_stored(tensors.read(name), array):
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' is not the target's; the drafter was "
                "trained for other weights than those loaded"
            )
    return read_weights(tensors, table, abstract_weights(config, dtype))


def _renamed(name: str) -> str:
    return dflash2.renamed(name.removeprefix(LEGACY_PREFIX))


def _vocabulary(arrays: TargetParams | Vocabulary):
    """What DeepSpec files repeat of the target, by name."""
    return (("embed_tokens.weight", arrays.embed), ("lm_head.weight", arrays.unembed))
