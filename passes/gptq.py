"""Quantize with GPTQ: round column by column and let later columns make up for the error.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). For a matrix W [out, in] with inputs
X, GPTQ minimizes ``|| (W - Q) X ||`` with the Hessian ``H = X X^T``. The Hessian of an expert sums
over the tokens that are routed to it, each counted by its weight in the expert's output (MoEQuant,
https://arxiv.org/abs/2505.03804). Matrices that share an input share the Hessian and its factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._ends import END_SCHEME, RoundedEnds, solve_by_rows
from moe2edge.passes._quantize import Quantize, Scales
from moe2edge.pipeline.contract import PlannedStep
from moe2edge.pipeline.solver import (
    Batches,
    EndSolver,
    GateWeighted,
    MatrixGroup,
    MinTokens,
    Solved,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.numerics import error_feedback
    from moe2edge.numerics.grid import Quantized


class Gptq(Quantize):
    """Quantize with GPTQ: round column by column and let later columns make up for the error.

    GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) on attention, experts, shared
    experts and dense MLPs. Hessians are computed from the inputs that a matrix gets once all
    matrices before it are quantized, in earlier blocks and in its own. An expert with fewer than
    ``min_tokens`` routed tokens is under-calibrated: it is reported, and treated as ``starved``
    says.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()

    damping: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="fraction of the Hessian's mean diagonal that is added to its diagonal",
        ),
    ] = 0.01
    scales: Scales = "mse"
    act_order: Annotated[
        bool,
        Field(
            description="round columns in the order of decreasing input size; groups stay in place "
            "(static)"
        ),
    ] = True
    refit: Annotated[
        int,
        Field(
            ge=0,
            le=8,
            description="times that scales are fitted to the integers and the columns rounded "
            "again; needs act_order",
        ),
    ] = 0
    gate_weighted: GateWeighted = True
    propagate: Annotated[
        bool,
        Field(
            description="true: inputs come from the model as quantized so far; false: from the "
            "unquantized model"
        ),
    ] = True
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="where matrices are solved; auto: on a GPU if there is one"),
    ] = "auto"
    compute: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="dtype of products: of attention and experts, of the inputs in Hessians, "
            "and of errors that are carried to distant columns; auto: bfloat16 where the processor "
            "multiplies it natively"
        ),
    ] = "auto"
    min_tokens: MinTokens = 256
    starved: Annotated[
        Literal["borrow", "round"],
        Field(
            description="an under-calibrated expert falls back to all tokens of its layer "
            "(borrow), or to rounding to nearest (round)"
        ),
    ] = "borrow"

    def check(self, model: Model) -> None:
        """Refuse models that `Quantize` refuses, and ``device: cuda`` where there is no GPU."""
        super().check(model)
        if self.refit and not self.act_order:
            raise InputError(
                "refit needs act_order: true, as otherwise scales are chosen column by column; "
                "leave one of the two out"
            )
        self.place()

    def place(self) -> torch.device:
        """Return the device on which matrices are solved: the CPU, or a GPU.

        Raises:
            InputError: ``device`` is ``cuda``, and there is no GPU.
        """
        from moe2edge.runtime.memory import choose_device

        return choose_device(self.device, self.name)

    def dtype(self) -> torch.dtype:
        """Return the dtype of products; Hessians and their factors are always float32."""
        import torch

        from moe2edge.runtime.products import multiplies_bfloat16

        if self.compute != "auto":
            return torch.float32 if self.compute == "float32" else torch.bfloat16
        native = multiplies_bfloat16(self.place().type)
        return torch.bfloat16 if native else torch.float32

    def resolve(self, model: Model) -> Self:
        """Return the pass with the dtype that this machine computes in, which affects numbers."""
        chosen = str(self.dtype()).removeprefix("torch.")
        return super().resolve(model).model_copy(update={"compute": chosen})

    def describe(self, planned: PlannedStep) -> str:
        """Describe the schemes, the dtype of products, and missing compiled loops."""
        from moe2edge.numerics import compiled

        loops = (
            ""
            if compiled.is_built()
            else "; using torch loops (slower): the compiled ones were not built at installation"
        )
        dtype = self.resolve(planned.before).compute
        return f"{super().describe(planned)}; products in {dtype}{loops}"

    def solver(self, model: Model) -> _Solver:
        """Create the solver, which computes Hessians of matrices, then solves them."""
        return _Solver(self, self.schemes(model), model)

    def end_solver(self, model: Model) -> EndSolver:
        """Create the solver of head and embedding."""
        return _Ends(*self.list_ends(model), self.scales, self.solver(model))


@dataclass(frozen=True)
class _Ends(RoundedEnds):
    """Solves a head by its inputs; the embedding, whose inputs are rows of one, is rounded.

    Attributes:
        solver: computes Hessians.
    """

    solver: _Solver | None = None

    def nbytes(self, weight: Weight) -> int:
        """Estimate the bytes of memory that solving one matrix takes."""
        return super().nbytes(weight) + 12 * weight.shape[1] ** 2

    def solve(self, name: str, weight: Weight, inputs: Batches | None) -> Solved:
        """Solve the head where its inputs are known, and round anything else."""
        if inputs is None or self.solver is None:
            return super().solve(name, weight, inputs)
        return self.solver.solve_head(name, weight, inputs)


class _Solver:
    """Solver of a few groups of matrices at a time, by their Hessians."""

    def __init__(self, options: Gptq, schemes: Mapping[str, Scheme], model: Model) -> None:
        self._options, self._schemes, self._model = options, schemes, model
        self.propagate = options.propagate
        self.device, self.dtype = options.place(), options.dtype()
        self._spaces: dict[int, Tensor] = {}

    def solve_alone(self, block: Block) -> Mapping[str, Quantized]:
        """Round factors and linear maps to nearest; in 8 bits they need no error feedback."""
        return self._options.solve_alone(block, self._options.scales)

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Estimate the bytes of memory that solving one group takes."""
        rows, ins = sum(shape[0] for shape in shapes), shapes[0][1]
        # The Hessian twice, as LAPACK needs it in another order; the weights and their errors in
        # two dtypes, integers, and temporary zero points. Fitting takes as much again.
        return (8 * ins * ins + 12 * rows * ins) * (2 if self._options.refit else 1)

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Solve groups of equal shapes and schemes as one batch.

        The rows of a matrix do not depend on each other, so matrices of one scheme that share
        their Hessian are solved as one with all their rows.
        """
        from moe2edge.numerics import error_feedback

        places = self._sort_by_scheme(block, groups[0])
        if not places:
            return Solved({})
        hessians, notes = self._sum_hessians(block, groups)
        # `_factorize` overwrites the Hessians.
        reference = sum(
            error_feedback.estimate_output_size(weight.load(), hessian)
            for group, hessian in zip(groups, hessians, strict=True)
            for weight in group.weights.values()
        )
        diagonals, orders, factors, fine = self._factorize(hessians)
        notes += [
            f"block {block.index}: {', '.join(group.weights)}: the Hessian is singular; fell back "
            "to rounding to nearest"
            for group, good in zip(groups, fine, strict=True)
            if not good
        ]
        numbers: dict[str, Quantized] = {}
        lost = 0.0
        for scheme, chosen in places.items():
            parts = [[list(g.weights)[n] for n in chosen] for g in groups]
            sparse = any(
                g.weights[r].pattern for g, p in zip(groups, parts, strict=True) for r in p
            )
            found, loss = self._round(
                self._load(groups, parts), scheme, factors, orders, diagonals, sparse=sparse
            )
            lost += float(loss.sum())
            for group, roles, whole in zip(groups, parts, found, strict=True):
                sizes = [group.weights[role].shape[0] for role in roles]
                numbers |= dict(zip(roles, whole.split(sizes), strict=True))
        return Solved(numbers, tuple(notes), (lost, reference))

    def solve_head(self, name: str, weight: Weight, inputs: Batches) -> Solved:
        """Solve the head, of whose inputs all tokens count alike, a part of its rows at a time."""
        import torch

        from moe2edge.numerics import error_feedback

        ins = weight.shape[1]
        hessians = self._get_space(0, torch.Size((1, ins, ins)))
        near = ((x.to(self.device), None) for x, _ in inputs())
        error_feedback.sum_hessian(hessians[0], near, weighted=False, dtype=self.dtype)
        whole = hessians[0].clone()
        diagonals, orders, factors, fine = self._factorize(hessians)

        def solve(rows: Tensor) -> tuple[Quantized, float]:
            (found,), loss = self._round(
                rows[None].to(self.device), END_SCHEME, factors, orders, diagonals, sparse=False
            )
            return found, float(loss.sum())

        def measure(rows: Tensor) -> float:
            return error_feedback.estimate_output_size(rows, whole)

        solved = solve_by_rows(name, weight, solve, measure)
        if fine[0]:
            return solved
        note = f"{weight.name}: the Hessian is singular; fell back to rounding to nearest"
        return replace(solved, notes=(note,))

    def _factorize(
        self, hessians: Tensor
    ) -> tuple[Tensor, Tensor | None, error_feedback.HessianFactors, list[bool]]:
        """Factorize Hessians [batch, in, in], which are overwritten.

        Returns:
            Their diagonals [batch, in], the order of columns, the factors, and which there are.
        """
        import torch

        from moe2edge.numerics import bfloat16, error_feedback

        diagonals = hessians.diagonal(dim1=1, dim2=2).clone()
        orders = diagonals.argsort(dim=1, stable=True) if self._options.act_order else None
        space = self._get_space(1, hessians.shape)
        # Hessians of these loops are symmetric to the last bit, so that either half will do.
        if orders is not None and self._sums_bfloat16():
            for hessian, found, order in zip(hessians, space, orders, strict=True):
                bfloat16.order_both(hessian, order, found)
            hessians, space = space, hessians
        elif orders is not None:
            for hessian, rows, order in zip(hessians, space, orders, strict=True):
                torch.index_select(hessian, 0, order, out=rows)
                # The upper triangle is never read.
                for start in range(0, len(order), error_feedback.HESSIAN_COLUMNS):
                    part = slice(start, start + error_feedback.HESSIAN_COLUMNS)
                    left = order[: part.stop]
                    hessian[part, : len(left)] = rows[part].index_select(1, left)
        factors, fine = error_feedback.factorize(hessians, self._options.damping, space)
        return diagonals, orders, factors, fine

    def _sums_bfloat16(self) -> bool:
        """Return whether compiled loops sum Hessians of bfloat16 inputs."""
        import torch

        from moe2edge.numerics import bfloat16

        return self.dtype == torch.bfloat16 and self.device.type == "cpu" and bfloat16.is_native()

    def _get_space(self, n: int, shape: torch.Size) -> Tensor:
        """Return the n-th of some buffers; reuse it, as new memory must be cleared."""
        import torch

        space = self._spaces.pop(n, None)
        if space is None or space.numel() < shape.numel():
            del space  # free it before another one is allocated
            space = torch.empty(shape.numel(), device=self.device)
        self._spaces[n] = space
        return space[: shape.numel()].view(shape)

    def _load(self, groups: Sequence[MatrixGroup], parts: Sequence[Sequence[str]]) -> Tensor:
        """Load the matrices of each group below one another, float32 [batch, out, in]."""
        import torch

        from moe2edge.runtime.decoder_blocks import check_finite

        rows = sum(groups[0].weights[role].shape[0] for role in parts[0])
        shape = torch.Size((len(groups), rows, groups[0].shapes[0][1]))
        # Without compiled loops its memory is needed for other things soon.
        keeps = self._sums_bfloat16()
        matrices = self._get_space(2, shape) if keeps else torch.empty(shape, device=self.device)
        for whole, group, roles in zip(matrices, groups, parts, strict=True):
            at = 0
            for role in roles:
                weight = group.weights[role]
                place = whole[at : at + weight.shape[0]]
                check_finite(weight.name, place.copy_(weight.load()))
                at += weight.shape[0]
        return matrices

    def _sort_by_scheme(self, block: Block, group: MatrixGroup) -> dict[Scheme, list[int]]:
        """Sort the positions of a group's matrices by scheme; leave out those without one.

        All groups that are solved together give the same, as the experts of a layer have one
        scheme.
        """
        places: dict[Scheme, list[int]] = {}
        for place, role in enumerate(group.weights):
            scheme = self._schemes.get(self._model.disk_name(block, role))
            if scheme is not None:
                places.setdefault(scheme, []).append(place)
        return places

    def _round(
        self,
        weights: Tensor,
        scheme: Scheme,
        factors: error_feedback.HessianFactors,
        orders: Tensor | None,
        diagonals: Tensor,
        *,
        sparse: bool,
    ) -> tuple[list[Quantized], Tensor]:
        """Quantize ``weights`` [batch, out, in]; return the results and their losses [batch]."""
        import torch

        from moe2edge.numerics import bfloat16, error_feedback
        from moe2edge.numerics.grid import Grid
        from moe2edge.numerics.rounding import choose_grid
        from moe2edge.numerics.scale_fitting import fit_scales, measure_rows

        batch, _, ins = weights.shape
        how = self._options.scales
        groups = torch.arange(ins, device=weights.device) // scheme.width(ins)
        groups = groups.expand(batch, ins)
        fixed = orders is not None or scheme.groups(ins) == 1
        costs = diagonals
        if orders is not None and how == "signed":
            # What is left of the Hessian once later columns make up for errors.
            costs = torch.empty_like(diagonals).scatter_(1, orders, factors.weight)
        grid = choose_grid(weights, scheme, how if fixed else "absmax", costs)
        whole = self.dtype == torch.bfloat16 and fixed and not self._options.refit
        if whole and bfloat16.can_round(weights):
            q, loss = bfloat16.round_matrices(
                weights,
                grid,
                torch.arange(ins).repeat(batch, 1) if orders is None else orders,
                factors.lower.mT,
                factors.weight,
                sparse=sparse,
            )
            return [grid[n].to_quantized(q[n]) for n in range(batch)], loss
        mask = (weights != 0) if sparse else None
        columns = error_feedback.transpose(weights)
        del weights  # frees its memory: there is no other reference
        if orders is not None:
            groups = groups.gather(1, orders)
            columns = error_feedback.gather_rows(columns, orders)
            mask = None if mask is None else error_feedback.gather_rows(mask.mT, orders).mT
        original = columns.clone() if self._options.refit else columns
        rounder = error_feedback.GridRounder(groups, grid, None if fixed else how, mask)
        loss = error_feedback.round_columns(columns, factors, rounder, self.dtype)
        q, grid = rounder.integers(orders), rounder.grid
        if self._options.refit:
            rows = measure_rows(columns, factors)
            for _ in range(self._options.refit):
                fitted = fit_scales(original, rounder.numbers, rounder.grid.scales, groups, factors)
                columns.copy_(original)
                again = Grid(fitted, grid.zeros, scheme)
                rounder = error_feedback.GridRounder(groups, again, None, mask)
                error_feedback.round_columns(columns, factors, rounder, self.dtype)
                found = measure_rows(columns, factors)
                better = (found < rows)[..., None]
                q = torch.where(better, rounder.integers(orders), q)
                grid = Grid(torch.where(better, fitted, grid.scales), grid.zeros, scheme)
                rows = torch.minimum(found, rows)
            loss = rows.sum(1)
        q, grid = q.cpu(), grid.cpu()
        return [grid[n].to_quantized(q[n]) for n in range(batch)], loss

    def _sum_hessians(
        self, block: Block, groups: Sequence[MatrixGroup]
    ) -> tuple[Tensor, list[str]]:
        """Sum the Hessians [batch, in, in]; return them and notes on under-calibrated experts."""
        import torch

        from moe2edge.numerics import error_feedback

        ins = groups[0].shapes[0][1]
        hessians = self._get_space(0, torch.Size((len(groups), ins, ins)))
        notes: list[str] = []
        for group, hessian in zip(groups, hessians, strict=True):
            batches, least = group.batches, self._options.min_tokens
            if group.is_under_calibrated(least):
                notes += group.describe_under_calibrated(
                    block, least, GPTQ_FALLBACKS[self._options.starved]
                )
                if self._options.starved == "round" or group.everyone is None:
                    hessian.zero_()
                    continue
                batches = group.everyone
            error_feedback.sum_hessian(
                hessian, batches(), weighted=self._options.gate_weighted, dtype=self.dtype
            )
        return hessians, notes


GPTQ_FALLBACKS = {
    "borrow": "it uses the Hessian of all tokens of the layer",
    "round": "rounded to nearest",
}
