"""The same shape in PyTorch's transformers: eager, and compiled with CUDA graphs.

    python examples/gpu/peer.py --nodes 1 64

Random bfloat16 weights, a static cache, greedy: one forward over `nodes` tokens a round, the
next ones chosen on the device. JAX sees no GPU here: the memory is PyTorch's.
"""

from __future__ import annotations

import functools
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import timing
from shapes import MODELS

ROUNDS, WARM_UP = 32, 6


def build(config, torch, device: str):
    """A Qwen3 of this shape with random weights, made on the device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.initialization import no_init_weights

    own = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_positions,
    )
    own._attn_implementation = "sdpa"
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            model = Qwen3ForCausalLM(own)
    finally:
        torch.set_default_dtype(usual)
    for weight in model.parameters():
        weight.data.normal_(0, 0.02) if weight.ndim > 1 else weight.data.fill_(1)
    return model.eval()


def measure(model, step, torch, device: str, *, nodes: int, length: int, capacity: int) -> dict:
    """Milliseconds of a round of `step`, which is the model or what it was compiled to."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=capacity)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, length), device=device)
    places = torch.arange(length, device=device)
    model(
        prompt, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=places
    )
    position, tokens = length, torch.randint(0, vocabulary, (1, nodes), device=device)

    def rounds(count: int):
        nonlocal position, tokens
        for _ in range(count):
            places = torch.arange(position, position + nodes, device=device)
            out = step(
                tokens,
                position_ids=places[None],
                past_key_values=cache,
                use_cache=True,
                cache_position=places,
            )
            tokens = out.logits.argmax(-1).clone()
            position += 1  # the rows of other nodes are overwritten
            if nodes > 1:  # the cache counts for itself
                counts = [layer.cumulative_length for layer in cache.layers]
                torch._foreach_sub_(counts, nodes - 1)
        if device == "cuda":
            torch.cuda.synchronize()

    rounds(WARM_UP)
    return timing.milliseconds(functools.partial(rounds, ROUNDS), ROUNDS)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import torch
        import transformers
    except ImportError as error:
        sys.exit(f"{error}: this script compares with PyTorch; install torch and transformers")
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else None
    rows = timing.Rows("peer", options, rates=False, on=card)
    config = MODELS[options.model]
    capacity = -(-(options.length + 1024) // 512) * 512
    settings = dict(
        model=options.model,
        length=options.length,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    model = build(config, torch, device)
    ways = {"eager": model}
    if device == "cuda":
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        ways["torch.compile reduce-overhead"] = compiled
    for nodes in options.nodes:
        for way, step in ways.items():
            find = functools.partial(
                measure,
                model,
                step,
                torch,
                device,
                nodes=nodes,
                length=options.length,
                capacity=capacity,
            )
            rows.measure(find, **settings, way=way, nodes=nodes)
    return rows.finish()


def parse(arguments: list[str] | None):
    parser = timing.parser(__doc__.splitlines()[0], "peer")
    dense = [name for name, config in MODELS.items() if not config.num_experts]
    parser.add_argument("--model", choices=dense, default="qwen3-8b")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=3500)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
