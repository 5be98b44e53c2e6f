"""The far end of the context: a short text whose last tokens stand at the last positions.

Rotary tables, and rotary settings of a config, may be wrong for all positions but the first ones,
which a short text at the beginning does not show. So a few tokens run at the first positions, and
after them a few at the last; where blocks attend to a window, all of them run at the last ones.
Attention takes the positions as given, so that this costs no more than any text of that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from moe2edge.calibration import walk
from moe2edge.evaluation.margins import MarginObserver
from moe2edge.model.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Tokens of the text, of which half run at the first positions.
LENGTH = 32
# Texts to choose from: the one with the largest routing margins is recorded.
CANDIDATES = 4
# Tokens whose logits are recorded.
COMPARED = 4


@runtime_checkable
class PlacedRuntime(Protocol):
    """A runtime that runs tokens at given positions; others cannot be tested at the far end.

    Attributes:
        drift: difference of logits by each position, from frequencies of rotary embeddings that
            are not those of PyTorch in the last bits; 0: it has the same.
    """

    drift: float

    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits float32 [n, vocabulary] of ids int64 [n] at ascending positions [n]."""
        ...


@dataclass(frozen=True)
class FarEnd:
    """Tokens at the far end of the context, and their logits.

    Attributes:
        ids: int64 [n].
        positions: int64 [n], ascending.
        logits: float32 [k, vocabulary], after each of the last k tokens.
    """

    ids: Tensor
    positions: Tensor
    logits: Tensor

    def measure(self, logits: Tensor) -> float:
        """Return the largest difference to ``logits`` [n, vocabulary] of all tokens."""
        return float((logits[-len(self.logits) :] - self.logits).abs().max())


def choose_positions(model: Model, recorded: int) -> Tensor | None:
    """Choose the positions [n] of the text.

    Args:
        model: the model; where it has windows, the positions are consecutive, and no more than
            the smallest window, as every token sees all before it.
        recorded: number of the first positions that are compared anyway.

    Returns:
        The positions; None if the model has hardly more than ``recorded``, or a window of one.
    """
    windows = [block.window for block in model.blocks if block.window]
    length = min(LENGTH, *windows) if windows else LENGTH
    end = model.family.geometry(model.config).max_positions
    if end < recorded + length or length < 2:
        return None
    first = 0 if windows else length // 2
    return torch.cat([torch.arange(first), torch.arange(end - length + first, end)])


class FarEndObserver:
    """Runs texts at the far end through each block of a walk over other texts."""

    def __init__(self, model: Model, ids: Tensor, positions: Tensor) -> None:
        """Run ``ids`` int64 [texts, n] of ``model`` at ``positions`` int64 [n]."""
        self._hidden = walk.embed(model, ids)
        self._ids, self._positions = ids, positions
        self._margins = MarginObserver(ids.shape[1])
        self._last: int | None = None

    def observe(self, trace: BlockTrace) -> None:
        """Run the texts through the block of the first batch; later batches add nothing."""
        if trace.block.index == self._last:
            return
        self._last = trace.block.index
        there = trace.rerun(self._hidden, self._positions)
        self._margins.observe(there)
        self._hidden = there.outputs

    def result(self) -> FarEndHidden:
        """Return the text with the largest routing margins, after the last block."""
        margins = self._margins.result()
        best = 0 if margins is None else int(margins.argmax())
        return FarEndHidden(self._ids[best], self._positions, self._hidden[best])


@dataclass(frozen=True)
class FarEndHidden:
    """Hidden states float32 [n, hidden] of ``ids`` at ``positions`` after the last block."""

    ids: Tensor
    positions: Tensor
    hidden: Tensor

    def compute(self, model: Model, count: int = COMPARED) -> FarEnd:
        """Compute the logits of ``model`` after the last ``count`` tokens."""
        (logits,) = walk.compute_logits(model, [self.hidden[-count:]])
        return FarEnd(self.ids, self.positions, logits.clone())


def observe_far_end(
    model: Model, ids: Tensor, far: FarEnd | None, label: str
) -> tuple[Tensor, Tensor | None]:
    """Run recorded tokens through a model, and in the same walk those at the far end.

    Args:
        model: the model.
        ids: int64 [samples, length].
        far: what was recorded at the far end; None: nothing.
        label: name of the walk in progress lines.

    Returns:
        Logits [samples, length, vocabulary], and those at the far end, in the shape of
        ``far.logits``.
    """
    observers = [] if far is None else [FarEndObserver(model, far.ids[None], far.positions)]
    hidden = walk.observe(model, ids, observers, lambda *_: None, label)
    logits = torch.stack(list(walk.compute_logits(model, hidden)))
    if far is None:
        return logits, None
    return logits, observers[0].result().compute(model, len(far.logits)).logits
