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
from moe2edge.model.anatomy import Anatomy, ExpertsForm
from moe2edge.model.architecture import find_layers
from moe2edge.model.block import Block
from moe2edge.model.body import find_body, give_nothing
from moe2edge.model.experts import PARTS, Dense, Expert, Linear, Replacement, Tied
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.model.traits import scales_to_one_sum
from moe2edge.model.weights import Weight
from moe2edge.numerics.skipping import apply_skipping, skip_in_any_order
from moe2edge.runtime.mixed_experts import MixedExperts, find_experts_name

if TYPE_CHECKING:
    from torch import Tensor


class Nothing(nn.Module):
    """In place of an MLP: adds nothing to the residual stream.

    Attributes:
        count: number of values that it returns.
    """

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return zeros like ``x``, and nothing besides."""
        return give_nothing(self.count, x)


class Passing(Nothing):
    """In place of an MLP: hands on its input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return ``x``, and nothing besides."""
        return x if self.count == 1 else (x, *(None,) * (self.count - 1))


class NoNorm(nn.Identity):
    """In place of a norm: hands on its input. Some layers ask for the dtype of the weight."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        dtype = next(norm.parameters()).dtype
        nothing = torch.empty(0, dtype=dtype, device="cpu")
        self.register_buffer("weight", nothing, persistent=False)


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
        hidden = mlp.shared.mlp.gate.shape[1]
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if mlp.shared.gate else None
        if mlp.expert is not None:
            own = GatedMLP(mlp.expert)
            self.gate_proj, self.up_proj, self.down_proj = (
                own.gate_proj,
                own.up_proj,
                own.down_proj,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum for ``x`` [..., hidden]."""
        out: Tensor = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            out = torch.sigmoid(self.shared_expert_gate(x)) * out
        if hasattr(self, "gate_proj"):
            out = out + _apply_gated_mlp(self, x)
        return out


def fit_layers(layers: nn.ModuleList, model: Model) -> None:
    """Give each decoder layer the form of its block. Call it under the device "meta"."""
    for block in model.blocks:
        layers[block.index] = fit_layer(layers[block.index], model, block)


def fit_meta_layers(layers: nn.ModuleList, model: Model) -> None:
    """Give layers without numbers the forms of the blocks, as `fit_layers` does."""
    with torch.device("meta"):
        fit_layers(layers, model)


def fit_layer(layer: Any, model: Model, block: Block) -> Any:
    """Give a decoder layer the form of its block. Call it under the device "meta"."""
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        anatomy = model.architecture.anatomy[block.origin]
        _resize_experts(layer, anatomy, mlp)
        if not anatomy.choices:
            _set_top_k(layer, model.family.top_k_key, mlp.router.top_k)
        if not mlp.is_plain:
            path = str(anatomy.experts)
            layer.set_submodule(path, MixedExperts(layer.get_submodule(path), mlp))
        if mlp.router.skip_below and model.family.generic:
            with torch.device("cpu"):  # where its rule is tried
                normalizes = scales_to_one_sum(model.architecture, block.origin)
            experts = layer.get_submodule(str(anatomy.experts))
            hook = _SkippedChoices(mlp.router_rows, mlp.router.skip_below, normalizes)
            experts._is_expert_parallel = True
            experts.skipping = experts.register_forward_pre_hook(hook)
        elif mlp.router.skip_below:
            add_skipping(layer.mlp, mlp.router.skip_below, renormalize=mlp.router.renormalize)
    elif model.family.generic:
        if model.architecture.anatomy[block.origin].experts is not None:
            _take_body_out(layer, model, block)
    elif not _is_as_built(layer, model, block):
        _fit_unrouted(layer, block)
    return layer


def _fit_unrouted(layer: Any, block: Block) -> None:
    """Give a layer of a family with a row the form of a block without experts."""
    if isinstance(block.mlp, Dense):
        layer.mlp = GatedMLP(block.mlp)
    elif isinstance(block.mlp, UnroutedMLP):
        layer.mlp = AlwaysOn(block.mlp)
    elif block.passes_norm:
        layer.mlp = nn.Identity()
    else:
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()


def _take_body_out(layer: Any, model: Model, block: Block) -> None:
    """Take out of a layer what goes with its experts."""
    body = find_body(model.architecture, block.origin)
    assert body is not None, "a block lost its experts, which cannot go by themselves"
    for name, count in body.modules.items():
        setattr(layer, name, Passing(count) if block.passes_norm else Nothing(count))
    for name in () if block.passes_norm else (*body.before, *body.behind):
        setattr(layer, name, NoNorm(layer.get_submodule(name)))


def _is_as_built(layer: Any, model: Model, block: Block) -> bool:
    """Return whether a layer, as transformers' class made it, is a block without experts.

    It may be the layer of another config than the model's: a source has experts where an output
    has a plain MLP.
    """
    if not isinstance(block.mlp, Dense):
        return model_.is_stock_form(model, block)
    gate = getattr(layer.mlp, "gate_proj", None)
    return gate is not None and bool(gate.out_features == block.mlp.gate.shape[0])


def _resize_experts(layer: Any, anatomy: Anatomy, mlp: MoELayer) -> None:
    """Give a layer the numbers of experts, of rows of its router and of chosen ones that it has.

    Everything is changed on the instances; parameters that get another size lose their numbers.
    """
    assert anatomy.experts is not None, "a layer with experts has none in transformers' class"
    experts = layer.get_submodule(anatomy.experts)
    for path, name in anatomy.counts:
        count = len(mlp.experts) if path == anatomy.experts else mlp.router_rows
        setattr(layer.get_submodule(path), name, count)
    for path, name in anatomy.choices:
        setattr(layer.get_submodule(path), name, mlp.router.top_k)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        _resize(experts, name, parameter, 0, len(mlp.experts))
    for role, axis in anatomy.per_expert.items():
        owner, _, name = anatomy.roles[role].rpartition(".")
        module = layer.get_submodule(owner)
        _resize(module, name, getattr(module, name), axis, mlp.router_rows)


def _set_top_k(layer: Any, key: str, top_k: int) -> None:
    """Give modules that read the number of chosen experts while they run a config of their own."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if getattr(config, key, top_k) != top_k:
            module.config = copy.copy(config)
            setattr(module.config, key, top_k)


def _resize(module: Any, name: str, tensor: Tensor, axis: int, size: int) -> None:
    """Replace a parameter or buffer by an empty one of another size."""
    if tensor.shape[axis] == size:
        return
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
    if name in module._parameters:
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    else:
        module._buffers[name] = empty


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


@dataclass(frozen=True)
class _SkippedChoices:
    """Forward hook of the experts of families without a row; the same as `_SkippingHook`."""

    experts: int
    skip_below: tuple[float, ...]
    renormalize: bool

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, ids, weights = args
        weights, gone = skip_in_any_order(weights, self.skip_below, renormalize=self.renormalize)
        return x, ids.masked_fill(gone, self.experts), weights


def disable_skipping(model: nn.Module) -> None:
    """Remove dynamic skipping from a loaded transformers model; every chosen expert runs then."""
    for module in model.modules():
        if handle := getattr(module, "skipping", None):
            handle.remove()


def load_block_state(
    model: Model,
    block: Block,
    wanted: Callable[[str], bool] = lambda _: True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Load a block's numbers in float32 under transformers' names in memory, experts fused.

    Args:
        model: the model.
        block: one of its blocks.
        wanted: says by its role whether to load a tensor; the same for all experts.
        dtype: of the matrices of experts, which hold it exactly.
    """
    state: dict[str, Tensor] = {}
    anatomy = model.architecture.anatomy[block.origin]
    parts: dict[str, list[Tensor]] = {}
    for role, weight in block.weights():
        if wanted(role) and (name := find_module_name(anatomy, role)):
            parts.setdefault(name, []).append(load_finite(weight))
    # A tensor that files have in parts is put together along its first axis.
    state |= {n: found[0] if len(found) == 1 else torch.cat(found) for n, found in parts.items()}
    if isinstance(block.mlp, MoELayer) and wanted("experts.0.gate"):
        assert anatomy.form is not None, "a layer with experts has none in transformers' class"
        fused = _fuse_experts(block.mlp.experts, anatomy.form, dtype)
        at = find_experts_name(block.mlp, str(anatomy.experts))
        state |= {f"{at}.{name}": numbers for name, numbers in fused.items()}
    if isinstance(block.mlp, MoELayer) and block.mlp.replaced and wanted("substitutes.0"):
        fused = _fuse_replacements(block.mlp)
        state |= {f"{anatomy.experts}.substitutes.{name}": t for name, t in fused.items()}
    if isinstance(block.mlp, MoELayer) and wanted("members.0"):
        fused = _fuse_factors(block.mlp)
        state |= {f"{anatomy.experts}.members.{name}": t for name, t in fused.items()}
    return state


def find_module_name(anatomy: Anatomy, role: str) -> str | None:
    """Return transformers' name in memory for a role; None for a part of a fused tensor."""
    if found := anatomy.roles.get(role.partition(".part")[0]):
        return found
    # Forms that transformers' class does not know: see `fit_layer`.
    kind, _, rest = role.partition(".")
    names = {
        "norms": rest,
        "attention": f"self_attn.{rest}",
        "router": f"mlp.gate.{rest}",
        "shared": f"mlp.shared_expert.{rest}_proj.weight",
        "dense": f"mlp.{rest}_proj.weight",
    }
    return "mlp.shared_expert_gate.weight" if role == "shared.router" else names.get(kind)


def _fuse_experts(
    experts: Sequence[Expert], form: ExpertsForm, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the parameters of transformers' module of experts.

    ``gate_up_proj`` is [experts, 2 width, hidden], ``down_proj`` [experts, hidden, width], with the
    last two axes exchanged if the form says so.
    """
    width, hidden = experts[0].up.shape
    gates = experts[0].gate.shape[0]  # 0: there is no gate, and up stands alone
    gate_up = torch.empty(len(experts), gates + width, hidden, dtype=dtype)
    down = torch.empty(len(experts), hidden, width, dtype=dtype)
    for n, expert in enumerate(experts):
        for place, weight in (
            (gate_up[n, :gates], expert.gate),
            (gate_up[n, gates:], expert.up),
            (down[n], expert.down),
        ):
            if weight.count:
                place.copy_(check_finite(weight.name, weight.load()))
    fused = {form.first: arrange_gate_up(gate_up, form), "down_proj": down}
    if form.transposed:
        fused = {name: matrices.transpose(1, 2) for name, matrices in fused.items()}
    if form.biased:
        biases = [{part: load_finite(w) for part, w in e.biases.items()} for e in experts]
        parts = ("gate", "up") if form.gated else ("up",)
        both = torch.stack([torch.cat([own[part] for part in parts]) for own in biases])
        fused[f"{form.first}_bias"] = arrange_gate_up(both, form)
        fused["down_proj_bias"] = torch.stack([own["down"] for own in biases])
    return {name: numbers.contiguous() for name, numbers in fused.items()}


def arrange_gate_up(both: Tensor, form: ExpertsForm) -> Tensor:
    """Return gate above up [experts, 2 width, ...] in the order of a form."""
    if form.concatenated or not form.gated:
        return both
    return torch.stack(both.chunk(2, dim=1), dim=2).flatten(1, 2)


def find_activation(model: Model, block: Block) -> Callable[[Tensor, Tensor], Tensor]:
    """Return transformers' function from gate and up of a block's experts to what ``down`` gets.

    Both are [n, width]; gate is [n, 0] where experts have none.
    """
    anatomy = model.architecture.anatomy[block.origin]
    form = anatomy.form
    assert form is not None, "a layer without experts has no activation"
    layer = find_layers(model.architecture.model)[1][block.origin]
    experts = layer.get_submodule(str(anatomy.experts))
    act = experts._apply_gate if form.gated else experts.act_fn
    return lambda gate, up: act(arrange_gate_up(torch.cat([gate, up], dim=1), form))


def _fuse_replacements(layer: MoELayer) -> dict[str, Tensor]:
    """Return the parameters of `Replacements`."""
    found = [row for row in layer.rows if isinstance(row, Replacement)]
    linear = [row for row in found if isinstance(row, Linear)]
    nothing = torch.empty(0, layer.hidden)
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
    ends = torch.aminmax(numbers) if numbers.numel() else ()
    if not all(bool(torch.isfinite(end)) for end in ends):
        raise InputError(
            f"{name} holds numbers that are not finite in float32; the checkpoint is damaged, get "
            "it again"
        )
    return numbers
