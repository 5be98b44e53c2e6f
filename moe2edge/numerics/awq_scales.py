"""AWQ's scales: candidates, and the loss of rounding under each. Pure functions on tensors."""

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

# Magnitudes of inputs below the largest by more than this factor count as if they were not.
SPAN = 1e4
# Numbers of scaled matrices that are rounded at once.
NUMBERS = 1 << 20
# Outputs of a matrix from which its loss is estimated; of fewer than twice as many, all are taken.
OUTPUTS = 256


def list_candidates(magnitudes: Tensor, steps: int) -> Tensor:
    """Scales to choose from: ``m ** alpha`` for alpha in ``0, 1 / steps, .. 1 - 1 / steps``.

    They are divided by the root of the smallest times the largest (as in AutoAWQ), so that they
    lie around one; with alpha 0 all are one.

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


def round_to_exact(scales: Tensor, stored: Tensor) -> Tensor:
    """Scales by which a vector can be divided in the dtype that it is stored in.

    The quotient is rounded to that dtype; the scale becomes what it was really divided by. Where
    the quotient would vanish or overflow, the scale is one; a zero is zero with any scale.

    Args:
        scales: float32 [..., channels].
        stored: the vector, [channels].
    """
    numbers = stored.float()
    quotients = (numbers / scales).to(stored.dtype).float()
    usable = quotients.isfinite() & (quotients != 0)
    found = torch.where(usable, numbers / quotients, torch.ones_like(scales))
    return torch.where(numbers == 0, scales, found)


class Sample:
    """Some of the inputs that were seen, evenly spaced, in bounded memory.

    Every ``stride``-th token is kept; when more than ``limit`` are, every other one is forgotten.

    Attributes:
        seen: number of tokens.
        stride: tokens that each kept one stands for.
        inputs: of the kept tokens, float32 [n, width].
        weights: of the kept tokens in what they are used for, [n].
    """

    def __init__(self, limit: int, width: int) -> None:
        self.seen, self.stride, self._limit = 0, 1, limit
        self.inputs, self.weights = torch.empty(0, width), torch.empty(0)

    def add(self, inputs: Tensor, tokens: Tensor, weights: Tensor) -> None:
        """Take in the rows ``tokens`` int64 [n] of ``inputs`` [N, width], with weights [n]."""
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
        x: float32 [n, in].
        weights: what outputs are multiplied with later on, [n].
        importance: mean square of each input, so weighted, [in].
        magnitudes: mean magnitude of each input, of all that compute with the same inputs, [in].
        share: tokens that each of ``x`` stands for.
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
        """Of the importance that they have themselves."""
        importance = (x * weights.unsqueeze(1)).square().mean(0)
        return cls(x, weights, importance, magnitudes, share)

    def compute_output_squares(self, errors: Tensor) -> Tensor:
        """Squared size of the outputs for matrices [..., out, in], each [...]."""
        outputs = (self.x @ errors.mT) * self.weights.unsqueeze(1)
        return outputs.square().sum((-2, -1)) * self.share


def compute_losses(
    weight: Tensor, scales: Tensor, inputs: AwqInputs, scheme: Scheme, how: Range
) -> Tensor:
    """``|| X (W - Q(W s) / s)^T ||^2`` for each of some scales, float32 [k].

    Of large matrices it is estimated from some of the outputs, evenly spaced.

    Args:
        weight: W, [out, in].
        scales: s, [k, in].
        inputs: X.
        scheme: what Q rounds to.
        how: as of `moe2edge.numerics.rounding.choose_grid`; inputs count by their mean square.
    """
    weight, share = _some(weight)
    found = []
    step = max(1, NUMBERS // weight.numel())
    for at in range(0, len(scales), step):
        part = scales[at : at + step]
        scaled = weight * part.unsqueeze(1)
        grid = choose_grid(scaled, scheme, how, inputs.importance / part.square())
        rounded = dequantize(round_to(scaled, grid), grid.scales, scheme, grid.zeros)
        found.append(inputs.compute_output_squares(weight - rounded / part.unsqueeze(1)))
    return torch.cat(found) * share


def measure_output_size(weight: Tensor, inputs: AwqInputs) -> float:
    """``|| X W^T ||^2``, which `compute_losses` are to be held against, from as many of the outputs."""
    weight, share = _some(weight)
    return float(inputs.compute_output_squares(weight)) * share


def _some(weight: Tensor) -> tuple[Tensor, float]:
    """Some rows of a matrix, float32, and how many each stands for."""
    some = weight[:: max(1, len(weight) // OUTPUTS)].float()
    return some, len(weight) / len(some)


def compute_intermediate(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """Inputs [n, width] of ``down`` of a gated MLP for its inputs [n, hidden]."""
    return torch.nn.functional.silu(x @ gate.float().T) * (x @ up.float().T)
