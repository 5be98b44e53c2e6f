"""Remove whole transformer blocks that change the hidden states least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.model import Block, Model
from moe2edge.passes._drop_alike import DropAlike
from moe2edge.pipeline.contract import Outcome

if TYPE_CHECKING:
    from moe2edge.calibration.similarity import BlockSimilarityFactory


class BlockDrop(DropAlike):
    """Drop the blocks whose input and output are most similar (Block Drop).

    The score of a block, or of a run of blocks, is the mean cosine over calibration tokens of
    its input and its output (https://arxiv.org/abs/2406.02500). Blocks are scored once, on the
    model as it stood when the stage began, and those that stay are renumbered.
    """

    unit: ClassVar[str] = "block"

    consecutive: Annotated[
        bool,
        Field(
            description="drop one run of neighbours, scored as a whole; with threshold the longest "
            "that reaches it. Keeps the hidden states at all depths of a run in memory"
        ),
    ] = False

    def whole(self, model: Model) -> int:
        """All blocks."""
        return len(model.blocks)

    def check(self, model: Model) -> None:
        """Refuse to drop no block, all blocks, or all that have experts."""
        super().check(model)
        if self.limit >= len(model.moe_blocks):
            raise InputError(
                f"block_drop: {self.option} is {self.limit}, which could remove all "
                f"{len(model.moe_blocks)} MoE layers"
            )

    def plan(self, model: Model) -> Model:
        """Return the model without its last blocks."""
        return model.keep_blocks(range(len(model.blocks) - self.planned))

    @property
    def _kinds(self) -> tuple[BlockSimilarityFactory]:
        from moe2edge.calibration.similarity import BlockSimilarityFactory

        return (BlockSimilarityFactory(int(self.limit) if self.consecutive else 1),)

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Similarities of block inputs and outputs."""
        return self._kinds

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant blocks; ties go to the deeper ones."""
        (kind,) = self._kinds
        cosine = facts[kind].cosine
        runs = [run for run in self._runs(model) if _origins(run) in cosine]
        if not runs:
            raise InputError(
                "block_drop: the runs of neighbours were scored before other blocks were dropped; "
                "set rescore: true"
            )
        order = sorted(runs, key=lambda run: (-len(run), -cosine[_origins(run)], -run[0].index))
        if self.threshold is not None:
            order = [run for run in order if cosine[_origins(run)] >= self.threshold]
            if not order:
                return self.none_reaches(model, max(cosine[_origins(run)] for run in runs))
        gone = order[: 1 if self.consecutive else int(self.limit)]
        gone.sort(key=lambda run: run[0].index)
        dropped = {block.index for run in gone for block in run}
        return Outcome(
            model.keep_blocks([b.index for b in model.blocks if b.index not in dropped]),
            changed=tuple(
                f"block {block.origin} (cosine {cosine[_origins(run)]:.4f})"
                for run in gone
                for block in run
            ),
        )

    def _runs(self, model: Model) -> list[tuple[Block, ...]]:
        """List the candidates: single blocks, or runs; with threshold, runs of any length."""
        blocks, count = model.blocks, len(model.blocks)
        longest = int(self.limit) if self.consecutive else 1
        shortest = 1 if self.drop is None else longest
        return [
            blocks[at : at + length]
            for length in range(shortest, longest + 1)
            for at in range(count - length + 1)
        ]


def _origins(run: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(block.origin for block in run)
