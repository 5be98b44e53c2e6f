"""What a runtime is: a model that runs, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Runtime(Protocol):
    """An output folder, reopened in the runtime that it was made for. One sequence at a time."""

    @property
    def dtype(self) -> str:
        """What it computes in, as torch names it: the dtype of activations between operators."""
        ...

    @property
    def threads(self) -> int:
        """Processor threads that it computes with."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [batch, length, vocabulary] of token ids int64 [batch, length]."""
        ...

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence (prefill): logits float32 [vocabulary] after its last token."""
        ...

    def step(self, token: int) -> Tensor:
        """Go on with one more token (decode, cached): logits float32 [vocabulary] after it."""
        ...
