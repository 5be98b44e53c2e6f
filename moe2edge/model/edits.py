"""Changes of a model that no pass owns: rows sorted, tied experts made whole, skipping removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.errors import Unsupported
from moe2edge.model.block import Block
from moe2edge.model.body import find_body
from moe2edge.model.experts import PARTS, Expert, Full, Tied, list_full_rows
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight, cast_to_stored, hide_integers

if TYPE_CHECKING:
    from torch import Tensor


def change_weights(model: Model, change: Callable[[str, Weight], Weight | None]) -> Model:
    """Return a model with other handles on tensors of its blocks.

    Args:
        model: the model.
        change: returns the new handle for a role and its handle; None: it stays.
    """
    for block in model.blocks:
        found = {role: change(role, weight) for role, weight in block.weights()}
        if new := {role: weight for role, weight in found.items() if weight is not None}:
            model = model.replace_block(block.with_weights(new))
    return model


def drop_mlp(model: Model, block: Block, *, keep_norm: bool = False) -> Block:
    """Return a block of a model without its MLP or MoE layer, and the norms that belong to it.

    Args:
        model: the model.
        block: one of its blocks.
        keep_norm: add the output of the norm before it to the residual stream in its place.

    Raises:
        Unsupported: no part of the layer was found that can go.
    """
    if not model.family.generic:
        return block.without_mlp(keep_norm=keep_norm)
    body = find_body(model.architecture, block.origin)
    if body is None or (keep_norm and not body.can_pass_norm):
        what = "norm that only its experts read" if body else "experts that can go by themselves"
        raise Unsupported(
            f"block {block.index} of {model.family.model_type} has no {what}; keep its layer"
        )
    paths = model.architecture.anatomy[block.origin].roles

    def select(weights: Mapping[str, Weight], kind: str = "") -> dict[str, Weight]:
        places = {name: paths[f"{kind}{name}".partition(".part")[0]] for name in weights}
        return {
            name: weight
            for name, weight in weights.items()
            if not body.contains(places[name], keep_norms=keep_norm)
        }

    return replace(
        block,
        mlp=None,
        norms=select(block.norms, "norms."),
        attention=select(block.attention, "attention."),
        others=select(block.others),
        passes_norm=keep_norm,
    )


def sort_rows(model: Model) -> Model:
    """Return ``model`` with the rows of each router in the order that formats on disk need.

    Rows that run full or tied experts come before replacements, but in groups, which are of rows
    that stand together. Where each expert is run by one
    row as it is, experts stand in the order of their rows. The model computes the same.
    """
    for block, layer in model.moe_blocks:
        found = _sort_layer(layer)
        if found is not layer:
            model = model.replace_block(replace(block, mlp=found))
    return model


def _sort_layer(layer: MoELayer) -> MoELayer:
    order = (*layer.routed, *layer.replaced)
    if layer.router.groups > 1 and layer.replaced:
        return layer
    if order != tuple(range(layer.router_rows)):
        rows = tuple(layer.rows[row] for row in order)
        layer = replace(layer, router=layer.router.select(order), rows=rows)
    ran = [layer.rows[row] for row in layer.routed]
    experts = [row.expert for row in ran if isinstance(row, Full)]
    if layer.is_tied and len(experts) == len(ran) == len(set(experts)):
        stored = tuple(layer.experts[n] for n in experts)
        full = (Full(row.origin, n) for n, row in enumerate(ran))
        rows = (*full, *(layer.rows[row] for row in layer.replaced))
        layer = replace(layer, experts=stored, rows=rows)
    return layer


def materialize(model: Model) -> Model:
    """Return ``model`` with every tied expert as an expert with matrices of its own.

    Bases and factors are added up in float32 and stored in the dtype of the base, so that the
    model grows, and is rounded once more; rows without factors stay exactly what they were.
    """
    for block, layer in model.moe_blocks:
        if layer.is_tied:
            experts = tuple(_make_expert(layer, row) for row in layer.routed)
            rows = list(layer.rows)
            for row, full in zip(layer.routed, list_full_rows(experts), strict=True):
                rows[row] = full
            whole = replace(layer, experts=experts, rows=tuple(rows))
            model = model.replace_block(replace(block, mlp=whole))
    return model


def _make_expert(layer: MoELayer, number: int) -> Expert:
    """Return what a row runs as an expert of its own."""
    row = layer.rows[number]
    if isinstance(row, Full):
        return replace(layer.experts[row.expert], origin=row.origin)
    assert isinstance(row, Tied), "a replacement has no matrices of an expert"
    like = layer.experts[row.base or 0]
    gate, up, down = (_add_factors(getattr(like, part), row, part) for part in PARTS)
    return Expert(gate, up, down, row.origin)


def _add_factors(like: Weight, row: Tied, part: str) -> Weight:
    """Return a matrix of a tied expert: that of its base, if it has one, plus its factors."""
    factors, based = row.factors[part], row.base is not None

    def load() -> Tensor:
        low = factors.second.load().float() @ factors.first.load().float()
        return cast_to_stored(low + like.load().float() if based else low, like.dtype)

    name = f"{part} of tied expert {row.origin}"
    return replace(like, name=name, load=load, scheme=None, load_quantized=None, pattern=None)


def remove_skipping(model: Model) -> Model:
    """Return ``model`` with every chosen expert run."""
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=())
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    return model


# ---- integers of a quantized source --------------------------------------------------------------


def hide_source_integers(model: Model) -> Model:
    """Return a model whose integers of the source are seen as plain numbers, as passes take them.

    `restore_source_integers` is the inverse for all that no pass has changed.
    """
    return change_weights(model, lambda _, weight: hide_integers(weight) if weight.kept else None)


def restore_source_integers(model: Model, source: Model) -> Model:
    """Return a model in which unchanged weights have the integers again that they had in a source.

    Args:
        model: made from the source by passes.
        source: the model before `hide_source_integers`.
    """
    kept = {weight.load: weight for _, _, weight in source.tensors() if weight.kept}
    return change_weights(model, lambda _, weight: kept.get(weight.load)) if kept else model
