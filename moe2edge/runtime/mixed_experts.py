"""What a router chooses from, where that is more than experts: members and substitutes.

Modules in the place of a transformers MoE module's experts, on the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.layers import PARTS, MoELayer

if TYPE_CHECKING:
    from torch import Tensor


class Table:
    """Small integers, looked up on whichever device asks; made once for each."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = tuple(values)
        self._made: dict[torch.device, Tensor] = {}

    def __getitem__(self, place: int) -> int:
        return self._values[place]

    def on(self, device: torch.device) -> Tensor:
        """All of them, int64."""
        if device not in self._made:
            # Made in inference mode it could not be used in training afterwards.
            with torch.inference_mode(False):
                self._made[device] = torch.tensor(self._values, device=device)
        return self._made[device]


class Substitutes(nn.Module):
    """What answers in the place of some experts of a layer, all at once.

    Attributes:
        constants: [substitutes, hidden].
        first, second: matrices of all linear maps side by side, [ranks, hidden], [hidden, ranks].
        ranks: of each substitute, 0 for a constant.
        behind: the id of the first one: experts come before them.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        ranks = [s.rank for s in layer.substitutes]
        self.ranks, self.behind = Table(ranks), layer.routed
        hidden, width = layer.router.weight.shape[1], sum(ranks)
        self.constants = nn.Parameter(torch.empty(len(ranks), hidden), requires_grad=False)
        self.first = nn.Parameter(torch.empty(width, hidden), requires_grad=False)
        self.second = nn.Parameter(torch.empty(hidden, width), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Their part in the output of the layer, [tokens, hidden].

        Args:
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen experts and substitutes, int64 [tokens, k]; one behind the last
                substitute stands for none.
            weights: what outputs are multiplied with, [tokens, k].
        """
        count = len(self.constants)
        # A column for experts before those of substitutes, and one for none behind them.
        columns = (ids - self.behind + 1).clamp(0, count + 1)
        gates = x.new_zeros(len(x), count + 2).scatter_add(1, columns, weights.to(x.dtype))
        gates = gates[:, 1:-1]
        out: Tensor = gates @ self.constants
        if len(self.first):
            each = gates.repeat_interleave(self.ranks.on(x.device), dim=1)
            inside = (x @ self.first.T) * each
            out = out + inside @ self.second.T
        return out


class Members(nn.Module):
    """Experts that have the matrices of one of the layer's experts plus factors of low rank.

    The matrices are never added up: an expert costs what its base does, and its factors.

    Attributes:
        rows: of each member, its row of the router.
        bases: the expert whose matrices it has; None: the factors are all.
        gate_first, up_first, down_first: [members, rank, in].
        gate_second, up_second, down_second: [members, out, rank].
        original_share: while training anneals, how much of a member is what it was before.
    """

    def __init__(self, layer: MoELayer, rows: Sequence[int]) -> None:
        """Without numbers.

        Args:
            layer: of which it is a part.
            rows: members, all of one rank, which may be 0.
        """
        super().__init__()
        self.rows = tuple(rows)
        self.bases = tuple(layer.members[row].base for row in rows)
        rank = layer.members[rows[0]].rank
        for part in PARTS:
            outs, ins = getattr(layer.experts[0], part).shape
            for name, shape in (("first", (rank, ins)), ("second", (outs, rank))):
                numbers = nn.Parameter(torch.empty(len(rows), *shape), requires_grad=False)
                setattr(self, f"{part}_{name}", numbers)
        self.original_share = 0.0
        self._originals: tuple[Tensor, Tensor] | None = None

    def anneal(self, gate_up: Tensor, down: Tensor) -> None:
        """Start as the experts that members were: LightMoE's recovery.

        While ``original_share`` s is above 0, a matrix is ``s W + (1 - s) (B + second @ first)``.

        Args:
            gate_up: W of gate above that of up, [members, 2 width, hidden].
            down: [members, hidden, width].
        """
        self._originals, self.original_share = (gate_up, down), 1.0

    def forget_originals(self) -> None:
        """Be what the base and the factors make, and nothing else."""
        self._originals, self.original_share = None, 0.0

    def low(self, part: str, own: Tensor | int, x: Tensor) -> Tensor:
        """What factors of ``part`` make of ``x`` [n, in]: [n, out].

        Args:
            part: gate, up or down.
            own: the member, or of each row the member, int64 [n].
            x: the inputs.
        """
        first: Tensor = getattr(self, f"{part}_first")
        second: Tensor = getattr(self, f"{part}_second")
        if isinstance(own, int):
            return (x @ first[own].T) @ second[own].T
        out = x.new_empty(len(x), second.shape[1])
        for n in sorted(set(own.tolist())):
            rows = own == n
            out[rows] = (x[rows] @ first[n].T) @ second[n].T
        return out

    def answer(self, experts: Any, own: int, x: Tensor) -> Tensor:
        """Output [n, hidden] of a member for ``x`` [n, hidden].

        Args:
            experts: the module with the matrices of bases.
            own: the member.
            x: the inputs.
        """
        hidden = self.inside(experts, own, x)
        out = self.low("down", own, hidden)
        if (base := self.bases[own]) is not None:
            out = out + _product(experts, "down", base, hidden)
        if self._originals is None or not self.original_share:
            return out
        return torch.lerp(out, hidden @ self._originals[1][own].T, self.original_share)

    def inside(self, experts: Any, own: int, x: Tensor) -> Tensor:
        """What a member has between its matrices for ``x`` [n, hidden]: [n, width]."""
        both = torch.cat([self.low("gate", own, x), self.low("up", own, x)], dim=1)
        if (base := self.bases[own]) is not None:
            both = both + _product(experts, "gate_up", base, x)
        if self._originals is not None and self.original_share:
            both = torch.lerp(both, x @ self._originals[0][own].T, self.original_share)
        gate, up = both.chunk(2, dim=1)
        return nn.functional.silu(gate) * up

    def forward(self, experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Their part in the output of the layer, [tokens, hidden].

        Args:
            experts: the module with the matrices of bases.
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen members, int64 [tokens, k]; one below 0 stands for none.
            weights: what outputs are multiplied with, [tokens, k].
        """
        # In float32, so that the order of members hardly matters.
        out = torch.zeros_like(x, dtype=torch.float32)
        for own in sorted(set(ids[ids >= 0].tolist())):
            token, place = torch.where(ids == own)
            y = self.answer(experts, own, x[token]) * weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class MixedExperts(nn.Module):
    """In place of the experts of a transformers MoE module: what a router chooses from, any kind.

    Attributes:
        experts: those with matrices of their own, as transformers has them.
        members: those with factors.
        substitutes: behind them all.
    """

    def __init__(self, experts: nn.Module, layer: MoELayer) -> None:
        super().__init__()
        self.experts = experts
        # An id behind its last expert is then one that transformers leaves out.
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        self.substitutes = Substitutes(layer) if layer.substitutes else None
        self.num_experts, self._none = layer.router_rows, len(layer.experts)
        self.members: Members | None = None
        self._set_members(layer, [n for n, m in enumerate(layer.members) if m.factors])

    def _set_members(self, layer: MoELayer, rows: Sequence[int]) -> None:
        """Take some members for themselves; what is left are experts as they are."""
        self.members = Members(layer, rows) if rows else None
        # What a row of the router stands for, and an id behind the last row, which skips.
        behind = len(layer.substitutes) + 1
        bases = [
            self._none if row in rows or base is None else base
            for row, base in enumerate(layer.bases)
        ]
        members = [rows.index(row) if row in rows else -1 for row in range(layer.routed)]
        self.expert_of = Table((*bases, *[self._none] * behind))
        self.member_of = Table((*members, *[-1] * behind))

    def annealed(self, layer: MoELayer, original: Callable[[int], Sequence[Tensor]]) -> Members:
        """Let all that share a base begin as they were: see `Members.anneal`.

        Args:
            layer: the layer.
            original: the three matrices, gate, up and down, that a row of the router had.
        """
        device = self.experts.get_parameter("gate_up_proj").device
        if self.members is None:
            with device:
                self._set_members(layer, layer.sharing)
        assert self.members is not None, "no two experts share a base"
        found = [original(row) for row in self.members.rows]
        gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in found])
        down = torch.stack([down for _, _, down in found])
        self.members.anneal(gate_up.to(device), down.to(device))
        return self.members

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts, members and substitutes put out."""
        ids = self.expert_of.on(hidden.device)[top_k_index]
        none = ids == self._none
        out: Tensor = self.experts(hidden, ids, top_k_weights.masked_fill(none, 0))
        if self.members is not None:
            own = self.member_of.on(hidden.device)[top_k_index]
            out = out + self.members(self.experts, hidden, own, top_k_weights).to(out.dtype)
        if self.substitutes is not None:
            added: Tensor = self.substitutes(hidden, top_k_index, top_k_weights)
            out = out + added.to(out.dtype)
        return out

    def inside(self, row: int, x: Tensor) -> Tensor:
        """What the expert or member of a row of the router has between its matrices."""
        if self.members is not None and (own := self.member_of[row]) >= 0:
            return self.members.inside(self.experts, own, x)
        return _inside(self.experts, self.expert_of[row], x)

    def answer(self, row: int, x: Tensor) -> Tensor:
        """What the expert or member of a row of the router puts out for ``x`` [n, hidden]."""
        if self.members is not None and (own := self.member_of[row]) >= 0:
            return self.members.answer(self.experts, own, x)
        return _answer(self.experts, self.expert_of[row], x)


def _product(experts: Any, part: str, n: int, x: Tensor) -> Tensor:
    """``x`` times a matrix of an expert, gate_up or down: fused in one tensor, or packed."""
    if hasattr(experts, f"{part}_proj"):
        matrix: Tensor = getattr(experts, f"{part}_proj")[n]
        return x @ matrix.T
    out: Tensor = getattr(experts, part)[n](x)
    return out


def _inside(experts: Any, n: int, x: Tensor) -> Tensor:
    gate, up = _product(experts, "gate_up", n, x).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _answer(experts: Any, n: int, x: Tensor) -> Tensor:
    return _product(experts, "down", n, _inside(experts, n, x))


def compute_expert_intermediate(moe: Any, row: int, x: Tensor) -> Tensor:
    """Inputs [n, width] of ``down`` of what a row of the router of an MoE module stands for."""
    mixed = isinstance(moe.experts, MixedExperts)
    inside: Tensor = moe.experts.inside(row, x) if mixed else _inside(moe.experts, row, x)
    return inside


def compute_expert_output(moe: Any, row: int, x: Tensor) -> Tensor:
    """Output [n, hidden] of what a row of the router of an MoE module stands for."""
    if isinstance(moe.experts, MixedExperts):
        return moe.experts.answer(row, x)
    return _answer(moe.experts, row, x)


def find_experts_name(layer: MoELayer) -> str:
    """Where the module with the matrices of the experts is in a decoder layer."""
    mixed = layer.substitutes or layer.members
    return "mlp.experts.experts" if mixed else "mlp.experts"
