"""Hugging Face checkpoints: a folder, or a name on the hub."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxspec.checkpoints import catalog, hybrid, layer_sizes, target_weights
from jaxspec.checkpoints.eight_bit import keep
from jaxspec.checkpoints.fuse import check_dtype
from jaxspec.checkpoints.json_config import REQUIRED, JsonConfig
from jaxspec.checkpoints.known_keys import HARMLESS, NEUTRAL
from jaxspec.checkpoints.quantisation import quantisation_of, read_quantisation
from jaxspec.checkpoints.quantised import open_weights
from jaxspec.checkpoints.rope import read_rope, rope_to_json
from jaxspec.checkpoints.tensors import pickled_only, read_json
from jaxspec.checkpoints.visibility import to_json as windows_to_json
from jaxspec.checkpoints.visibility import windows
from jaxspec.config import RopeScaling, TargetConfig
from jaxspec.models.params import TargetParams, abstract_params
from jaxspec.sharding import shardings
from jaxspec.tokenizer import Tokenizer

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
MASK = "mask_embedding.pt"  # of MiMo's drafters, whose mask embedding is not the target's
# `MASK` is not read; a drafter that has one is refused.
FILES = ("*.json", "*.safetensors", "merges.txt", "*.jinja", "tokenizer.model", f"*{MASK}")
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
MODEL_TYPES = (*ARCHITECTURES, *hybrid.MODEL_TYPES)
OLDER_GPUS = ("7.0", "7.2", "7.5", "8.0", "8.6", "8.7")  # NVIDIA capabilities without fp8
WEIGHTS = "weights.orbax"  # folder in a converted checkpoint, instead of safetensors


def resolve(name_or_path: str | Path) -> Path:
    """A local file or folder as it is; a hub name as the folder of its downloaded snapshot.

    The hub's cache is used if the hub cannot be reached. Pickled weights are not downloaded.

    Raises:
      ValueError: there is no such path, and the hub does not supply such a name, or only with
        pickled weights.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.exists():
        return path
    name = str(name_or_path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise ValueError(
            f"there is no file or folder {name}; expected a path that exists, a hub name "
            f"such as Qwen/Qwen3-0.6B, or one of {', '.join(catalog.names())}"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds: offline, unknown, gated, timed out
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face hub did not supply it "
            f"({type(error).__name__}: {reason}); pass the path of a downloaded checkpoint, "
            f"or run `hf download {name}` where the hub can be reached"
        ) from error
    if not any(folder.rglob("*.safetensors")):
        _refuse_other(name)
    return folder


def _refuse_other(name: str) -> None:
    """Raises ValueError if a hub repository, which has no safetensors, has other weights."""
    from huggingface_hub import list_repo_files

    names: list[str] = []
    with contextlib.suppress(Exception):  # the hub is out of reach
        names = list_repo_files(name)
    files = sorted(file for file in names if file.endswith(".gguf"))
    if files:
        raise ValueError(
            f"{name} holds GGUF files; download one (`hf download {name} {files[0]}`) and pass "
            "its path"
        )
    message = pickled_only(name, names)
    if message is not None:
        raise ValueError(message)


def read_config(folder: str | Path) -> TargetConfig:
    """The model that `config.json` describes; accepts the keys of transformers 4 and 5.

    Warns of keys that are not known (`JsonConfig.finish`).

    Raises:
      ValueError: a key is missing or has a value this decoder does not implement.
    """
    folder = Path(folder)
    whole = _config(folder / "config.json")
    read_quantisation(whole, folder)
    model_type = whole.one_of("model_type", MODEL_TYPES, REQUIRED)
    is_hybrid = model_type in hybrid.MODEL_TYPES
    raw = hybrid.text_section(whole) if is_hybrid else whole
    for part in (whole, raw):
        _refuse_unsupported(part, model_type)
    heads = raw.integer("num_attention_heads")
    hidden = raw.integer("hidden_size")
    layers = raw.count("num_hidden_layers")
    special = _mixture(raw, layers, model_type)
    if is_hybrid:
        special |= hybrid.fields(raw, model_type)
    dense = len(special.get("sparse_layers", ())) < layers
    head_dim = raw.integer("head_dim", REQUIRED if is_hybrid else hidden // heads)
    rope = _rope(raw, is_hybrid)
    config = raw.make(
        TargetConfig,
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer(
            "intermediate_size", REQUIRED if dense or not is_hybrid else hidden
        ),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        **rope,
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        max_positions=_positions(raw, rope["rope_scaling"]),
        tie_embeddings=raw.flag("tie_word_embeddings", whole.flag("tie_word_embeddings")),
        qk_norm=model_type.startswith("qwen3"),
        attention_bias=model_type == "qwen2",
        eos_token_ids=_eos_token_ids(folder, raw, whole),
        **special,
    )
    rotary_dim = config.rotary_dim or head_dim
    raw.one_of("rotary_dim", (rotary_dim,), rotary_dim)
    raw.one_of("query_pre_attn_scalar", (head_dim,), head_dim)
    whole.finish(HARMLESS, NEUTRAL)
    return config


def config_to_json(c: TargetConfig) -> dict[str, Any]:
    """`config.json` of a model that is not a hybrid; the inverse of `read_config`.

    Raises:
      ValueError: no supported model type has such layers.
    """
    kind = "qwen3_moe" if c.sparse_layers else "qwen3" if c.qk_norm else "llama"
    kind = "qwen2" if c.attention_bias else kind
    hybrid_only = c.delta_net or c.attention_gate or c.zero_centered_norms or c.rotary_dim
    if hybrid_only or c.qk_norm != kind.startswith("qwen3") or c.shared_expert_size:
        raise ValueError(
            f"{kind!r} does not have the layers of {c}; expected a Qwen2, a Qwen3 (dense or a "
            "mixture of experts) or a Llama"
        )
    raw = layer_sizes.to_json(c) | {
        "architectures": [ARCHITECTURES[kind]],
        "eos_token_id": list(c.eos_token_ids) or None,
        "model_type": kind,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if c.sliding_rope_theta is not None:
        rope = {"sliding_attention": rope_to_json(c.sliding_rope_theta, None)}
        raw["rope_parameters"] = rope | {"full_attention": raw["rope_parameters"]}
    if kind != "qwen2":  # Qwen2 has biases without a key
        raw["attention_bias"] = False
    if c.windows:
        raw |= windows_to_json(c.windows)
    if c.sparse_layers:
        raw |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": sorted(set(range(c.num_layers)) - set(c.sparse_layers)),
            "moe_intermediate_size": c.moe_intermediate_size,
            "norm_topk_prob": c.norm_topk_prob,
            "num_experts": c.num_experts,
            "num_experts_per_tok": c.experts_per_token,
        }
    return raw


def _mixture(raw: JsonConfig, layers: int, model_type: str) -> dict[str, Any]:
    """Fields of `TargetConfig` for mixtures of experts; none for a dense model."""
    always = model_type in hybrid.SPARSE  # every layer, renormalised
    if model_type not in ("qwen3_moe", hybrid.NEXT) and not always:
        return {}
    experts = "num_local_experts" if raw.has("num_local_experts") else "num_experts"
    if always:
        raw.one_of("norm_topk_prob", (True,), True)
        raw.one_of("decoder_sparse_step", (1,), 1)
        raw.one_of("mlp_only_layers", ([],), [])
    step = raw.integer("decoder_sparse_step", 1)
    dense = raw.items("mlp_only_layers", int, ())
    return dict(
        num_experts=raw.count(experts),
        experts_per_token=raw.integer("num_experts_per_tok"),
        moe_intermediate_size=raw.integer("moe_intermediate_size"),
        norm_topk_prob=raw.flag("norm_topk_prob", model_type != "qwen3_moe"),
        sparse_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
    )


def load_params(
    folder: str | Path,
    config: TargetConfig,
    dtype=jnp.float32,
    mesh: Mesh | None = None,
    *,
    stored: bool = False,
) -> TargetParams:
    """The weights of a folder in the fused layout, from safetensors or a converted store.

    See `target_weights.load` for memory, errors and `mesh`.

    Args:
      stored: hold fp8 weights in 8 bits (`eight_bit.keep`).

    Raises:
      ValueError: `stored`, and the weights are not in fp8.
    """
    folder = Path(folder)
    if stored:
        _check_fp8(folder)
    if not (folder / WEIGHTS).exists():
        tensors = open_weights(folder, dequantise=not stored)
        if config.delta_net is not None:
            tensors = hybrid.text_tensors(tensors)
        return target_weights.load(config, tensors, dtype, mesh, keep=keep if stored else None)
    from jaxspec.checkpoints.store import load_weights  # Orbax takes seconds to import

    specs = abstract_params(config, check_dtype(dtype))
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, specs)
    else:
        places = shardings(mesh, specs)
    return load_weights(
        folder / WEIGHTS,
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), specs, places
        ),
    )


def _check_fp8(folder: Path) -> None:
    """Raises ValueError unless a folder has weights in fp8, and its device converts them."""
    quantisation = quantisation_of(folder)
    if quantisation is None or not quantisation.fp8:
        by = "by value" if quantisation is None else f"as {quantisation.name}"
        raise ValueError(
            f"{folder} is stored {by}; weights 'stored' needs fp8: leave it out, or make an "
            "fp8 checkpoint (python -m jaxspec convert --dtype fp8)"
        )
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if device.platform == "gpu" and capability in OLDER_GPUS:
        raise ValueError(
            f"{device.device_kind} has compute capability {capability}; weights 'stored' needs "
            "8.9 or newer (Ada, Hopper) for fp8: leave it out"
        )


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none."""
    folder = Path(folder)
    if any((folder / name).exists() for name in TOKENIZERS):
        return Tokenizer.from_folder(folder)
    return None


def _config(path: Path) -> JsonConfig:
    return JsonConfig(read_json(path), path, "a target")


def _refuse_unsupported(raw: JsonConfig, model_type: str) -> None:
    raw.one_of("hidden_act", ("silu",), "silu")
    raw.one_of("mlp_bias", (False,), False)
    normed, biased = model_type.startswith("qwen3"), model_type == "qwen2"
    raw.one_of("use_qk_norm", (normed,), normed)
    for key in ("attention_bias", "qkv_bias"):  # in others also of the output projection
        raw.one_of(key, (biased,), biased)


def _rope(raw: JsonConfig, is_hybrid: bool) -> dict[str, Any]:
    """Rotary fields of `TargetConfig`; only sliding layers may have another base."""
    theta, scaling = read_rope(raw, partial=is_hybrid)
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    if is_hybrid:
        raw.one_of("use_sliding_window", (False,), False)
        return fields
    fields["windows"] = windows(raw)
    if any(fields["windows"]):
        local, local_scaling = read_rope(raw, "sliding_attention")
        if (local, local_scaling) != (theta, scaling):
            if local_scaling is not None:
                raise raw.refusal(
                    "rope_parameters", "sliding layers that rotate unscaled, or as the others"
                )
            fields["sliding_rope_theta"] = local
    return fields


def _positions(raw: JsonConfig, scaling: RopeScaling | None) -> int:
    """Positions of a target; YaRN's if more than stated, since the cards of Qwen2.5 and Qwen3
    advise to add `rope_scaling` alone."""
    stated = raw.integer("max_position_embeddings")
    if scaling is None or scaling.kind != "yarn":
        return stated
    return max(stated, int(scaling.factor * scaling.original_positions))


def _eos_token_ids(folder: Path, *sources: JsonConfig) -> tuple[int, ...]:
    """Stop ids of config.json and its sections, then those only in generation_config.json."""
    sources = list(sources)
    if (folder / "generation_config.json").exists():
        sources.append(_config(folder / "generation_config.json"))
    found: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise source.refusal("eos_token_id", "a token id or a list of them")
        found |= dict.fromkeys(ids)
    return tuple(found)
