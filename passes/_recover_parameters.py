"""Numbers of a trained transformers model back by role: the inverse of `modules.block_state`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.experts import PARTS, Linear, Replacement, Tied
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.pipeline.work import Store
from moe2edge.runtime.decoder_blocks import find_module_name
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

REPLACEMENTS, TIED = "mlp.experts.replacements", "mlp.experts.tied"


@dataclass(frozen=True)
class ParameterPlace:
    """What a parameter of a transformers model holds.

    Attributes:
        block: index of its block; None for what is outside of blocks.
        name: in the decoder layer; outside of blocks that on disk.
        roles: of the tensors that it holds; outside of blocks none.
    """

    block: int | None
    name: str
    roles: tuple[str, ...] = ()


def locate_parameters(model: Model) -> dict[str, ParameterPlace]:
    """Every parameter of the transformers model that `loading.to_transformers` makes, by name."""
    found = {name: ParameterPlace(None, name) for name in model.rest}
    for block in model.blocks:
        for name, roles in list_block_parameters(block).items():
            found[f"model.layers.{block.index}.{name}"] = ParameterPlace(block.index, name, roles)
    return found


def check_parameters(model: Model, names: Collection[str]) -> None:
    """Prove that every parameter of the transformers model has its place.

    Raises:
        Moe2EdgeError: one has none, and would be left out of whatever is done to all.
    """
    if strange := sorted(set(names) ^ set(locate_parameters(model))):
        raise Moe2EdgeError(f"{strange[0]} of the transformers model has no place in ours")


def list_block_parameters(block: Block) -> dict[str, tuple[str, ...]]:
    """Parameters of a block's decoder layer by name, with the roles of what each holds."""
    found: dict[str, tuple[str, ...]] = {}
    for role, _ in block.weights():
        if name := find_module_name(role):
            found[name] = (role,)
    if isinstance(layer := block.mlp, MoELayer):
        at, count = find_experts_name(layer), range(len(layer.experts))
        both = tuple(f"experts.{n}.{part}" for n in count for part in ("gate", "up"))
        found[f"{at}.gate_up_proj"] = both
        found[f"{at}.down_proj"] = tuple(f"experts.{n}.down" for n in count)
        rows = list(zip(layer.row_roles, layer.rows, strict=True))
        if layer.replaced:
            roles = [role for role, row in rows if isinstance(row, Replacement)]
            found[f"{REPLACEMENTS}.constants"] = tuple(f"{role}.constant" for role in roles)
            linear = [role for role, row in rows if isinstance(row, Linear)]
            for part in ("first", "second"):
                found[f"{REPLACEMENTS}.{part}"] = tuple(f"{role}.{part}" for role in linear)
        tied = [role for role, row in rows if isinstance(row, Tied)]
        for part, name in itertools.product(PARTS, ("first", "second")) if tied else ():
            found[f"{TIED}.{part}_{name}"] = tuple(f"{role}.{part}.{name}" for role in tied)
    return found


def split_by_role(block: Block, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers by role of some parameters of the block's decoder layer, by name."""
    roles = list_block_parameters(block)
    found: dict[str, Tensor] = {}
    for name, numbers in state.items():
        pieces = _pieces(block, name, numbers)
        found |= dict(zip(roles[name], pieces, strict=True))
    return found


def _pieces(block: Block, name: str, numbers: Tensor) -> list[Tensor]:
    """What a parameter holds, in the order of its roles."""
    layer, part = block.mlp, name.rpartition(".")[2]
    if not isinstance(layer, MoELayer):
        return [numbers]
    if name == f"{find_experts_name(layer)}.gate_up_proj":
        return [piece for expert in numbers for piece in expert.chunk(2)]
    if name in (f"{find_experts_name(layer)}.down_proj", f"{REPLACEMENTS}.constants"):
        return list(numbers)
    if name.startswith(TIED):
        return list(numbers)
    if name.startswith(REPLACEMENTS):
        ranks = [row.rank for row in layer.rows if isinstance(row, Linear)]
        return list(torch.split(numbers, ranks, dim=0 if part == "first" else 1)) if ranks else []
    return [numbers]


def select_parameters(model: Model, wanted: Callable[[Block | None, str], bool]) -> list[str]:
    """Names of the parameters all of whose tensors are wanted; those without numbers left out.

    Args:
        model: the model.
        wanted: says so of a block and a role; outside of blocks of None and the name on disk.
    """
    found = []
    for name, place in locate_parameters(model).items():
        if place.block is None:
            take = wanted(None, place.name)
        else:
            block = model.blocks[place.block]
            take = bool(place.roles) and all(wanted(block, role) for role in place.roles)
        if take:
            found.append(name)
    return found


def attach_trained(model: Model, state: Mapping[str, Tensor], store: Store) -> Model:
    """The model with the numbers of some parameters of its transformers model, by their names.

    Each takes the dtype of what it replaces.
    """
    known = locate_parameters(model)
    rest = {known[name].name: t for name, t in state.items() if known[name].block is None}
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, numbers in state.items():
        if (index := known[name].block) is not None:
            blocks.setdefault(index, {})[known[name].name] = numbers
    for index, own in sorted(blocks.items()):
        block = model.blocks[index]
        model = model.replace_block(store.put(block, split_by_role(block, own)))
    return replace(model, rest=store.put_rest(model.rest, rest)) if rest else model
