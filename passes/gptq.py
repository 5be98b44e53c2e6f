"""Quantize with GPTQ: round column by column and let later columns make up for the error.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). For a matrix W [out, in] with inputs
X, GPTQ minimizes ``|| (W - Q) X ||`` with the Hessian ``H = X X^T``. Each expert has the Hessian of
the tokens that were really routed to it; matrices that share an input share the Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moe2edge.model import Block, Model, MoELayer, Weight
from moe2edge.pipeline import Slim, Solver, selected
from moe2edge.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized
    from moe2edge.walk import Seen

# Columns that are updated at once; every group size divides it.
PANEL = 128
# Memory of one batch besides the Hessians.
BATCH_BYTES = 512 << 20


class Gptq(Slim):
    """GPTQ on attention, experts, shared experts and dense MLPs, block by block.

    The Hessians of a block are taken from the outputs of the blocks before it as quantized.
    An expert that saw fewer than ``min_tokens`` tokens is rounded to nearest, and listed.
    """

    damping: Annotated[
        float, Field(gt=0, lt=1, description="part of the mean diagonal added to the Hessian")
    ] = 0.01
    min_tokens: Annotated[
        int, Field(ge=1, description="an expert with fewer routed tokens is rounded to nearest")
    ] = 256

    def solver(self, model: Model) -> Solver:
        """Gathers Hessians of a block, then solves its matrices."""
        return _Solver(self.scheme(model), self.damping, self.min_tokens)


class _Solver:
    """Hessians of the current block by input, and the solution."""

    def __init__(self, scheme: Scheme, damping: float, min_tokens: int) -> None:
        self._scheme = scheme
        self._damping = damping
        self._min_tokens = min_tokens
        self._hessians: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch to the Hessians."""
        import torch

        for role, inputs in seen.linear_inputs.items():
            if role == leader(role):
                self._add(role, inputs)
        if seen.routing is None:
            return
        for expert in range(seen.routing.logits.shape[1]):
            token = torch.where(seen.routing.ids == expert)[0]
            inputs = seen.routing.inputs[token]
            self._add(f"experts.{expert}.gate", inputs)
            self._add(f"experts.{expert}.down", seen.expert_hidden(expert, inputs))

    def _add(self, role: str, inputs: Tensor) -> None:
        """``H += 2 X^T X`` for inputs X [n, in]."""
        hessian = 2 * inputs.T @ inputs
        if role in self._hessians:
            self._hessians[role] += hessian
        else:
            self._hessians[role] = hessian
        self._tokens[role] = self._tokens.get(role, 0) + len(inputs)

    def solve(self, block: Block) -> tuple[dict[str, Quantized], list[str]]:
        """Solve all selected matrices; those with one input as one, equal shapes in batches."""
        numbers: dict[str, Quantized] = {}
        starved = self._starved(block)
        notes = [_starved_note(block, starved, self._min_tokens)] if starved else []
        groups: dict[str, dict[str, Weight]] = {}
        for role, weight in selected(block):
            groups.setdefault(leader(role), {})[role] = weight
        alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for first, weights in groups.items():
            expert = first.rpartition(".")[0]
            if expert in {f"experts.{n}" for n in starved}:
                numbers |= self._rounded(weights)
            else:
                shapes = tuple(weight.shape for weight in weights.values())
                alike.setdefault(shapes, []).append(first)
        for shapes, leaders in alike.items():
            size = _batch_size(shapes)
            for at in range(0, len(leaders), size):
                batch = {first: groups[first] for first in leaders[at : at + size]}
                solved, singular = self._solve_batch(batch)
                numbers |= solved
                notes += [
                    f"block {block.index}: {r}: Hessian is singular: rounded" for r in singular
                ]
        self._hessians.clear()
        self._tokens.clear()
        return numbers, notes

    def _rounded(self, weights: Mapping[str, Weight]) -> dict[str, Quantized]:
        from moe2edge.rounding import round_to_nearest

        return {role: round_to_nearest(w.load(), self._scheme) for role, w in weights.items()}

    def _starved(self, block: Block) -> dict[int, int]:
        """Experts with too few tokens, and how many they had."""
        if not isinstance(block.mlp, MoELayer):
            return {}
        counts = {n: self._tokens[f"experts.{n}.gate"] for n in range(len(block.mlp.experts))}
        return {n: count for n, count in counts.items() if count < self._min_tokens}

    def _solve_batch(
        self, groups: Mapping[str, Mapping[str, Weight]]
    ) -> tuple[dict[str, Quantized], list[str]]:
        """Solve groups of equal shapes; returns numbers by role, and roles that were rounded.

        The rows of a matrix do not depend on each other, so the matrices of a group, which share
        their Hessian, are solved as one with all their rows.
        """
        import torch

        from moe2edge.rounding import Quantized

        solved: dict[str, Quantized] = {}
        factors: dict[str, Tensor] = {}
        singular: list[str] = []
        for first, weights in groups.items():
            factor = inverse_factor(self._hessians.pop(first), self._damping)
            if factor is None:
                singular += weights
                solved |= self._rounded(weights)
            else:
                factors[first] = factor
        if factors:
            stacked = torch.stack(
                [torch.cat([w.load().float() for w in groups[f].values()]) for f in factors]
            )
            q, scales = solve(stacked, torch.stack(list(factors.values())), self._scheme)
            for n, first in enumerate(factors):
                rows = [weight.shape[0] for weight in groups[first].values()]
                both = torch.split(q[n], rows), torch.split(scales[n], rows)
                for role, integers, scale in zip(groups[first], *both, strict=True):
                    solved[role] = Quantized(integers.clone(), scale.clone(), self._scheme)
        return solved, singular


def _batch_size(shapes: tuple[tuple[int, ...], ...]) -> int:
    """Groups of matrices of these shapes that are solved at once, within `BATCH_BYTES`."""
    rows, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
    # In float32: the factor and its place in the batch, the weights twice, integers as bytes.
    return max(1, BATCH_BYTES // (8 * inputs * inputs + 9 * rows * inputs))


def _starved_note(block: Block, starved: Mapping[int, int], least: int) -> str:
    listed = ", ".join(f"{expert} ({count})" for expert, count in starved.items())
    return (
        f"block {block.index}: rounded to nearest, because they saw fewer than {least} tokens: "
        f"experts {listed}"
    )


def leader(role: str) -> str:
    """The role whose Hessian a matrix uses: q, k, v share an input, and so do gate and up.

    >>> leader("attention.v_proj.weight"), leader("experts.3.up"), leader("experts.3.down")
    ('attention.q_proj.weight', 'experts.3.gate', 'experts.3.down')
    """
    if role.startswith("attention") and "o_proj" not in role:
        return "attention.q_proj.weight"
    return role.removesuffix("up") + "gate" if role.endswith(".up") else role


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian [in, in]; None if it has none.

    Inputs that never occur get a diagonal of one, so that their weights are simply rounded. If
    the factorization fails, the damping is raised tenfold up to the whole mean diagonal.
    """
    import torch

    diagonal = hessian.diagonal()
    dead = diagonal == 0
    eye = torch.eye(len(hessian))
    while damping < 10:
        shift = torch.where(dead, torch.ones(()), damping * diagonal.mean())
        lower, info = torch.linalg.cholesky_ex(hessian + eye * shift)
        if info == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if info == 0 and bool(upper.isfinite().all()):
                found: Tensor = upper
                return found
        damping *= 10
    return None


def solve(weights: Tensor, factors: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """GPTQ over a batch of matrices.

    Args:
        weights: float32 [batch, out, in].
        factors: float32 [batch, in, in], of `inverse_factor`.
        scheme: how to quantize.

    Returns:
        Integers uint8 [batch, out, in] and scales float32 [batch, out, in / group_size]. The
        scale of a group is chosen when the solver reaches it, from the weights as updated.
    """
    import torch

    from moe2edge.rounding import dequantize, group_scales, round_to

    weights = weights.clone()
    width = weights.shape[-1]
    integers = torch.empty_like(weights, dtype=torch.uint8)
    scales = weights.new_empty(*weights.shape[:-1], width // scheme.group_size)
    column_scheme = Scheme(scheme.bits, 1)
    for start in range(0, width, PANEL):
        end = min(start + PANEL, width)
        errors = torch.empty_like(weights[..., start:end])
        for column in range(start, end):
            group, place = divmod(column, scheme.group_size)
            if place == 0:
                inside = weights[..., column : column + scheme.group_size]
                scales[..., group] = group_scales(inside, scheme)[..., 0]
            now = weights[..., column : column + 1]
            scale = scales[..., group : group + 1]
            q = round_to(now, scale, column_scheme)
            integers[..., column : column + 1] = q
            pivot = factors[:, column, column, None, None]
            error = (now - dequantize(q, scale, column_scheme)) / pivot
            errors[..., column - start : column - start + 1] = error
            row = factors[:, column, None, column + 1 : end]
            weights[..., column + 1 : end] -= error * row
        weights[..., end:] -= errors @ factors[:, start:end, end:]
    return integers, scales
