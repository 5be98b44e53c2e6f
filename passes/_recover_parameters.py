"""Trained parameters of a transformers model as tensors by role.

The inverse of building its state dict in `moe2edge.runtime.decoder_blocks`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.anatomy import Anatomy, ExpertsForm
from moe2edge.model.architecture import find_layers
from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS, Linear, Replacement, Tied
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.pipeline.work import Store
from moe2edge.runtime.decoder_blocks import find_module_name
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

# Modules of `MixedExperts`.
REPLACEMENTS, TIED = "substitutes", "members"


@dataclass(frozen=True)
class ParameterPlace:
    """Place of a parameter of a transformers model in our model.

    Attributes:
        block: index of its block; None: it is outside of blocks.
        name: name in the decoder layer; outside of blocks, name on disk.
        roles: roles of the tensors that it holds; none outside of blocks.
    """

    block: int | None
    name: str
    roles: tuple[str, ...] = ()


def locate_parameters(model: Model) -> dict[str, ParameterPlace]:
    """Locate every parameter of the transformers model that is built from ``model``, by name."""
    places = {name: ParameterPlace(None, name) for name in model.rest}
    layers = model.architecture.layers_path
    for block in model.blocks:
        for name, roles in list_block_parameters(model, block).items():
            places[f"{layers}.{block.index}.{name}"] = ParameterPlace(block.index, name, roles)
    return places


def check_parameters(model: Model, names: Collection[str]) -> None:
    """Prove that every parameter of the transformers model has its place.

    Raises:
        Moe2EdgeError: one has none, or one is missing; it would be left out of the training.
    """
    if unknown := sorted(set(names) ^ set(locate_parameters(model))):
        raise Moe2EdgeError(
            f"{unknown[0]} of the transformers model has no counterpart in the model of moe2edge"
        )


def list_block_parameters(model: Model, block: Block) -> dict[str, tuple[str, ...]]:
    """List the parameters of a block's decoder layer by name, with the roles that each holds.

    Buffers of transformers' layer, such as biases that balance experts, are none.
    """
    parameters: dict[str, tuple[str, ...]] = {}
    anatomy = model.architecture.anatomy[block.origin]
    layers = find_layers(model.architecture.model)[1]
    buffers = {name for name, _ in layers[block.origin].named_buffers()}
    for role, _ in block.weights():
        if (name := find_module_name(anatomy, role)) and name not in buffers:
            parameters[name] = (*parameters.get(name, ()), role)
    if isinstance(layer := block.mlp, MoELayer):
        parameters |= _list_expert_parameters(anatomy, layer)
        rows = list(zip(layer.row_roles, layer.rows, strict=True))
        replacements, factors = f"{anatomy.experts}.{REPLACEMENTS}", f"{anatomy.experts}.{TIED}"
        if layer.replaced:
            roles = [role for role, row in rows if isinstance(row, Replacement)]
            parameters[f"{replacements}.constants"] = tuple(f"{role}.constant" for role in roles)
            linear = [role for role, row in rows if isinstance(row, Linear)]
            for part in ("first", "second"):
                parameters[f"{replacements}.{part}"] = tuple(f"{role}.{part}" for role in linear)
        tied = [role for role, row in rows if isinstance(row, Tied)]
        for part, name in itertools.product(PARTS, ("first", "second")) if tied else ():
            parameters[f"{factors}.{part}_{name}"] = tuple(f"{role}.{part}.{name}" for role in tied)
    return parameters


def _list_expert_parameters(anatomy: Anatomy, layer: MoELayer) -> dict[str, tuple[str, ...]]:
    """List the parameters of the module of the experts as `list_block_parameters` does."""
    form, at = get_form_of_experts(anatomy), _find_experts(anatomy, layer)
    first = ("gate", "up") if form.gated else ("up",)
    kinds: dict[str, tuple[str, ...]] = {f"{at}.{form.first}": first, f"{at}.down_proj": ("down",)}
    if form.biased:
        kinds |= {f"{at}.{form.first}_bias": tuple(f"{part}_bias" for part in first)}
        kinds |= {f"{at}.down_proj_bias": ("down_bias",)}
    return {
        name: tuple(f"experts.{n}.{part}" for n in range(len(layer.experts)) for part in parts)
        for name, parts in kinds.items()
    }


def _find_experts(anatomy: Anatomy, layer: MoELayer) -> str:
    """Return the path in a decoder layer of the module with the matrices of the experts."""
    return find_experts_name(layer, str(anatomy.experts))


def get_form_of_experts(anatomy: Anatomy) -> ExpertsForm:
    """Return the form of the experts of a layer that has some."""
    assert anatomy.form is not None, "a layer with experts has none in transformers' class"
    return anatomy.form


def split_by_role(model: Model, block: Block, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split parameters of the block's decoder layer, given by name, into tensors by role."""
    roles = list_block_parameters(model, block)
    shapes = {role: weight.shape for role, weight in block.weights()}
    anatomy = model.architecture.anatomy[block.origin]
    tensors: dict[str, Tensor] = {}
    for name, numbers in state.items():
        if len(roles[name]) > 1 and ".part" in roles[name][0]:
            parts = list(torch.split(numbers, [shapes[role][0] for role in roles[name]]))
        else:
            parts = _split(anatomy, block, name, numbers)
        tensors |= dict(zip(roles[name], parts, strict=True))
    return tensors


def _split(anatomy: Anatomy, block: Block, name: str, numbers: Tensor) -> list[Tensor]:
    """Split a parameter into the tensors that it holds, in the order of its roles."""
    layer, part = block.mlp, name.rpartition(".")[2]
    if not isinstance(layer, MoELayer):
        return [numbers]
    at = _find_experts(anatomy, layer)
    if name.startswith(f"{at}.{(form := get_form_of_experts(anatomy)).first}"):
        return [piece for expert in numbers for piece in _split_expert(expert, form)]
    if name == f"{at}.down_proj":
        return [expert.T if form.transposed else expert for expert in numbers]
    inside = name.removeprefix(f"{anatomy.experts}.")
    if name == f"{at}.down_proj_bias" or inside == f"{REPLACEMENTS}.constants":
        return list(numbers)
    if inside.startswith(TIED):
        return list(numbers)
    if inside.startswith(REPLACEMENTS):
        ranks = [row.rank for row in layer.rows if isinstance(row, Linear)]
        return list(torch.split(numbers, ranks, dim=0 if part == "first" else 1)) if ranks else []
    return [numbers]


def _split_expert(both: Tensor, form: ExpertsForm) -> list[Tensor]:
    """Split gate and up of an expert, or their biases, which `arrange_gate_up` put together."""
    if form.transposed and both.ndim > 1:
        both = both.T
    if not form.gated:
        return [both]
    return list(both.chunk(2)) if form.concatenated else [both[0::2], both[1::2]]


def select_parameters(model: Model, wanted: Callable[[Block | None, str], bool]) -> list[str]:
    """Return the names of the parameters all of whose tensors are wanted; none that are empty.

    Args:
        model: the model.
        wanted: predicate on a block and a role; outside of blocks, on None and the name on disk.
    """
    names = []
    for name, place in locate_parameters(model).items():
        if place.block is None:
            take = wanted(None, place.name)
        else:
            block = model.blocks[place.block]
            take = bool(place.roles) and all(wanted(block, role) for role in place.roles)
        if take:
            names.append(name)
    return names


def attach_trained(model: Model, state: Mapping[str, Tensor], store: Store) -> Model:
    """Return the model with trained parameters of its transformers model, given by name.

    Each tensor gets the dtype of the one that it replaces.
    """
    places = locate_parameters(model)
    rest = {places[name].name: t for name, t in state.items() if places[name].block is None}
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, numbers in state.items():
        if (index := places[name].block) is not None:
            blocks.setdefault(index, {})[places[name].name] = numbers
    for index, parameters in sorted(blocks.items()):
        block = model.blocks[index]
        model = model.replace_block(store.put(block, split_by_role(model, block, parameters)))
    return replace(model, rest=store.put_rest(model.rest, rest)) if rest else model
