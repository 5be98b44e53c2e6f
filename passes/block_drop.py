"""Remove whole transformer blocks that change what passes through them least."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moe2edge.errors import InputError
from moe2edge.model import Model
from moe2edge.pipeline import Facts, Kind, Outcome, Trim


class BlockDrop(Trim):
    """Drop the blocks whose input and output are most alike (Block Drop, discrete).

    The score of a block is the mean cosine of its input and output over calibration tokens
    (https://arxiv.org/abs/2406.02500); blocks are scored once, on the model as it stood when the
    stage began, and those that stay are renumbered.
    """

    drop: Annotated[int, Field(ge=1, description="number of blocks to drop")]

    def check(self, model: Model) -> None:
        """Refuse to drop all blocks, or all that have experts."""
        if self.drop >= len(model.blocks):
            raise InputError(
                f"block_drop: drop {self.drop} of {len(model.blocks)} blocks; "
                f"at most {len(model.blocks) - 1}"
            )
        if self.drop >= len(model.moe_blocks):
            raise InputError(
                f"block_drop: drop {self.drop} could remove all {len(model.moe_blocks)} MoE layers"
            )

    def plan(self, model: Model) -> Model:
        """The model without its last blocks."""
        return model.keep_blocks(range(len(model.blocks) - self.drop))

    def observers(self) -> tuple[Kind, ...]:
        """Similarities of block inputs and outputs."""
        from moe2edge.similarity import SimilarityObserver

        return (SimilarityObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant blocks; ties go to the deeper one."""
        from moe2edge.similarity import SimilarityObserver

        cosine = facts[SimilarityObserver].cosine
        order = sorted(model.blocks, key=lambda b: (-cosine[b.origin], -b.index))
        gone = sorted(order[: self.drop], key=lambda b: b.index)
        dropped = {b.index for b in gone}
        indices = [b.index for b in model.blocks if b.index not in dropped]
        return Outcome(
            model.keep_blocks(indices),
            changed=tuple(f"block {b.origin} (cosine {cosine[b.origin]:.4f})" for b in gone),
        )
