"""Roles that passes ask for by name, and the gated MLPs of a block."""

from __future__ import annotations

from collections.abc import Iterator

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.weights import Weight

QKV = tuple(f"attention.{name}_proj.weight" for name in ("q", "k", "v"))
OUT = "attention.o_proj.weight"


def list_gated_mlps(block: Block) -> Iterator[tuple[str, Dense]]:
    """Yield the gated MLPs of a block with the first part of their roles: ``experts.3``."""
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        yield from ((f"experts.{n}", expert) for n, expert in enumerate(mlp.experts))
    dense = mlp.expert if isinstance(mlp, UnroutedMLP) else mlp
    if isinstance(dense, Dense):
        yield "dense", dense
    if isinstance(mlp, MoELayer | UnroutedMLP) and mlp.shared is not None:
        yield "shared", mlp.shared.mlp


def list_quantizable(block: Block) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of a block that passes quantize or prune, with their roles."""
    yield from block.matrices
