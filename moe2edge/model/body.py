"""The part of a decoder layer that goes with its experts, found by a run without numbers.

A layer without its experts adds to its input what transformers' own layer would add if its MoE
module, and the MLPs beside it, returned zeros. Norms that make no difference then are of no use.
Which these are is seen by following gradients: a norm that only the experts read is behind nothing
that is left, and one that reads only the experts gets nothing from the input of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moe2edge.model.anatomy import Anatomy, is_experts
from moe2edge.model.architecture import Architecture, find_layers, pass_by
from moe2edge.model.trial_run import TRIAL_TOKENS, copy_way, forget_numbers, silence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Body:
    """Modules of a layer that go with its experts.

    Attributes:
        modules: number of values that each returns, by the name of the child of the layer.
        before, behind: names of the norms that only these read, and that read only these.
    """

    modules: Mapping[str, int]
    before: tuple[str, ...]
    behind: tuple[str, ...]

    @property
    def can_pass_norm(self) -> bool:
        """True if one norm is there for one module, in whose place its output can be added."""
        return len(self.modules) == 1 and len(self.before) == 1

    def contains(self, path: str, *, keep_norms: bool = False) -> bool:
        """Return whether a tensor of the layer, by its path, goes with the experts."""
        child = path.partition(".")[0]
        gone = () if keep_norms else (*self.before, *self.behind)
        return child in self.modules or child in gone


def find_body(architecture: Architecture, index: int) -> Body | None:
    """Find what goes with the experts of a layer; None: it cannot be told."""
    key = ("body", _describe_kind(find_layers(architecture.model)[1][index]))
    if key not in architecture.looks:
        architecture.looks[key] = _find_body(architecture, index)
    found: Body | None = architecture.looks[key]
    return found


def _describe_kind(layer: Any) -> object:
    """Return what is the same for layers that run the same code: modules, and kinds by name."""
    kinds = [
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | str)
    ]
    return repr(layer), tuple(kinds)


def _find_body(architecture: Architecture, index: int) -> Body | None:
    """Run the layer twice: as it is, and with zeros in place of what goes."""
    import torch

    layer = find_layers(architecture.model)[1][index]
    anatomy = architecture.anatomy[index]
    names = _list_modules(layer, anatomy)
    try:
        with torch.device("cpu"):
            counts = _Trial(architecture, index).count_outputs(names)
            before, behind = _Trial(architecture, index).find_norms(counts, _list_norms(layer))
    except Exception:  # whatever a foreign class raises on a run that it is not made for
        return None
    return Body(counts, before, behind)


def _list_modules(layer: Any, anatomy: Anatomy) -> tuple[str, ...]:
    """List the children of a layer with experts, router, and MLPs beside them."""
    paths = (str(anatomy.experts), anatomy.roles["router.weight"])
    names = {path.partition(".")[0] for path in paths} | set(anatomy.mlps)
    return tuple(n for n, child in layer.named_children() if n in names and child.state_dict())


def _list_norms(layer: Any) -> tuple[str, ...]:
    """List the children of a layer that are norms."""
    return tuple(n for n, child in layer.named_children() if "norm" in n and child.state_dict())


class _Reached(Exception):
    """Ends a run behind the layer."""


class _Trial:
    """Transformers' model with one layer of its own, which is run without numbers."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        path, layers = find_layers(architecture.model)
        others = [_empty(layer) for layer in layers]
        self._layer: Any = copy.deepcopy(layers[index])
        others[index] = self._layer
        self._model = copy_way(architecture.model, path, others)

    def count_outputs(self, names: tuple[str, ...]) -> dict[str, int]:
        """Count the values that children of the layer return."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        counts: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                counts[name] = len(output) if isinstance(output, tuple) else 1

            return hook

        for module in self._layer.modules():
            if is_experts(module):
                pass_by(module)
        for name in names:
            self._layer.get_submodule(name).register_forward_hook(note(name))
        with FakeTensorMode():
            self._run()
        return {name: counts[name] for name in names}

    def find_norms(
        self, counts: Mapping[str, int], norms: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the norms that nothing reads, and those that read nothing.

        Args:
            counts: children that return zeros, with the number of values that they return.
            norms: names of the norms.
        """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Tensor) -> None:
                outputs[name] = output

            return hook

        for name, count in counts.items():
            self._layer.get_submodule(name).forward = partial(give_nothing, count)
        for name in norms:
            self._layer.get_submodule(name).register_forward_hook(keep(name))
        with torch.enable_grad(), FakeTensorMode():
            output = self._run()
            reached = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad}
            slopes: tuple[Tensor | None, ...] = ()
            if reached:
                given = list(reached.values())
                slopes = torch.autograd.grad(output.sum(), given, allow_unused=True)
        before = tuple(n for n, slope in zip(reached, slopes, strict=True) if slope is None)
        behind = tuple(n for n in outputs if n not in reached and self._has_no_bias(n))
        return before, behind

    def _has_no_bias(self, norm: str) -> bool:
        """Return whether a norm puts out zeros for zeros."""
        return [*dict(self._layer.get_submodule(norm).named_parameters())] == ["weight"]

    def _run(self) -> Any:
        """Return the output of the layer; its gradient is that of the input of the layer."""
        import torch

        found: list[Any] = []

        def stop(_: Any, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        self._layer.register_forward_hook(stop)
        forget_numbers(self._model)
        self._model.get_input_embeddings().weight.requires_grad_()
        with silence(), suppress(_Reached):
            self._model(torch.zeros(1, TRIAL_TOKENS, dtype=torch.int64), use_cache=False)
        return found[0]


def _empty(layer: Any) -> Any:
    """Return a stand-in for a layer, without modules, that hands on what it gets."""
    found = copy.copy(layer)
    found.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}}
    return pass_by(found)


def give_nothing(count: int, x: Tensor, *_: Any, **__: Any) -> Any:
    """Return zeros like ``x``, the first of ``count`` values."""
    import torch

    nothing = torch.zeros_like(x)
    return nothing if count == 1 else (nothing, *(None,) * (count - 1))
