"""Blocks as modules of transformers: its own decoder layers, in the form that each block has.

A layer of another size is built by transformers' own class from a config that says so. Forms that
the class does not know (nothing after attention, a plain MLP where experts were, dynamic skipping)
are put in its place here, on the instance: no class of transformers is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.errors import InputError
from moe2edge.model import model as model_
from moe2edge.model.experts import PARTS, Dense, Linear, Replacement, Tied
from moe2edge.model.hf_config import build_transformers_config
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import SECOND_NORM, Block, Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.skipping import apply_skipping
from moe2edge.runtime.mixed_experts import MixedExperts, find_experts_name

if TYPE_CHECKING:
    from torch import Tensor


class Nothing(nn.Module):
    """In place of an MLP: adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros like ``x``."""
        return torch.zeros_like(x)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, under the names that transformers gives its own."""

    def __init__(self, mlp: Dense) -> None:
        super().__init__()
        width, hidden = mlp.gate.shape
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to ``x`` [..., hidden]."""
        return _apply_gated_mlp(self, x)


def _apply_gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Apply a gated MLP with the three matrices of a module."""
    out: Tensor = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return out


class AlwaysOn(nn.Module):
    """A shared expert times the sigmoid of its gate, and with ``expert`` a further MLP."""

    def __init__(self, mlp: UnroutedMLP) -> None:
        super().__init__()
        self.shared_expert = GatedMLP(mlp.shared.mlp)
        self.shared_expert_gate = nn.Linear(mlp.shared.gate.shape[1], 1, bias=False)
        if mlp.expert is not None:
            own = GatedMLP(mlp.expert)
            self.gate_proj, self.up_proj, self.down_proj = (
                own.gate_proj,
                own.up_proj,
                own.down_proj,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum for ``x`` [..., hidden]."""
        out: Tensor = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        if hasattr(self, "gate_proj"):
            out = out + _apply_gated_mlp(self, x)
        return out


def fit_layers(layers: nn.ModuleList, model: Model) -> None:
    """Give each decoder layer the form of its block. Call it under the device "meta"."""
    config = build_transformers_config(model)
    for block in model.blocks:
        layers[block.index] = _fit_layer(layers[block.index], config, model, block)


def _fit_layer(layer: Any, config: Any, model: Model, block: Block) -> Any:
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        sizes = {
            model.family.experts_key[0]: len(mlp.experts),
            "num_experts_per_tok": mlp.router.top_k,
        }
        if any(getattr(config, key) != size for key, size in sizes.items()):
            layer = _build_layer_like(layer, config, block.index, sizes)
        if not mlp.is_plain:
            layer.mlp.experts = MixedExperts(layer.mlp.experts, mlp)
            layer.mlp.gate.weight = nn.Parameter(torch.empty(mlp.router.weight.shape))
        if mlp.router.skip_below:
            add_skipping(layer.mlp, mlp.router.skip_below, renormalize=mlp.router.renormalize)
    elif not model_.is_stock_form(model, block):
        if isinstance(mlp, Dense):
            layer.mlp = GatedMLP(mlp)
        elif isinstance(mlp, UnroutedMLP):
            layer.mlp = AlwaysOn(mlp)
        elif SECOND_NORM in block.norms:
            layer.mlp = nn.Identity()
        else:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()
    return layer


def _build_layer_like(layer: Any, config: Any, index: int, own: dict[str, int]) -> Any:
    """Return a decoder layer of the same class with other settings."""
    changed = copy.copy(config)
    for key, value in own.items():
        setattr(changed, key, value)
    fresh = type(layer)(changed, index)
    shared = next((m.config for m in layer.modules() if hasattr(m, "config")), config)
    for module in fresh.modules():
        # All modules share one config, through which transformers switches implementations.
        if getattr(module, "config", None) is changed:
            module.config = shared
    return fresh


def add_skipping(moe: Any, skip_below: Sequence[float], *, renormalize: bool) -> None:
    """Make the router of a transformers MoE module leave out experts of low weight.

    A skipped place gets weight zero and the id behind the last expert. The expert implementations
    of transformers take it for "computed elsewhere" (expert parallelism) and spend no time on it.
    """
    moe.experts._is_expert_parallel = True
    hook = _SkippingHook(moe.experts.num_experts, tuple(skip_below), renormalize)
    # The handle is kept for `disable_skipping`.
    moe.gate.skipping = moe.gate.register_forward_hook(hook)


@dataclass(frozen=True)
class _SkippingHook:
    """Forward hook of a router; a dataclass, so that models can be pickled."""

    experts: int
    skip_below: tuple[float, ...]
    renormalize: bool

    def __call__(self, _: nn.Module, __: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, ids = out
        weights, skipped = apply_skipping(weights, self.skip_below, renormalize=self.renormalize)
        return logits, weights, ids.masked_fill(skipped, self.experts)


def disable_skipping(model: nn.Module) -> None:
    """Remove dynamic skipping from a loaded transformers model; every chosen expert runs then."""
    for module in model.modules():
        if handle := getattr(module, "skipping", None):
            handle.remove()


def load_block_state(
    block: Block, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, Tensor]:
    """Load a block's numbers in float32 under transformers' names in memory, experts fused.

    Args:
        block: the block.
        wanted: says by its role whether to load a tensor; the same for all experts.
    """
    state: dict[str, Tensor] = {}
    for role, weight in block.weights():
        if wanted(role) and (name := find_module_name(role)):
            state[name] = load_finite(weight)
    if isinstance(block.mlp, MoELayer) and wanted("experts.0.gate"):
        fused, at = _fuse_experts(block.mlp.experts), find_experts_name(block.mlp)
        state |= {f"{at}.{name}": numbers for name, numbers in fused.items()}
    if isinstance(block.mlp, MoELayer) and block.mlp.replaced and wanted("substitutes.0"):
        fused = _fuse_replacements(block.mlp)
        state |= {f"mlp.experts.substitutes.{name}": t for name, t in fused.items()}
    if isinstance(block.mlp, MoELayer) and wanted("members.0"):
        fused = _fuse_factors(block.mlp)
        state |= {f"mlp.experts.members.{name}": t for name, t in fused.items()}
    return state


def find_module_name(role: str) -> str | None:
    """Return transformers' name in memory for a role; None for a part of a fused tensor."""
    kind, _, rest = role.partition(".")
    names = {
        "norms": rest,
        "attention": f"self_attn.{rest}",
        "router": f"mlp.gate.{rest}",
        "shared": f"mlp.shared_expert.{rest}_proj.weight",
        "dense": f"mlp.{rest}_proj.weight",
    }
    return "mlp.shared_expert_gate.weight" if role == "shared.router" else names.get(kind)


def _fuse_experts(experts: Sequence[Dense]) -> dict[str, Tensor]:
    """Return ``gate_up_proj`` [experts, 2 width, hidden] and ``down_proj`` [.., hidden, width]."""
    width, hidden = experts[0].gate.shape
    gate_up = torch.empty(len(experts), 2 * width, hidden)
    down = torch.empty(len(experts), hidden, width)
    for n, expert in enumerate(experts):
        for place, weight in (
            (gate_up[n, :width], expert.gate),
            (gate_up[n, width:], expert.up),
            (down[n], expert.down),
        ):
            place.copy_(check_finite(weight.name, weight.load()))
    return {"gate_up_proj": gate_up, "down_proj": down}


def _fuse_replacements(layer: MoELayer) -> dict[str, Tensor]:
    """Return the parameters of `Replacements`."""
    found = [row for row in layer.rows if isinstance(row, Replacement)]
    linear = [row for row in found if isinstance(row, Linear)]
    nothing = torch.empty(0, layer.router.weight.shape[1])
    return {
        "constants": torch.stack([load_finite(row.constant) for row in found]),
        "first": torch.cat([nothing, *(load_finite(row.first) for row in linear)]),
        "second": torch.cat([nothing.T, *(load_finite(row.second) for row in linear)], dim=1),
    }


def _fuse_factors(layer: MoELayer) -> dict[str, Tensor]:
    """Return the parameters of `TiedExperts`."""
    found = [row.factors for row in layer.rows if isinstance(row, Tied)]
    return {
        f"{part}_{name}": torch.stack([load_finite(getattr(f[part], name)) for f in found])
        for part in PARTS
        for name in ("first", "second")
        if found
    }


def load_finite(weight: Weight) -> Tensor:
    """Load the numbers of a weight in float32.

    Raises:
        InputError: some are not finite.
    """
    return check_finite(weight.name, weight.load().float())


def check_finite(name: str, numbers: Tensor) -> Tensor:
    """Return ``numbers`` of the tensor ``name``.

    Raises:
        InputError: some are not finite.
    """
    # Minimum and maximum are not finite if any number is not.
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(numbers)):
        raise InputError(
            f"{name} holds numbers that are not finite in float32; the checkpoint is damaged, get "
            "it again"
        )
    return numbers
