"""Experts as the pass expert_merge sees them: their tensors, and samples of what layers get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS, Expert
from moe2edge.model.layers import MoELayer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import RouterTrace
    from moe2edge.model.weights import Weight
    from moe2edge.numerics.expert_groups import Matrices


def get_merged_role(block: Block, place: int, part: str) -> str:
    """Return the role of a matrix of an expert, which alone in its layer is a plain MLP."""
    kind = f"experts.{place}" if isinstance(block.mlp, MoELayer) else "dense"
    return f"{kind}.{part}"


def list_expert_parts(expert: Expert) -> list[str]:
    """List the tensors of an expert as roles name them."""
    matrices = [part for part in PARTS if getattr(expert, part).count]
    return [*matrices, *(f"{part}_bias" for part in expert.biases)]


def load_matrices(layer: MoELayer, n: int) -> Matrices:
    """Load the numbers of an expert, float32."""
    from moe2edge.numerics.expert_groups import Matrices
    from moe2edge.runtime.decoder_blocks import load_finite

    expert = layer.experts[n]
    gate, up, down = (getattr(expert, part) for part in PARTS)
    return Matrices(
        # A gate that experts do not have is without numbers, which have no minimum.
        load_finite(gate) if gate.count else gate.load().float(),
        load_finite(up),
        load_finite(down),
        {part: load_finite(bias) for part, bias in expert.biases.items()},
    )


def reorder_neurons(block: Block, layer: MoELayer, orders: Mapping[int, Tensor]) -> Block:
    """Return the block with the neurons of some experts, by position, in another order."""

    def permuted(weight: Weight, order: Tensor, dim: int) -> Weight:
        return replace(weight, load=lambda: weight.load().index_select(dim, order))

    experts = list(layer.experts)
    for n, order in orders.items():
        gate, up, down = (getattr(experts[n], part) for part in PARTS)
        experts[n] = replace(
            experts[n],
            gate=permuted(gate, order, 0) if gate.count else gate,
            up=permuted(up, order, 0),
            down=permuted(down, order, 1),
            biases={
                part: bias if part == "down" else permuted(bias, order, 0)
                for part, bias in experts[n].biases.items()
            },
        )
    return replace(block, mlp=replace(layer, experts=tuple(experts)))


@dataclass
class LayerSamples:
    """Inputs, outputs and router logits of a layer for evenly spread tokens.

    Attributes:
        every: one in this many tokens is kept.
        inputs, outputs: [n, hidden] of each batch.
        logits: of the router, [n, experts] of each batch.
    """

    every: int
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    _seen: int = 0

    def add(self, routing: RouterTrace, outputs: Tensor) -> None:
        """Add a batch, with outputs [n, hidden]."""
        first = -self._seen % self.every
        self.inputs.append(routing.inputs[first :: self.every].clone())
        self.outputs.append(outputs[first :: self.every].clone())
        self.logits.append(routing.logits[first :: self.every].clone())
        self._seen += len(routing.inputs)
