"""The tensors of a model in the layout of its source: experts in tensors of their own, or fused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.model.anatomy import ExpertsForm
from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS, Expert
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


def list_stored(model: Model) -> Iterator[tuple[str, Weight]]:
    """Yield all tensors by their names in files, experts fused where the source has them so."""
    for block in model.blocks:
        yield from list_stored_block(model, block)
    yield from _list_outside(model)


def list_stored_integers(model: Model) -> Iterator[tuple[str, str, Weight]]:
    """Yield all tensors by their names in files with integers, with the roles of matrices.

    Experts that are quantized are single ones, and all else is as `list_stored` has it.
    """
    for block, tensors in zip(model.blocks, model.named_blocks, strict=True):
        if any(weight.scheme for _, role, weight in tensors if role.startswith("experts.")):
            yield from tensors
        else:
            yield from _list_with_roles(model, block)
    yield from ((name, "rest", weight) for name, weight in _list_outside(model))


def list_stored_block(model: Model, block: Block) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of a block as `list_stored` does."""
    return ((name, weight) for name, _, weight in _list_with_roles(model, block))


def _list_with_roles(model: Model, block: Block) -> Iterator[tuple[str, str, Weight]]:
    """Yield the tensors of a block with their roles; "fused" is that of all experts."""
    fused = isinstance(block.mlp, MoELayer) and _is_fused(model, block)
    for role, weight in block.weights():
        if not fused or not role.startswith("experts."):
            yield model.disk_name(block, role), role, weight
    if fused:
        yield from ((name, "fused", weight) for name, weight in _list_fused(model, block))


def _list_outside(model: Model) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors outside of blocks."""
    for name, weight in model.rest.items():
        yield model.names.get_rest_name(name), weight
    yield from ((name, w) for name, w in model.carried.items() if is_carried(model, name))


def is_carried(model: Model, name: str) -> bool:
    """Return whether a tensor of another part of a model is written.

    Layers that predict further tokens have experts and an index of their own, and are of no use to
    a model that has other ones.
    """
    anatomy = model.architecture.anatomy
    counts = {block.origin: len(layer.experts) for block, layer in model.moe_blocks}
    whole = len(model.blocks) == len(anatomy) and all(
        counts.get(origin, 0) == one.count for origin, one in enumerate(anatomy)
    )
    return whole or not model.names.is_prediction(name)


def _is_fused(model: Model, block: Block) -> bool:
    """Return whether files have one tensor of all experts of a block."""
    anatomy = model.architecture.anatomy[block.origin]
    return anatomy.experts is not None and model.names.is_fused(block.origin, anatomy)


def _list_fused(model: Model, block: Block) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of all experts of a block."""
    anatomy, layer = model.architecture.anatomy[block.origin], block.mlp
    assert isinstance(layer, MoELayer)
    assert anatomy.form is not None
    for matrix in (anatomy.form.first, "down_proj"):
        for bias in ("", "_bias") if anatomy.form.biased else ("",):
            name = model.names.get_experts_name(block.index, block.origin, f"{matrix}{bias}")
            yield name, fuse(layer.experts, anatomy.form, matrix, bias=bool(bias), name=name)


def fuse(
    experts: Sequence[Expert], form: ExpertsForm, matrix: str, *, bias: bool, name: str
) -> Weight:
    """Return a handle on one tensor of all experts, as transformers holds it.

    Args:
        experts: the experts.
        form: how their matrices are arranged.
        matrix: the parameter, such as ``down_proj``.
        bias: their biases instead.
        name: of the tensor in files.
    """
    parts = PARTS[2:] if matrix == "down_proj" else PARTS[:2] if form.gated else PARTS[1:2]
    own = [[e.biases[p] if bias else getattr(e, p) for p in parts] for e in experts]
    first = own[0][0]
    rows = sum(weight.shape[0] for weight in own[0])
    shape: tuple[int, ...] = (rows, *first.shape[1:])
    shape = shape[::-1] if form.transposed and not bias else shape

    def load() -> Tensor:
        import torch

        found = []
        for weights in own:
            numbers = [weight.load() for weight in weights]
            joined = torch.cat(numbers)
            if len(numbers) == 2 and not form.concatenated:
                joined = torch.stack(numbers, dim=1).flatten(0, 1)
            found.append(joined.T if form.transposed and not bias else joined)
        return torch.stack(found)

    return replace(first, name=name, shape=(len(experts), *shape), load=load)
