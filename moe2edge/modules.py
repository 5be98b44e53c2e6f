"""Blocks as modules of transformers: its own decoder layers, in the form that each block has.

A layer of another size is built by transformers' own class from a config that says so. What the
class has no form for (nothing after attention, a plain MLP where experts were, dynamic skipping)
is put in its place here, on the instance: no class of transformers is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge import per_layer
from moe2edge.errors import InputError
from moe2edge.layers import PARTS, Always, Dense, MoELayer, Weight
from moe2edge.model import SECOND_NORM, Block, Model

if TYPE_CHECKING:
    from torch import Tensor


class Nothing(nn.Module):
    """In place of an MLP: adds nothing to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like ``x``."""
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
        """The MLP of ``x`` [..., hidden]."""
        return _gated(self, x)


def _gated(mlp: Any, x: Tensor) -> Tensor:
    """By the three matrices that a module holds."""
    out: Tensor = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return out


class AlwaysOn(nn.Module):
    """A shared expert times the sigmoid of its gate, and with ``expert`` a further MLP."""

    def __init__(self, mlp: Always) -> None:
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
        """The sum for ``x`` [..., hidden]."""
        out: Tensor = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        if hasattr(self, "gate_proj"):
            out = out + _gated(self, x)
        return out


class Substitutes(nn.Module):
    """What answers in the place of some experts of a layer, all at once.

    Attributes:
        constants: [substitutes, hidden].
        first, second: matrices of all linear maps side by side, [ranks, hidden], [hidden, ranks].
        ranks: of each substitute, 0 for a constant.
        behind: the id of the first one: experts come before them.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.ranks = tuple(s.rank for s in layer.substitutes)
        self.behind = layer.routed
        hidden, width = layer.router.weight.shape[1], sum(self.ranks)
        self.constants = nn.Parameter(torch.empty(len(self.ranks), hidden), requires_grad=False)
        self.first = nn.Parameter(torch.empty(width, hidden), requires_grad=False)
        self.second = nn.Parameter(torch.empty(hidden, width), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Their part in the output of the layer, [tokens, hidden].

        Args:
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen experts and substitutes, int64 [tokens, k]; one behind the last
                substitute stands for none.
            weights: what outputs are multiplied with, [tokens, k].
        """
        count = len(self.ranks)
        # A column for experts before those of substitutes, and one for none behind them.
        columns = (ids - self.behind + 1).clamp(0, count + 1)
        gates = x.new_zeros(len(x), count + 2).scatter_add(1, columns, weights.to(x.dtype))
        gates = gates[:, 1:-1]
        out: Tensor = gates @ self.constants
        if len(self.first):
            ranks = torch.tensor(self.ranks, device=x.device)
            inside = (x @ self.first.T) * gates.repeat_interleave(ranks, dim=1)
            out = out + inside @ self.second.T
        return out


class Members(nn.Module):
    """Experts that have the matrices of one of the layer's experts plus factors of low rank.

    The matrices are never added up: an expert costs what its base does, and its factors.

    Attributes:
        bases: of each member, the expert whose matrices it has; None: the factors are all.
        gate_first, up_first, down_first: [members, rank, in].
        gate_second, up_second, down_second: [members, out, rank].
        original_share: while training anneals, how much of a member is what it was before.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        own = [m for m in layer.members if m.factors]
        self.bases = tuple(m.base for m in own)
        for part in PARTS:
            for name in ("first", "second"):
                shape = getattr(own[0].factors[part], name).shape
                numbers = nn.Parameter(torch.empty(len(own), *shape), requires_grad=False)
                setattr(self, f"{part}_{name}", numbers)
        self.original_share = 0.0
        self._originals: tuple[Tensor, Tensor] | None = None

    def anneal(self, gate_up: Tensor, down: Tensor) -> None:
        """Start as the experts that members were: LightMoE's recovery.

        While ``original_share`` s is above 0, a matrix is ``s W + (1 - s) (B + second @ first)``.

        Args:
            gate_up: W of gate above that of up, [members, 2 width, hidden].
            down: [members, hidden, width].
        """
        self._originals, self.original_share = (gate_up, down), 1.0

    def forget_originals(self) -> None:
        """Be what the base and the factors make, and nothing else."""
        self._originals, self.original_share = None, 0.0

    def low(self, part: str, own: Tensor | int, x: Tensor) -> Tensor:
        """What factors of ``part`` make of ``x`` [n, in]: [n, out].

        Args:
            part: gate, up or down.
            own: the member, or of each row the member, int64 [n].
            x: the inputs.
        """
        first: Tensor = getattr(self, f"{part}_first")
        second: Tensor = getattr(self, f"{part}_second")
        if isinstance(own, int):
            return (x @ first[own].T) @ second[own].T
        out = x.new_empty(len(x), second.shape[1])
        for n in sorted(set(own.tolist())):
            rows = own == n
            out[rows] = (x[rows] @ first[n].T) @ second[n].T
        return out

    def answer(self, experts: Any, own: int, x: Tensor) -> Tensor:
        """Output [n, hidden] of a member for ``x`` [n, hidden].

        Args:
            experts: the module with the matrices of bases.
            own: the member.
            x: the inputs.
        """
        hidden = self.inside(experts, own, x)
        out = self.low("down", own, hidden)
        if (base := self.bases[own]) is not None:
            out = out + _product(experts, "down", base, hidden)
        if self._originals is None:
            return out
        return torch.lerp(out, hidden @ self._originals[1][own].T, self.original_share)

    def inside(self, experts: Any, own: int, x: Tensor) -> Tensor:
        """What a member has between its matrices for ``x`` [n, hidden]: [n, width]."""
        both = torch.cat([self.low("gate", own, x), self.low("up", own, x)], dim=1)
        if (base := self.bases[own]) is not None:
            both = both + _product(experts, "gate_up", base, x)
        if self._originals is not None:
            both = torch.lerp(both, x @ self._originals[0][own].T, self.original_share)
        gate, up = both.chunk(2, dim=1)
        return nn.functional.silu(gate) * up

    def forward(self, experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Their part in the output of the layer, [tokens, hidden].

        Args:
            experts: the module with the matrices of bases.
            x: inputs of the layer, [tokens, hidden].
            ids: the chosen members, int64 [tokens, k]; one below 0 stands for none.
            weights: what outputs are multiplied with, [tokens, k].
        """
        # In float32, so that the order of members hardly matters.
        out = torch.zeros_like(x, dtype=torch.float32)
        for own in sorted(set(ids[ids >= 0].tolist())):
            token, place = torch.where(ids == own)
            y = self.answer(experts, own, x[token]) * weights[token, place, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out


class MixedExperts(nn.Module):
    """In place of the experts of a transformers MoE module: what a router chooses from, any kind.

    Attributes:
        experts: those with matrices of their own, as transformers has them.
        members: those with factors.
        substitutes: behind them all.
    """

    def __init__(self, experts: nn.Module, layer: MoELayer) -> None:
        super().__init__()
        self.experts = experts
        # An id behind its last expert is then one that transformers leaves out.
        self.experts._is_expert_parallel = True  # type: ignore[assignment]
        self.members = Members(layer) if any(m.factors for m in layer.members) else None
        self.substitutes = Substitutes(layer) if layer.substitutes else None
        self.num_experts, self._none = layer.choices, len(layer.experts)
        # What a row of the router stands for, and an id behind the last row, which skips.
        behind = len(layer.substitutes) + 1
        has_factors = [bool(m.factors) for m in layer.members] or [False] * layer.routed
        bases = [
            self._none if own or base is None else base
            for base, own in zip(layer.bases, has_factors, strict=True)
        ]
        counts = accumulate(has_factors, initial=0)
        members = [n if own else -1 for n, own in zip(counts, has_factors, strict=False)]
        self.expert_of = (*bases, *[self._none] * behind)
        self.member_of = (*members, *[-1] * behind)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts, members and substitutes put out."""
        ids = torch.tensor(self.expert_of, device=hidden.device)[top_k_index]
        none = ids == self._none
        out: Tensor = self.experts(hidden, ids, top_k_weights.masked_fill(none, 0))
        if self.members is not None:
            own = torch.tensor(self.member_of, device=hidden.device)[top_k_index]
            out = out + self.members(self.experts, hidden, own, top_k_weights).to(out.dtype)
        if self.substitutes is not None:
            added: Tensor = self.substitutes(hidden, top_k_index, top_k_weights)
            out = out + added.to(out.dtype)
        return out

    def inside(self, row: int, x: Tensor) -> Tensor:
        """What the expert or member of a row of the router has between its matrices."""
        if self.members is not None and (own := self.member_of[row]) >= 0:
            return self.members.inside(self.experts, own, x)
        return _inside(self.experts, self.expert_of[row], x)

    def answer(self, row: int, x: Tensor) -> Tensor:
        """What the expert or member of a row of the router puts out for ``x`` [n, hidden]."""
        if self.members is not None and (own := self.member_of[row]) >= 0:
            return self.members.answer(self.experts, own, x)
        expert = self.expert_of[row]
        return _product(self.experts, "down", expert, _inside(self.experts, expert, x))


def _product(experts: Any, part: str, n: int, x: Tensor) -> Tensor:
    """``x`` times a matrix of an expert, gate_up or down: fused in one tensor, or packed."""
    if hasattr(experts, f"{part}_proj"):
        matrix: Tensor = getattr(experts, f"{part}_proj")[n]
        return x @ matrix.T
    out: Tensor = getattr(experts, part)[n](x)
    return out


def _inside(experts: Any, n: int, x: Tensor) -> Tensor:
    gate, up = _product(experts, "gate_up", n, x).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def expert_inside(moe: Any, row: int, x: Tensor) -> Tensor:
    """Inputs [n, width] of ``down`` of what a row of the router of an MoE module stands for."""
    mixed = isinstance(moe.experts, MixedExperts)
    inside: Tensor = moe.experts.inside(row, x) if mixed else _inside(moe.experts, row, x)
    return inside


def expert_answer(moe: Any, row: int, x: Tensor) -> Tensor:
    """Output [n, hidden] of what a row of the router of an MoE module stands for."""
    if isinstance(moe.experts, MixedExperts):
        return moe.experts.answer(row, x)
    return _product(moe.experts, "down", row, _inside(moe.experts, row, x))


def experts_name(layer: MoELayer) -> str:
    """Where the module with the matrices of the experts is in a decoder layer."""
    mixed = layer.substitutes or layer.members
    return "mlp.experts.experts" if mixed else "mlp.experts"


def fit(layers: nn.ModuleList, model: Model) -> None:
    """Give each decoder layer the form of its block. Call it under the device "meta"."""
    config = model.family.transformers_config(model)
    for block in model.blocks:
        layers[block.index] = _fitted(layers[block.index], config, model, block)


def _fitted(layer: Any, config: Any, model: Model, block: Block) -> Any:
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        sizes = {
            model.family.experts_key[0]: len(mlp.experts),
            "num_experts_per_tok": mlp.router.top_k,
        }
        if any(getattr(config, key) != size for key, size in sizes.items()):
            layer = _layer_like(layer, config, block.index, sizes)
        if mlp.substitutes or mlp.members:
            layer.mlp.experts = MixedExperts(layer.mlp.experts, mlp)
            layer.mlp.gate.weight = nn.Parameter(torch.empty(mlp.router.weight.shape))
        if mlp.router.skip_below:
            add_skipping(layer.mlp, mlp.router.skip_below, renormalize=mlp.router.renormalize)
    elif not per_layer.is_own_form(model, block):
        if isinstance(mlp, Dense):
            layer.mlp = GatedMLP(mlp)
        elif isinstance(mlp, Always):
            layer.mlp = AlwaysOn(mlp)
        elif SECOND_NORM in block.norms:
            layer.mlp = nn.Identity()
        else:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()
    return layer


def _layer_like(layer: Any, config: Any, index: int, own: dict[str, int]) -> Any:
    """A decoder layer of the same class with settings of its own."""
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
    """Let the router of a transformers MoE module leave out experts of low weight.

    A skipped place gets weight zero and the id behind the last expert, which transformers' expert
    implementations take to be "computed elsewhere" (expert parallelism) and spend no time on.
    """
    moe.experts._is_expert_parallel = True
    hook = _Skip(moe.experts.num_experts, tuple(skip_below), renormalize)
    # Kept, so that it can be taken off: see `without_skipping`.
    moe.gate.skipping = moe.gate.register_forward_hook(hook)


@dataclass(frozen=True)
class _Skip:
    """Forward hook of a router; a value, so that models can be pickled."""

    experts: int
    skip_below: tuple[float, ...]
    renormalize: bool

    def __call__(self, _: nn.Module, __: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, ids = out
        weights, skipped = skipping(weights, self.skip_below, renormalize=self.renormalize)
        return logits, weights, ids.masked_fill(skipped, self.experts)


def without_skipping(model: nn.Module) -> None:
    """Take dynamic skipping off a loaded transformers model; every chosen expert runs then."""
    for module in model.modules():
        if handle := getattr(module, "skipping", None):
            handle.remove()


def skipping(
    weights: Tensor, skip_below: Sequence[float], *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Weights after dynamic skipping, and which places are skipped.

    Efficient Expert Pruning and Skipping (https://arxiv.org/abs/2402.14800), whose rule for two
    experts, ``w2 < beta * w1``, is applied here to each place after the first.

    Args:
        weights: [N, k], in falling order.
        skip_below: k - 1 thresholds.
        renormalize: scale what stays to sum to one, as the router does.
    """
    below = torch.tensor([0.0, *skip_below], dtype=weights.dtype, device=weights.device)
    skipped = weights < below * weights[:, :1]
    kept = weights.masked_fill(skipped, 0)
    if renormalize:
        kept = kept / kept.sum(-1, keepdim=True)
    return kept, skipped


def block_state(block: Block, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The block's numbers in float32 under transformers' names in memory, experts fused.

    Args:
        block: the block.
        wanted: says by its role whether a tensor is; of experts, all or none.
    """
    state: dict[str, Tensor] = {}
    for role, weight in block.weights():
        if wanted(role) and (name := module_name(role)):
            state[name] = finite(weight)
    if isinstance(block.mlp, MoELayer) and wanted("experts.0.gate"):
        fused, at = _fused_experts(block.mlp.experts), experts_name(block.mlp)
        state |= {f"{at}.{name}": numbers for name, numbers in fused.items()}
    if isinstance(block.mlp, MoELayer) and block.mlp.substitutes and wanted("substitutes.0"):
        fused = _fused_substitutes(block.mlp)
        state |= {f"mlp.experts.substitutes.{name}": t for name, t in fused.items()}
    if isinstance(block.mlp, MoELayer) and wanted("members.0"):
        fused = _fused_factors(block.mlp)
        state |= {f"mlp.experts.members.{name}": t for name, t in fused.items()}
    return state


def module_name(role: str) -> str | None:
    """Transformers' name in memory of a tensor of a block; None where it has no name of its own."""
    kind, _, rest = role.partition(".")
    names = {
        "norms": rest,
        "attention": f"self_attn.{rest}",
        "router": f"mlp.gate.{rest}",
        "shared": f"mlp.shared_expert.{rest}_proj.weight",
        "dense": f"mlp.{rest}_proj.weight",
    }
    return "mlp.shared_expert_gate.weight" if role == "shared.router" else names.get(kind)


def _fused_experts(experts: Sequence[Dense]) -> dict[str, Tensor]:
    """``gate_up_proj`` [experts, 2 width, hidden] and ``down_proj`` [experts, hidden, width]."""
    width, hidden = experts[0].gate.shape
    gate_up = torch.empty(len(experts), 2 * width, hidden)
    down = torch.empty(len(experts), hidden, width)
    for n, expert in enumerate(experts):
        for place, weight in (
            (gate_up[n, :width], expert.gate),
            (gate_up[n, width:], expert.up),
            (down[n], expert.down),
        ):
            place.copy_(checked(weight.name, weight.load()))
    return {"gate_up_proj": gate_up, "down_proj": down}


def _fused_substitutes(layer: MoELayer) -> dict[str, Tensor]:
    """Parameters of `Substitutes`."""
    linear = [(s.first, s.second) for s in layer.substitutes if s.first and s.second]
    nothing = torch.empty(0, layer.router.weight.shape[1])
    return {
        "constants": torch.stack([finite(s.constant) for s in layer.substitutes]),
        "first": torch.cat([nothing, *(finite(first) for first, _ in linear)]),
        "second": torch.cat([nothing.T, *(finite(second) for _, second in linear)], dim=1),
    }


def _fused_factors(layer: MoELayer) -> dict[str, Tensor]:
    """Parameters of `Members`."""
    own = [m.factors for m in layer.members if m.factors]
    return {
        f"{part}_{name}": torch.stack([finite(getattr(f[part], name)) for f in own])
        for part in PARTS
        for name in ("first", "second")
        if own
    }


def finite(weight: Weight) -> Tensor:
    """Numbers of a weight in float32.

    Raises:
        InputError: some are not finite.
    """
    return checked(weight.name, weight.load().float())


def checked(name: str, numbers: Tensor) -> Tensor:
    # NaN and infinity come through minimum and maximum.
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(numbers)):
        raise InputError(
            f"{name} holds numbers that are not finite; the checkpoint is damaged, get it again"
        )
    return numbers
