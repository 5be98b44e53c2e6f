"""The work of replacing experts by constants and linear maps: sums in a walk, then fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe2edge.model.experts import Constant, Linear, Replacement
from moe2edge.model.layers import MoELayer
from moe2edge.model.weights import DTYPE_BYTES, Weight, plan_weight_like
from moe2edge.numerics import reduced_rank, selection
from moe2edge.numerics.reduced_rank import RegressionSums, Size
from moe2edge.pipeline.kept_transform import KeptTransform

if TYPE_CHECKING:
    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.model.block import Block
    from moe2edge.numerics.reduced_rank import ReducedRankFit

# Ranks that a budget chooses are multiples of this: formats pack as many numbers of 8 bits.
RANK_STEP = 4


def plan_replacements(block: Block, layer: MoELayer, ranks: Mapping[int, int]) -> Block:
    """Return the block with replacements of some ranks, whose numbers are not there yet.

    Args:
        block: the block.
        layer: its layer.
        ranks: by the position of the expert in the layer; 0 for a constant.
    """
    hidden = layer.hidden

    def weight(name: str, *shape: int) -> Weight:
        return plan_weight_like(layer.experts[0].down, name, shape)

    new: dict[int, Replacement] = {}
    for n, rank in ranks.items():
        origin = layer.experts[n].origin
        name = f"replacement of expert {origin} in block {block.origin}"
        constant = weight(f"constant of the {name}", hidden)
        if rank:
            first = weight(f"first of the {name}", rank, hidden)
            second = weight(f"second of the {name}", hidden, rank)
            new[n] = Linear(origin, constant, first, second)
        else:
            new[n] = Constant(origin, constant)
    return replace(block, mlp=layer.replace_experts(new))


def estimate_size(layer: MoELayer) -> Size:
    """Return the bytes of an expert of a layer, and of its possible replacements."""
    expert = layer.experts[0]
    each, hidden = DTYPE_BYTES[expert.down.dtype], layer.hidden
    matrices = (expert.gate, expert.up, expert.down)
    whole = sum(weight.nbytes for weight in (*matrices, *expert.biases.values()))
    return Size(whole, each * hidden, 2 * each * hidden)


@dataclass
class Fitter(KeptTransform):
    """Sums up what experts do, and replaces some; one layer at a time.

    Attributes:
        count: how many experts go, by the index of their block; None: see ``budget``.
        rank: of the maps of a layer; 0 for constants.
        budget: bytes that experts of a layer and their replacements may take: which go, and which
            rank each gets, is chosen by the error that is left.
        ridge: see `reduced_rank.fit_reduced_rank`.
        min_tokens: an expert with fewer gets a constant.
        scores: of experts by the index of their block, the lowest go; None: those whose
            replacements leave the smallest error do.
    """

    count: Mapping[int, int] | None
    rank: Callable[[MoELayer], int]
    ridge: float
    min_tokens: int
    scores: Mapping[int, list[float]] | None
    budget: Callable[[MoELayer], int] | None = None
    _sums: dict[int, RegressionSums] = field(default_factory=dict)

    def observe(self, trace: BlockTrace, source: BlockTrace | None = None) -> None:
        """Add one batch."""
        import torch

        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            return
        for n in self._list_candidates(trace.block, layer):
            if n not in self._sums:
                maps = self.budget is not None or self.rank(layer) > 0
                self._sums[n] = RegressionSums(routing.inputs.shape[1], maps=maps)
            row = layer.bases.index(n)
            token, place = torch.where(routing.ids == row)
            if len(token):
                inputs = routing.inputs[token]
                outputs = trace.expert_output(row, inputs)
                self._sums[n].add(inputs, outputs, routing.weights[token, place])

    def _list_candidates(self, block: Block, layer: MoELayer) -> list[int]:
        """Return the experts that may go, by position."""
        count = self.count[block.index] if self.count else len(layer.experts)
        if not count:
            return []
        if self.scores is None:
            return list(range(len(layer.experts)))
        return sorted(selection.rank_by_score(self.scores[block.index])[-count:])

    def compute(self, block: Block) -> tuple[Block, Any] | None:
        """Return the block with replacements, and their ranks by the position of the expert."""
        sums, self._sums = self._sums, {}
        layer = block.mlp
        if not isinstance(layer, MoELayer) or not sums:
            return None
        fits = self._choose_fits(block.index, layer, sums)
        gone = sorted(fits)
        for n in gone:
            if sums[n].tokens < self.min_tokens:
                self.notes.append(
                    f"block {block.index}: expert {layer.experts[n].origin} saw {sums[n].tokens} "
                    f"tokens, fewer than {self.min_tokens}: replaced by a constant"
                )
        left = sum(fits[n].residual for n in gone)
        whole = sum(sums[n].squares for n in gone)
        origins = [layer.experts[n].origin for n in gone]
        self.changed.append(f"block {block.index}: experts {origins}")
        share = left / whole if whole else 0.0
        self.notes.append(
            f"block {block.index}: replacements miss {share:.1%} of the squared outputs of experts "
            f"{origins}"
        )
        ranks = {str(n): len(fits[n].first) for n in gone}
        numbers = {}
        for place, n in enumerate(gone):
            found = fits[n]
            numbers[f"substitutes.{place}.constant"] = found.constant.float()
            if len(found.first):
                numbers[f"substitutes.{place}.first"] = found.first.float()
                numbers[f"substitutes.{place}.second"] = found.second.float()
        return self.put(self.reshape(block, ranks), numbers), ranks

    def reshape(self, block: Block, shape: Any) -> Block:
        """Return the block with replacements of these ranks, without numbers."""
        assert isinstance(block.mlp, MoELayer)
        return plan_replacements(block, block.mlp, {int(n): rank for n, rank in shape.items()})

    def _choose_fits(
        self, index: int, layer: MoELayer, sums: Mapping[int, RegressionSums]
    ) -> dict[int, ReducedRankFit]:
        """Return the fits of the experts that go, by position."""
        too_few = {n for n, own in sums.items() if own.tokens < self.min_tokens}
        if self.count is not None:
            rank, count = self.rank(layer), self.count[index]
            fits = {
                n: reduced_rank.fit_reduced_rank(own, 0 if n in too_few else rank, self.ridge)
                for n, own in sums.items()
            }
            least = sorted(fits, key=lambda n: (fits[n].residual, -n))[:count]
            return {n: fits[n] for n in least}
        assert self.budget is not None
        found = {n: reduced_rank.compute_gains(own, self.ridge) for n, own in sums.items()}
        falls = [fall[:0] if n in too_few else fall for n, (_, fall) in found.items()]
        spreads = [spread for spread, _ in found.values()]
        size, budget = estimate_size(layer), self.budget(layer)
        ranks = reduced_rank.allocate_ranks(spreads, falls, size, budget, RANK_STEP)
        return {
            n: reduced_rank.fit_reduced_rank(sums[n], rank, self.ridge)
            for n, rank in zip(found, ranks, strict=True)
            if rank is not None
        }
