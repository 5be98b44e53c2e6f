"""Fit of a router to the experts that were kept. Pure functions on tensors.

Notation: T tokens, E experts, ``h_t`` the router's input, ``f_tj`` the output of expert j,
``w_tj`` its weight (0 where it is not chosen), ``D_t`` the source's residual stream after the block
minus the model's. With new rows W the weights move by ``a = w(W) - w``, and the loss is

    sum_t c_t | D_t - sum_j a_tj f_tj |^2
        = sum_t c_t ( |D_t|^2 - 2 sum_j a_tj <D_t, f_tj> + sum_ij a_ti a_tj <f_ti, f_tj> )

so that, as in `moe2edge.numerics.subset_loss`, only products of expert outputs are needed. A step
is a least-squares fit: with the chosen experts fixed, weights are linear in the logits to first
order, ``dw_j / dz_l = w_j (1[j = l] - q_l)``, where q is w itself if the router renormalizes and
the full softmax if it does not; what remains is ridge regression for all rows of W at once
(Gauss-Newton), solved by conjugate gradients without forming its E H x E H matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.subset_loss import RoutingRule

if TYPE_CHECKING:
    from torch import Tensor

# Conjugate gradients stop after this many iterations, or when the preconditioned square of the
# residual has fallen to this fraction.
ITERATIONS, PRECISION = 30, 1e-4
# Fractions of a proposed step that are tried; the true loss decides between them.
FIT_STEPS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class RouterEvidence:
    """All that determines the loss of a layer's router, for some tokens.

    Attributes:
        rule: rule of the router.
        inputs: ``h``, float32 [T, H].
        gram: ``<f_ti, f_tj>``, float32 [T, E, E].
        pull: ``<D_t, f_tj>``, float32 [T, E].
        missing: ``|D_t|^2``, float32 [T].
        weights: ``w`` before the fit, float32 [T, E].
        scale: ``c``, float32 [T].
    """

    rule: RoutingRule
    inputs: Tensor
    gram: Tensor
    pull: Tensor
    missing: Tensor
    weights: Tensor
    scale: Tensor

    def select(self, rows: Tensor) -> RouterEvidence:
        """Select the tokens where ``rows`` bool [T] is set."""
        return RouterEvidence(
            self.rule,
            self.inputs[rows],
            self.gram[rows],
            self.pull[rows],
            self.missing[rows],
            self.weights[rows],
            self.scale[rows],
        )


def join_evidence(parts: Sequence[RouterEvidence]) -> RouterEvidence:
    """Join the tokens of several parts, in order."""
    tensors = [f.name for f in fields(RouterEvidence) if f.name != "rule"]
    return RouterEvidence(
        parts[0].rule, *(torch.cat([getattr(p, t) for p in parts]) for t in tensors)
    )


def estimate_router_evidence_bytes(tokens: int, experts: int, hidden: int) -> int:
    """Estimate the bytes of a `RouterEvidence`, of its two parts, and of a step on one of them."""
    return 4 * tokens * (4 * experts**2 + 8 * experts + 2 * hidden)


def route(logits: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Compute ``w`` and ``q`` of the module docstring, both [T, E], from logits [T, E]."""
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p).scatter(1, logits.topk(rule.top_k, dim=1).indices, 1.0)
    weights = p * chosen
    if not rule.renormalize:
        return weights, p
    weights = weights / weights.sum(1, keepdim=True)
    return weights, weights


def compute_router_loss(evidence: RouterEvidence, router: Tensor) -> float:
    """Compute the loss with the rows ``router`` [E, H]."""
    weights, _ = route(evidence.inputs @ router.T, evidence.rule)
    a = weights - evidence.weights
    inner = torch.einsum("ti,tij,tj->t", a, evidence.gram, a)
    each = evidence.missing - 2 * (a * evidence.pull).sum(1) + inner
    return float((evidence.scale * each).double().sum())


def take_step(evidence: RouterEvidence, router: Tensor, damping: float, ridge: float) -> Tensor:
    """Compute the change of ``router`` [E, H] that a linear least-squares fit proposes.

    Args:
        evidence: tokens to fit.
        router: the current rows.
        damping: weight of the change of logits, relative to the mean curvature.
        ridge: weight of the change of rows, relative to the mean square of inputs.
    """
    h, scale = evidence.inputs, evidence.scale
    weights, q = route(h @ router.T, evidence.rule)
    slopes = torch.diag_embed(weights) - q[:, :, None] * weights[:, None, :]  # [T, l, j]
    curved = (slopes @ evidence.gram @ slopes.mT) * scale[:, None, None]
    residual = evidence.pull - (evidence.gram @ (weights - evidence.weights)[:, :, None])[:, :, 0]
    descent = scale[:, None] * (slopes @ residual[:, :, None])[:, :, 0]
    products = (h.T @ h).double()
    mean = curved.diagonal(dim1=1, dim2=2).mean().double()
    size = curved.diagonal(dim1=1, dim2=2).mean(0).double() + damping * mean
    shrink = ridge * products.diagonal().mean()
    factor = torch.linalg.cholesky(products + shrink * torch.eye(len(products)).double())

    def apply(x: Tensor) -> Tensor:
        moved = (curved @ (h @ x.T.float())[:, :, None])[:, :, 0]
        return (moved.T @ h).double() + damping * mean * x @ products + shrink * size[:, None] * x

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve((x / size[:, None]).T, factor).T

    if mean <= 0:  # no rows can change the loss, for example with one expert
        return torch.zeros_like(router)
    return _solve_by_conjugate_gradients(apply, (descent.T @ h).double(), precondition).float()


def _solve_by_conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Solve ``apply(x) = right`` for a symmetric positive ``apply``; float64."""
    x, residual = torch.zeros_like(right), right.clone()
    preconditioned = precondition(residual)
    direction, size = preconditioned, (residual * preconditioned).sum()
    least = PRECISION * size
    for _ in range(ITERATIONS):
        if size <= least:
            break
        applied = apply(direction)
        length = size / (direction * applied).sum()
        x = x + length * direction
        residual = residual - length * applied
        preconditioned = precondition(residual)
        size, previous = (residual * preconditioned).sum(), size
        direction = preconditioned + size / previous * direction
    return x


@dataclass(frozen=True)
class RouterFit:
    """Fitted router and its loss.

    Attributes:
        router: the new rows [E, H], in the precision that they will be stored in; None: no step
            lowered the loss on the held-out tokens.
        before, after: loss on the held-out tokens.
        rounds: number of steps taken.
    """

    router: Tensor | None
    before: float
    after: float
    rounds: int


def fit_router(
    evidence: RouterEvidence,
    held_out: Tensor,
    router: Tensor,
    dtype: torch.dtype,
    *,
    damping: float,
    ridge: float,
    rounds: int,
    margin: float,
) -> RouterFit:
    """Fit rows on some tokens, as long as that lowers the loss on held-out ones.

    Args:
        evidence: all tokens.
        held_out: bool [T], the held-out tokens, whose loss decides.
        router: the current rows, float32 [E, H].
        dtype: dtype that rows are stored in; losses are those of rounded rows.
        damping: as in `take_step`.
        ridge: as in `take_step`.
        rounds: most steps to take.
        margin: fraction by which a step must lower the loss of the held-out tokens.
    """
    fit_part, held_part = evidence.select(~held_out), evidence.select(held_out)
    before = current = compute_router_loss(held_part, router)
    best, taken = router, 0
    for _ in range(rounds):
        change = take_step(fit_part, best, damping, ridge)
        candidates = [(best + length * change).to(dtype).float() for length in FIT_STEPS]
        losses = [compute_router_loss(held_part, rows) for rows in candidates]
        lowest = min(losses)
        if not lowest < current * (1 - margin):
            break
        best, current, taken = candidates[losses.index(lowest)], lowest, taken + 1
    return RouterFit(best if taken else None, before, current, taken)
