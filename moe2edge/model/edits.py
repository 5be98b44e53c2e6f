"""Changes of a model that passes do not own: members made whole, skipping taken off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.model.layers import PARTS, Expert, Member, MoELayer, Weight, cast_to_stored
from moe2edge.model.model import Model

if TYPE_CHECKING:
    from torch import Tensor


def materialize(model: Model) -> Model:
    """``model`` with every member as an expert with matrices of its own.

    Bases and factors are added up in float32 and stored in the dtype of the base, so that the
    model grows, and is rounded once more; members without factors stay exactly what they were.
    """
    for block, layer in model.moe_blocks:
        if layer.members:
            experts = tuple(_expert(layer, member) for member in layer.members)
            whole = replace(layer, experts=experts, members=())
            model = model.replace_block(replace(block, mlp=whole))
    return model


def _expert(layer: MoELayer, member: Member) -> Expert:
    base = None if member.base is None else layer.experts[member.base]
    if base is not None and not member.factors:
        return replace(base, origin=member.origin)
    like = layer.experts[member.base or 0]
    gate, up, down = (_sum(getattr(like, part), member, part, base is not None) for part in PARTS)
    return Expert(gate, up, down, member.origin)


def _sum(like: Weight, member: Member, part: str, based: bool) -> Weight:
    factors = member.factors[part]

    def load() -> Tensor:
        low = factors.second.load().float() @ factors.first.load().float()
        return cast_to_stored(low + like.load().float() if based else low, like.dtype)

    name = f"{part} of member {member.origin}"
    return replace(like, name=name, load=load, scheme=None, load_quantized=None, pattern=None)


def remove_skipping(model: Model) -> Model:
    """``model`` with every chosen expert run."""
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=())
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    return model
