"""Remove MoE layers that change the hidden states least; attention stays.

Formulas are in `moe2edge.calibration.similarity.LayerSimilarity`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.model.model import Model
from moe2edge.passes._drop_alike import DropAlike
from moe2edge.pipeline.contract import Outcome

if TYPE_CHECKING:
    from moe2edge.model.model import Block


class LayerDrop(DropAlike):
    """Drop the MoE layers whose input and output are most similar (Layer Drop).

    Layers are scored once, on the model as it stood when the stage began
    (https://arxiv.org/abs/2406.02500). Dense layers are never dropped, a shared expert goes with
    its layer, and one MoE layer stays.
    """

    unit: ClassVar[str] = "MoE layer"

    norm: Annotated[
        bool,
        Field(
            description="true: the norm before the layer counts as part of it and goes with it; "
            "false: it stays, and its output is added to the residual stream instead"
        ),
    ] = True

    def whole(self, model: Model) -> int:
        """MoE layers, of which one stays."""
        return len(model.moe_blocks)

    def plan(self, model: Model) -> Model:
        """Return the model without its last MoE layers."""
        return self._without(model, [block for block, _ in model.moe_blocks[-self.planned :]])

    def _without(self, model: Model, blocks: list[Block]) -> Model:
        for block in blocks:
            model = model.replace_block(block.without_mlp(keep_norm=not self.norm))
        return model

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Similarities of what goes into MoE layers and what comes out."""
        from moe2edge.calibration.similarity import LayerSimilarityObserver

        return (LayerSimilarityObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant layers; ties go to the deeper one."""
        from moe2edge.calibration.similarity import LayerSimilarityObserver

        found = facts[LayerSimilarityObserver]
        by_run = found.with_norm if self.norm else found.without_norm
        cosine = {origin: value for (origin,), value in by_run.items()}
        layers = [block for block, _ in model.moe_blocks]
        order = sorted(layers, key=lambda b: (-cosine[b.origin], -b.index))
        gone = order[: int(self.limit)]
        if self.threshold is not None:
            gone = [block for block in gone if cosine[block.origin] >= self.threshold]
            if not gone:
                return self.none_reaches(model, cosine[order[0].origin])
        gone.sort(key=lambda b: b.index)
        return Outcome(
            self._without(model, gone),
            changed=tuple(f"block {b.index}: MoE layer ({cosine[b.origin]:.4f})" for b in gone),
        )
