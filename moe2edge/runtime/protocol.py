"""Interface of a runtime: a model that runs one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# What logits may differ by for each position: runtimes compute angles of rotary embeddings in
# float32, from frequencies that differ from those of PyTorch in the last bits.
ROTARY_DRIFT = 2.0**-22
# Positions up to which that is little; beyond, it may change which experts are chosen.
MOST_PLACED = 4096


class Runtime(Protocol):
    """An output folder, opened in the runtime of its target. Runs one sequence at a time."""

    @property
    def dtype(self) -> str:
        """Dtype of activations between operators, by its name in torch."""
        ...

    @property
    def threads(self) -> int:
        """Number of processor threads."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of token ids int64 [batch, length]."""
        ...

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence (prefill).

        Returns:
            Logits float32 [vocabulary] after its last token.
        """
        ...

    def step(self, token: int) -> Tensor:
        """Continue the sequence with one token (decode, cached).

        Returns:
            Logits float32 [vocabulary] after the token.
        """
        ...


def check_id_range(lowest: int, highest: int, vocabulary: int) -> None:
    """Check token ids against the entries of a vocabulary.

    Raises:
        InputError: some are outside of it.
    """
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"token ids run from {lowest} to {highest}, but the vocabulary has {vocabulary} entries"
        )
