"""Selection of the tensors that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.experts import Expert, Tied
from moe2edge.model.layers import MoELayer, UnroutedMLP

# Kinds of tensors that are trained directly, without adapters.
WHOLE = ("substitutes", "members")


@dataclass(frozen=True)
class Selection:
    """The tensors that are trained.

    Attributes:
        train: the option of `recover`.
        anneals: whether tied experts start as their originals.
    """

    train: str
    anneals: bool

    def takes(self, block: Block, role: str) -> bool:
        """Return whether a tensor of a block is trained.

        Tied experts, and all that anneal, read the matrices of experts themselves, where
        an adapter of peft is not seen: those get none. Their factors are trained.
        """
        if (
            self.train == "lora"
            and role.startswith("experts.")
            and isinstance(layer := block.mlp, MoELayer)
        ):
            tied = any(isinstance(row, Tied) for row in layer.rows)
            if tied or (self.anneals and layer.sharing):
                return False
        kind = role.partition(".")[0]
        if self.train == "full":
            return True
        if self.train == "router":
            return kind == "router"
        if self.train == "lora":
            return is_quantizable(role) or kind in WHOLE
        # The one expert that stayed in its layer is one, too.
        only = kind == "dense" and isinstance(block.mlp, Expert | UnroutedMLP)
        return kind in ("experts", "router", *WHOLE) or only

    def takes_anywhere(self, block: Block | None, role: str) -> bool:
        """Return whether a tensor is trained; outside of blocks by the name on disk."""
        return self.train == "full" if block is None else self.takes(block, role)


def is_whole(role: str) -> bool:
    """Return whether a tensor gets no adapter, but is trained itself."""
    return role.partition(".")[0] in WHOLE
