"""Set weights to zero, anywhere or in an n:m pattern; later passes keep the zeros.

``method`` chooses the weights that become zero:

- ``magnitude``: the smallest of each matrix.
- ``wanda`` (Sun et al., 2023, https://arxiv.org/abs/2306.11695): in each row, those with the least
  ``|W_ij| * ||x_j||``, with x_j the j-th input over all tokens. Gate-weighted, a token's inputs are
  multiplied by its weight in the expert's output (MoE-Pruner: Xie et al., 2024,
  https://arxiv.org/abs/2410.12013).
- ``sparsegpt`` (Frantar and Alistarh, 2023, https://arxiv.org/abs/2301.00774): in each block of 128
  columns, those with the least ``w^2 / [U]_jj^2``, with U the Cholesky factor of the inverse of the
  Hessian; the remaining weights make up for them. Gate-weighted, a token counts in the Hessian by
  its weight in the expert's output, as in GPTQ here.

With n:m, scores are compared within each run of m inputs of a row instead. The number of zeros is
exact: among equal scores the first are taken, in the order of the matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.traits import Trait
from moe2edge.model.weights import Weight, plan_weight
from moe2edge.numerics.scheme import Pattern
from moe2edge.pipeline.contract import PlannedStep, Slim
from moe2edge.pipeline.solver import GateWeighted, GroupSolver, MatrixGroup, MinTokens, Solved

if TYPE_CHECKING:
    from torch import Tensor

RUN_LENGTHS = {"2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
# Columns whose scores SparseGPT compares together, as in the paper.
BLOCK = 128
ATTENTION = "attention"
PARTS_BY_ROLE = {
    "experts": "experts",
    "shared": "shared experts",
    "dense": "dense MLPs",
    "attention": ATTENTION,
}
SAVES_NOTHING = (
    "zeros are stored like other numbers, so they make no file smaller, and no runtime of this "
    "package skips them"
)


class Sparsify(Slim):
    """Set a fraction of the weights of experts, shared experts and dense MLPs to zero.

    By magnitude, Wanda (https://arxiv.org/abs/2306.11695) or SparseGPT
    (https://arxiv.org/abs/2301.00774). Comes before a quantizing pass, which keeps the zeros. A
    matrix is judged by the inputs that it gets once all matrices before it are sparse, in earlier
    blocks and in its own. An expert with fewer than ``min_tokens`` routed tokens, or none, is
    under-calibrated: it is reported, and treated as ``starved`` says.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()

    method: Annotated[
        Literal["magnitude", "wanda", "sparsegpt"],
        Field(
            description="score of a weight: its size (magnitude), size times norm of the input "
            "(wanda), or the error that remains after feedback to other weights (sparsegpt)"
        ),
    ] = "wanda"
    pattern: Annotated[
        Literal["unstructured", "2:4", "4:8"],
        Field(description="zeros anywhere, or n:m: of each m inputs of a row, n stay"),
    ] = "unstructured"
    amount: Annotated[
        float,
        Field(gt=0, lt=1, description="fraction of weights that become zero; 0.5 in 2:4 and 4:8"),
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
            gt=0,
            lt=1,
            description="sparsegpt: fraction of the Hessian's mean diagonal that is added to its "
            "diagonal",
        ),
    ] = 0.01
    propagate: Annotated[
        bool,
        Field(
            description="true: inputs come from the model as sparsified so far; false: from the "
            "dense model"
        ),
    ] = True
    min_tokens: MinTokens = 256
    starved: Annotated[
        Literal["borrow", "magnitude"],
        Field(
            description="an under-calibrated expert falls back to all tokens of its layer "
            "(borrow), or to magnitude (magnitude)"
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
        """True if it reads activations; magnitudes do not depend on them."""
        return self.method != "magnitude"

    @property
    def promise(self) -> Pattern:
        """Pattern that the selected weights get."""
        return RUN_LENGTHS.get(self.pattern) or Pattern(self.amount)

    def width(self, ins: int) -> int:
        """Return in how many of ``ins`` columns SparseGPT chooses zeros at once.

        >>> [Sparsify().width(n) for n in (1408, 96, 192)], Sparsify(pattern="2:4").width(96)
        ([128, 96, 64], 4)
        """
        if (run := self.promise.of) is not None:
            return run
        # A divisor both of the matrix and of a panel of columns of `error_feedback.round_columns`.
        return ins if ins <= BLOCK else math.gcd(ins, BLOCK)

    def split_into_runs(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Split a matrix [out, in] into runs of compared weights; return length and zeros of each.

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
        """Count the weights of a matrix [out, in] that become zero."""
        length, count = self.split_into_runs(shape)
        return math.prod(shape) // length * count

    def selected(self, model: Model, block: Block) -> Iterator[tuple[str, Weight]]:
        """Yield the matrices of a block that become sparse, with their roles."""
        return ((r, w) for r, w in list_quantizable(block) if self.selects(model, block, r))

    def selects(self, model: Model, block: Block, role: str) -> bool:
        """Return whether matrices of this role become sparse."""
        return self.select == "all" or _name_part(model, block, role) != ATTENTION

    def check(self, model: Model) -> None:
        """Refuse quantized or sparse models, and widths that the pattern does not fit."""
        for _, _, weight in model.tensors():
            if weight.scheme is not None:
                raise InputError("sparsify comes before the pass that quantizes; move it up")
            if weight.pattern is not None:
                raise InputError("the recipe sparsifies twice; keep one of its sparsify passes")
        weights = [w for block in model.blocks for _, w in self.selected(model, block)]
        if not weights:
            raise InputError(
                "sparsify: the model has no experts and no dense MLPs; set select: all to sparsify "
                "attention"
            )
        shortest = min(self.split_into_runs(weight.shape)[0] for weight in weights)
        for weight in weights:
            length, count = self.split_into_runs(weight.shape)
            if weight.shape[1] % self.width(weight.shape[1]):
                raise InputError(
                    f"pattern {self.pattern} does not fit the {weight.shape[1]} inputs of "
                    f"{weight.name}, which {length} does not divide; choose pattern unstructured"
                )
            if not 0 < count < length:
                raise InputError(
                    f"amount {self.amount} makes {count} of {length} weights of {weight.name} "
                    f"zero; choose one between {1 / shortest:.12g} and {1 - 1 / shortest:.12g}"
                )

    def plan(self, model: Model) -> Model:
        """Return the model with the pattern on every selected weight."""
        for block in model.blocks:
            new = {
                role: plan_weight(weight, pattern=self.promise)
                for role, weight in self.selected(model, block)
            }
            model = model.replace_block(block.with_weights(new))
        return model

    def solver(self, model: Model) -> GroupSolver:
        """Create the solver, which sparsifies a few matrices at a time."""
        return _Solver(self, model)

    def check_result(self, before: Model, after: Model) -> None:
        """Prove from the numbers that every selected weight has its zeros.

        Raises:
            Moe2EdgeError: one does not, or a weight that is not selected has a pattern.
        """
        from moe2edge.numerics.sparsity import has_zeros

        for block in after.blocks:
            chosen = dict(self.selected(after, block))
            for role, weight in block.weights():
                name = after.disk_name(block, role)
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
        model = planned.before
        weights = [w for block in model.blocks for _, w in self.selected(model, block)]
        return (
            f"{self.promise} by {self.method}: {len(weights)} matrices, "
            f"{sum(self.zeros(w.shape) for w in weights):,} of "
            f"{sum(w.count for w in weights):,} weights become zero"
        )


class _Solver(GroupSolver):
    """Solver that sparsifies a few matrices at a time."""

    def __init__(self, options: Sparsify, model: Model) -> None:
        self._options, self._model = options, model
        blocks = [block for block in model.blocks if any(options.selected(model, block))]
        # The block after which zeros are summed up, and its matrices that are still to be solved.
        self._last = blocks[-1].index if blocks else None
        self._left = sum(1 for _ in options.selected(model, blocks[-1])) if blocks else 0
        self._zeros: Counter[str] = Counter()
        self._weights: Counter[str] = Counter()
        for block in blocks:
            for role, weight in options.selected(model, block):
                part = _name_part(model, block, role)
                self._zeros[part] += options.zeros(weight.shape)
                self._weights[part] += weight.count
        self.propagate = options.propagate

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Estimate the bytes of one group: scores and masks, or weights, results and Hessian."""
        rows, ins = sum(shape[0] for shape in shapes), shapes[0][1]
        if self._options.method == "sparsegpt":
            return 8 * ins * ins + 16 * rows * ins
        return 12 * rows * ins

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Sparsify what is selected in groups of equal shapes."""
        groups = [self._select(block, group) for group in groups]
        if not groups[0].weights:
            return Solved({})
        notes: list[str] = []
        groups = [self._choose_tokens(block, group, notes) for group in groups]
        if self._options.method == "sparsegpt":
            numbers, loss = self._solve_with_feedback(block, groups, notes)
        else:
            numbers, loss = {}, (0.0, 0.0)
            for group in groups:
                numbers |= self._solve_by_score(group)
        return Solved(
            numbers, (*notes, *self._count_zeros(block, len(numbers))), loss, self._options.promise
        )

    def _select(self, block: Block, group: MatrixGroup) -> MatrixGroup:
        """Return the group with the selected matrices: attention may share its input with MLPs."""
        chosen = {
            role: weight
            for role, weight in group.weights.items()
            if self._options.selects(self._model, block, role)
        }
        return replace(group, weights=chosen)

    def _choose_tokens(self, block: Block, group: MatrixGroup, notes: list[str]) -> MatrixGroup:
        """Return the group with the tokens that judge it, without weights if all count alike.

        Notes on under-calibrated experts are added to ``notes``.
        """
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

    def _count_zeros(self, block: Block, solved: int) -> list[str]:
        """After the last matrix of the model, report how many of all weights were set to zero.

        This follows from shapes, as the numbers of zeros are exact; some blocks may have been
        solved by an earlier run that was interrupted.
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

    def _solve_by_score(self, group: MatrixGroup) -> dict[str, Tensor]:
        """Sparsify by magnitude or Wanda; the remaining weights do not change."""
        from moe2edge.numerics.sparsity import mask_smallest

        sizes = None
        if self._options.needs_tokens:
            sizes = measure_inputs(group, next(iter(group.weights.values())).shape[1])
        numbers = {}
        for role, weight in group.weights.items():
            matrix = _load(weight)
            scores = matrix.float().abs()
            if sizes is not None:
                scores.mul_(sizes)
                # Weights that are zero already come first, also where inputs never occur.
                scores.masked_fill_(matrix == 0, -1)
            length, count = self._options.split_into_runs(weight.shape)
            zeros = mask_smallest(scores.reshape(-1, length), count).view(matrix.shape)
            numbers[role] = matrix.masked_fill(zeros, 0)
        return numbers

    def _solve_with_feedback(
        self, block: Block, groups: Sequence[MatrixGroup], notes: list[str]
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """Sparsify groups of equal shapes as one batch by SparseGPT; return the loss as well.

        Matrices that share their Hessian are solved as one with all their rows. The loss comes with
        the size of the outputs that it is relative to.
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
            f"block {block.index}: {', '.join(group.weights)}: the Hessian is singular; fell back "
            "to magnitude"
            for group, good in zip(groups, fine, strict=True)
            if not good
        ]
        # A zero for an input that never occurs costs nothing, unless no input occurs.
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
    """Rounder of `error_feedback.round_columns` that sets some weights to zero and keeps others.

    SparseGPT's choice: with D the reciprocal of the squared diagonal of the Cholesky factor of the
    inverse Hessian, ``w^2 D`` is the loss that a zero adds.
    """

    def __init__(self, options: Sparsify, weights: Tensor, sizes: Sequence[int]) -> None:
        """Prepare for a batch of matrices.

        Args:
            options: pattern and amount.
            weights: float32 [batch, out, in].
            sizes: rows of each of the matrices that are stacked along ``out``; zeros are chosen in
                each by itself.
        """
        import torch

        batch, outs, ins = weights.shape
        self.width: int | None = options.width(ins)
        self._sizes = list(sizes)
        self._runs = [options.split_into_runs((size, ins)) for size in sizes]
        # Transposed, so that a column is contiguous.
        self._zeros = torch.zeros(batch, ins, outs, dtype=torch.bool)
        self._result = weights.new_empty(batch, ins, outs)

    @property
    def result(self) -> Tensor:
        """Weights after all columns are rounded, [batch, out, in]."""
        return self._result.transpose(1, 2)

    def round_panel(self, *_: object) -> None:
        """Return None: columns are rounded one by one."""

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Choose the zeros of `width` columns by their best values ``completed``."""
        from moe2edge.numerics.sparsity import mask_smallest

        scores = completed.square().mul_(weight.unsqueeze(-1)).transpose(1, 2)
        at, columns = 0, slice(first, first + completed.shape[1])
        for size, (length, count) in zip(self._sizes, self._runs, strict=True):
            part = scores[:, at : at + size]
            zeros = mask_smallest(part.reshape(len(part), -1, length), count).view(part.shape)
            self._zeros[:, columns, at : at + size] = zeros.transpose(1, 2)
            at += size

    def round(self, column: int, target: Tensor, original: Tensor, error: Tensor) -> None:
        """Set the chosen zeros of a column [batch, out]; keep the other numbers of ``target``."""
        import torch

        rounded = target.masked_fill(self._zeros[:, column], 0)
        self._result[:, column] = rounded
        torch.sub(original, rounded, out=error)


def measure_inputs(group: MatrixGroup, ins: int) -> Tensor:
    """Measure the Euclidean norm of each input [in] over the weighted tokens of a group.

    All are one if the group has no tokens, or no input of theirs differs from zero.
    """
    import torch

    total = torch.zeros(ins, dtype=torch.float64)
    for x, weights in group.batches():
        weighed = x if weights is None else x * weights.unsqueeze(1)
        total += weighed.square().sum(0, dtype=torch.float64)
    sizes = total.sqrt().float()
    return sizes if bool(sizes.any()) else torch.ones(ins)


def _load(weight: Weight) -> Tensor:
    """Load a weight in its stored dtype.

    Raises:
        InputError: some numbers are not finite.
    """
    from moe2edge.runtime.decoder_blocks import check_finite

    return check_finite(weight.name, weight.load())


def _name_part(model: Model, block: Block, role: str) -> str:
    """Name the part of a block that a matrix belongs to, as in notes."""
    kind, _, path = role.partition(".")
    if kind != "linear":
        return PARTS_BY_ROLE[kind]
    if not model.architecture.anatomy[block.origin].is_in_mlp(role):
        return ATTENTION
    shared = any(name.startswith("shared") for name in path.split("."))
    return PARTS_BY_ROLE["shared" if shared else "dense"]
