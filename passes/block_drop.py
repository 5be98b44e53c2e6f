"""Remove whole transformer blocks that change what passes through them least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, field_validator

from moe2edge.amounts import check_amount, check_choice, number
from moe2edge.errors import InputError
from moe2edge.model import Block, Model
from moe2edge.pipeline import Facts, Kind, Outcome, Trim

if TYPE_CHECKING:
    from moe2edge.similarity import BlockSimilarityKind


class BlockDrop(Trim):
    """Drop the blocks whose input and output are most alike (Block Drop).

    The score of a block, or of a run of blocks, is the mean cosine over calibration tokens of what
    goes in and what comes out (https://arxiv.org/abs/2406.02500). Blocks are scored once, on the
    model as it stood when the stage began, and those that stay are renumbered.
    """

    drop: Annotated[
        int | float | None,
        Field(description="blocks to drop: a count, or a fraction of the source's, rounded down"),
    ] = None
    threshold: Annotated[
        float | None,
        Field(ge=-1, le=1, description="instead of drop: the cosine from which blocks are dropped"),
    ] = None
    most: Annotated[
        int | float | None,
        Field(
            description="with threshold, at most so many: a count or a fraction; none: a quarter, "
            "and one at least"
        ),
    ] = None
    consecutive: Annotated[
        bool,
        Field(
            description="drop one run of neighbours, scored as a whole; with threshold the longest "
            "that reaches it. Holds the streams at the depths of a run in memory"
        ),
    ] = False

    @field_validator("drop", "most", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def check(self, model: Model) -> None:
        """Refuse to drop no block, all blocks, or all that have experts."""
        check_choice("block_drop", self.drop, self.threshold, self.most)
        blocks, count = len(model.blocks), self._most
        option = "drop" if self.threshold is None else "most"
        if not 1 <= count < blocks:
            raise InputError(
                f"block_drop: {option} is {count} of {blocks} blocks; at least 1 and at most "
                f"{blocks - 1}"
            )
        if count >= len(model.moe_blocks):
            raise InputError(
                f"block_drop: {option} is {count}, which could remove all "
                f"{len(model.moe_blocks)} MoE layers"
            )

    @property
    def _most(self) -> float:
        """As many as may go: a count, once it is `resolved`."""
        limit = self.most if self.drop is None else self.drop
        return 1 if limit is None else limit

    def resolved(self, model: Model) -> Self:
        """With counts in place of fractions of the source."""
        whole = len(model.blocks)
        if self.drop is not None:
            return self.model_copy(update={"drop": number(self.drop, whole)})
        most = max(1, whole // 4) if self.most is None else number(self.most, whole)
        return self.model_copy(update={"most": most})

    def plan(self, model: Model) -> Model:
        """The model without its last blocks: as many as will go, or one by threshold."""
        count = int(self._most) if self.threshold is None else 1
        return model.keep_blocks(range(len(model.blocks) - count))

    @property
    def _kinds(self) -> tuple[BlockSimilarityKind]:
        from moe2edge.similarity import BlockSimilarityKind

        return (BlockSimilarityKind(int(self._most) if self.consecutive else 1),)

    def observers(self) -> tuple[Kind, ...]:
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
            limit = self.threshold
            order = [run for run in order if cosine[_origins(run)] >= limit]
            if not order:
                highest = max(cosine[_origins(run)] for run in runs)
                reason = f"the highest cosine is {highest:.4f}, below the threshold {limit}"
                return Outcome(model, skipped={"every block": reason})
        gone = order[: 1 if self.consecutive else int(self._most)]
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
        """What may go: single blocks, or runs of the wanted length; with threshold of any."""
        blocks, count = model.blocks, len(model.blocks)
        longest = int(self._most) if self.consecutive else 1
        shortest = 1 if self.drop is None else longest
        return [
            blocks[at : at + length]
            for length in range(shortest, longest + 1)
            for at in range(count - length + 1)
        ]


def _origins(run: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(block.origin for block in run)
