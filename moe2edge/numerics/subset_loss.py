"""What an MoE layer loses when it keeps only some of its experts. Pure functions on tensors.

Experts run once per token; subsets only re-weight. Notation: T tokens, E experts, ``f_tj`` the
output of expert j for token t, ``w_tj`` its weight in the full layer, ``w'_tj`` its weight when
the router chooses among the kept experts only, ``Y_t`` the output of the full layer, ``Z_t`` the
output that is wanted. With ``a = w' - w`` and ``D = Z - Y`` the loss of a subset is

    || Z - Z' ||^2 = sum_t || D_t - sum_j a_tj f_tj ||^2
                   = sum_t |D_t|^2 - 2 sum_j a_tj <D_t, f_tj> + sum_ij a_ti a_tj <f_ti, f_tj>

so that products of expert outputs are all that is needed, whatever the hidden size. A shared
expert is part of Y and of Z' alike. Where the router is the same for a token, ``a`` is exactly 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of a `EvidencePart` at most, which bounds the temporaries of a loss.
PART_TOKENS = 8192

CountProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class RoutingRule:
    """How a router turns logits into weights: softmax, the best few, perhaps scaled to one.

    Attributes:
        top_k: experts per token; all, where fewer are kept.
        renormalize: whether the weights of those chosen are scaled to sum to one.
    """

    top_k: int
    renormalize: bool


@dataclass(frozen=True)
class EvidencePart:
    """Some tokens of a layer.

    Attributes:
        gram: products of expert outputs ``<f_ti, f_tj>``, float32 [T, E, E].
        pull: ``<D_t, f_tj>``, float64 [T, E]; None: D is zero.
        p: softmax of the logits, float64 [T, E].
        rank: place of each expert in the falling order of logits, int64 [T, E].
        ids: experts that the full layer chooses, int64 [T, k].
        weights: what it multiplies them with, float64 [T, k].
    """

    gram: Tensor
    pull: Tensor | None
    p: Tensor
    rank: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SubsetEvidence:
    """All that tells the loss of any subset of a layer's experts.

    Attributes:
        rule: of its router.
        experts: E.
        parts: its tokens.
        missing: ``sum_t |D_t|^2``, what would be lost with all experts.
        wanted: ``sum_t |Z_t|^2``.
    """

    rule: RoutingRule
    experts: int
    parts: tuple[EvidencePart, ...]
    missing: float
    wanted: float

    def compute_relative_error(self, loss: float) -> float:
        """``||Z - Z'|| / ||Z||`` of a loss."""
        return math.sqrt(max(loss, 0.0) / self.wanted) if self.wanted else 0.0


# ---- gathering ---------------------------------------------------------------------------------


def estimate_subset_evidence_bytes(tokens: int, experts: int) -> int:
    """Bytes of an `SubsetEvidence`: Gram matrices, and tables of one row per token."""
    return tokens * (4 * experts**2 + 8 * 3 * experts)


def spread(tokens: int, most: int | None) -> Tensor:
    """Places of at most ``most`` of ``tokens`` tokens, evenly spread; int64, rising.

    >>> spread(10, 4).tolist(), spread(3, None).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    count = tokens if most is None else min(most, tokens)
    return torch.arange(count) * tokens // max(count, 1)


def make_part(gram: Tensor, pull: Tensor | None, logits: Tensor, rule: RoutingRule) -> EvidencePart:
    """Tokens with their routing among all experts.

    Args:
        gram: float32 [T, E, E].
        pull: float64 [T, E] or None.
        logits: of the router, [T, E].
        rule: of the router.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    # In float64 nothing that a router could choose is zero, and the clamp keeps it so.
    p = logits.double().softmax(1).clamp(min=1e-300)
    ids = order[:, : rule.top_k].clone()  # not a view that keeps the rest
    weights = p.gather(1, ids)
    total = weights.sum(1, keepdim=True) if rule.renormalize else p.sum(1, keepdim=True)
    return EvidencePart(gram, pull, p, rank, ids, weights / total)


# ---- losses ------------------------------------------------------------------------------------


def compute_subset_loss(evidence: SubsetEvidence, kept: Sequence[int]) -> float:
    """``|| Z - Z' ||^2`` over all tokens when only the experts ``kept`` stay."""
    total = evidence.missing
    mask = _mask(evidence.experts, kept)
    for part in evidence.parts:
        ids = _best(part, mask, min(evidence.rule.top_k, len(kept)))
        weights = part.p.gather(1, ids)
        among = weights if evidence.rule.renormalize else part.p * mask
        weights = weights / among.sum(1, keepdim=True)
        near = _Near.of(part, ids)
        total += float(near.losses(near.shift(weights[:, None])).sum())
    return total


def compute_removal_losses(evidence: SubsetEvidence, kept: Sequence[int]) -> list[float]:
    """The `compute_subset_loss` after removing each of two or more experts ``kept``, in their order, at one go.

    A token that did not choose the removed expert keeps its choice; one that did takes its next
    best in its place. Without renormalization the weights of all tokens grow a little besides.
    """
    mask = _mask(evidence.experts, kept)
    base = evidence.missing
    change = torch.zeros(evidence.experts, dtype=torch.float64)
    for part in evidence.parts:
        before, changed = _removals(part, mask, len(kept), evidence.rule)
        base += before
        change += changed
    return (base + change)[list(kept)].tolist()


def _removals(
    part: EvidencePart, mask: Tensor, count: int, rule: RoutingRule
) -> tuple[float, Tensor]:
    """Loss of a set less what is missing anyway, and its change by removing each expert [E]."""
    chosen = min(rule.top_k, count)
    ids = _best(part, mask, min(rule.top_k + 1, count))  # and the one that steps in
    near = _Near.of(part, ids)
    p = part.p * mask
    # Sums without each, by addition alone: subtracting would cancel.
    rest = _sums_without_each(p)
    mine = part.p.gather(1, ids)
    # Rows: the set as it is, then without each of the chosen.
    numbers = mine[:, None].repeat(1, chosen + 1, 1)
    numbers[:, 0, chosen:] = 0
    numbers[:, 1:, :chosen] *= 1 - torch.eye(chosen, dtype=torch.float64)
    if rule.renormalize:
        totals = numbers.sum(2)
    else:
        totals = torch.cat([p.sum(1, keepdim=True), rest.gather(1, ids[:, :chosen])], dim=1)
    weights = numbers / totals[:, :, None]
    a = near.shift(weights)
    found = near.losses(a)
    before, after = found[:, :1], found[:, 1:]
    change = torch.zeros(part.p.shape[1], dtype=torch.float64)
    change.index_add_(0, ids[:, :chosen].flatten(), (after - before).flatten())
    if not rule.renormalize:
        growth = (p / rest).scatter(1, ids[:, :chosen], 0.0)
        slope, bend = near.growth(a[:, 0], weights[:, 0])
        change += growth.T @ slope + growth.square().T @ bend
    return float(before.sum()), change


@dataclass(frozen=True)
class _Near:
    """What a loss needs of tokens: the experts chosen now, then those of the full layer.

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
    def of(cls, part: EvidencePart, ids: Tensor) -> _Near:
        """For the experts ``ids`` [T, now] of each token."""
        both = torch.cat([ids, part.ids], dim=1)
        tokens, experts, n = len(both), part.p.shape[1], both.shape[1]
        pairs = (both[:, :, None] * experts + both[:, None, :]).view(tokens, n * n)
        gram = part.gram.view(tokens, -1).gather(1, pairs).view(tokens, n, n).double()
        pull = None if part.pull is None else part.pull.gather(1, both)
        same = (ids[:, :, None] == part.ids[:, None, :]).double()
        return cls(gram, pull, same, part.weights)

    def shift(self, weights: Tensor) -> Tensor:
        """``a`` [T, m, n] for weights [T, m, now] of the experts chosen now.

        An expert that stands in both halves gets its difference in the first and 0 in the second,
        so that equal weights cancel exactly.
        """
        # Products of matrices rather than sums over their short sides, which are slow.
        mine = torch.bmm(self.same, self.full[:, :, None]).mT
        ones = self.same.new_ones(len(self.same), 1, self.same.shape[1])
        matched = torch.bmm(ones, self.same)
        lost = (self.full[:, None] * (matched - 1)).expand(-1, weights.shape[1], -1)
        return torch.cat([weights - mine, lost], dim=2)

    def losses(self, a: Tensor) -> Tensor:
        """``a G a - 2 a pull`` [T, m] for ``a`` [T, m, n]."""
        found = (torch.bmm(a, self.gram) * a).sum(2)
        if self.pull is not None:
            found = found - 2 * torch.bmm(a, self.pull[:, :, None])[..., 0]
        return found

    def growth(self, a: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How the loss at ``a`` [T, n] changes when weights [T, now] grow by the part e.

        It is ``slope * e + bend * e^2``; both [T].
        """
        now = weights.shape[1]
        force = torch.bmm(self.gram[:, :now], a[:, :, None])[..., 0]
        if self.pull is not None:
            force = force - self.pull[:, :now]
        own = torch.bmm(self.gram[:, :now, :now], weights[:, :, None])[..., 0]
        return 2 * (force * weights).sum(1), (own * weights).sum(1)


def _mask(experts: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _best(part: EvidencePart, mask: Tensor, count: int) -> Tensor:
    """The ``count`` best experts within ``mask``, int64 [T, count], the best first."""
    rank = part.rank.masked_fill(~mask, len(mask))
    return rank.topk(count, dim=1, largest=False).indices


def _sums_without_each(p: Tensor) -> Tensor:
    """Sum of each row of ``p`` [T, E] without each of its entries."""
    none = p.new_zeros(len(p), 1)
    before = torch.cat([none, p[:, :-1].cumsum(1)], dim=1)
    after = torch.cat([p[:, 1:].flip(1).cumsum(1).flip(1), none], dim=1)
    return before + after


# ---- searches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """What a search chose.

    Attributes:
        kept: positions of the experts that stay, rising.
        loss: ``|| Z - Z' ||^2``.
        tried: number of losses computed.
    """

    kept: tuple[int, ...]
    loss: float
    tried: int


def search_exhaustively(
    evidence: SubsetEvidence, keep: int, advance: CountProgress
) -> SearchResult:
    """The best of all subsets of ``keep`` experts; of equals the first in lexicographic order."""
    count = math.comb(evidence.experts, keep)
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for n, kept in enumerate(itertools.combinations(range(evidence.experts), keep)):
        advance(n, count)
        best = min(best, (compute_subset_loss(evidence, kept), kept))
    return SearchResult(best[1], best[0], count)


def search_beam(
    evidence: SubsetEvidence, keep: int, width: int, advance: CountProgress
) -> SearchResult:
    """Remove one expert after the other, going on from the ``width`` best sets of each size.

    Width 1 is greedy removal. Of equals, sets that come first in lexicographic order go first.
    """
    sets: list[tuple[float, tuple[int, ...]]] = [(evidence.missing, tuple(range(evidence.experts)))]
    tried = 0
    for size in range(evidence.experts, keep, -1):
        advance(evidence.experts - size, evidence.experts - keep)
        smaller: dict[tuple[int, ...], float] = {}
        for _, kept in sets:
            for n, value in enumerate(compute_removal_losses(evidence, kept)):
                smaller.setdefault(kept[:n] + kept[n + 1 :], value)
            tried += size
        sets = sorted((value, kept) for kept, value in smaller.items())[:width]
    value, kept = sets[0]
    return SearchResult(kept, value, tried)


def count_beam_tries(experts: int, keep: int, width: int) -> int:
    """Losses that `search_beam` computes at most.

    >>> count_beam_tries(8, 4, 1), count_beam_tries(8, 4, 2)
    (26, 44)
    """
    return sum(size * min(width, math.comb(experts, size)) for size in range(experts, keep, -1))


# ---- rankings and reconstruction errors --------------------------------------------------------


def compute_prefix_errors(
    evidence: SubsetEvidence, streams: Tensor, order: Sequence[int], floor: int
) -> list[float]:
    """What a layer does wrong with its ``floor`` best experts, with one more, ... with all.

    The mean over tokens of ``||Z_t - Z'_t||^2 / ||x_t||^2``, x being the residual stream behind the
    layer: an error counts for as much as it turns what later blocks see. Token by token, because a
    few have streams a thousand times as long as others (https://arxiv.org/abs/2402.17762).

    Args:
        evidence: of the layer; its Gram matrices are scaled in place.
        streams: squared norms ``||x_t||^2`` of its tokens, float64 [T].
        order: positions of the experts, the best first.
        floor: at least 1.
    """
    sizes = [len(part.gram) for part in evidence.parts]
    for part, norms in zip(evidence.parts, torch.split(streams, sizes), strict=True):
        part.gram.div_(norms.clamp(min=1e-30)[:, None, None])
    counts = range(floor, evidence.experts + 1)
    return [compute_subset_loss(evidence, order[:count]) / sum(sizes) for count in counts]
