"""Loss of an MoE layer that keeps only some of its experts. Pure functions on tensors.

Experts run once per token; subsets only re-weight. Notation: T tokens, E experts, ``f_tj`` the
output of expert j for token t, ``w_tj`` its weight in the full layer, ``w'_tj`` its weight when
the router chooses among the kept experts only, ``Y_t`` the output of the full layer, ``Z_t`` the
target output. With ``a = w' - w`` and ``D = Z - Y`` the loss of a subset is

    || Z - Z' ||^2 = sum_t || D_t - sum_j a_tj f_tj ||^2
                   = sum_t |D_t|^2 - 2 sum_j a_tj <D_t, f_tj> + sum_ij a_ti a_tj <f_ti, f_tj>

so that only products of expert outputs are needed, whatever the hidden size. A shared expert is
part of Y and of Z' alike. Where the routing of a token does not change, ``a`` is exactly 0.

Here the router takes the softmax of its logits and the k best, so the removal of every expert is
measured at once; `moe2edge.numerics.routed_loss` asks routers of any rule.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Most tokens of an `EvidencePart`; this bounds the temporaries of a loss.
PART_TOKENS = 8192

# Callback of a search: units done, and units in total.
CountProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class RoutingRule:
    """Rule by which a router turns logits into weights: softmax, top k, perhaps scaled to one.

    Attributes:
        top_k: experts per token; all of them if fewer are kept.
        renormalize: whether the weights of the chosen experts are scaled to sum to one.
    """

    top_k: int
    renormalize: bool


@dataclass(frozen=True)
class TokenPart:
    """Choices of the full layer for some tokens, with products of expert outputs.

    Attributes:
        gram: products of expert outputs ``<f_ti, f_tj>``, float32 [T, E, E].
        pull: ``<D_t, f_tj>``, float64 [T, E]; None: D is zero.
        ids: experts that the full layer chooses, int64 [T, k].
        weights: weights of these experts, float64 [T, k].
    """

    gram: Tensor
    pull: Tensor | None
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class EvidencePart(TokenPart):
    """Routing of some tokens by a softmax.

    Attributes:
        p: softmax of the logits, float64 [T, E].
        rank: place of each expert in the falling order of logits, int64 [T, E].
    """

    p: Tensor
    rank: Tensor


class Evidence(ABC):
    """All that determines the loss of any subset of a layer's experts.

    Attributes:
        experts: E.
        groups: groups of adjacent experts, of which the same number stays; 1: there are none.
        parts: tokens of the layer.
        missing: ``sum_t |D_t|^2``, the loss with all experts.
        target_square: ``sum_t |Z_t|^2``.
    """

    experts: int
    groups: int
    parts: Sequence[TokenPart]
    missing: float
    target_square: float

    @abstractmethod
    def compute_loss(self, kept: Sequence[int]) -> float:
        """Compute ``|| Z - Z' ||^2`` over all tokens when only the experts ``kept`` stay."""

    @abstractmethod
    def compute_removals(self, kept: Sequence[int], gone: Sequence[int]) -> list[float]:
        """Compute the loss after removing each of the experts ``gone`` from ``kept``."""

    def compute_relative_error(self, loss: float) -> float:
        """Return ``||Z - Z'|| / ||Z||`` for a loss."""
        if not self.target_square:
            return 0.0
        return math.sqrt(max(loss, 0.0) / self.target_square)

    def list_removable(self, kept: Sequence[int]) -> list[int]:
        """List the experts of which one may go next: those of the largest groups."""
        group = [n * self.groups // self.experts for n in kept]
        most = max(map(group.count, group))
        return [n for n, own in zip(kept, group, strict=True) if group.count(own) == most]


@dataclass(frozen=True)
class SubsetEvidence(Evidence):
    """The evidence of a layer whose router takes a softmax and the k best.

    Attributes:
        rule: rule of the layer's router.
    """

    rule: RoutingRule
    experts: int
    parts: tuple[EvidencePart, ...]
    missing: float
    target_square: float
    groups: int = 1

    def compute_loss(self, kept: Sequence[int]) -> float:
        """See `Evidence.compute_loss`."""
        return compute_subset_loss(self, kept)

    def compute_removals(self, kept: Sequence[int], gone: Sequence[int]) -> list[float]:
        """See `Evidence.compute_removals`."""
        found = dict(zip(kept, compute_removal_losses(self, kept), strict=True))
        return [found[n] for n in gone]


# ---- gathering ---------------------------------------------------------------------------------


def estimate_subset_evidence_bytes(tokens: int, experts: int) -> int:
    """Estimate the bytes of a `SubsetEvidence`: Gram matrices, and tables of one row per token."""
    return tokens * (4 * experts**2 + 8 * 3 * experts)


def spread(tokens: int, most: int | None) -> Tensor:
    """Spread at most ``most`` places evenly over ``tokens`` tokens; int64, rising.

    >>> spread(10, 4).tolist(), spread(3, None).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    count = count_spread(tokens, most)
    return torch.arange(count) * tokens // max(count, 1)


def count_spread(tokens: int, most: int | None) -> int:
    """Count the places of `spread`."""
    return tokens if most is None else min(most, tokens)


def make_part(gram: Tensor, pull: Tensor | None, logits: Tensor, rule: RoutingRule) -> EvidencePart:
    """Make a part from tokens, with their routing among all experts.

    Args:
        gram: float32 [T, E, E].
        pull: float64 [T, E] or None.
        logits: logits of the router, [T, E].
        rule: rule of the router.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    # In float64 no probability that a router could choose is zero; the clamp makes sure of it.
    p = logits.double().softmax(1).clamp(min=1e-300)
    ids = order[:, : rule.top_k].clone()  # a view would keep the rest in memory
    weights = p.gather(1, ids)
    total = weights.sum(1, keepdim=True) if rule.renormalize else p.sum(1, keepdim=True)
    return EvidencePart(gram, pull, ids, weights / total, p, rank)


# ---- losses ------------------------------------------------------------------------------------


def compute_subset_loss(evidence: SubsetEvidence, kept: Sequence[int]) -> float:
    """Compute ``|| Z - Z' ||^2`` over all tokens when only the experts ``kept`` stay."""
    total = evidence.missing
    mask = make_mask(evidence.experts, kept)
    for part in evidence.parts:
        ids = _choose_best(part, mask, min(evidence.rule.top_k, len(kept)))
        weights = part.p.gather(1, ids)
        eligible = weights if evidence.rule.renormalize else part.p * mask
        weights = weights / eligible.sum(1, keepdim=True)
        terms = LossTerms.gather(part, ids)
        total += float(terms.compute_losses(terms.compute_shift(weights[:, None])).sum())
    return total


def compute_removal_losses(evidence: SubsetEvidence, kept: Sequence[int]) -> list[float]:
    """Compute the loss after removing each of two or more experts ``kept``, in order.

    All at once: a token that did not choose the removed expert keeps its choice; one that did takes
    its next best in its place. Without renormalization, the weights of all tokens also grow a
    little.
    """
    mask = make_mask(evidence.experts, kept)
    base = evidence.missing
    change = torch.zeros(evidence.experts, dtype=torch.float64)
    for part in evidence.parts:
        before, changed = _compute_removals(part, mask, len(kept), evidence.rule)
        base += before
        change += changed
    return (base + change)[list(kept)].tolist()


def _compute_removals(
    part: EvidencePart, mask: Tensor, count: int, rule: RoutingRule
) -> tuple[float, Tensor]:
    """Return the loss of a set beyond ``missing``, and its change by removing each expert [E]."""
    chosen = min(rule.top_k, count)
    ids = _choose_best(part, mask, min(rule.top_k + 1, count))  # and the expert that steps in
    terms = LossTerms.gather(part, ids)
    p = part.p * mask
    # Sums without each entry, by addition alone: subtraction would cancel.
    rest = _sum_without_each(p)
    chosen_p = part.p.gather(1, ids)
    # Rows: the set as it is, then without each chosen expert.
    unscaled = chosen_p[:, None].repeat(1, chosen + 1, 1)
    unscaled[:, 0, chosen:] = 0
    unscaled[:, 1:, :chosen] *= 1 - torch.eye(chosen, dtype=torch.float64)
    if rule.renormalize:
        totals = unscaled.sum(2)
    else:
        totals = torch.cat([p.sum(1, keepdim=True), rest.gather(1, ids[:, :chosen])], dim=1)
    weights = unscaled / totals[:, :, None]
    a = terms.compute_shift(weights)
    losses = terms.compute_losses(a)
    before, after = losses[:, :1], losses[:, 1:]
    change = torch.zeros(part.p.shape[1], dtype=torch.float64)
    change.index_add_(0, ids[:, :chosen].flatten(), (after - before).flatten())
    if not rule.renormalize:
        growth = (p / rest).scatter(1, ids[:, :chosen], 0.0)
        slope, bend = terms.measure_growth(a[:, 0], weights[:, 0])
        change += growth.T @ slope + growth.square().T @ bend
    return float(before.sum()), change


@dataclass(frozen=True)
class LossTerms:
    """Terms of the loss for each token's experts: those chosen now, then the full layer's.

    Attributes:
        gram: float64 [T, n, n], of these n experts.
        pull: float64 [T, n], or None.
        same: 1 where one of the first is one of the second, else 0; float64 [T, now, full].
        full: weights in the full layer, float64 [T, full].
    """

    gram: Tensor
    pull: Tensor | None
    same: Tensor
    full: Tensor

    @classmethod
    def gather(cls, part: TokenPart, ids: Tensor) -> LossTerms:
        """Gather the terms for the experts ``ids`` [T, now] of each token."""
        both = torch.cat([ids, part.ids], dim=1)
        tokens, experts, n = len(both), part.gram.shape[1], both.shape[1]
        pairs = (both[:, :, None] * experts + both[:, None, :]).view(tokens, n * n)
        gram = part.gram.view(tokens, -1).gather(1, pairs).view(tokens, n, n).double()
        pull = None if part.pull is None else part.pull.gather(1, both)
        same = (ids[:, :, None] == part.ids[:, None, :]).double()
        return cls(gram, pull, same, part.weights)

    @classmethod
    def take(cls, part: TokenPart, ids: Tensor, rows: Tensor) -> LossTerms:
        """Gather the terms of some tokens, int64 [n], for the experts ``ids`` [n, now] of each."""
        full = part.ids[rows]
        both = torch.cat([ids, full], dim=1)
        gram = part.gram[rows[:, None, None], both[:, :, None], both[:, None, :]].double()
        pull = None if part.pull is None else part.pull[rows[:, None], both]
        same = (ids[:, :, None] == full[:, None, :]).double()
        return cls(gram, pull, same, part.weights[rows])

    def compute_shift(self, weights: Tensor) -> Tensor:
        """Compute ``a`` [T, m, n] for weights [T, m, now] of the experts chosen now.

        An expert in both halves gets its difference in the first and 0 in the second, so that equal
        weights cancel exactly.
        """
        # Matrix products instead of sums over their short sides, which are slow.
        full_weights = torch.bmm(self.same, self.full[:, :, None]).mT
        ones = self.same.new_ones(len(self.same), 1, self.same.shape[1])
        matched = torch.bmm(ones, self.same)
        lost = (self.full[:, None] * (matched - 1)).expand(-1, weights.shape[1], -1)
        return torch.cat([weights - full_weights, lost], dim=2)

    def compute_losses(self, a: Tensor) -> Tensor:
        """Compute ``a G a - 2 a pull`` [T, m] for ``a`` [T, m, n]."""
        losses = (torch.bmm(a, self.gram) * a).sum(2)
        if self.pull is not None:
            losses = losses - 2 * torch.bmm(a, self.pull[:, :, None])[..., 0]
        return losses

    def measure_growth(self, a: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return how the loss at ``a`` [T, n] changes when weights [T, now] grow by the fraction e.

        The change is ``slope * e + bend * e^2``; returns slope and bend, both [T].
        """
        now = weights.shape[1]
        force = torch.bmm(self.gram[:, :now], a[:, :, None])[..., 0]
        if self.pull is not None:
            force = force - self.pull[:, :now]
        product = torch.bmm(self.gram[:, :now, :now], weights[:, :, None])[..., 0]
        return 2 * (force * weights).sum(1), (product * weights).sum(1)


def make_mask(experts: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _choose_best(part: EvidencePart, mask: Tensor, count: int) -> Tensor:
    """Choose the ``count`` best experts within ``mask``, int64 [T, count], the best first."""
    rank = part.rank.masked_fill(~mask, len(mask))
    return rank.topk(count, dim=1, largest=False).indices


def _sum_without_each(p: Tensor) -> Tensor:
    """Sum each row of ``p`` [T, E] without each of its entries in turn."""
    zero = p.new_zeros(len(p), 1)
    before = torch.cat([zero, p[:, :-1].cumsum(1)], dim=1)
    after = torch.cat([p[:, 1:].flip(1).cumsum(1).flip(1), zero], dim=1)
    return before + after


# ---- searches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """Subset that a search chose.

    Attributes:
        kept: positions of the experts that stay, rising.
        loss: ``|| Z - Z' ||^2``.
        tried: number of losses computed.
    """

    kept: tuple[int, ...]
    loss: float
    tried: int


def search_exhaustively(evidence: Evidence, keep: int, advance: CountProgress) -> SearchResult:
    """Find the best of all subsets of ``keep`` experts.

    Among equal ones it is the first in lexicographic order.
    """
    count = count_sets(evidence.experts, keep, evidence.groups)
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for n, kept in enumerate(_list_sets(evidence.experts, keep, evidence.groups)):
        advance(n, count)
        best = min(best, (evidence.compute_loss(kept), kept))
    return SearchResult(best[1], best[0], count)


def count_sets(experts: int, keep: int, groups: int = 1) -> int:
    """Count the subsets of ``keep`` experts that have the same number of each group.

    >>> count_sets(8, 4), count_sets(8, 4, groups=2)
    (70, 36)
    """
    each: int = math.comb(experts // groups, keep // groups)
    return math.prod([each] * groups)


def _list_sets(experts: int, keep: int, groups: int) -> Iterator[tuple[int, ...]]:
    """Yield these subsets in lexicographic order."""
    size = experts // groups
    each = [
        itertools.combinations(range(first, first + size), keep // groups)
        for first in range(0, size * groups, size)
    ]
    return (tuple(itertools.chain(*parts)) for parts in itertools.product(*each))


def search_beam(evidence: Evidence, keep: int, width: int, advance: CountProgress) -> SearchResult:
    """Remove one expert after the other, continuing with the ``width`` best sets of each size.

    Width 1 is greedy removal. Among equal sets, the first in lexicographic order goes first.
    """
    sets: list[tuple[float, tuple[int, ...]]] = [(evidence.missing, tuple(range(evidence.experts)))]
    tried = 0
    for size in range(evidence.experts, keep, -1):
        advance(evidence.experts - size, evidence.experts - keep)
        smaller: dict[tuple[int, ...], float] = {}
        for _, kept in sets:
            gone = evidence.list_removable(kept)
            for one, value in zip(gone, evidence.compute_removals(kept, gone), strict=True):
                smaller.setdefault(tuple(n for n in kept if n != one), value)
            tried += len(gone)
        sets = sorted((value, kept) for kept, value in smaller.items())[:width]
    value, kept = sets[0]
    return SearchResult(kept, value, tried)


def count_beam_tries(experts: int, keep: int, width: int, groups: int = 1) -> int:
    """Count the losses that `search_beam` computes at most.

    >>> count_beam_tries(8, 4, 1), count_beam_tries(8, 4, 2), count_beam_tries(8, 4, 1, groups=2)
    (26, 44, 21)
    """
    tries, full = 0, experts // groups
    for removed in range(experts - keep):
        # So many groups have lost none yet in this round; the sets so far are at most so many.
        rounds, begun = divmod(removed, groups)
        removable = (groups - begun) * (full - rounds)
        tries += removable * min(width, math.comb(experts, removed))
    return tries


# ---- reconstruction errors of a ranking --------------------------------------------------------


def compute_prefix_errors(
    evidence: Evidence, streams: Tensor, order: Sequence[int], floor: int
) -> list[float]:
    """Compute the reconstruction error of a layer for each number of kept experts.

    From its ``floor`` best experts to all of them, in steps of the number of groups. The mean over
    tokens of ``||Z_t - Z'_t||^2 / ||x_t||^2``, x being the residual stream after the layer: an
    error counts for as much as it turns the input of later blocks. It is relative for each token,
    because a few have hidden states a thousand times as long as others
    (https://arxiv.org/abs/2402.17762).

    Args:
        evidence: evidence of the layer; its Gram matrices are scaled in place.
        streams: squared norms ``||x_t||^2`` of the residual stream, float64 [T].
        order: positions of the experts, the best first; groups take turns.
        floor: at least 1, and a multiple of the groups.
    """
    sizes = [len(part.gram) for part in evidence.parts]
    for part, norms in zip(evidence.parts, torch.split(streams, sizes), strict=True):
        part.gram.div_(norms.clamp(min=1e-30)[:, None, None])
    counts = range(floor, evidence.experts + 1, evidence.groups)
    return [evidence.compute_loss(order[:count]) / sum(sizes) for count in counts]
