"""The router of a layer, run by transformers' own code on scores that are known.

A router multiplies its input with a matrix of one row for each expert, and makes a choice of the
products: by softmax or sigmoid, with biases, within groups, scaled or not. Here the products are
computed once, and the choice is asked for as often as one likes, among any of the experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe2edge.errors import Unsupported
from moe2edge.model.anatomy import Anatomy
from moe2edge.numerics.router_fit import route
from moe2edge.numerics.subset_loss import RoutingRule

if TYPE_CHECKING:
    from torch import Tensor

# Score of an expert that is not there, and its bias: no router chooses it, or it has no weight.
ABSENT = -1e9
# Spreads of the scores on which a rule is tried, tokens of each, and experts that are removed.
SPREADS, TOKENS, REMOVED = (0.01, 0.1, 1.0, 3.0), 128, 16


class _Reached(Exception):
    """Ends a run once it is known what the experts get."""

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.ids, self.weights = ids, weights


class _Experts(nn.Module):
    """In place of the experts: tells what they get, or gives the same number for everything."""

    output: float | None = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Raise what was given, or return the output."""
        if self.output is None:
            raise _Reached(ids, weights)
        return torch.full_like(x, self.output)


class _Nothing(nn.Module):
    """In place of what stands beside router and experts."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return zeros like ``x``."""
        return torch.zeros_like(x)


class _Scoring(TorchFunctionMode):
    """Gives known products with a matrix, or notes those that are computed.

    Attributes:
        scores: the products, [tokens, experts].
    """

    def __init__(self, matrix: Tensor, scores: Tensor | None) -> None:
        super().__init__()
        self._place, self.scores = matrix.data_ptr(), scores
        self._given = scores is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, if it is none that multiplies with the matrix."""
        more = kwargs or {}
        if func is not nn.functional.linear:
            return func(*args, **more)
        given: list[Any] = [*args, *more.values()]
        if given[1].data_ptr() != self._place:
            return func(*args, **more)
        if self._given:
            assert self.scores is not None
            return self.scores.view(*given[0].shape[:-1], -1)
        found: Tensor = func(*args, **more)
        self.scores = found.flatten(0, -2)
        return found


class StockRouter:
    """A router that chooses among any of its experts.

    Attributes:
        experts: number of experts.
        top_k: experts that are chosen for a token.
    """

    def __init__(self, layer: Any, anatomy: Anatomy, top_k: int) -> None:
        """Copy what chooses from a layer of transformers.

        Args:
            layer: the layer; parts without numbers get some in the copy.
            anatomy: its parts.
            top_k: experts that it chooses for a token.
        """
        path = anatomy.roles["router.weight"]
        # Without a module around router and experts, the router says itself what they get.
        root = anatomy.moe or path.split(".")[0]
        below = path.removeprefix(f"{root}.").split(".")[0]
        owner = layer.get_submodule(root)
        memo: dict[int, Any] = {id(m.config): m.config for m in layer.modules() if _has_config(m)}
        self._experts = _Experts()
        for name, child in owner.named_children():
            if f"{root}.{name}" == anatomy.experts:
                memo[id(child)] = self._experts
            elif anatomy.moe and name != below and any(True for _ in child.parameters()):
                memo[id(child)] = _Nothing()
        self._root = copy.deepcopy(owner, memo)
        fill_meta(self._root, 1.0)  # which no rule divides by zero with
        self._stands_alone = not anatomy.moe

        def shorten(path: str) -> str | None:
            inside = path == root or path.startswith(f"{root}.")
            return path[len(root) + 1 :] if inside else None

        self._matrix: Tensor = _get(self._root, str(shorten(path)))
        self._biases = [
            (tensor := _get(self._root, own), axis, tensor.clone())
            for role, axis in anatomy.per_expert.items()
            if role != "router.weight" and (own := shorten(anatomy.roles[role])) is not None
        ]
        self._choices = [
            (self._root.get_submodule(own), name)
            for place, name in anatomy.choices
            if (own := shorten(place)) is not None and place != anatomy.experts
        ]
        self.experts, self._hidden = self._matrix.shape
        self.top_k = top_k

    @torch.no_grad()
    def score(self, inputs: Tensor) -> Tensor:
        """Return the scores float32 [tokens, experts] for inputs [tokens, hidden].

        Raises:
            Unsupported: the router does not multiply its input with a matrix.
        """
        mode = _Scoring(self._matrix, None)
        self._run(inputs[None], mode)
        if mode.scores is None:
            raise Unsupported(f"{type(self._root).__name__} scores experts in an unknown way")
        return mode.scores.float()

    @torch.no_grad()
    def choose(self, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Choose among some of the experts, as the router does when there are no others.

        Args:
            scores: of all experts, float32 [tokens, experts].
            kept: which experts there are, bool [experts].

        Returns:
            Their numbers among all experts, int64 [tokens, k], and weights, float64 [tokens, k].
        """
        count = min(self.top_k, int(kept.sum()))
        for module, name in self._choices:
            setattr(module, name, count)
        for tensor, axis, numbers in self._biases:
            gone = (~kept).nonzero()[:, 0]
            tensor.data.copy_(numbers.index_fill(axis, gone, ABSENT))
        known = scores.masked_fill(~kept, ABSENT)
        inputs = scores.new_zeros(1, 1, 1).expand(1, len(scores), self._hidden)
        ids, weights = self._run(inputs, _Scoring(self._matrix, known))
        return ids, weights.double()

    def _run(self, inputs: Tensor, mode: _Scoring) -> tuple[Tensor, Tensor]:
        """Return what the experts get, [tokens, k] each."""
        try:
            with mode:
                out = self._root(inputs)
        except _Reached as reached:
            return reached.ids.flatten(0, -2), reached.weights.flatten(0, -2)
        # A router that stands alone: numbers of experts, and as many weights.
        ids = next(one for one in out if not one.is_floating_point())
        weights = next(one for one in out if one is not ids and one.shape == ids.shape)
        return ids.flatten(0, -2), weights.flatten(0, -2)

    @cached_property
    def is_local(self) -> bool:
        """True if experts that a token does not choose do not change its choice and weights."""
        draw, biases = torch.Generator().manual_seed(0), self._biases
        scores = self._draw_scores(draw)
        # The rule is tried, not this layer: with biases that change many choices.
        self._biases = [
            (t, axis, torch.randn(t.shape, generator=draw) / 4) for t, axis, _ in biases
        ]
        try:
            return self._is_local_on(scores)
        finally:
            self._biases = biases

    def _draw_scores(self, draw: torch.Generator) -> Tensor:
        """Draw scores of several spreads, [tokens, experts]."""
        scores = torch.randn(len(SPREADS), TOKENS, self.experts, generator=draw)
        return (scores * torch.tensor(SPREADS)[:, None, None]).flatten(0, 1)

    def _is_local_on(self, scores: Tensor) -> bool:
        everyone = torch.ones(self.experts, dtype=torch.bool)
        before = self._spread(scores, everyone)
        for n in range(0, self.experts, -(-self.experts // REMOVED)):
            others = everyone.clone()
            others[n] = False
            change = (self._spread(scores, others) - before).abs().amax(1)
            same = change <= 1e-6 * before.abs().amax(1)
            if not bool((same | (before[:, n] != 0)).all()):
                return False
        return True

    def _spread(self, scores: Tensor, kept: Tensor) -> Tensor:
        """Return the weight of each expert, [tokens, experts]."""
        ids, weights = self.choose(scores, kept)
        return weights.new_zeros(scores.shape).scatter_add(1, ids, weights)

    @cached_property
    def softmax(self) -> tuple[bool, float] | None:
        """The rule, if it is the softmax of products with the layer's input, and the k best.

        Whether their weights are scaled to sum to one, and a number that all weights are multiplied
        with; None: the rule is another one.
        """
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(TOKENS, self._hidden, generator=draw)
        if self._biases or self._stands_alone:
            return None
        if not torch.allclose(self.score(inputs), inputs @ self._matrix.T, rtol=1e-3, atol=1e-3):
            return None
        scores = torch.randn(TOKENS, self.experts, generator=draw)
        found = self._spread(scores, torch.ones(self.experts, dtype=torch.bool))
        for renormalize in (True, False):
            plain, _ = route(scores.double(), RoutingRule(self.top_k, renormalize))
            scale = float(found.sum() / plain.sum())
            if torch.allclose(found, scale * plain, rtol=1e-4, atol=1e-6):
                return renormalize, scale
        return None

    @cached_property
    def normalizes(self) -> bool:
        """True if the weights of the chosen experts have the same sum for every token."""
        scores = self._draw_scores(torch.Generator().manual_seed(0))
        sums = self.choose(scores, torch.ones(self.experts, dtype=torch.bool))[1].sum(1)
        return torch.allclose(sums, sums[:1], rtol=1e-4)

    @cached_property
    def factor(self) -> float | None:
        """Number that multiplies the sum of the experts' outputs; None: more is done to it."""
        if self._stands_alone:
            return 1.0
        inputs = torch.zeros(1, 2, self._hidden)

        def run(output: float) -> Tensor:
            self._experts.output = output
            out = self._root(inputs)
            found: Tensor = out[0] if isinstance(out, tuple) else out
            return found

        factor = find_factor(run)
        self._experts.output = None
        return factor


@torch.no_grad()
def find_factor(run: Callable[[float], Tensor], atol: float = 1e-8) -> float | None:
    """Find the number that multiplies what experts put out; None: more is done to it.

    Args:
        run: returns the output of a layer all of whose experts put out a number.
        atol: absolute error that rounding may cause.
    """
    nothing, one, other = (run(value).double() for value in (0.0, 1.0, -2.0))
    one, other = one - nothing, other - nothing
    factor = float(one.flatten()[0])
    same = torch.allclose(one, one.new_full((), factor), atol=atol)
    return factor if factor and same and torch.allclose(other, -2 * one, atol=atol) else None


def _has_config(module: Any) -> bool:
    return hasattr(module, "config")


def _get(module: Any, path: str) -> Any:
    """Return a tensor of a module by its path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def fill_meta(root: Any, value: float, but: Any = None) -> None:
    """Give one number to all entries of the tensors of a module that have none.

    Args:
        root: the module, with all below it.
        value: the number.
        but: a module whose own tensors stay as they are.
    """
    for module in root.modules():
        if module is but:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    numbers = torch.full(tensor.shape, value, dtype=tensor.dtype)
                    made = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(numbers, requires_grad=False) if made else numbers
