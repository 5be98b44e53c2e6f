"""Members as experts of their own again, for those who know no shared matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.checkpoint import as_stored
from moe2edge.errors import Unsupported
from moe2edge.layers import PARTS, Expert, Member, MoELayer, Weight
from moe2edge.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.target import Target


def held(model: Model, targets: Sequence[Target], *, materialize: bool) -> Model:
    """``model`` as all of some targets hold it: as it is, or materialized where that is wanted.

    Raises:
        Unsupported: a target holds neither, or no members and ``materialize`` is not set.
    """
    try:
        for target in targets:
            target.accepts(model)
    except Unsupported as error:
        if not model.members:
            raise
        whole = materialized(model)
        other = _refusal(whole, targets)
        if other is not None and materialize:
            raise Unsupported(
                f"{error}; nor is it held with every member as an expert of its own: {other}; "
                "targets of which one needs that want an export each"
            ) from error
        if other is not None:
            raise
        if not materialize:
            raise Unsupported(
                f"{error}; or write every member as an expert of its own with --materialize: "
                f"{told(model, whole)}"
            ) from error
        return whole
    return model


def told(model: Model, whole: Model) -> str:
    """What materializing costs."""
    return f"{whole.nbytes / 1e6:.1f} MB in place of {model.nbytes / 1e6:.1f}"


def _refusal(model: Model, targets: Sequence[Target]) -> Unsupported | None:
    try:
        for target in targets:
            target.accepts(model)
    except Unsupported as error:
        return error
    return None


def materialized(model: Model) -> Model:
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
        return as_stored(low + like.load().float() if based else low, like.dtype)

    name = f"{part} of member {member.origin}"
    return replace(like, name=name, load=load, scheme=None, load_quantized=None, pattern=None)
