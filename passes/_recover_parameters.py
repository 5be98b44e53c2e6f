"""Numbers of a trained transformers model by role: the inverse of `load_block_state`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import PARTS, MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.pipeline.work import Store
from moe2edge.runtime.decoder_blocks import find_module_name
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

SUBSTITUTES, MEMBERS = "mlp.experts.substitutes", "mlp.experts.members"


@dataclass(frozen=True)
class ParameterPlace:
    """Contents of a parameter of a transformers model.

    Attributes:
        block: index of its block; None for what is outside of blocks.
        name: in the decoder layer; outside of blocks that on disk.
        roles: of the tensors that it holds; outside of blocks none.
    """

    block: int | None
    name: str
    roles: tuple[str, ...] = ()


def locate_parameters(model: Model) -> dict[str, ParameterPlace]:
    """Locate every parameter of the model of `build_transformers_model`, by name."""
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
    """List the parameters of a block's decoder layer by name, with the roles that each holds."""
    found: dict[str, tuple[str, ...]] = {}
    for role, _ in block.weights():
        if name := find_module_name(role):
            found[name] = (role,)
    if isinstance(layer := block.mlp, MoELayer):
        at, count = find_experts_name(layer), range(len(layer.experts))
        both = tuple(f"experts.{n}.{part}" for n in count for part in ("gate", "up"))
        found[f"{at}.gate_up_proj"] = both
        found[f"{at}.down_proj"] = tuple(f"experts.{n}.down" for n in count)
        if layer.substitutes:
            own = [(n, substitute.rank) for n, substitute in enumerate(layer.substitutes)]
            found[f"{SUBSTITUTES}.constants"] = tuple(f"substitutes.{n}.constant" for n, _ in own)
            for part in ("first", "second"):
                linear = tuple(f"substitutes.{n}.{part}" for n, rank in own if rank)
                found[f"{SUBSTITUTES}.{part}"] = linear
        factored = [n for n, member in enumerate(layer.members) if member.factors]
        for part, name in itertools.product(PARTS, ("first", "second")) if factored else ():
            roles = tuple(f"members.{n}.{part}.{name}" for n in factored)
            found[f"{MEMBERS}.{part}_{name}"] = roles
    return found


def split_by_role(block: Block, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split some parameters of the block's decoder layer, by name, into numbers by role."""
    roles = list_block_parameters(block)
    found: dict[str, Tensor] = {}
    for name, numbers in state.items():
        pieces = _pieces(block, name, numbers)
        found |= dict(zip(roles[name], pieces, strict=True))
    return found


def _pieces(block: Block, name: str, numbers: Tensor) -> list[Tensor]:
    """Split a parameter into the numbers of its roles, in order."""
    layer, part = block.mlp, name.rpartition(".")[2]
    if not isinstance(layer, MoELayer):
        return [numbers]
    if name == f"{find_experts_name(layer)}.gate_up_proj":
        return [piece for expert in numbers for piece in expert.chunk(2)]
    if name in (f"{find_experts_name(layer)}.down_proj", f"{SUBSTITUTES}.constants"):
        return list(numbers)
    if name.startswith(MEMBERS):
        return list(numbers)
    if name.startswith(SUBSTITUTES):
        ranks = [substitute.rank for substitute in layer.substitutes if substitute.rank]
        return list(torch.split(numbers, ranks, dim=0 if part == "first" else 1)) if ranks else []
    return [numbers]


def select_parameters(model: Model, wanted: Callable[[Block | None, str], bool]) -> list[str]:
    """List the parameters all of whose tensors are selected; those without numbers left out.

    Args:
        model: the model.
        wanted: selects by block and role; outside of blocks, by None and the name on disk.
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
    """Return the model with numbers of some parameters of its transformers model, by name.

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
