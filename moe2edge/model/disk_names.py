"""Names in files of the tensors of a model, of its source or of an output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moe2edge.model.anatomy import Anatomy, ExpertsForm
from moe2edge.model.architecture import Architecture
from moe2edge.model.parameter_names import NUMBER, Stored, check_steps, map_names


class DiskNames:
    """Names in files of the tensors of a model, of its source or of an output.

    Attributes:
        stored: stored form of each parameter of transformers' model, by its name there.
        unknown: names of tensors that become nothing of the model.
    """

    def __init__(self, architecture: Architecture, names: Iterable[str]) -> None:
        """Map the names of the tensors in files; integers count as the matrix that they are."""
        self._architecture = architecture
        plain = {get_plain_name(name): name for name in names}
        self.stored = map_names(architecture.model, plain)
        used = {name for one in self.stored.values() for part in one.names for name in part}
        self.unknown = frozenset(name for plain, name in plain.items() if plain not in used)

    def list_carried(self, given: Mapping[str, Any]) -> list[str]:
        """List the tensors of other parts of a model than the text model.

        These are what transformers' class says that it leaves out, and in a model of several parts
        all that stands beside the text model.

        Args:
            given: content of ``config.json``.
        """
        ignored = self._architecture.model._keys_to_ignore_on_load_unexpected or ()
        # Transformers' own patterns, not those of a checkpoint.
        patterns = [re.compile(pattern) for pattern in ignored]
        found = [name for name in self.unknown if any(p.search(name) for p in patterns)]
        if "text_config" in given:
            text = self._find_text_name()
            found += [name for name in self.unknown if not name.startswith(text)]
        return sorted(set(found))

    def is_prediction(self, name: str) -> bool:
        """Return whether a carried tensor is one of layers that predict further tokens.

        They are named so, or are numbered behind the last layer.
        """
        if "mtp" in name:
            return True
        behind = len(self._architecture.anatomy)
        return name.startswith(f"{self._find_text_name()}layers.{behind}.")

    def _find_text_name(self) -> str:
        """Return the name in files of the module with all layers."""
        architecture = self._architecture
        layer = f"{architecture.layers_path}.0"
        return self._find_place(layer, architecture.anatomy[0]).removesuffix("layers.0")

    def find(self, parameter: str) -> Stored:
        """Return the stored form of a parameter, or the usual one if it is not stored."""
        return self.stored.get(parameter) or self._architecture.usual_names[parameter]

    def get_rest_name(self, parameter: str) -> str:
        """Return the name in files of a tensor outside of layers."""
        return self.find(parameter).name

    def get_block_name(self, index: int, origin: int, role: str) -> str:
        """Return the name in files of a tensor of block ``index``, which was ``origin``.

        Each expert has names of its own, also where files have one tensor of all.
        """
        architecture = self._architecture
        anatomy = architecture.anatomy[origin]
        layer = f"{architecture.layers_path}.{origin}"
        kind, _, rest = role.partition(".")
        whole, _, number = role.partition(".part")
        if number and whole in anatomy.roles:
            parts = self.find(f"{layer}.{anatomy.roles[whole]}").names_in_order()
            name = parts[int(number)]
        elif role in anatomy.roles:
            name = self.find(f"{layer}.{anatomy.roles[role]}").name
        elif kind == "experts":
            n, _, part = rest.partition(".")
            name = self._get_expert_name(layer, anatomy, int(n), part)
        elif kind == "dense":
            name = f"{self._find_place(layer, anatomy)}.{anatomy.moe}.{rest}_proj.weight"
        else:
            name = f"{self._get_moe_name(layer, anatomy)}.{role}"
        return replace_number(name, origin, index)

    def _get_expert_name(self, layer: str, anatomy: Anatomy, n: int, part: str) -> str:
        first = self.find_expert_part(layer, anatomy, part)
        if isinstance(first, str):
            return f"{self._find_place(layer, anatomy)}.{anatomy.experts}.{n}.{first}"
        return replace_number(first[0], 0, n, last=True)

    def find_expert_part(self, layer: str, anatomy: Anatomy, part: str) -> tuple[str, ...] | str:
        """Find the tensors of one part of all experts; its usual name if they are in one tensor."""
        bias = part.endswith("_bias")
        matrix = "down_proj" if part.startswith("down") else _get_form(anatomy).first
        stored = self.find(f"{layer}.{anatomy.experts}.{matrix}{'_bias' if bias else ''}")
        if not stored.steps:
            return f"{part.removesuffix('_bias')}_proj.{'bias' if bias else 'weight'}"
        check_steps(matrix, stored)
        return stored.names[1 if part.startswith("up") and len(stored.names) > 1 else 0]

    def _find_place(self, layer: str, anatomy: Anatomy) -> str:
        """Return the name of a layer in files."""
        for path in anatomy.roles.values():
            names = self.find(f"{layer}.{path}").names_in_order()
            if names[0].endswith(f".{path}"):
                return names[0].removesuffix(f".{path}")
        return layer

    def is_fused(self, origin: int, anatomy: Anatomy) -> bool:
        """Return whether files have one tensor of all experts of a layer."""
        layer = f"{self._architecture.layers_path}.{origin}"
        return isinstance(self.find_expert_part(layer, anatomy, "down"), str)

    def get_experts_name(self, index: int, origin: int, matrix: str) -> str:
        """Return the name in files of one tensor of all experts of block ``index``."""
        architecture = self._architecture
        path = f"{architecture.layers_path}.{origin}.{architecture.anatomy[origin].experts}"
        return replace_number(self.find(f"{path}.{matrix}").name, origin, index)

    def _get_moe_name(self, layer: str, anatomy: Anatomy) -> str:
        """Return the name in files of the module with experts and router."""
        router = self.find(f"{layer}.{anatomy.roles['router.weight']}").name
        here = anatomy.roles["router.weight"].removeprefix(f"{anatomy.moe}.")
        inside = "." + here if router.endswith("." + here) else "." + here.split(".", 1)[-1]
        return router.removesuffix(inside)


def _get_form(anatomy: Anatomy) -> ExpertsForm:
    assert anatomy.form is not None, "the layer has no experts"
    return anatomy.form


# Endings of the main part of a quantized tensor, and what its plain name has there.
PLAIN_ENDINGS = {".qweight": ".weight", ".weight_packed": ".weight", "_proj_blocks": "_proj"}


def get_plain_name(name: str) -> str:
    """Return the name that a tensor has when it is not quantized.

    >>> get_plain_name("model.layers.0.self_attn.q_proj.qweight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    for ending, plain in PLAIN_ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + plain
    return name


def replace_number(name: str, old: int, new: int, *, last: bool = False) -> str:
    """Replace a number between points, the first or the last that is ``old``.

    >>> replace_number("model.layers.0.mlp.experts.0.up_proj.weight", 0, 7, last=True)
    'model.layers.0.mlp.experts.7.up_proj.weight'
    """
    places = [found for found in NUMBER.finditer(name) if int(found.group()) == old]
    if not places:
        raise ValueError(f"{name} has no number {old}")
    found = places[-1 if last else 0]
    return f"{name[: found.start()]}{new}{name[found.end() :]}"
