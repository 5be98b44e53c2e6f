"""Set weights to zero, anywhere or in an n:m pattern, and let them stay zero in later passes.

Which weights become zero, by ``method``:

- ``magnitude``: the smallest of a matrix.
- ``wanda`` (Sun et al., 2023, https://arxiv.org/abs/2306.11695): of each row, those with the least
  ``|W_ij| * ||x_j||``, with x_j the j-th input of all tokens. Weighted by gates, a token's inputs
  count times its weight in the expert's output (MoE-Pruner: Xie et al., 2024,
  https://arxiv.org/abs/2410.12013).
- ``sparsegpt`` (Frantar and Alistarh, 2023, https://arxiv.org/abs/2301.00774): of each block of 128
  columns, those with the least ``w^2 / [U]_jj^2``, with U the Cholesky factor of the inverse of the
  Hessian; the weights that stay make up for them. Weighted by gates, a token counts in the Hessian
  by its weight in the expert's output, as in GPTQ here.

With n:m, numbers are compared inside each run of m inputs of a row instead. The count of zeros is
exact: of equal scores the first are taken, in the order of the matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.layers import Weight, plan_weight
from moe2edge.model.model import Block, Model
from moe2edge.model.roles import list_quantizable
from moe2edge.numerics.scheme import Pattern
from moe2edge.pipeline.contract import PlannedStep, Slim
from moe2edge.pipeline.solver import GateWeighted, GroupSolver, MatrixGroup, MinTokens, Solved

if TYPE_CHECKING:
    from torch import Tensor

RUN_LENGTHS = {"2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
# Columns that SparseGPT compares together, as in the paper.
BLOCK = 128
PARTS_BY_ROLE = {
    "experts": "experts",
    "shared": "shared experts",
    "dense": "dense MLPs",
    "attention": "attention",
}
SAVES_NOTHING = (
    "zeros are stored like other numbers, so they make no file smaller, and no runtime of this "
    "package skips them"
)


class Sparsify(Slim):
    """Set a part of the weights of experts, shared experts and dense MLPs to zero.

    Comes before a quantizing pass, which keeps the zeros. The inputs of a matrix are taken from
    what comes before it as sparsified, in earlier blocks and in its own. An expert that saw fewer
    than ``min_tokens`` tokens, or none, is reported, and handled according to ``starved``.
    """

    method: Annotated[
        Literal["magnitude", "wanda", "sparsegpt"],
        Field(
            description="magnitude: by size; wanda: by size times input; sparsegpt: with feedback "
            "to the weights that stay"
        ),
    ] = "wanda"
    pattern: Annotated[
        Literal["unstructured", "2:4", "4:8"],
        Field(
            description="unstructured: zeros anywhere; n:m: n of each m inputs of a row are kept"
        ),
    ] = "unstructured"
    amount: Annotated[
        float,
        Field(gt=0, lt=1, description="fraction of the weights set to zero; 0.5 in 2:4 and 4:8"),
    ] = 0.5
    select: Annotated[
        Literal["experts", "all"],
        Field(
            description="experts: experts, shared experts and dense MLPs; all: attention as well"
        ),
    ] = "experts"
    gate_weighted: GateWeighted = True
    damping: Annotated[
        float,
        Field(
            gt=0, lt=1, description="sparsegpt: fraction of the mean diagonal added to the Hessian"
        ),
    ] = 0.01
    propagate: Annotated[bool, Field(description="false: inputs come from the dense model")] = True
    min_tokens: MinTokens = 256
    starved: Annotated[
        Literal["borrow", "magnitude"],
        Field(
            description="an under-calibrated expert uses all tokens of its layer (borrow), or its "
            "weights alone (magnitude)"
        ),
    ] = "borrow"

    @model_validator(mode="after")
    def _half_in_runs(self) -> Self:
        if self.pattern != "unstructured" and self.amount != 0.5:
            raise ValueError(
                f"{self.pattern} makes half of the weights zero, not {self.amount}; leave amount "
                "out, or choose pattern unstructured"
            )
        return self

    @property
    def needs_tokens(self) -> bool:
        """True if it needs activations: magnitudes do not."""
        return self.method != "magnitude"

    @property
    def promise(self) -> Pattern:
        """Pattern that the selected weights have afterwards."""
        return RUN_LENGTHS.get(self.pattern) or Pattern(self.amount)

    def width(self, ins: int) -> int:
        """Columns that SparseGPT chooses zeros in at once, in a matrix of ``ins`` columns.

        >>> [Sparsify().width(n) for n in (1408, 96, 192)], Sparsify(pattern="2:4").width(96)
        ([128, 96, 64], 4)
        """
        if (run := self.promise.of) is not None:
            return run
        # A divisor both of the matrix and of the columns that `feedback.solve` works on.
        return ins if ins <= BLOCK else math.gcd(ins, BLOCK)

    def split_into_runs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many numbers of a matrix [out, in] are compared together, and how many zeroed.

        >>> Sparsify(amount=0.3).split_into_runs((4, 64))
        (64, 19)
        >>> Sparsify(pattern="4:8").split_into_runs((4, 64))
        (8, 4)
        >>> Sparsify(method="magnitude").split_into_runs((4, 64))
        (256, 128)
        >>> Sparsify(method="sparsegpt").split_into_runs((4, 256))
        (512, 256)
        """
        outs, ins = shape
        if (run := self.promise.of) is not None:
            return run, round(self.promise.zeros)
        together = {"wanda": ins, "magnitude": outs * ins, "sparsegpt": outs * self.width(ins)}
        length = together[self.method]
        return length, round(self.amount * length)

    def zeros(self, shape: tuple[int, ...]) -> int:
        """Count the numbers of a matrix [out, in] that become zero."""
        length, count = self.split_into_runs(shape)
        return math.prod(shape) // length * count

    def selected(self, block: Block) -> Iterator[tuple[str, Weight]]:
        """Return the tensors of a block that it changes, with their roles."""
        return ((r, w) for r, w in list_quantizable(block) if self.selects(r))

    def selects(self, role: str) -> bool:
        """Return whether it changes a matrix of this role."""
        return self.select == "all" or _part(role) != PARTS_BY_ROLE["attention"]

    def check(self, model: Model) -> None:
        """Refuse a model that is quantized or sparse already, and widths that do not fit."""
        for _, _, weight in model.tensors():
            if weight.scheme is not None:
                raise InputError("sparsify comes before the pass that quantizes; move it up")
            if weight.pattern is not None:
                raise InputError("the recipe sparsifies twice; keep one of its sparsify passes")
        found = [w for block in model.blocks for _, w in self.selected(block)]
        if not found:
            raise InputError("sparsify finds no experts and no MLP; give select: all")
        for weight in found:
            length, count = self.split_into_runs(weight.shape)
            if weight.shape[1] % self.width(weight.shape[1]):
                raise InputError(
                    f"pattern {self.pattern} does not fit the {weight.shape[1]} inputs of "
                    f"{weight.name}, which {length} does not divide; choose pattern unstructured"
                )
            if not 0 < count < length:
                raise InputError(
                    f"amount {self.amount} makes {count} of {length} weights of {weight.name} "
                    f"zero; choose one between {1 / length:.3g} and {1 - 1 / length:.3g}"
                )

    def plan(self, model: Model) -> Model:
        """Return the model with the pattern on every selected weight."""
        for block in model.blocks:
            new = {
                role: plan_weight(weight, pattern=self.promise)
                for role, weight in self.selected(block)
            }
            model = model.replace_block(block.with_weights(new))
        return model

    def solver(self, model: Model) -> GroupSolver:
        """Make a solver that chooses the zeros of a few matrices at a time."""
        return _Solver(self, model)

    def check_result(self, before: Model, after: Model) -> None:
        """Prove from the numbers that every selected weight has its zeros.

        Raises:
            Moe2EdgeError: one has not, or another was marked.
        """
        for block in after.blocks:
            chosen = dict(self.selected(block))
            for role, weight in block.weights():
                name = after.family.disk_name(block.index, role)
                expected = self.promise if role in chosen else None
                if weight.pattern != expected:
                    raise Moe2EdgeError(
                        f"{name}: zeros are {weight.pattern or 'anywhere'}, expected "
                        f"{expected or 'no pattern'}"
                    )
                if expected is not None and not has_zeros(
                    weight.load(), *self.split_into_runs(weight.shape)
                ):
                    raise Moe2EdgeError(f"{name} has fewer zeros than {expected}")

    def describe(self, planned: PlannedStep) -> str:
        """Describe the pattern, the method, and how many weights become zero."""
        weights = [w for block in planned.before.blocks for _, w in self.selected(block)]
        return (
            f"{self.promise} by {self.method}: {len(weights)} matrices, "
            f"{sum(self.zeros(w.shape) for w in weights):,} of "
            f"{sum(w.count for w in weights):,} weights become zero"
        )


class _Solver(GroupSolver):
    """Zeros of a few matrices at a time."""

    def __init__(self, options: Sparsify, model: Model) -> None:
        self._options = options
        blocks = [block for block in model.blocks if any(options.selected(block))]
        # The block after which the account is given, and its matrices that are still to come.
        self._last = blocks[-1].index if blocks else None
        self._left = sum(1 for _ in options.selected(blocks[-1])) if blocks else 0
        self._zeros: Counter[str] = Counter()
        self._weights: Counter[str] = Counter()
        for role, weight in (pair for block in blocks for pair in options.selected(block)):
            self._zeros[_part(role)] += options.zeros(weight.shape)
            self._weights[_part(role)] += weight.count
        self.propagate = options.propagate

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Memory of solving one group: scores and masks; or weights, results and Hessian."""
        rows, ins = sum(shape[0] for shape in shapes), shapes[0][1]
        if self._options.method == "sparsegpt":
            return 8 * ins * ins + 16 * rows * ins
        return 12 * rows * ins

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Sparsify groups of equal shapes; those of attention only if it is selected."""
        if not self._options.selects(next(iter(groups[0].weights))):
            return Solved({})
        notes: list[str] = []
        shown = [self._shown(block, group, notes) for group in groups]
        if self._options.method == "sparsegpt":
            numbers, loss = self._with_feedback(block, shown, notes)
        else:
            numbers, loss = {}, (0.0, 0.0)
            for group in shown:
                numbers |= self._by_score(group)
        return Solved(
            numbers, (*notes, *self._account(block, len(numbers))), loss, self._options.promise
        )

    def _shown(self, block: Block, group: MatrixGroup, notes: list[str]) -> MatrixGroup:
        """Return the group with the tokens that are used; without weights if all are equal."""
        options = self._options
        least = max(1, options.min_tokens)
        if group.is_under_calibrated(least):
            if options.needs_tokens:
                notes += group.describe_under_calibrated(
                    block, least, SPARSIFY_FALLBACKS[options.starved]
                )
            if options.starved == "borrow" and group.everyone is not None:
                return replace(group, batches=group.everyone)
            return replace(group, batches=lambda: iter(()))
        if options.gate_weighted:
            return group
        return replace(group, batches=lambda: ((x, None) for x, _ in group.batches()))

    def _account(self, block: Block, solved: int) -> list[str]:
        """With the last matrix of the model, how many weights were set to zero in all of it.

        That follows from shapes, as the counts are exact; blocks may have been solved by an earlier
        run that was cut off.
        """
        self._left -= solved if block.index == self._last else 0
        if self._left or block.index != self._last:
            return []
        return [
            f"{part}: {self._zeros[part]:,} of {self._weights[part]:,} weights were set to zero "
            f"({self._options.promise})"
            for part in PARTS_BY_ROLE.values()
            if part in self._weights
        ] + [SAVES_NOTHING]

    def _by_score(self, group: MatrixGroup) -> dict[str, Tensor]:
        """Magnitude and Wanda: the weights that stay do not change."""
        sizes = None
        if self._options.needs_tokens:
            sizes = measure_inputs(group, next(iter(group.weights.values())).shape[1])
        numbers = {}
        for role, weight in group.weights.items():
            matrix = _load(weight)
            scores = matrix.float().abs()
            if sizes is not None:
                scores.mul_(sizes)
                # What is zero already comes first, also where inputs never occur.
                scores.masked_fill_(matrix == 0, -1)
            length, count = self._options.split_into_runs(weight.shape)
            gone = mask_smallest(scores.reshape(-1, length), count).view(matrix.shape)
            numbers[role] = matrix.masked_fill(gone, 0)
        return numbers

    def _with_feedback(
        self, block: Block, groups: Sequence[MatrixGroup], notes: list[str]
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """SparseGPT on groups of equal shapes as one batch, and the loss with its reference.

        Matrices that share their Hessian are solved as one with all their rows.
        """
        import torch

        from moe2edge.numerics import error_feedback

        shapes, ins = groups[0].shapes, groups[0].shapes[0][1]
        loaded = [[_load(weight) for weight in group.weights.values()] for group in groups]
        weights = torch.stack([torch.cat([m.float() for m in matrices]) for matrices in loaded])
        hessians = torch.empty(len(groups), ins, ins)
        for group, hessian in zip(groups, hessians, strict=True):
            error_feedback.sum_hessian(hessian, group.batches())
        reference = sum(map(error_feedback.estimate_output_size, weights, hessians))
        dead = hessians.diagonal(dim1=1, dim2=2) == 0
        factors, fine = error_feedback.factorize(hessians, self._options.damping)
        notes += [
            f"block {block.index}: {', '.join(group.weights)}: the Hessian is singular: by "
            "magnitude"
            for group, good in zip(groups, fine, strict=True)
            if not good
        ]
        # Weights of inputs that never occur cost nothing, unless there is no other input.
        factors.weight.masked_fill_(dead & ~dead.all(1, keepdim=True), 0)
        chooser = ZeroChooser(self._options, weights, [shape[0] for shape in shapes])
        lost = float(
            error_feedback.round_columns(error_feedback.transpose(weights), factors, chooser).sum()
        )
        numbers = {}
        for group, matrices, whole in zip(groups, loaded, chooser.result, strict=True):
            parts = whole.split([shape[0] for shape in shapes])
            for role, matrix, part in zip(group.weights, matrices, parts, strict=True):
                numbers[role] = part.to(matrix.dtype).contiguous()
        return numbers, (lost, reference)


SPARSIFY_FALLBACKS = {
    "borrow": "it is judged by all tokens of the layer",
    "magnitude": "it is judged by its weights alone",
}


class ZeroChooser:
    """Rounds for `feedback.solve`: some numbers of each run of columns to zero, others not at all.

    SparseGPT's choice: with D the reciprocal of the squared diagonal of the Cholesky factor of the
    inverse Hessian, ``w^2 D`` is the loss that a zero adds.
    """

    def __init__(self, options: Sparsify, weights: Tensor, sizes: Sequence[int]) -> None:
        """Make one for a batch of matrices.

        Args:
            options: pattern and amount.
            weights: float32 [batch, out, in].
            sizes: rows of the stacked matrices, each of which gets its own zeros.
        """
        import torch

        batch, outs, ins = weights.shape
        self.width: int | None = options.width(ins)
        self._sizes = list(sizes)
        self._runs = [options.split_into_runs((size, ins)) for size in sizes]
        # Transposed, so that a column is contiguous.
        self._gone = torch.zeros(batch, ins, outs, dtype=torch.bool)
        self._result = weights.new_empty(batch, ins, outs)

    @property
    def result(self) -> Tensor:
        """The numbers, [batch, out, in]."""
        return self._result.transpose(1, 2)

    def panel(self, *_: object) -> None:
        """Column by column."""

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Choose the zeros of `width` columns, by what they would best be [batch, width, out]."""
        scores = completed.square().mul_(weight.unsqueeze(-1)).transpose(1, 2)
        at = 0
        for size, (length, count) in zip(self._sizes, self._runs, strict=True):
            part = scores[:, at : at + size]
            gone = mask_smallest(part.reshape(len(part), -1, length), count).view(part.shape)
            self._gone[:, first : first + completed.shape[1], at : at + size] = gone.transpose(1, 2)
            at += size

    def round(self, column: int, wanted: Tensor, original: Tensor, error: Tensor) -> None:
        """Compute the numbers of a column [batch, out], with its zeros."""
        import torch

        kept = wanted.masked_fill(self._gone[:, column], 0)
        self._result[:, column] = kept
        torch.sub(original, kept, out=error)


def mask_smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` of the smallest of each row; of equal ones the first.

    Args:
        scores: [..., n], no NaN.
        count: from 0 to n.

    Returns:
        bool [..., n].
    """
    import torch

    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < last, scores == last
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= room))


def has_zeros(matrix: Tensor, length: int, count: int) -> bool:
    """Return whether each run of ``length`` numbers of a matrix [out, in] has ``count`` zeros.

    Runs that are longer than a row are whole columns side by side: a block of SparseGPT.
    """
    outs, ins = matrix.shape
    if length > ins:
        matrix = matrix.reshape(outs, -1, length // outs).transpose(0, 1)
    zeros = (matrix == 0).reshape(-1, length).sum(-1)
    return bool((zeros >= count).all())


def measure_inputs(group: MatrixGroup, ins: int) -> Tensor:
    """Euclidean norm of each input [in] over the tokens of a group, weighted; ones without any."""
    import torch

    total = torch.zeros(ins, dtype=torch.float64)
    for x, weights in group.batches():
        weighed = x if weights is None else x * weights.unsqueeze(1)
        total += weighed.square().sum(0, dtype=torch.float64)
    sizes = total.sqrt().float()
    return sizes if bool(sizes.any()) else torch.ones(ins)


def _load(weight: Weight) -> Tensor:
    """Load the numbers of a weight in its own dtype.

    Raises:
        InputError: some are not finite.
    """
    from moe2edge.runtime.decoder_blocks import check_finite

    return check_finite(weight.name, weight.load())


def _part(role: str) -> str:
    """Return the part of a block that a matrix belongs to, as named in notes."""
    return PARTS_BY_ROLE[role.partition(".")[0]]
