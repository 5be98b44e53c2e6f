"""Drop the MoE layers that change the hidden states least; attention stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import Unsupported
from moe2edge.model.body import find_body
from moe2edge.model.edits import drop_mlp
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.passes._drop_alike import DropAlike
from moe2edge.pipeline.contract import Outcome

if TYPE_CHECKING:
    from moe2edge.model.block import Block


class LayerDrop(DropAlike):
    """Drop the MoE layers whose input and output are most similar (Layer Drop).

    The score of a layer is the mean cosine of its input and output over the calibration tokens
    (https://arxiv.org/abs/2406.02500). Layers are scored once, on the model as it was when the
    stage began. A shared expert is dropped with its layer; dense layers and at least one MoE layer
    stay. In families without a row, norms go that make no difference without the layer.
    """

    unit: ClassVar[str] = "MoE layer"
    needs: ClassVar[tuple[Trait, ...]] = (Trait.APART,)

    norm: Annotated[
        bool,
        Field(
            description="true: the norm before the layer is scored and dropped with it; false: the "
            "norm stays, and its output is added to the residual stream in place of the layer's"
        ),
    ] = True

    def check(self, model: Model) -> None:
        """Refuse also norms that stay where none belongs to the layer alone.

        Raises:
            Unsupported: names the block.
        """
        super().check(model)
        if self.norm or not model.family.generic:
            return
        for block, _ in model.moe_blocks:
            body = find_body(model.architecture, block.origin)
            if body is not None and not body.can_pass_norm:
                raise Unsupported(
                    f"layer_drop: norm: false does not work on {model.family.model_type}: block "
                    f"{block.index} has no norm whose output could be added in place of one MoE "
                    "layer; leave norm out"
                )

    def whole(self, model: Model) -> int:
        """Return the number of MoE layers."""
        return len(model.moe_blocks)

    def plan(self, model: Model) -> Model:
        """Return the model without its last MoE layers."""
        return self._drop_layers(model, [block for block, _ in model.moe_blocks[-self.planned :]])

    def _drop_layers(self, model: Model, blocks: list[Block]) -> Model:
        """Return the model without the MoE layers of some blocks."""
        for block in blocks:
            model = model.replace_block(drop_mlp(model, block, keep_norm=not self.norm))
        return model

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Return the observer of the similarities of inputs and outputs of MoE layers."""
        from moe2edge.calibration.similarity import LayerSimilarityObserver

        return (LayerSimilarityObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Drop the most redundant layers; among equal scores, the deeper ones."""
        from moe2edge.calibration.similarity import LayerSimilarityObserver

        similarity = facts[LayerSimilarityObserver]
        by_run = similarity.with_norm if self.norm else similarity.without_norm
        cosine = {origin: value for (origin,), value in by_run.items()}
        layers = [block for block, _ in model.moe_blocks]
        order = sorted(layers, key=lambda b: (-cosine[b.origin], -b.index))
        dropped = order[: int(self.limit)]
        if self.threshold is not None:
            dropped = [block for block in dropped if cosine[block.origin] >= self.threshold]
            if not dropped:
                return self.none_reaches(model, cosine[order[0].origin])
        dropped.sort(key=lambda b: b.index)
        return Outcome(
            self._drop_layers(model, dropped),
            changed=tuple(f"block {b.index}: MoE layer ({cosine[b.origin]:.4f})" for b in dropped),
        )
