"""Modules that run rows of a router other than plain experts: tied experts and replacements.

They stand in the place of a transformers MoE module's experts, on the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.anatomy import is_experts
from moe2edge.model.experts import PARTS, Tied
from moe2edge.model.layers import MoELayer

if TYPE_CHECKING:
    from torch import Tensor


class Table:
    """Small integers that are looked up on several devices; made once for each."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = tuple(values)
        self._made: dict[torch.device, Tensor] = {}

    def __getitem__(self, place: int) -> int:
        return self._values[place]

    def on(self, device: torch.device) -> Tensor:
        """Return all of them on a device, int64."""
        if device not in self._made:
            # Made in inference mode it could not be used in training afterwards.
            with torch.inference_mode(False):
                self._made[device] = torch.tensor(self._values, device=device)
        return self._made[device]


class Replacements(nn.Module):
    """Replacements of a layer, linear maps and constants, all at once.

    Attributes:
        constants: [replacements, hidden].
        first, second: matrices of all linear maps side by side, [ranks, hidden], [hidden, ranks].
        ranks: rank of each replacement, 0 for a constant.
        columns: column of each row of the router: 0 for a row that runs an expert, then one for
            each replacement, and one for the number behind the last row, which stands for none.
    """

    def __init__(self, layer: MoELayer) -> None:
        """Make the parameters, without numbers."""
        super().__init__()
        ranks = [layer.rows[row].rank for row in layer.replaced]
        places = {row: n for n, row in enumerate(layer.replaced, 1)}
        columns = [places.get(row, 0) for row in range(layer.router_rows)]
        self.ranks, self.columns = Table(ranks), Table((*columns, len(ranks) + 1))
        hidden, width = layer.hidden, sum(ranks)
        self.constants = nn.Parameter(torch.empty(len(ranks), hidden), requires_grad=False)
        self.first = nn.Parameter(torch.empty(width, hidden), requires_grad=False)
        self.second = nn.Parameter(torch.empty(hidden, width), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return their part in the output of the layer, [tokens, hidden].

        Args:
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen rows of the router, int64 [tokens, k]; the number of rows stands for
                none.
            weights: gate weights of the outputs, [tokens, k].
        """
        count, columns = len(self.constants), self.columns.on(ids.device)[ids]
        gates = x.new_zeros(len(x), count + 2).scatter_add(1, columns, weights.to(x.dtype))
        gates = gates[:, 1:-1]
        out: Tensor = gates @ self.constants
        if len(self.first):
            each = gates.repeat_interleave(self.ranks.on(x.device), dim=1)
            inside = (x @ self.first.T) * each
            out = out + inside @ self.second.T
        return out


class TiedExperts(nn.Module):
    """Tied experts of a layer: matrices of a stored expert plus low-rank factors.

    The matrices are never added up: an expert costs what its base does, and its factors.

    Attributes:
        rows: row of the router of each tied expert.
        bases: stored expert of each; None: there is none, and the factors are the matrices.
        gate_first, up_first, down_first: [tied experts, rank, in].
        gate_second, up_second, down_second: [tied experts, out, rank].
        original_share: while training anneals, the part that is still the original expert.
    """

    def __init__(self, layer: MoELayer, rows: Sequence[int]) -> None:
        """Make the parameters, without numbers.

        Args:
            layer: the layer.
            rows: rows of the router, all of one rank, which may be 0.
        """
        super().__init__()
        self.rows = tuple(rows)
        self.bases = tuple(layer.bases[row] for row in rows)
        rank = layer.rows[rows[0]].rank
        for part in PARTS:
            outs, ins = getattr(layer.experts[0], part).shape
            for name, shape in (("first", (rank, ins)), ("second", (outs, rank))):
                numbers = nn.Parameter(torch.empty(len(rows), *shape), requires_grad=False)
                setattr(self, f"{part}_{name}", numbers)
        self.original_share = 0.0
        self._originals: tuple[Tensor, Tensor] | None = None

    def anneal(self, gate_up: Tensor, down: Tensor) -> None:
        """Start as the original experts: LightMoE's recovery.

        While ``original_share`` s is above 0, a matrix is ``s W + (1 - s) (B + second @ first)``.

        Args:
            gate_up: W of gate above that of up, [tied experts, 2 width, hidden].
            down: [tied experts, hidden, width].
        """
        self._originals, self.original_share = (gate_up, down), 1.0

    def forget_originals(self) -> None:
        """Be the sum of base and factors, and nothing else."""
        self._originals, self.original_share = None, 0.0

    def apply_factors(self, part: str, which: Tensor | int, x: Tensor) -> Tensor:
        """Return the product of the factors of ``part`` with ``x`` [n, in]: [n, out].

        Args:
            part: gate, up or down.
            which: the tied expert, or the tied expert of each token, int64 [n].
            x: the inputs.
        """
        first: Tensor = getattr(self, f"{part}_first")
        second: Tensor = getattr(self, f"{part}_second")
        if isinstance(which, int):
            return (x @ first[which].T) @ second[which].T
        out = x.new_empty(len(x), second.shape[1])
        for n in sorted(set(which.tolist())):
            tokens = which == n
            out[tokens] = (x[tokens] @ first[n].T) @ second[n].T
        return out

    def compute_output(self, experts: Any, which: int, x: Tensor) -> Tensor:
        """Return the output [n, hidden] of a tied expert for ``x`` [n, hidden].

        Args:
            experts: the module with the matrices of bases.
            which: the tied expert.
            x: the inputs.
        """
        inside = self.compute_intermediate(experts, which, x)
        out = self.apply_factors("down", which, inside)
        if (base := self.bases[which]) is not None:
            out = out + _multiply(experts, "down", base, inside)
        if self._originals is None or not self.original_share:
            return out
        return torch.lerp(out, inside @ self._originals[1][which].T, self.original_share)

    def compute_intermediate(self, experts: Any, which: int, x: Tensor) -> Tensor:
        """Return the input [n, width] of ``down`` of a tied expert for ``x`` [n, hidden]."""
        gate, up = self.apply_factors("gate", which, x), self.apply_factors("up", which, x)
        both = torch.cat([gate, up], dim=1)
        if (base := self.bases[which]) is not None:
            both = both + _arrange(experts, _multiply(experts, "gate_up", base, x))
        if self._originals is not None and self.original_share:
            both = torch.lerp(both, x @ self._originals[0][which].T, self.original_share)
        return _activate(experts, both)

    def forward(self, experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return their part in the output of the layer, [tokens, hidden].

        Args:
            experts: the module with the matrices of bases.
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen tied experts, int64 [tokens, k]; one below 0 stands for none.
            weights: gate weights of the outputs, [tokens, k].
        """
        # In float32, so that the order of the experts hardly matters.
        out = torch.zeros_like(x, dtype=torch.float32)
        for which in sorted(set(ids[ids >= 0].tolist())):
            token, place = torch.where(ids == which)
            y = self.compute_output(experts, which, x[token]) * weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class MixedExperts(nn.Module):
    """In place of the experts of a transformers MoE module: rows of any kind, in any order.

    Attributes:
        experts: stored experts, as transformers has them.
        replacements: linear maps and constants.
        tied: tied experts.
    """

    def __init__(self, experts: nn.Module, layer: MoELayer) -> None:
        """Take the module with the stored experts; make the others, without numbers."""
        super().__init__()
        self.experts = experts
        # An id behind its last expert is then one that transformers leaves out.
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        # The names of these two modules are in checkpoints of training and in state dicts.
        self.substitutes = Replacements(layer) if layer.replaced else None
        self.num_experts, self._none = layer.router_rows, len(layer.experts)
        self.members: TiedExperts | None = None
        self._set_tied(layer, [n for n, row in enumerate(layer.rows) if isinstance(row, Tied)])

    def _set_tied(self, layer: MoELayer, rows: Sequence[int]) -> None:
        """Run some rows as tied experts, and the others that use a stored expert as it is."""
        self.members = TiedExperts(layer, rows) if rows else None
        # By row, and for an id behind the last row, which skips.
        bases = [
            self._none if row in rows or base is None else base
            for row, base in enumerate(layer.bases)
        ]
        tied = [rows.index(row) if row in rows else -1 for row in range(layer.router_rows)]
        self.expert_of, self.tied_of = Table((*bases, self._none)), Table((*tied, -1))

    def anneal(self, layer: MoELayer, original: Callable[[int], Sequence[Tensor]]) -> TiedExperts:
        """Start all experts that share a base as the originals: see `TiedExperts.anneal`.

        Args:
            layer: the layer.
            original: gives the three matrices, gate, up and down, that a row of the router had.
        """
        device = self.experts.get_parameter("gate_up_proj").device
        if self.members is None:
            with device:
                self._set_tied(layer, layer.sharing)
        assert self.members is not None, "no two experts share a base"
        found = [original(row) for row in self.members.rows]
        gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in found])
        down = torch.stack([down for _, _, down in found])
        self.members.anneal(gate_up.to(device), down.to(device))
        return self.members

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's rows."""
        ids = self.expert_of.on(hidden.device)[top_k_index]
        none = ids == self._none
        out: Tensor = self.experts(hidden, ids, top_k_weights.masked_fill(none, 0))
        if self.members is not None:
            tied = self.tied_of.on(hidden.device)[top_k_index]
            out = out + self.members(self.experts, hidden, tied, top_k_weights).to(out.dtype)
        if self.substitutes is not None:
            added: Tensor = self.substitutes(hidden, top_k_index, top_k_weights)
            out = out + added.to(out.dtype)
        return out

    def runs_expert(self, row: int) -> bool:
        """Return whether a row runs a stored expert or a tied one."""
        return self.expert_of[row] != self._none or self.tied_of[row] >= 0

    def find_tied(self, rows: Tensor) -> Tensor:
        """Return which tied expert each chosen row of the router runs, int64; -1 for none."""
        return self.tied_of.on(rows.device)[rows]

    def compute_unstored(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the part [tokens, hidden] of rows that use no stored expert.

        Args:
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen rows of the router, int64 [tokens, k].
            weights: gate weights of the outputs, [tokens, k].
        """
        out = torch.zeros_like(x)
        if self.substitutes is not None:
            out += self.substitutes(x, ids, weights)
        if self.members is not None:
            tied = self.find_tied(ids)
            alone = torch.tensor([base is None for base in (*self.members.bases, 0)])
            tied = tied.masked_fill(~alone.to(tied.device)[tied], -1)
            out += self.members(self.experts, x, tied, weights)
        return out

    def compute_intermediate(self, row: int, x: Tensor) -> Tensor:
        """Return the input [n, width] of ``down`` of the expert that a row runs."""
        if self.members is not None and (which := self.tied_of[row]) >= 0:
            return self.members.compute_intermediate(self.experts, which, x)
        return _compute_intermediate(self.experts, self.expert_of[row], x)

    def compute_output(self, row: int, x: Tensor) -> Tensor:
        """Return the output for ``x`` [n, hidden] of the expert that a row runs."""
        if self.members is not None and (which := self.tied_of[row]) >= 0:
            return self.members.compute_output(self.experts, which, x)
        return _compute_output(self.experts, self.expert_of[row], x)


def _multiply(experts: Any, part: str, n: int, x: Tensor) -> Tensor:
    """Multiply ``x`` with a matrix of an expert, gate_up or down: one of a tensor, or packed.

    The product is in the dtype of the matrix, and its result in the wider one of both.
    """
    out: Tensor
    if not hasattr(experts, f"{part}_proj"):
        out = getattr(experts, part)[n](x)
        return out
    matrix: Tensor = getattr(experts, f"{part}_proj")[n]
    wide = torch.promote_types(x.dtype, matrix.dtype)
    out = (x.to(matrix.dtype) @ (matrix if experts.is_transposed else matrix.T)).to(wide)
    return out + getattr(experts, f"{part}_proj_bias")[n] if experts.has_bias else out


def _compute_intermediate(experts: Any, n: int, x: Tensor) -> Tensor:
    if is_experts(experts) and not experts.has_gate:
        inside: Tensor = experts.act_fn(_multiply(experts, "up", n, x))
        return inside
    return _activate(experts, _arrange(experts, _multiply(experts, "gate_up", n, x)))


def _arrange(experts: Any, both: Tensor) -> Tensor:
    """Return the products of gate before those of up, [n, 2 width], of a module's own order."""
    if is_experts(experts) and not experts.is_concatenated:
        return torch.cat([both[:, 0::2], both[:, 1::2]], dim=1)
    return both


def _activate(experts: Any, both: Tensor) -> Tensor:
    """Return what ``down`` gets from the products of gate before those of up, [n, 2 width]."""
    gate, up = both.chunk(2, dim=-1)
    if not is_experts(experts):
        return nn.functional.silu(gate) * up
    if not experts.is_concatenated:
        both = torch.stack([gate, up], dim=2).flatten(1)
    out: Tensor = experts._apply_gate(both)  # transformers' own function between the matrices
    return out


def _compute_output(experts: Any, n: int, x: Tensor) -> Tensor:
    return _multiply(experts, "down", n, _compute_intermediate(experts, n, x))


def compute_expert_intermediate(experts: Any, row: int, x: Tensor) -> Tensor:
    """Return the input [n, width] of ``down`` of the expert that a row of a router runs.

    Args:
        experts: the module of the experts of a layer.
        row: the row.
        x: inputs, [n, hidden].
    """
    if isinstance(experts, MixedExperts):
        return experts.compute_intermediate(row, x)
    return _compute_intermediate(experts, row, x)


def compute_expert_output(experts: Any, row: int, x: Tensor) -> Tensor:
    """Return the output [n, hidden] of the expert that a row of a router runs."""
    if isinstance(experts, MixedExperts):
        return experts.compute_output(row, x)
    return _compute_output(experts, row, x)


def find_experts_name(layer: MoELayer, at: str = "mlp.experts") -> str:
    """Return the name in a decoder layer of the module with the matrices of the experts.

    Args:
        layer: the layer with experts.
        at: the name that transformers gives it.
    """
    return at if layer.is_plain else f"{at}.experts"


# ---- all rows of a layer -------------------------------------------------------------------------

# Gets a row of the router, the outputs [n, hidden] of its expert for the tokens that chose it, in
# their order, and the weights [n] of the outputs.
OutputVisitor = Callable[[int, "Tensor", "Tensor"], None]


def run_row_by_row(experts: Any) -> None:
    """Let a module of experts run one row of the router after the other, in place.

    So outputs can be seen on the way (`visit_outputs`), and only those of one expert take memory.
    """
    experts.__class__ = _find_row_by_row(experts.__class__)


@contextmanager
def visit_outputs(experts: Any, visitors: Sequence[OutputVisitor]) -> Iterator[None]:
    """Show visitors the outputs of every expert that runs meanwhile."""
    experts.output_visitors = tuple(visitors)
    try:
        yield
    finally:
        del experts.output_visitors


@lru_cache
def _find_row_by_row(kind: Any) -> type[Any]:
    """Return a class of experts that runs them row by row."""
    return type(kind.__name__, (kind,), {"forward": _run_rows, "__module__": kind.__module__})


def _run_rows(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the outputs of each token's rows, [tokens, hidden].

    Args:
        experts: the module.
        x: inputs of the layer, [tokens, hidden].
        ids: the chosen rows of the router, int64 [tokens, k]; the number of rows stands for none.
        weights: gate weights of the outputs, [tokens, k].
    """
    mixed = experts if isinstance(experts, MixedExperts) else None
    order = ids.flatten().argsort(stable=True)
    sizes = ids.flatten().bincount(minlength=experts.num_experts).tolist()
    out, flat = torch.zeros_like(x, dtype=torch.float32), weights.flatten().float()
    for row, chosen in enumerate(torch.split(order, sizes)[: experts.num_experts]):
        if not len(chosen) or (mixed is not None and not mixed.runs_expert(row)):
            continue
        token = chosen.div(ids.shape[1], rounding_mode="floor")
        y, own = compute_expert_output(experts, row, x[token]).float(), flat[chosen]
        for visit in getattr(experts, "output_visitors", ()):
            visit(row, y, own)
        out.index_add_(0, token, y.mul_(own[:, None]))
    if mixed is not None and mixed.substitutes is not None:
        out += mixed.substitutes(x, ids, weights)
    return out.to(x.dtype)
