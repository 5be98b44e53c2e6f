"""Names in files of the tensors of a model, of its source or of an output."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
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
        self._split_names: dict[tuple[int, int, str], tuple[str, str]] = {}
        self._block_names: dict[tuple[int, int], dict[str, str]] = {}
        plain = {get_plain_name(name): name for name in names}
        self.stored = map_names(architecture.model, plain)
        used = {name for one in self.stored.values() for part in one.names for name in part}
        # Layers with tensors of single experts, where transformers knows of one for all.
        self._single = frozenset(
            n
            for n, anatomy in enumerate(architecture.anatomy)
            if self._has_single(n, anatomy, plain)
        )
        used |= {name for n in self._single for name in self._list_single(n)}
        self.unknown = frozenset(name for plain, name in plain.items() if plain not in used)

    def _has_single(self, origin: int, anatomy: Anatomy, plain: Container[str]) -> bool:
        """Return whether a layer has experts that only programs which quantize store one by one."""
        if anatomy.experts is None or not self.is_fused(origin, anatomy):
            return False
        layer = f"{self._architecture.layers_path}.{origin}"
        if f"{layer}.{anatomy.experts}.down_proj" in self.stored:
            return False
        return any(name in plain for name in self._list_single(origin, 1))

    def _list_single(self, origin: int, count: int | None = None) -> Iterator[str]:
        """Yield the names of all tensors of single experts of a layer, or of the first ones."""
        anatomy = self._architecture.anatomy[origin]
        for part in _get_form(anatomy).parts:
            before, behind = self._split_expert_name(origin, origin, part)
            for n in range(anatomy.count if count is None else count):
                yield f"{before}{n}{behind}"

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

        Each expert has names of its own, also where files have one tensor of all. Names are asked
        for by the hundred thousand, so they are kept.
        """
        known = self._block_names.get((index, origin))
        if known is None:
            known = self._block_names[index, origin] = {}
        name = known.get(role)
        if name is None:
            name = known[role] = self._find_block_name(index, origin, role)
        return name

    def _find_block_name(self, index: int, origin: int, role: str) -> str:
        architecture = self._architecture
        anatomy = architecture.anatomy[origin]
        layer = f"{architecture.layers_path}.{origin}"
        kind, _, rest = role.partition(".")
        if kind == "experts":
            n, _, part = rest.partition(".")
            before, behind = self._split_expert_name(index, origin, part)
            return f"{before}{n}{behind}"
        whole, _, number = role.partition(".part")
        if number and whole in anatomy.roles:
            parts = self.find(f"{layer}.{anatomy.roles[whole]}").names_in_order()
            name = parts[int(number)]
        elif role in anatomy.roles:
            name = self.find(f"{layer}.{anatomy.roles[role]}").name
        elif kind == "dense":
            name = f"{self._find_place(layer, anatomy)}.{anatomy.moe}.{rest}_proj.weight"
        else:
            name = f"{self._get_moe_name(layer, anatomy)}.{role}"
        return replace_number(name, origin, index)

    def _split_expert_name(self, index: int, origin: int, part: str) -> tuple[str, str]:
        """Return what stands before and behind the number of an expert in a name in files."""
        key = (index, origin, part)
        if key not in self._split_names:
            layer = f"{self._architecture.layers_path}.{origin}"
            name = self._get_expert_name(layer, self._architecture.anatomy[origin], part)
            place = list(NUMBER.finditer(replaced := replace_number(name, origin, index)))[-1]
            self._split_names[key] = replaced[: place.start()], replaced[place.end() :]
        return self._split_names[key]

    def _get_expert_name(self, layer: str, anatomy: Anatomy, part: str) -> str:
        """Return the name in files of a tensor of the first expert, whatever its number is.

        Where files have one tensor of all, it is the one that transformers reads as well, or else
        that of programs which quantize: one module for each expert, below that of all.
        """
        bias = part.endswith("_bias")
        matrix = "down_proj" if part.startswith("down") else _get_form(anatomy).first
        parameter = f"{layer}.{anatomy.experts}.{matrix}{'_bias' if bias else ''}"
        stored = self.find(parameter)
        form = stored if stored.steps else self._architecture.usual_names[parameter]
        if form.steps:
            check_steps(matrix, form)
            name = form.names[1 if part.startswith("up") and len(form.names) > 1 else 0][0]
            name = name if form is stored else self._place(name, layer, anatomy)
            return name
        end = f"{part.removesuffix('_bias')}_proj.{'bias' if bias else 'weight'}"
        return f"{self._find_place(layer, anatomy)}.{anatomy.experts}.0.{end}"

    def has_single_experts(self, origin: int, anatomy: Anatomy) -> bool:
        """Return whether files have tensors of single experts in a layer."""
        return origin in self._single or not self.is_fused(origin, anatomy)

    def _find_place(self, layer: str, anatomy: Anatomy) -> str:
        """Return the name of a layer in files."""
        return _find_layer_name(layer, anatomy, self.find)

    def _place(self, usual: str, layer: str, anatomy: Anatomy) -> str:
        """Return the usual name of a tensor of a layer with the name that the layer has here."""
        known = self._architecture.usual_names
        there = _find_layer_name(layer, anatomy, known.__getitem__)
        here = self._find_place(layer, anatomy)
        return here + usual.removeprefix(there) if usual.startswith(f"{there}.") else usual

    def is_fused(self, origin: int, anatomy: Anatomy) -> bool:
        """Return whether transformers reads one tensor of all experts of a layer here."""
        layer = f"{self._architecture.layers_path}.{origin}"
        return not self.find(f"{layer}.{anatomy.experts}.down_proj").steps

    def get_experts_name(self, index: int, origin: int, matrix: str) -> str:
        """Return the name in files of one tensor of all experts of block ``index``."""
        anatomy = self._architecture.anatomy[origin]
        layer = f"{self._architecture.layers_path}.{origin}"
        parameter = f"{layer}.{anatomy.experts}.{matrix}"
        name = self.find(parameter).name
        if parameter not in self.stored:
            name = self._place(name, layer, anatomy)
        return replace_number(name, origin, index)

    def _get_moe_name(self, layer: str, anatomy: Anatomy) -> str:
        """Return the name in files of the module with experts and router."""
        router = self.find(f"{layer}.{anatomy.roles['router.weight']}").name
        here = anatomy.roles["router.weight"].removeprefix(f"{anatomy.moe}.")
        inside = "." + here if router.endswith("." + here) else "." + here.split(".", 1)[-1]
        return router.removesuffix(inside)


def _find_layer_name(layer: str, anatomy: Anatomy, find: Callable[[str], Stored]) -> str:
    """Return the name in files of a layer, by the names of its tensors."""
    for path in anatomy.roles.values():
        names = find(f"{layer}.{path}").names_in_order()
        if names[0].endswith(f".{path}"):
            return names[0].removesuffix(f".{path}")
    return layer


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


def replace_number(name: str, old: int, new: int) -> str:
    """Replace the first number between points that is ``old``.

    >>> replace_number("model.layers.0.mlp.experts.0.up_proj.weight", 0, 7)
    'model.layers.7.mlp.experts.0.up_proj.weight'

    Raises:
        ValueError: there is none.
    """
    found = next((one for one in NUMBER.finditer(name) if int(one.group()) == old), None)
    if found is None:
        raise ValueError(f"{name} has no number {old}")
    return f"{name[: found.start()]}{new}{name[found.end() :]}"
