"""Scales that move between a matrix and what computes its inputs. Pure functions on tensors.

AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): of ``y = W x``, the columns of W are
multiplied by ``s`` and the inputs divided by it. The function stays the same, but rounding errs
less on the columns of large inputs. What computes the inputs carries out the division: a norm
before the matrix, the values before the output projection, or the half of a gated MLP that is
linear, since ``silu(gate) * (up / s) = (silu(gate) * up) / s``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moe2edge.layers import MoELayer
from moe2edge.model import SECOND_NORM, Block
from moe2edge.roles import OUT, QKV, gated
from moe2edge.rounding import choose_grid, dequantize, round_to

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.families import Geometry
    from moe2edge.rounding import Range
    from moe2edge.scheme import Scheme

# Magnitudes of inputs below the largest by more than this factor count as if they were not.
SPAN = 1e4
# Numbers of scaled matrices that are rounded at once.
NUMBERS = 1 << 20
# Outputs of a matrix from which its loss is estimated; of fewer than twice as many, all are taken.
OUTPUTS = 256


@dataclass(frozen=True)
class Place:
    """Where scales fold: who divides, and who multiplies.

    Attributes:
        producers: roles of the tensors whose rows are divided.
        consumers: roles of the matrices whose columns are multiplied.
        heads: runs of channels that producers put out.
        copies: how often the consumers read each run (query heads that share a key-value head).
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    heads: int = 1
    copies: int = 1

    def gather(self, magnitudes: Tensor) -> Tensor:
        """Means over the copies: [inputs of consumers] -> [channels of producers]."""
        return magnitudes.view(self.heads, self.copies, -1).mean(1).flatten()

    def spread(self, scales: Tensor) -> Tensor:
        """Scales for each copy: [..., channels of producers] -> [..., inputs of consumers]."""
        runs = scales.reshape(*scales.shape[:-1], self.heads, -1)
        return runs.repeat_interleave(self.copies, -2).flatten(-2)


def places(block: Block, geometry: Geometry) -> Iterator[Place]:
    """All places of a block.

    A norm whose output is added to the stream is none, and values that are clipped are none.
    """
    roles = {role for role, _ in block.weights()}
    yield Place(("norms.input_layernorm.weight",), tuple(role for role in QKV if role in roles))
    if geometry.clip_qkv is None:
        values = ("attention.v_proj.weight", "attention.v_proj.bias")
        copies = geometry.heads // geometry.kv_heads
        yield Place(
            tuple(role for role in values if role in roles), (OUT,), geometry.kv_heads, copies
        )
    if block.mlp is None:
        return
    kinds = [kind for kind, _ in gated(block)]
    scorers = [role for role in ("router.weight", "shared.router") if role in roles]
    readers = [f"{kind}.{part}" for kind in kinds for part in ("gate", "up")]
    yield Place((f"norms.{SECOND_NORM}",), (*scorers, *readers, *_small_readers(roles)))
    members = block.mlp.members if isinstance(block.mlp, MoELayer) else ()
    for kind in kinds:
        own = [n for n, m in enumerate(members) if m.factors and kind == f"experts.{m.base}"]
        yield Place(
            (f"{kind}.up", *(f"members.{n}.up.second" for n in own)),
            (f"{kind}.down", *(f"members.{n}.down.first" for n in own)),
        )


def _small_readers(roles: Collection[str]) -> list[str]:
    """First factors of members and substitutes, which read what experts read."""
    ends = {"members": (".gate.first", ".up.first"), "substitutes": (".first",)}
    return sorted(
        role
        for role in roles
        for kind, end in ends.items()
        if role.startswith(kind) and role.endswith(end)
    )


@dataclass
class Folding:
    """Scales of some places of a block, by the roles of the tensors that they change.

    Attributes:
        columns: what columns are multiplied with, [in].
        rows: what rows, or the entries of a vector, are divided by, [out].
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, place: Place, scales: Tensor) -> None:
        """Fold ``scales`` [channels of producers] through a place; once per place."""
        self.columns |= dict.fromkeys(place.consumers, place.spread(scales))
        self.rows |= dict.fromkeys(place.producers, scales)

    @property
    def roles(self) -> set[str]:
        """Of all tensors that change."""
        return {*self.columns, *self.rows}

    def apply(self, role: str, numbers: Tensor) -> Tensor:
        """The changed numbers of a tensor, float32."""
        numbers = numbers.float()
        if role in self.columns:
            numbers = numbers * self.columns[role]
        if role in self.rows:
            rows = self.rows[role]
            numbers = numbers / (rows if numbers.ndim == 1 else rows.unsqueeze(1))
        return numbers


def candidates(magnitudes: Tensor, steps: int) -> Tensor:
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


def exact(scales: Tensor, stored: Tensor) -> Tensor:
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
class Inputs:
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
    def of(cls, x: Tensor, weights: Tensor, magnitudes: Tensor, share: int = 1) -> Inputs:
        """Of the importance that they have themselves."""
        importance = (x * weights.unsqueeze(1)).square().mean(0)
        return cls(x, weights, importance, magnitudes, share)

    def squares(self, errors: Tensor) -> Tensor:
        """Squared size of the outputs for matrices [..., out, in], each [...]."""
        outputs = (self.x @ errors.mT) * self.weights.unsqueeze(1)
        return outputs.square().sum((-2, -1)) * self.share


def losses(weight: Tensor, scales: Tensor, inputs: Inputs, scheme: Scheme, how: Range) -> Tensor:
    """``|| X (W - Q(W s) / s)^T ||^2`` for each of some scales, float32 [k].

    Of large matrices it is estimated from some of the outputs, evenly spaced.

    Args:
        weight: W, [out, in].
        scales: s, [k, in].
        inputs: X.
        scheme: what Q rounds to.
        how: as of `moe2edge.rounding.choose_grid`; inputs count by their mean square.
    """
    weight, share = _some(weight)
    found = []
    step = max(1, NUMBERS // weight.numel())
    for at in range(0, len(scales), step):
        part = scales[at : at + step]
        scaled = weight * part.unsqueeze(1)
        grid = choose_grid(scaled, scheme, how, inputs.importance / part.square())
        rounded = dequantize(round_to(scaled, grid), grid.scales, scheme, grid.zeros)
        found.append(inputs.squares(weight - rounded / part.unsqueeze(1)))
    return torch.cat(found) * share


def output_size(weight: Tensor, inputs: Inputs) -> float:
    """``|| X W^T ||^2``, which `losses` are to be held against, from as many of the outputs."""
    weight, share = _some(weight)
    return float(inputs.squares(weight)) * share


def _some(weight: Tensor) -> tuple[Tensor, float]:
    """Some rows of a matrix, float32, and how many each stands for."""
    some = weight[:: max(1, len(weight) // OUTPUTS)].float()
    return some, len(weight) / len(some)


def inside(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """Inputs [n, width] of ``down`` of a gated MLP for its inputs [n, hidden]."""
    return torch.nn.functional.silu(x @ gate.float().T) * (x @ up.float().T)
