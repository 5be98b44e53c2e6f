"""Places where AWQ's scales fold, in families of which only the modules are known.

A layer of transformers is filled with random numbers and run on a few tokens. Which modules read
the output of a norm is seen by watching; that scales fold there is shown by folding random ones:
the output must stay as it was. So nothing is assumed of a family, and what reads a tensor unseen
(the residual stream, a router with a norm of its own, values that are clipped) rules its place out.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe2edge.model.anatomy import ExpertsForm
from moe2edge.model.architecture import Architecture
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.passes._awq_folding import FoldingPlace, find_first_factors, make_inner_place
from moe2edge.runtime.decoder_blocks import arrange_gate_up, find_module_name
from moe2edge.runtime.layer_stage import LayerStage, share_numbers
from moe2edge.runtime.mixed_experts import MixedExperts

# Tokens that a layer is tried on.
TRIED_TOKENS = 16
# Size of the outputs of random matrices, and the relative error that rounding may cause. Small ones
# saturate nothing, so every reader shows; large ones reach the limits of what is clipped.
TRIALS = ((2.0, 1e-4), (40.0, 1e-2))
# The same for routers, whose scores must not become equal.
SCORES = 2.0
EXPERTS = "experts"
VALUES = "v_proj"


@dataclass(frozen=True)
class _Place:
    """A place in a layer, by paths of modules.

    Attributes:
        producer: module whose weight, and bias, are divided; `EXPERTS`: ``up`` of each expert.
        consumers: parameters whose columns are multiplied; `EXPERTS`: gate and up of all experts,
            or ``down`` of each if it is the producer.
        heads, copies, offset: as in `FoldingPlace`.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: int = 1
    copies: int = 1
    offset: float = 0.0


def find_places_by_trial(model: Model, block: Block) -> Iterator[FoldingPlace]:
    """Find the places of a block of any family where scales fold."""
    anatomy = model.architecture.anatomy[block.origin]
    roles: dict[str, list[str]] = {}
    for role, _ in block.weights():
        if not role.startswith("experts.") and (name := find_module_name(anatomy, role)):
            roles.setdefault(name, []).append(role)
    experts = block.mlp.experts if isinstance(block.mlp, MoELayer) else ()
    for place in _find_places(model, block):
        if place.producer == EXPERTS:
            for n, expert in enumerate(experts):
                biases = [f"experts.{n}.up_bias"] if "up" in expert.biases else []
                yield make_inner_place(block, f"experts.{n}", biases)
            continue
        owned = [roles.get(f"{place.producer}.{kind}", []) for kind in ("bias", "weight")]
        if any(len(found) > 1 for found in owned):  # its rows are in several tensors
            continue
        consumers = [role for name in place.consumers for role in roles.get(name, ())]
        if EXPERTS in place.consumers:
            parts = ("gate", "up") if experts[0].gate.count else ("up",)
            consumers += [f"experts.{n}.{part}" for n in range(len(experts)) for part in parts]
            consumers += find_first_factors({role for role, _ in block.weights()})
        producers = tuple(role for found in owned for role in found)
        yield FoldingPlace(producers, tuple(consumers), place.heads, place.copies, place.offset)


# Places of layers by what identifies them, of models that are in use.
_known: weakref.WeakKeyDictionary[Architecture, dict[object, tuple[_Place, ...]]] = (
    weakref.WeakKeyDictionary()
)


def _find_places(model: Model, block: Block) -> tuple[_Place, ...]:
    """Find the places of the layer of a block; layers of the same modules have the same."""
    layer = LayerStage(model, block).layer
    sizes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    found = _known.setdefault(model.architecture, {})
    key = repr(layer), sizes
    if key not in found:
        found[key] = _try_places(model, block)
    return found[key]


def _try_places(model: Model, block: Block) -> tuple[_Place, ...]:
    """Find the places of a layer by trying them."""
    trial = _Trial(model, block, *TRIALS[0])
    norms, chains = list(trial.list_norms()), list(trial.list_chains())
    form = model.architecture.anatomy[block.origin].form
    experts = trial.experts
    if isinstance(experts, MixedExperts):
        experts = experts.experts
    inner = form is not None and experts is not None and _is_linear_in_up(experts, form)
    for size, error in TRIALS:
        if size != TRIALS[0][0]:  # one layer in memory at a time
            del trial
            trial = _Trial(model, block, size, error)
        norms, chains = trial.fit_norms(norms), trial.fit_chains(chains)
    return (*norms, *chains, *([_Place(EXPERTS, (EXPERTS,))] if inner else []))


@dataclass(frozen=True)
class _Call:
    """A call of a module: what it got, and what it returned."""

    args: tuple[Any, ...]
    more: dict[str, Any]
    output: Any


class _StandIn:
    """Takes the place of a layer's experts: a linear map, times numbers by what was chosen.

    It knows no layer, which is freed when its trial ends.

    Attributes:
        columns: scales of the columns of the map, [in].
    """

    def __init__(self, matrix: Tensor, factors: Tensor) -> None:
        """Make it of the map [out, in], and of a number for each row of the router and for none."""
        self._matrix, self._factors = matrix, factors
        self.columns = torch.ones(matrix.shape[1])

    def run(self, inputs: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the outputs, in the shape of the inputs."""
        out = nn.functional.linear(inputs * self.columns, self._matrix)
        factors = (self._factors[ids] * weights.float()).sum(-1)
        return out * factors.reshape(*out.shape[:-1], 1)


class _Trial:
    """A layer with random numbers, which is run with and without scales.

    Attributes:
        experts: the module of the experts; None: there is none.
    """

    def __init__(self, model: Model, block: Block, size: float, error: float) -> None:
        """Fill the layer.

        Args:
            model: the model.
            block: one of its blocks.
            size: of the outputs of random matrices.
            error: relative error of outputs that rounding may cause.
        """
        self._error = error
        self._draw = torch.Generator().manual_seed(0)
        anatomy = model.architecture.anatomy[block.origin]
        self._mlps = anatomy.mlps
        self._stage = LayerStage(model, block)
        self._layer: Any = self._stage.layer
        inside = f"{anatomy.experts}."
        routing = {path for role, path in anatomy.roles.items() if role.startswith("router.")}
        state = {
            name: self._fill(tuple(tensor.shape), SCORES if name in routing else size)
            for name, tensor in self._layer.state_dict().items()
            if tensor.is_meta and not name.startswith(inside)
        }
        self._layer.load_state_dict(state, strict=False, assign=True)
        self.experts: Any = None
        if anatomy.experts is not None and isinstance(block.mlp, MoELayer):
            self.experts = self._layer.get_submodule(anatomy.experts)
            outs, ins = block.mlp.experts[0].down.shape[0], block.mlp.experts[0].up.shape[1]
            factors = torch.randn(block.mlp.router_rows + 1, generator=self._draw)
            self._stand_in = _StandIn(self._fill((outs, ins), size), factors)
            self.experts.forward = self._stand_in.run
        hidden = model.family.geometry(model.config).hidden
        self._hidden = torch.randn(1, TRIED_TOKENS, hidden, generator=self._draw)
        self._calls: dict[str, list[_Call]] = {}
        self._output = self._watch()

    def _fill(self, shape: tuple[int, ...], size: float) -> Tensor:
        """Return random numbers: every diagonal of a matrix is one, as drawing all takes long."""
        if len(shape) < 2:
            return torch.rand(shape, generator=self._draw) + 0.5
        drawn = torch.randn(sum(shape), generator=self._draw) * (size / math.sqrt(shape[-1]))
        return drawn.as_strided(shape, (1,) * len(shape)).clone()

    @torch.no_grad()
    def _watch(self) -> Tensor:
        """Run the layer, and keep what each of its modules gets and returns."""

        def keep(path: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...], more: dict[str, Any], output: Any) -> None:
                self._calls.setdefault(path, []).append(_Call(args, more, output))

            return hook

        hooks = [
            module.register_forward_hook(keep(path), with_kwargs=True)
            for path, module in self._layer.named_modules()
            if path and not path.startswith(f"{self._path_of_experts()}.")
        ]
        try:
            return self._stage.run(self._hidden)
        finally:
            for handle in hooks:
                handle.remove()

    def _path_of_experts(self) -> str:
        found = (path for path, module in self._layer.named_modules() if module is self.experts)
        return next(found, "no experts")

    # ---- what may be places ----------------------------------------------------------------------

    def list_norms(self) -> Iterator[_Place]:
        """List the norms with what reads their output, as far as modules do."""
        for path, module in self._layer.named_modules():
            own = dict(module.named_parameters(recurse=False))
            vectors = own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
            calls = self._calls.get(path, ())
            if "weight" not in own or not vectors or len(calls) != 1:
                continue
            output = calls[0].output
            if isinstance(output, Tensor) and output.shape[-1:] == own["weight"].shape:
                consumers = tuple(self._list_readers(output))
                if consumers:
                    yield _Place(path, consumers)

    def _list_readers(self, tensor: Tensor) -> Iterator[str]:
        """List the matrices of modules that get a tensor, and the experts."""
        for path, calls in self._calls.items():
            given = [one for call in calls for one in (*call.args, *call.more.values())]
            if not any(isinstance(one, Tensor) and _is_same(one, tensor) for one in given):
                continue
            module = self._layer.get_submodule(path)
            if module is self.experts:
                yield EXPERTS
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2 and parameter.shape[1] == tensor.shape[-1]:
                    yield f"{path}.{name}"

    def list_chains(self) -> Iterator[_Place]:
        """List pairs of linear layers of one module where the first may feed the second.

        In modules that mix tokens, these are the values and what comes after them.
        """
        order = {path: n for n, path in enumerate(self._calls)}
        for parent, module in self._layer.named_modules():
            prefix = f"{parent}." if parent else ""
            linears = {
                f"{prefix}{name}": child
                for name, child in module.named_children()
                if isinstance(child, nn.Linear) and len(self._calls.get(f"{prefix}{name}", ())) == 1
            }
            mixes = parent.partition(".")[0] not in self._mlps
            # The linear half of a gated MLP comes behind the other one.
            for first, one in reversed(linears.items()):
                if not parent or (mixes and not first.endswith(VALUES)):
                    continue
                for second, other in linears.items():
                    copies, rest = divmod(other.in_features, one.out_features)
                    if rest or order[first] >= order[second]:
                        continue
                    for heads in _list_heads(module, one.out_features, copies):
                        yield _Place(first, (f"{second}.weight",), heads, copies)

    # ---- trying ----------------------------------------------------------------------------------

    def fit_norms(self, places: Sequence[_Place]) -> list[_Place]:
        """Return the places with whose scales the output of the layer stays.

        What some norms add to their weight is tried, too.
        """
        run = functools.partial(self._stage.run, self._hidden)
        if self._keeps(places, run, self._output):  # usual, and a layer may be large
            return list(places)
        found = []
        for place in places:
            both = (replace(place, offset=offset) for offset in (place.offset, 1.0 - place.offset))
            found += [fit for fit in both if self._keeps([fit], run, self._output)][:1]
        return found

    def fit_chains(self, places: Sequence[_Place]) -> list[_Place]:
        """Return the first place for each last layer with which the output of its module stays."""
        found: dict[tuple[str, ...], _Place] = {}
        for place in places:
            parent = place.producer.rpartition(".")[0]
            call, module = self._calls[parent][0], self._layer.get_submodule(parent)
            run = functools.partial(module, *call.args, **call.more)
            if place.consumers not in found and self._keeps([place], run, call.output):
                found[place.consumers] = place
        return list(found.values())

    @torch.no_grad()
    def _keeps(self, places: Sequence[_Place], run: Callable[[], Any], expected: Any) -> bool:
        """Return whether an output stays when random scales fold at some places."""
        changed: list[tuple[nn.Parameter, Tensor]] = []

        def put(parameter: nn.Parameter, numbers: Tensor) -> None:
            changed.append((parameter, parameter.data))
            parameter.data = numbers

        for place in places:
            producer = self._layer.get_submodule(place.producer)
            scales = torch.randn(len(producer.weight), generator=self._draw).mul(0.7).exp()
            spread = FoldingPlace((), (), place.heads, place.copies).spread(scales)
            for parameter in producer.parameters(recurse=False):
                rows = scales.reshape(-1, *(1,) * (parameter.ndim - 1))
                offset = place.offset if parameter is producer.weight else 0.0
                put(parameter, (parameter.data + offset) / rows - offset)
            for name in place.consumers:
                if name == EXPERTS:
                    self._stand_in.columns = self._stand_in.columns * spread
                else:
                    parameter = self._layer.get_parameter(name)
                    put(parameter, parameter.data * spread)
        try:
            found = _take_first(run())
        finally:
            for parameter, numbers in reversed(changed):
                parameter.data = numbers
            if self.experts is not None:
                self._stand_in.columns = torch.ones_like(self._stand_in.columns)
        given = _take_first(expected)
        if not given.is_floating_point():  # choices, which do not show what they depend on
            return False
        return bool((found - given).norm() <= self._error * given.norm())


def _take_first(output: Any) -> Tensor:
    """Return the output of a module, without what some return beside it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory, in rows of one length."""
    return share_numbers(first, second) and first.shape[-1:] == second.shape[-1:]


def _list_heads(module: Any, channels: int, copies: int) -> Sequence[int]:
    """List the numbers of runs into which channels that are read several times may be split."""
    if copies == 1:
        return (1,)
    sizes = {getattr(module, name, None) for name in ("head_dim", "v_head_dim")}
    return [channels // n for n in sizes if isinstance(n, int) and n and channels % n == 0]


def _is_linear_in_up(experts: Any, form: ExpertsForm) -> bool:
    """Return whether scales fold from ``up`` to ``down``, through the experts' activation."""
    draw, width = torch.Generator().manual_seed(0), 64
    up = torch.randn(1, width, 512, generator=draw)
    gate = torch.randn(1, width if form.gated else 0, 512, generator=draw)
    scales = torch.randn(width, generator=draw).exp()

    def run(size: float, factors: Tensor) -> Tensor:
        both = torch.cat([gate * size, up * size / factors[:, None]], dim=1)
        inside: Tensor = (experts._apply_gate if form.gated else experts.act_fn)(
            arrange_gate_up(both, form)[0].T
        )
        return inside * factors

    for size, error in TRIALS:
        given = run(size, torch.ones(width))
        if not bool((run(size, scales) - given).norm() <= error * given.norm()):
            return False
    return True
