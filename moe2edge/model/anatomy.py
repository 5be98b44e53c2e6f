"""The parts of a decoder layer of transformers, found by looking at its modules.

Two further layers are laid beside it, of models with twice as many experts and with twice as many
chosen ones: what differs in size has one entry per expert, and what differs in value is a number of
experts. Every tensor gets a *role*, the name by which passes ask for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.model.experts import PARTS

# Attributes that transformers' decorator sets on a module of experts, as in `ExpertsForm`.
INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
# The projections of usual attention, whose roles are short.
USUAL = ("q_proj", "k_proj", "v_proj", "o_proj")
# A linear layer with fewer outputs than inputs by this factor is a small gate, and keeps its
# precision: it has few numbers, and each decides much.
SMALL_GATE = 16


@dataclass(frozen=True)
class ExpertsForm:
    """Form of the matrices of a module of experts, as transformers declares it.

    Attributes:
        gated: whether there is a gate beside up.
        biased: whether each expert has biases.
        transposed: whether matrices are stored [in, out].
        concatenated: whether gate stands above up; otherwise their rows alternate.
        normed: whether a norm follows each expert.
    """

    gated: bool
    biased: bool
    transposed: bool
    concatenated: bool
    normed: bool

    @property
    def first(self) -> str:
        """Name of the parameter with gate and up, or up alone."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices of an expert, and of its biases."""
        matrices = PARTS if self.gated else PARTS[1:]
        return (*matrices, *(f"{part}_bias" for part in matrices if self.biased))


@dataclass(frozen=True)
class Anatomy:
    """Parts of one decoder layer.

    Attributes:
        roles: path in the layer of each tensor but those of experts, by role.
        shapes: shape of each tensor that a checkpoint has, by path.
        experts: path of the module of the experts; None: the layer has none.
        form: of their matrices.
        moe: path of the module with experts and router; "" is the layer itself.
        per_expert: axis of the experts in each tensor outside of ``experts`` that has one entry
            for each, by role.
        counts: attributes of modules that hold the number of experts, as (path, name).
        choices: attributes of modules that hold the number of chosen experts.
        tables: roles of tensors that hold numbers of experts.
        mlps: paths of the modules that treat each token by itself, and are no norms.
    """

    roles: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    experts: str | None = None
    form: ExpertsForm | None = None
    moe: str = ""
    per_expert: Mapping[str, int] = field(default_factory=dict)
    counts: tuple[tuple[str, str], ...] = ()
    choices: tuple[tuple[str, str], ...] = ()
    tables: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of experts; 0: the layer has none."""
        return 0 if self.experts is None else self.shapes[f"{self.experts}.down_proj"][0]

    def is_in_mlp(self, role: str) -> bool:
        """Return whether a tensor belongs to an MLP or a shared expert, not to attention."""
        return self.roles[role.partition(".part")[0]].partition(".")[0] in self.mlps


def is_experts(module: Any) -> bool:
    """Return whether a module is one of experts by the interface of transformers."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate")


def find_anatomy(layer: Any, more: Any, wider: Any) -> Anatomy:
    """Find the parts of a layer.

    Args:
        layer: the layer.
        more: the same layer of a model with more experts.
        wider: the same layer of a model whose routers choose more experts.

    Raises:
        Unsupported: the layer has experts but no router.
    """
    shapes = {path: tuple(tensor.shape) for path, tensor in layer.state_dict().items()}
    experts = next((path for path, module in layer.named_modules() if is_experts(module)), None)
    if experts is None:
        roles = _find_roles(layer, shapes, None, {}, "")
        return Anatomy(roles, shapes, mlps=tuple(_find_mlps(layer)))
    inside = f"{experts}."
    grown = {p: axis for p, axis in _find_grown(shapes, more).items() if not p.startswith(inside)}
    moe = experts.rpartition(".")[0]
    scorer = _find_scorer(layer, shapes, grown)
    roles = _find_roles(layer, shapes, experts, grown, scorer)
    paths = {path: role for role, path in roles.items()}
    module = layer.get_submodule(experts)
    return Anatomy(
        roles=roles,
        shapes=shapes,
        experts=experts,
        form=ExpertsForm(*(bool(getattr(module, name)) for name in INTERFACE)),
        moe=moe,
        per_expert={paths[path]: axis for path, axis in grown.items()},
        counts=tuple(_find_attributes(layer, more)),
        choices=tuple(_find_attributes(layer, wider)),
        tables=tuple(paths[path] for path in _find_grown(shapes, wider)),
        mlps=tuple(_find_mlps(layer)),
    )


# ---- what differs between two layers -------------------------------------------------------------


def _find_grown(shapes: Mapping[str, tuple[int, ...]], other: Any) -> dict[str, int]:
    """Find the tensors that are longer in another layer, with the axis."""
    found = {}
    for path, tensor in other.state_dict().items():
        pairs = zip(shapes[path], tensor.shape, strict=True)
        if axes := [n for n, (a, b) in enumerate(pairs) if a != b]:
            found[path] = axes[0]
    return found


def _find_attributes(layer: Any, other: Any) -> Iterator[tuple[str, str]]:
    """Find the attributes of modules that are whole numbers and differ in another layer."""
    others = dict(other.named_modules())
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and getattr(others[path], name, None) != value:
                yield path, name


def _find_scorer(
    layer: Any, shapes: Mapping[str, tuple[int, ...]], grown: Mapping[str, int]
) -> str:
    """Find the matrix that scores experts, one row for each.

    Raises:
        Unsupported: there is none.
    """
    matrices = [path for path, axis in grown.items() if axis == 0 and len(shapes[path]) == 2]
    if not matrices:
        raise Unsupported(f"{type(layer).__name__} has experts, but no router was found")
    return max(matrices, key=lambda path: shapes[path][1])


# ---- roles ---------------------------------------------------------------------------------------


def _find_roles(
    layer: Any,
    shapes: Mapping[str, tuple[int, ...]],
    experts: str | None,
    grown: Mapping[str, int],
    scorer: str,
) -> dict[str, str]:
    """Return the path of each tensor outside of the experts, by its role."""
    short = _find_short_roles(layer, shapes, has_experts=experts is not None)
    linears = {f"{path}.weight" for path in _list_linears(layer)}
    router = scorer.rpartition(".")[0]
    # The child of the MoE module that scores, with all that it consists of.
    inside = experts.rpartition(".")[0].count(".") + 1 if experts and "." in experts else 0
    scoring = ".".join(scorer.split(".")[: inside + 1])
    roles: dict[str, str] = {}
    for path, shape in shapes.items():
        if experts is not None and path.startswith(f"{experts}."):
            continue
        owner = path.rpartition(".")[0]
        small = len(shape) == 2 and shape[0] * SMALL_GATE <= shape[1]
        if path == scorer:
            role = "router.weight"
        elif path in grown:
            role = f"router.{path.removeprefix(f'{router}.')}"
        elif path in short:
            role = short[path]
        elif path in linears and not small and not _is_excluded(path, scoring):
            role = f"linear.{path}"
        elif path in linears:  # one that keeps its precision
            role = f"other.{path}"
        elif owner and "." not in owner and "norm" in owner and len(shape) == 1:
            role = f"norms.{path}"
        elif path.startswith("self_attn."):
            role = f"attention.{path.removeprefix('self_attn.')}"
        else:
            role = f"other.{path}"
        roles[role] = path
    return roles


def _is_excluded(path: str, scoring: str) -> bool:
    """Return whether a linear layer keeps its precision: one of a router, or of an indexer."""
    return (bool(scoring) and path.startswith(f"{scoring}.")) or "indexer" in path.split(".")


def _find_short_roles(
    layer: Any, shapes: Mapping[str, tuple[int, ...]], *, has_experts: bool
) -> dict[str, str]:
    """Return the roles of usual attention, of a plain MLP and of a shared expert, by path."""
    found = {
        f"self_attn.{name}.weight": f"attention.{name}.weight"
        for name in USUAL
        if all(f"self_attn.{usual}.weight" in shapes for usual in USUAL)
    }
    mlps = [path for path, module in layer.named_modules() if _is_gated_mlp(module)]
    shared = [path for path in mlps if path.rpartition(".")[2].startswith("shared")]
    kinds = [("shared", shared)] if has_experts else [("dense", mlps)]
    for kind, paths in kinds:
        if len(paths) == 1:
            found |= {f"{paths[0]}.{part}_proj.weight": f"{kind}.{part}" for part in PARTS}
            found |= {f"{paths[0]}_gate.weight": f"{kind}.router"} if kind == "shared" else {}
    return found


def _is_gated_mlp(module: Any) -> bool:
    """Return whether a module has three linear layers without biases: gate, up and down."""
    from torch import nn

    names = tuple(f"{part}_proj" for part in PARTS)
    children = dict(module.named_children())
    linears = [children.get(name) for name in names]
    return all(isinstance(one, nn.Linear) and one.bias is None for one in linears)


def _find_mlps(layer: Any) -> Iterator[str]:
    """Find the children of a layer that get the hidden states and nothing else.

    What mixes tokens gets a mask or a cache as well.
    """
    from torch import nn

    for name, child in layer.named_children():
        alone = len(inspect.signature(child.forward).parameters) == 1
        if alone and not isinstance(child, nn.Linear) and "norm" not in name:
            yield name


def _list_linears(layer: Any) -> Iterator[str]:
    from torch import nn

    return (path for path, module in layer.named_modules() if isinstance(module, nn.Linear))
