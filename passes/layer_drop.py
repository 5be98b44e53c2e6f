"""Remove MoE layers that change what passes through them least; attention stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, field_validator

from moe2edge.amounts import check_amount, check_choice, number
from moe2edge.errors import InputError
from moe2edge.model import Model
from moe2edge.pipeline import Facts, Kind, Outcome, Trim

if TYPE_CHECKING:
    from moe2edge.model import Block


class LayerDrop(Trim):
    """Drop the MoE layers whose input and output are most alike (Layer Drop).

    Layers are scored once, on the model as it stood when the stage began
    (https://arxiv.org/abs/2406.02500; formulas in `moe2edge.similarity.LayerSimilarity`). Dense
    layers are never dropped, a shared expert goes with its layer, and one MoE layer stays.
    """

    drop: Annotated[
        int | float | None,
        Field(
            description="MoE layers to drop: a count, or a fraction of the source's, rounded down"
        ),
    ] = None
    threshold: Annotated[
        float | None,
        Field(ge=-1, le=1, description="instead of drop: the cosine from which a layer is dropped"),
    ] = None
    most: Annotated[
        int | float | None,
        Field(
            description="with threshold, at most so many: a count or a fraction; none: a quarter, "
            "and one at least"
        ),
    ] = None
    norm: Annotated[
        bool,
        Field(
            description="true: the norm before the layer counts as part of it and goes with it; "
            "false: it stays, and its output is added to the stream in the layer's place"
        ),
    ] = True

    @field_validator("drop", "most", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def check(self, model: Model) -> None:
        """Refuse to drop no layer, or all."""
        check_choice("layer_drop", self.drop, self.threshold, self.most)
        layers, count = len(model.moe_blocks), self._most
        if not 1 <= count < layers:
            raise InputError(
                f"layer_drop: {'drop' if self.threshold is None else 'most'} is {count} of "
                f"{layers} MoE layers; at least 1 and at most {layers - 1}"
            )

    @property
    def _most(self) -> float:
        """As many as may go: a count, once it is `resolved`."""
        limit = self.most if self.drop is None else self.drop
        return 1 if limit is None else limit

    def resolved(self, model: Model) -> Self:
        """With counts in place of fractions of the source."""
        whole = len(model.moe_blocks)
        if self.drop is not None:
            return self.model_copy(update={"drop": number(self.drop, whole)})
        most = max(1, whole // 4) if self.most is None else number(self.most, whole)
        return self.model_copy(update={"most": most})

    def plan(self, model: Model) -> Model:
        """The model without its last MoE layers: as many as may go, or one by threshold."""
        count = int(self._most) if self.threshold is None else 1
        return self._without(model, [block for block, _ in model.moe_blocks[-count:]])

    def _without(self, model: Model, blocks: list[Block]) -> Model:
        for block in blocks:
            model = model.replace_block(block.without_mlp(keep_norm=not self.norm))
        return model

    def observers(self) -> tuple[Kind, ...]:
        """Similarities of what goes into MoE layers and what comes out."""
        from moe2edge.similarity import LayerSimilarityObserver

        return (LayerSimilarityObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant layers; ties go to the deeper one."""
        from moe2edge.similarity import LayerSimilarityObserver

        found = facts[LayerSimilarityObserver]
        by_run = found.with_norm if self.norm else found.without_norm
        cosine = {origin: value for (origin,), value in by_run.items()}
        layers = [block for block, _ in model.moe_blocks]
        order = sorted(layers, key=lambda b: (-cosine[b.origin], -b.index))
        gone = order[: int(self._most)]
        if self.threshold is not None:
            limit = self.threshold
            gone = [block for block in gone if cosine[block.origin] >= limit]
            if not gone:
                highest = cosine[order[0].origin]
                reason = f"the highest cosine is {highest:.4f}, below the threshold {limit}"
                return Outcome(model, skipped={"every MoE layer": reason})
        gone.sort(key=lambda b: b.index)
        return Outcome(
            self._without(model, gone),
            changed=tuple(f"block {b.index}: MoE layer ({cosine[b.origin]:.4f})" for b in gone),
        )
