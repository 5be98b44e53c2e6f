"""Drop the transformer blocks that change the hidden states least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.hf_config import find_changed_layer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.passes._drop_alike import DropAlike
from moe2edge.pipeline.contract import Outcome

if TYPE_CHECKING:
    from moe2edge.calibration.similarity import BlockSimilarityFactory


class BlockDrop(DropAlike):
    """Drop the blocks whose input and output are most similar (Block Drop).

    The score of a block, or of a run of blocks, is the mean cosine of its input and output over the
    calibration tokens (https://arxiv.org/abs/2406.02500). Blocks are scored once, on the model as
    it was when the stage began. The remaining blocks are renumbered.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    unit: ClassVar[str] = "block"

    consecutive: Annotated[
        bool,
        Field(
            description="drop one run of adjacent blocks, scored as a whole; with threshold, the "
            "longest run that reaches it. Keeps the hidden states of as many blocks in memory as a "
            "run has"
        ),
    ] = False

    def whole(self, model: Model) -> int:
        """Return the number of blocks."""
        return len(model.blocks)

    def count_droppable(self, model: Model) -> int:
        """Return how many may be dropped: one with an MoE layer stays, whichever go."""
        return len(model.moe_blocks) - 1

    def check(self, model: Model) -> None:
        """Refuse, besides what `DropAlike` does, more blocks than a config can be without.

        Raises:
            InputError: names them.
        """
        super().check(model)
        fixed = _list_fixed(model)
        most = len(model.blocks) - len(fixed)
        if self.limit > most:
            raise InputError(
                f"block_drop: {self.option} is {self.limit} of {len(model.blocks)} blocks, but "
                f"{model.family.model_type} places kinds of layers by their number: without one "
                f"of blocks {sorted(fixed)} others would change their kind; choose at most {most}, "
                "or another pass"
            )

    def plan(self, model: Model) -> Model:
        """Return the model without its last blocks."""
        return model.keep_blocks(range(len(model.blocks) - self.planned))

    @property
    def _kinds(self) -> tuple[BlockSimilarityFactory]:
        from moe2edge.calibration.similarity import BlockSimilarityFactory

        return (BlockSimilarityFactory(int(self.limit) if self.consecutive else 1),)

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Return the observer of the similarities of block inputs and outputs."""
        return self._kinds

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant blocks; among equal scores, the deeper ones."""
        (kind,) = self._kinds
        cosine = facts[kind].cosine
        runs = [run for run in self._list_runs(model) if _list_origins(run) in cosine]
        if not runs:
            raise InputError(
                "block_drop: the runs of adjacent blocks were scored before other blocks were "
                "dropped; set rescore: true to score them again"
            )
        order = sorted(
            runs, key=lambda run: (-len(run), -cosine[_list_origins(run)], -run[0].index)
        )
        if self.threshold is not None:
            order = [run for run in order if cosine[_list_origins(run)] >= self.threshold]
            if not order:
                return self.none_reaches(model, max(cosine[_list_origins(run)] for run in runs))
        dropped, spared = self._take(model, order)
        dropped.sort(key=lambda run: run[0].index)
        indices = {block.index for run in dropped for block in run}
        left = model.keep_blocks([b.index for b in model.blocks if b.index not in indices])
        if model.family.generic and (other := find_changed_layer(left)) is not None:
            raise InputError(
                f"block_drop: without blocks {sorted(indices)} transformers would build another "
                f"layer for block {other}; drop one at a time, or choose another pass"
            )
        return Outcome(
            left,
            changed=tuple(
                f"block {block.origin} (cosine {cosine[_list_origins(run)]:.4f})"
                for run in dropped
                for block in run
            ),
            notes=tuple(
                f"block {n} stays: it is the last with attention, and transformers' caches need one"
                for n in spared
            ),
        )

    def _take(
        self, model: Model, order: Sequence[tuple[Block, ...]]
    ) -> tuple[list[tuple[Block, ...]], list[int]]:
        """Take the first runs, but leave a block with attention; return origins spared for that.

        Blocks without which others would change their kind are not taken either.

        Raises:
            InputError: the runs that may go are too few.
        """
        attending, fixed = set(_list_attending(model)), _list_fixed(model)
        order = [run for run in order if not fixed & {block.index for block in run}]
        wanted = 1 if self.consecutive else int(self.limit)
        taken: list[tuple[Block, ...]] = []
        spared: list[int] = []
        for run in order:
            if len(taken) == wanted:
                break
            left = attending - {block.index for block in run}
            if attending and not left:
                spared += [block.origin for block in run if block.index in attending]
            else:
                taken.append(run)
                attending = left
        if len(taken) < wanted and self.threshold is None:
            raise InputError(
                f"block_drop: only {len(taken)} of {wanted} can go: the last block with attention "
                "has to stay, and blocks without which others would change their kind; drop fewer"
            )
        return taken, sorted(set(spared))

    def _list_runs(self, model: Model) -> list[tuple[Block, ...]]:
        """List what may be dropped: runs of one block, or of up to the limit if consecutive.

        With a number to drop, runs have exactly this length.
        """
        blocks, count = model.blocks, len(model.blocks)
        longest = int(self.limit) if self.consecutive else 1
        shortest = 1 if self.drop is None else longest
        return [
            blocks[at : at + length]
            for length in range(shortest, longest + 1)
            for at in range(count - length + 1)
        ]


def _list_attending(model: Model) -> list[int]:
    """List the blocks with attention over tokens, where a model mixes it with other kinds."""
    if not model.family.generic:
        return []
    types = getattr(model.architecture.config, "layer_types", None) or ()
    kinds = {kind for kind in types if kind.endswith("attention")} - {"linear_attention"}
    return [block.index for block in model.blocks if types and types[block.origin] in kinds]


def _list_fixed(model: Model) -> set[int]:
    """List the blocks without any of which transformers would build other layers for the rest."""
    if not model.family.generic:
        return set()
    every = range(len(model.blocks))
    return {
        n
        for n in every
        if find_changed_layer(model.keep_blocks([m for m in every if m != n])) is not None
    }


def _list_origins(run: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(block.origin for block in run)
