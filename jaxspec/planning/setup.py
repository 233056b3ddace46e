"""A decoding setup, and the shapes that its programs take."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxspec.config import DrafterConfig, TargetConfig, spaced_taps
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.sampling import greedy_rows
from jaxspec.decoding.state import Decoder, DecodeState, Params, Requests
from jaxspec.drafters.base import Drafter
from jaxspec.models.params import TargetParams, abstract_params
from jaxspec.sharding import shardings
from pallas_kernels.tree_attention.config import Shape, unsupported

DTYPE = jnp.bfloat16
FP8_BLOCK = (128, 128)  # outputs and inputs per scale, as in Qwen3-*-FP8


@dataclasses.dataclass(frozen=True)
class Setup:
    """A target and a drafter, decoding together.

    Attributes:
      drafter: its trees have `drafter.size` nodes.
      context: S, rows of the caches; a multiple of `chunk`.
      batch: B, sequences decoded together.
      devices: the model is sharded over them.
      chunk: prompt tokens per forward.
      fp8: hold the target's `models.params.SCALABLE` matrices in 8 bits.
      fp8_lm_head: hold the LM head in 8 bits too, untied from the embedding.
    """

    target: TargetConfig
    drafter: Drafter
    context: int = 4096
    batch: int = 1
    devices: int = 1
    chunk: int = Decoder.chunk
    fp8: bool = False
    fp8_lm_head: bool = False

    def __post_init__(self):
        if self.fp8_lm_head and not self.fp8:
            raise ValueError("fp8_lm_head is set without fp8; set fp8 too")
        for name in ("context", "batch", "devices", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.context % self.chunk:
            raise ValueError(
                f"context is {self.context}; expected a multiple of {self.chunk}, the "
                "prompt tokens of one forward"
            )
        if self.context > self.target.max_positions:
            raise ValueError(
                f"context is {self.context}; the target has {self.target.max_positions} "
                "positions"
            )
        wide = {
            "channels": self.target.intermediate_size,
            "experts": self.target.num_experts,
        }
        for name, count in wide.items():
            if count % self.devices:
                raise ValueError(
                    f"{count} {name} cannot be sharded evenly over {self.devices} devices; "
                    "expected a number of devices that divides them"
                )

    @property
    def target_params(self) -> TargetParams:
        """Shapes of the target's weights, in bfloat16 or 8 bits."""
        target, head = self.target, self.fp8_lm_head
        if head:
            target = dataclasses.replace(target, tie_embeddings=False)
        block = FP8_BLOCK if self.fp8 else None
        return abstract_params(target, DTYPE, block=block, lm_head=head, devices=self.devices)

    @property
    def decoder(self) -> Decoder:
        c = self.target
        shape = Shape(1, 1, c.num_heads, c.num_kv_heads, c.head_dim, self.context, DTYPE)
        kernels = None if unsupported(shape) else "triton"  # there is no GPU to tell
        return Decoder(c, self.drafter, chunk=self.chunk, implementation=kernels)

    @property
    def heads(self) -> int:
        """Number of devices that key/value heads are sharded over; others hold copies."""
        return math.gcd(self.devices, self.target.num_kv_heads)

    @property
    def block(self) -> DrafterConfig | None:
        """Configuration of a block drafter, alone or joined with prompt lookup; else None."""
        configs = (part.head_config for part in self.drafter.parts)
        return next((config for config in configs if config is not None), None)


def published_drafter(target: TargetConfig) -> DrafterConfig:
    """A drafter sized as DFlash's and JetSpec's: five layers, five taps, blocks of 16."""
    return DrafterConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=5,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        target_layers=target.num_layers,
        taps=spaced_taps(target.num_layers, 5),
        block_size=16,
        mask_token_id=target.vocab_size - 1,
        causal=True,
        predict_next=True,
    )


def abstract_arguments(
    setup: Setup, mesh: Mesh | AbstractMesh
) -> tuple[Params, Requests, DecodeState]:
    """The arguments of `prefill` and `decode`, as shapes sharded over a mesh."""
    decoder = setup.decoder
    target = setup.target_params
    params = Params(target, decoder.drafter.abstract_params(target))
    requests = _abstract_requests(setup)
    state = jax.eval_shape(functools.partial(prefill, decoder), params, requests)
    return tuple(placed(mesh, tree) for tree in (params, requests, state))


def _abstract_requests(setup: Setup) -> Requests:
    def row(dtype=jnp.int32, *shape):
        return jax.ShapeDtypeStruct((setup.batch, *shape), dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), setup.batch))
    sampling = jax.eval_shape(greedy_rows, keys)
    return Requests(row(jnp.int32, setup.context), row(), row(), row(), sampling)


def placed(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shapes with their shardings on a mesh (`jaxspec.sharding`)."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings(mesh, tree),
    )
