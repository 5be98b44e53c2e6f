"""Folding of AWQ's scales into matrices and the tensors that produce their inputs.

AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): in ``y = W x``, the columns of W are
multiplied by ``s`` and the inputs divided by it. The function stays the same, but the columns of
large inputs are rounded with a smaller error. The tensor that produces the inputs does the
division: a norm before the matrix, the values before the output projection, or the linear half of a
gated MLP, since ``silu(gate) * (up / s) = (silu(gate) * up) / s``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe2edge.model.block import SECOND_NORM, Block
from moe2edge.model.experts import Tied
from moe2edge.model.layers import MoELayer
from moe2edge.model.roles import OUT, QKV, list_gated_mlps

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.family import Geometry


@dataclass(frozen=True)
class FoldingPlace:
    """Place where scales fold: tensors that are divided by them, and matrices multiplied by them.

    Attributes:
        producers: roles of the tensors whose rows are divided.
        consumers: roles of the matrices whose columns are multiplied.
        heads: number of runs into which the channels of producers are split.
        copies: number of times that consumers read each run (query heads per key-value head).
        offset: what transformers adds to a norm before it multiplies by it.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    heads: int = 1
    copies: int = 1
    offset: float = 0.0

    def gather(self, magnitudes: Tensor) -> Tensor:
        """Average over the copies: [inputs of consumers] -> [channels of producers]."""
        return magnitudes.view(self.heads, self.copies, -1).mean(1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """Repeat scales for each copy: [..., channels of producers] -> [..., consumer inputs]."""
        runs = scales.reshape(*scales.shape[:-1], self.heads, -1)
        return runs.repeat_interleave(self.copies, -2).flatten(-2)


def find_folding_places(block: Block, geometry: Geometry) -> Iterator[FoldingPlace]:
    """Find all places of a block where scales fold.

    Scales fold neither into a norm whose output is added to the residual stream nor into values
    that are clipped.
    """
    roles = {role for role, _ in block.weights()}
    yield FoldingPlace(
        ("norms.input_layernorm.weight",), tuple(role for role in QKV if role in roles)
    )
    if geometry.clip_qkv is None:
        values = ("attention.v_proj.weight", "attention.v_proj.bias")
        copies = geometry.heads // geometry.kv_heads
        yield FoldingPlace(
            tuple(role for role in values if role in roles), (OUT,), geometry.kv_heads, copies
        )
    if block.mlp is None:
        return
    kinds = [kind for kind, _ in list_gated_mlps(block)]
    scorers = [role for role in ("router.weight", "shared.router") if role in roles]
    readers = [f"{kind}.{part}" for kind in kinds for part in ("gate", "up")]
    yield FoldingPlace((f"norms.{SECOND_NORM}",), (*scorers, *readers, *find_first_factors(roles)))
    for kind in kinds:
        yield make_inner_place(block, kind)


def make_inner_place(block: Block, kind: str, biases: Sequence[str] = ()) -> FoldingPlace:
    """Return the place between ``up`` and ``down`` of an MLP, with all factors that belong to them.

    Args:
        block: the block.
        kind: first part of the roles of the MLP.
        biases: roles of the biases of ``up``.
    """
    low: list[str] = []
    if isinstance(block.mlp, MoELayer):
        rows = zip(block.mlp.row_roles, block.mlp.rows, strict=True)
        tied = ((role, row) for role, row in rows if isinstance(row, Tied))
        low = [role for role, row in tied if kind == f"experts.{row.base}"]
    return FoldingPlace(
        (*biases, f"{kind}.up", *(f"{role}.up.second" for role in low)),
        (f"{kind}.down", *(f"{role}.down.first" for role in low)),
    )


def find_first_factors(roles: Collection[str]) -> list[str]:
    """Find the first factors of tied experts and replacements, which read what experts read."""
    ends = {"members": (".gate.first", ".up.first"), "substitutes": (".first",)}
    return sorted(
        role
        for role in roles
        for kind, end in ends.items()
        if role.startswith(kind) and role.endswith(end)
    )


@dataclass
class Folding:
    """Scales of some places of a block, by the roles of the tensors that they change.

    Attributes:
        columns: scales that the columns are multiplied by, [in].
        rows: scales that the rows, or the entries of a vector, are divided by, [out].
        offsets: what is added before, and taken off after that, where it is not zero.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    def add(self, place: FoldingPlace, scales: Tensor) -> None:
        """Fold ``scales`` [channels of producers] at a place; call it once per place."""
        self.columns |= dict.fromkeys(place.consumers, place.spread(scales))
        self.rows |= dict.fromkeys(place.producers, scales)
        if place.offset:
            norms = (role for role in place.producers if not role.endswith("bias"))
            self.offsets |= dict.fromkeys(norms, place.offset)

    @property
    def roles(self) -> set[str]:
        """Roles of all tensors that change."""
        return {*self.columns, *self.rows}

    def apply(self, role: str, numbers: Tensor) -> Tensor:
        """Return the numbers of a tensor with its scales applied, float32."""
        numbers = numbers.float()
        if role in self.columns:
            numbers = numbers * self.columns[role]
        if role in self.rows:
            rows = self.rows[role]
            offset = self.offsets.get(role, 0.0)
            numbers = (numbers + offset) / (rows if numbers.ndim == 1 else rows.unsqueeze(1))
            numbers = numbers - offset
        return numbers
