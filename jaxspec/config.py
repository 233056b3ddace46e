"""Static descriptions: hashable, so that they can be static arguments of `jax.jit`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """A decoder-only transformer: Qwen3, Qwen3-MoE, or Llama-shaped through the flags.

    Attributes:
      qk_norm: RMSNorm over the head dimension of queries and keys (Qwen3: True, Llama: False).
      attention_bias: biases on the query, key and value projections (Qwen2: True).
      tie_embeddings: the LM head is the embedding table.
      num_experts: experts of a sparse layer; 0 for a dense model.
      sparse_layers: indices of the layers whose MLP is a mixture of experts.
      norm_topk_prob: renormalise the chosen experts' probabilities to sum to one.
      eos_token_ids: ids that end a generation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 40_960
    tie_embeddings: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sparse_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TargetConfig.{name} is {getattr(self, name)}; expected at least 1"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TargetConfig.num_heads is {self.num_heads}, not a multiple of "
                f"num_kv_heads = {self.num_kv_heads}; each serves equally many queries"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"TargetConfig.head_dim is {self.head_dim}; rotary positions need it even"
            )
        bad = [i for i in self.sparse_layers if not 0 <= i < self.num_layers]
        if bad:
            raise ValueError(
                f"TargetConfig.sparse_layers names {bad}; layers are 0 … {self.num_layers - 1}"
            )
        if self.sparse_layers and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"TargetConfig.experts_per_token is {self.experts_per_token}; "
                f"expected 1 … num_experts = {self.num_experts}"
            )

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads


TREE_KINDS = ("chain", "best_first", "top_budget", "path_conditioned", "transitions")


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """How a drafter's scores become a tree (`trees.build`).

    Attributes:
      kind: one of `TREE_KINDS`.
      size: N, nodes of the tree, root included; what is verified is padded to it. The budget
        of a row, an array, may be smaller.
      width: children per expanded node (`best_first`).
      candidates: tokens per parent that are re-scored (`path_conditioned`, `transitions`).
    """

    kind: str = "chain"
    size: int = 16
    width: int = 4
    candidates: int = 16

    def __post_init__(self):
        if self.kind not in TREE_KINDS:
            raise ValueError(f"TreeConfig.kind is {self.kind!r}; expected one of {TREE_KINDS}")
        for name in ("size", "width", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TreeConfig.{name} is {getattr(self, name)}; expected at least 1"
                )
