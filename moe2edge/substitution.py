"""Constants and linear maps in the place of experts, in closed form. Pure functions on sums.

An expert f answers token t, whose input is ``h_t``, and its output counts with the gate weight
``g_t``. A substitute ``c + S F h`` of rank r makes ``sum_t g_t^2 |f(h_t) - c - S F h_t|^2`` least:
it is the reduced-rank regression of outputs on inputs (Izenman, 1975), weighted by the gate, with a
ridge on F and S together. At rank 0 it is the gate-weighted mean (MoNE,
https://arxiv.org/abs/2507.00390, takes the plain one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Of the ridge, besides a part of the mean diagonal: for inputs that never occur.
LEAST = 1e-6


class Sums:
    """What one expert was asked and put out, in sums of float64.

    Attributes:
        tokens: how many it was asked.
        mass: sum of ``g^2``.
        inputs, outputs: sums of ``g^2 h`` and ``g^2 f(h)``, [hidden].
        gram: sum of ``g^2 h h^T``, [hidden, hidden].
        cross: sum of ``g^2 h f(h)^T``, [hidden, hidden].
        squares: sum of ``g^2 ||f(h)||^2``.
    """

    def __init__(self, hidden: int, *, maps: bool = True) -> None:
        """Nothing seen yet; without ``maps``, ``gram`` and ``cross`` stay zero: for constants."""
        self._maps = maps
        self.tokens, self.mass, self.squares = 0, 0.0, 0.0
        self.inputs, self.outputs = (torch.zeros(hidden, dtype=torch.float64) for _ in range(2))
        self.gram, self.cross = (torch.zeros(hidden, hidden, dtype=torch.float64) for _ in range(2))

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Take in inputs and outputs [n, hidden] with gate weights [n]."""
        x, y, g = inputs.double(), outputs.double(), weights.double().square()
        weighted = x * g[:, None]
        self.tokens += len(x)
        self.mass += float(g.sum())
        self.inputs += weighted.sum(0)
        self.outputs += g @ y
        if self._maps:
            self.gram += weighted.T @ x
            self.cross += weighted.T @ y
        self.squares += float(g @ y.square().sum(1))


def nbytes(hidden: int, experts: int) -> int:
    """Bytes of `Sums` of so many experts."""
    return experts * 8 * 2 * hidden * (hidden + 1)


@dataclass(frozen=True)
class Fit:
    """A substitute ``constant + second @ first @ h``, float64.

    Attributes:
        constant: [hidden].
        first, second: [rank, hidden] and [hidden, rank].
        residual: ``sum g^2 ||f - fit||^2``, of the tokens that it was fitted on.
    """

    constant: Tensor
    first: Tensor
    second: Tensor
    residual: float


def fit(sums: Sums, rank: int, ridge: float) -> Fit:
    """The best substitute of a rank.

    With inputs and outputs centred, ``H`` the ridged Gram matrix and ``C`` the cross products, the
    map of full rank is ``B = H^-1 C``; of rank r it is ``B V V^T`` with V the first r eigenvectors
    of ``C^T H^-1 C``, which are the right singular vectors of ``H^(1/2) B``.

    Args:
        sums: of the expert.
        rank: 0 for a constant.
        ridge: part of the mean diagonal of the Gram matrix that is added to it.
    """
    hidden = len(sums.inputs)
    mass = max(sums.mass, torch.finfo(torch.float64).tiny)
    mean_x, mean_y = sums.inputs / mass, sums.outputs / mass
    spread = max(0.0, sums.squares - mass * float(mean_y @ mean_y))
    if not rank:
        empty = mean_y.new_empty(0, hidden)
        return Fit(mean_y, empty, empty.T, spread)
    gram = sums.gram - mass * torch.outer(mean_x, mean_x)
    cross = sums.cross - mass * torch.outer(mean_x, mean_y)
    ridged = gram + (ridge * gram.diagonal().mean() + LEAST) * torch.eye(hidden, dtype=gram.dtype)
    full = torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))
    _, vectors = torch.linalg.eigh(cross.T @ full)
    second = vectors[:, -rank:].flip(1)
    first = (full @ second).T
    # trace of (Y - X F^T S^T)^T (Y - X F^T S^T), in which S has orthonormal columns.
    gained = 2 * float((first @ cross * second.T).sum()) - float((first @ gram * first).sum())
    return Fit(mean_y - second @ (first @ mean_x), first, second, max(0.0, spread - gained))
