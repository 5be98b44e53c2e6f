"""Scales of AWQ: candidates, and the rounding loss under each of them. Pure functions on tensors.

AWQ multiplies each column of a matrix by a scale before rounding and divides the matching input by
it, so that columns with large inputs are rounded more finely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.grid import dequantize
from moe2edge.numerics.rounding import choose_grid, round_to

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.rounding import Range
    from moe2edge.numerics.scheme import Scheme

# Magnitudes of inputs are raised to at least the largest divided by this factor.
SPAN = 1e4
# Numbers of scaled matrices that are rounded at once, to bound memory.
NUMBERS = 1 << 20
# Outputs of a matrix from which its loss is estimated; of fewer than twice as many, all are used.
OUTPUTS = 256


def list_candidates(magnitudes: Tensor, steps: int) -> Tensor:
    """List candidate scales: ``m ** alpha`` for alpha in ``0, 1 / steps, .. 1 - 1 / steps``.

    They are divided by the root of the smallest times the largest (as in AutoAWQ), which centres
    them on one; with alpha 0 all are one.

    Args:
        magnitudes: m, mean magnitude of each input, [channels].
        steps: number of candidates.

    Returns:
        float32 [steps, channels].
    """
    largest = magnitudes.max()
    if largest <= 0:
        return torch.ones(steps, len(magnitudes))
    logs = magnitudes.float().clamp(min=float(largest) / SPAN).log()
    centred = logs - (logs.max() + logs.min()) / 2
    return ((torch.arange(steps) / steps).unsqueeze(1) * centred).exp()


def round_to_exact(scales: Tensor, stored: Tensor, offset: float = 0.0) -> Tensor:
    """Adjust scales so that dividing a stored vector by them is exact in its dtype.

    The quotient is rounded to that dtype, and the scale becomes the number divided by it. Where
    the quotient would vanish or overflow, the scale is one; a zero may have any scale and keeps
    its own.

    Args:
        scales: float32 [..., channels].
        stored: the vector in its stored dtype, [channels].
        offset: what is added to it before it is used, and taken off the quotient. Then what is
            stored is close to its negative where the quotient is small, and few of its digits tell
            them apart; so it is exact in bfloat16, in which most models run, whatever it is stored
            in.
    """
    dtype = torch.bfloat16 if offset else stored.dtype
    numbers = stored.float() + offset
    quotients = (numbers / scales - offset).to(dtype).float() + offset
    usable = quotients.isfinite() & (quotients != 0)
    exact = torch.where(usable, numbers / quotients, torch.ones_like(scales))
    return torch.where(numbers == 0, scales, exact)


class Sample:
    """Evenly spaced sample of the inputs seen, in bounded memory.

    Every ``stride``-th token is kept. When there are more than ``limit``, every other one is
    dropped.

    Attributes:
        seen: number of tokens seen.
        stride: number of tokens that each kept one stands for.
        inputs: inputs of the kept tokens, float32 [n, width].
        weights: weights of the kept tokens where their outputs are used, [n].
    """

    def __init__(self, limit: int, width: int) -> None:
        self.seen, self.stride, self._limit = 0, 1, limit
        self.inputs, self.weights = torch.empty(0, width), torch.empty(0)

    def add(self, inputs: Tensor, tokens: Tensor, weights: Tensor) -> None:
        """Add the rows ``tokens`` int64 [n] of ``inputs`` [N, width], with weights [n]."""
        every = slice(-self.seen % self.stride, None, self.stride)
        self.seen += len(tokens)
        self.inputs = torch.cat([self.inputs, inputs[tokens[every]]])
        self.weights = torch.cat([self.weights, weights[every]])
        while len(self.inputs) > self._limit:
            self.inputs, self.weights = self.inputs[::2].clone(), self.weights[::2].clone()
            self.stride *= 2


@dataclass(frozen=True)
class AwqInputs:
    """Inputs of a matrix, by which its rounding is judged.

    Attributes:
        x: inputs of the sampled tokens, float32 [n, in].
        weights: weights that the outputs are multiplied with later, [n].
        importance: mean square of each input with these weights, [in].
        magnitudes: mean magnitude of each input over all uses of the same inputs, [in].
        share: number of tokens that each row of ``x`` stands for.
    """

    x: Tensor
    weights: Tensor
    importance: Tensor
    magnitudes: Tensor
    share: int = 1

    @classmethod
    def from_sample(
        cls, x: Tensor, weights: Tensor, magnitudes: Tensor, share: int = 1
    ) -> AwqInputs:
        """Make inputs whose importance is that of the sample itself."""
        importance = (x * weights.unsqueeze(1)).square().mean(0)
        return cls(x, weights, importance, magnitudes, share)

    def compute_output_squares(self, errors: Tensor) -> Tensor:
        """Compute the squared size of the outputs of matrices [..., out, in], each [...]."""
        outputs = (self.x @ errors.mT) * self.weights.unsqueeze(1)
        return outputs.square().sum((-2, -1)) * self.share


def compute_losses(
    weight: Tensor, scales: Tensor, inputs: AwqInputs, scheme: Scheme, how: Range
) -> Tensor:
    """Compute ``|| X (W - Q(W s) / s)^T ||^2`` for each of several scales, float32 [k].

    For large matrices it is estimated from some of the outputs, evenly spaced.

    Args:
        weight: W, [out, in].
        scales: s, [k, in].
        inputs: X.
        scheme: scheme that Q rounds to.
        how: as in `moe2edge.numerics.rounding.choose_grid`; inputs count by their mean square.
    """
    weight, share = _sample_rows(weight)
    losses = []
    step = max(1, NUMBERS // weight.numel())
    for at in range(0, len(scales), step):
        part = scales[at : at + step]
        scaled = weight * part.unsqueeze(1)
        grid = choose_grid(scaled, scheme, how, inputs.importance / part.square())
        rounded = dequantize(round_to(scaled, grid), grid.scales, scheme, grid.zeros)
        losses.append(inputs.compute_output_squares(weight - rounded / part.unsqueeze(1)))
    return torch.cat(losses) * share


def measure_output_size(weight: Tensor, inputs: AwqInputs) -> float:
    """Measure ``|| X W^T ||^2``, the reference for `compute_losses`, from the same outputs."""
    weight, share = _sample_rows(weight)
    return float(inputs.compute_output_squares(weight)) * share


def _sample_rows(weight: Tensor) -> tuple[Tensor, float]:
    """Return evenly spaced rows of a matrix, float32, and how many rows each stands for."""
    rows = weight[:: max(1, len(weight) // OUTPUTS)].float()
    return rows, len(weight) / len(rows)


def compute_intermediate(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """Compute the intermediate activations [n, width] of a gated MLP for inputs [n, hidden].

    They are the inputs of its ``down`` matrix.
    """
    return torch.nn.functional.silu(x @ gate.float().T) * (x @ up.float().T)
