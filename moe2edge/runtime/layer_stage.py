"""Run one decoder layer of transformers at a time, inside the model that it belongs to.

The whole model is there without numbers. All layers but one hand on the hidden states that they
get, so that masks, positions, rotary tables and all else that a layer is given comes from
transformers' own code, at the layer's true index.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.architecture import Architecture, build_meta_model, find_layers, pass_by
from moe2edge.model.stock_router import fill_meta, find_factor
from moe2edge.runtime.decoder_blocks import fit_layer
from moe2edge.runtime.expert_kernels import set_expert_implementation

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.block import Block
    from moe2edge.model.model import Model


class _Reached(Exception):
    """Ends a forward pass once the output of the layer is known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop(_: nn.Module, __: Any, output: Any) -> None:
    raise _Reached(output)


class _Entry:
    """Inputs of the layer. It knows no layer: a circle would keep the numbers in memory."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None

    def place(self, _: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Give the layer its hidden states as they are; some models scale what they are given."""
        if given:
            return (self.hidden, *given[1:]), more
        return given, {**more, "hidden_states": self.hidden}


class LayerStage:
    """One decoder layer, without numbers at first, and the model around it.

    Attributes:
        layer: the layer, a copy of its own; whoever made the stage fills it.
    """

    def __init__(self, model: Model, block: Block) -> None:
        """Take the layer that ``block`` was in the source, in the form that it has now."""
        scenery = _build_scenery(model.architecture)
        layer = scenery.copy_layer(block.origin)
        with torch.device("meta"):
            self.layer = fit_layer(layer, model, block)
        self._base = scenery.copy_base(block.origin, self.layer)
        self._entry = _Entry()
        self.layer.register_forward_pre_hook(self._entry.place, with_kwargs=True)
        self.layer.register_forward_hook(_stop)

    def run(self, hidden: Tensor, **more: Any) -> Tensor:
        """Return the output of the layer for ``hidden`` [batch, length, hidden].

        Args:
            hidden: hidden states in front of it.
            more: further arguments of transformers' model, such as positions.
        """
        self._entry.hidden = hidden
        try:
            self._base(inputs_embeds=hidden, use_cache=False, **more)
        except _Reached as reached:
            found: Tensor = reached.output
            return found[0] if isinstance(found, tuple) else found
        raise AssertionError("the layer was not reached")

    @property
    def rotary(self) -> Any:
        """The module of the rotary embedding."""
        return self._base.rotary_emb

    def to(self, device: torch.device) -> None:
        """Move what is around the layer to a device."""
        for name, module in self._base.named_children():
            if name != "layers" and not any(p.is_meta for p in module.parameters()):
                module.to(device)


def share_numbers(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory, though of other shapes."""
    return first.data_ptr() == second.data_ptr() and first.numel() == second.numel()


def measure_expert_scale(model: Model, block: Block) -> float | None:
    """Measure by how much the experts' summed outputs are multiplied in the output of a block.

    The layer runs with zeros in place of its numbers; no memory is taken for them.

    Returns:
        The number; None: more is done to them, such as a norm.
    """
    stage = LayerStage(model, block)
    experts = stage.layer.get_submodule(str(model.architecture.anatomy[block.origin].experts))
    fill_meta(stage.layer, 0.0, but=experts)
    hidden = torch.randn(1, 2, model.embedding.shape[1], generator=torch.Generator().manual_seed(0))

    def run(value: float) -> Tensor:
        experts.forward = partial(_give, value)
        return stage.run(hidden)

    return find_factor(run, atol=1e-5)


def _give(value: float, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.full_like(x, value)


class _Scenery:
    """Transformers' model without numbers, of which stages take copies."""

    def __init__(self, architecture: Architecture) -> None:
        model = build_meta_model(architecture.config)
        set_expert_implementation(model)
        path, layers = find_layers(model)
        owner, _, self._name = path.rpartition(".")
        self._config = model.config
        self._layers = list(layers)
        self._passing = [pass_by(copy.copy(layer)) for layer in layers]
        self._base = model.get_submodule(owner)
        self._model = model
        setattr(self._base, self._name, nn.ModuleList())
        compute_buffers(model, self._base)

    def copy_layer(self, index: int) -> Any:
        """Return a copy of a layer that shares the config."""
        layer = copy.deepcopy(self._layers[index], {id(self._config): self._config})
        compute_buffers(self._model, layer)
        return layer

    def copy_base(self, index: int, layer: Any) -> Any:
        """Return a copy of the model around the layers, with ``layer`` at ``index``."""
        base = copy.copy(self._base)
        memo = {id(self._config): self._config}
        base.__dict__["_modules"] = {
            name: copy.deepcopy(child, memo) for name, child in self._base.named_children()
        }
        placed = nn.ModuleList(self._passing)
        placed[index] = layer
        setattr(base, self._name, placed)
        return base


@lru_cache(maxsize=4)
def _build_scenery(architecture: Architecture) -> _Scenery:
    return _Scenery(architecture)


def compute_buffers(model: Any, root: Any) -> None:
    """Compute the buffers below ``root`` that no checkpoint has, as transformers does.

    Args:
        model: transformers' model, which knows how to initialize its modules.
        root: a module of it.
    """
    for module in root.modules():
        made = module._non_persistent_buffers_set
        names = [
            name for name, b in module.named_buffers(recurse=False) if name in made and b.is_meta
        ]
        if not names:
            continue
        # On a copy without its parameters, which may have numbers by now.
        fresh = copy.copy(module)
        fresh.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)
            for name, p in module._parameters.items()
        }
        fresh.__dict__["_buffers"] = {
            name: torch.empty_like(b, device="cpu") if name in names else b
            for name, b in module._buffers.items()
        }
        with torch.no_grad():
            model._init_weights(fresh)
        for name in names:
            module._buffers[name] = fresh._buffers[name]
