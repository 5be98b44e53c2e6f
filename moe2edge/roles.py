"""Roles that passes ask for by name, and the gated MLPs of a block."""

from __future__ import annotations

from collections.abc import Iterator

from moe2edge.layers import Always, Dense, MoELayer
from moe2edge.model import Block

QKV = tuple(f"attention.{name}_proj.weight" for name in ("q", "k", "v"))
OUT = "attention.o_proj.weight"


def gated(block: Block) -> Iterator[tuple[str, Dense]]:
    """The gated MLPs of a block with the first part of their roles: ``experts.3``, ``shared``."""
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        yield from ((f"experts.{n}", expert) for n, expert in enumerate(mlp.experts))
    dense = mlp.expert if isinstance(mlp, Always) else mlp
    if isinstance(dense, Dense):
        yield "dense", dense
    if isinstance(mlp, MoELayer | Always) and mlp.shared is not None:
        yield "shared", mlp.shared.mlp
