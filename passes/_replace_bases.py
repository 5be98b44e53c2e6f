"""The work of replacing groups of experts by bases with factors: a walk, then numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import torch

from moe2edge.calibration import walk
from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS, Expert, Factors, Full, Tied
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import DTYPE_BYTES, plan_weight_like
from moe2edge.numerics import base_sharing, expert_groups, low_rank, selection
from moe2edge.pipeline.contract import Outcome, PassContext
from moe2edge.pipeline.kept_transform import KeptTransform

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Rows of a matrix of every expert that are in memory together.
ROWS_PER_CHUNK = 256


def round_up(part: int, whole: int) -> str:
    """Format a part of a whole in percent, so that what is shown is not less.

    >>> round_up(1, 3), round_up(38, 100)
    ('33.4%', '38.0%')
    """
    return f"{-(-1000 * part // whole) / 10:.1f}%"


def count_expert_bytes(model: Model) -> int:
    """Return the bytes of routed experts, and of the rows in their place."""
    return sum(
        weight.nbytes
        for block, _ in model.moe_blocks
        for role, weight in block.weights()
        if role.startswith(("experts.", "members.", "substitutes."))
    )


def check_budget(before: Model, after: Model, budget: int, notes: list[str]) -> None:
    """Check that a budget was kept, and note the bytes of experts and their replacements.

    Raises:
        Moe2EdgeError: they take more.
    """
    whole, taken = count_expert_bytes(before), count_expert_bytes(after)
    if taken > budget:
        raise Moe2EdgeError(f"experts take {taken:,} bytes, more than the budget of {budget:,}")
    notes.append(
        f"experts and their replacements take {taken:,} bytes of {whole:,} ({taken / whole:.1%})"
    )


def share_bases(block: Block, layer: MoELayer, groups: Sequence[Sequence[int]], rank: int) -> Block:
    """Return the block whose groups of experts share a base each; a group of one has factors alone.

    Numbers of bases and factors are not there yet; experts that stay come before bases.
    """
    gone = {j: n for n, own in enumerate(groups) for j in own}
    based = [own for own in groups if len(own) > 1]
    stay = [j for j in range(len(layer.experts)) if j not in gone]
    experts = [layer.experts[j] for j in stay]
    for own in based:
        like = layer.experts[own[0]]
        numbers = {
            p: plan_weight_like(
                getattr(like, p),
                f"{p} of base {like.origin} in block {block.origin}",
                getattr(like, p).shape,
            )
            for p in PARTS
        }
        gate, up, down = (numbers[part] for part in PARTS)
        experts.append(Expert(gate, up, down, like.origin))
    rows: list[Full | Tied] = []
    for j, expert in enumerate(layer.experts):
        if j not in gone:
            rows.append(Full(expert.origin, stay.index(j)))
            continue
        own = groups[gone[j]]
        base = len(stay) + based.index(own) if len(own) > 1 else None
        if not rank:
            assert base is not None, "without a base, factors are all"
            rows.append(Full(expert.origin, base))
            continue
        factors = {}
        for part in PARTS:
            like = getattr(expert, part)
            outs, ins = like.shape
            name = f"of {part} of tied expert {expert.origin} in block {block.origin}"
            factors[part] = Factors(
                plan_weight_like(like, f"first factor {name}", (rank, ins)),
                plan_weight_like(like, f"second factor {name}", (outs, rank)),
            )
        rows.append(Tied(expert.origin, base, factors))
    return replace(block, mlp=replace(layer, experts=tuple(experts), rows=tuple(rows)))


@dataclass(frozen=True)
class Sharing:
    """Extent of the sharing: which experts of which layers go, in groups.

    Attributes:
        budget: bytes that experts may take, or a fraction of what they take.
        rank: gives the rank of the factors of a layer.
        group: experts to a base; None: experts become factors alone.
    """

    budget: float
    rank: Callable[[MoELayer], int]
    group: int | None

    def compute_costs(self, model: Model) -> list[base_sharing.SharingCost]:
        """Return the costs of each MoE layer."""
        return self._compute_costs(model, [self.rank(layer) for _, layer in model.moe_blocks])

    def _compute_costs(self, model: Model, ranks: Iterable[int]) -> list[base_sharing.SharingCost]:
        """Return the costs with factors of these ranks, by MoE layer."""
        found = []
        for (_, layer), rank in zip(model.moe_blocks, ranks, strict=False):
            expert = layer.experts[0]
            each = DTYPE_BYTES[expert.gate.dtype]
            factors = 3 * each * rank * sum(expert.gate.shape)
            found.append(base_sharing.SharingCost(each * expert.count, factors, self.group))
        return found

    def nbytes(self, model: Model) -> int:
        """Return the budget in bytes."""
        return selection.resolve_number(self.budget, count_expert_bytes(model))

    def check(self, model: Model) -> None:
        """Refuse ranks and budgets that are not possible.

        Raises:
            InputError: with what is possible.
        """
        if model.replaced_count:
            raise InputError(
                f"expert_replace: {model.replaced_count} experts are already replaced; constants "
                "and linear maps cannot be combined with shared bases and factors in one recipe; "
                "leave one of the two out"
            )
        sizes = [len(layer.experts) - (self.group is None) for _, layer in model.moe_blocks]
        least_rank = 0 if self.group else 1
        for block, layer in model.moe_blocks:
            shape, rank = layer.experts[0].gate.shape, self.rank(layer)
            if not least_rank <= rank <= min(shape):
                raise InputError(
                    f"expert_replace: rank is {rank}; the matrices of experts in block "
                    f"{block.index} are {list(shape)}: choose {self._suggest_rank(model, sizes)}"
                )
        whole, budget = count_expert_bytes(model), self.nbytes(model)
        least = whole - base_sharing.compute_most_saved(self.compute_costs(model), sizes)
        if least == whole:
            raise InputError(
                f"expert_replace: with rank {self.rank(model.moe_blocks[0][1])} the replacements "
                "are no smaller than the experts; choose "
                f"{self._suggest_rank(model, sizes)}"
            )
        if budget < least:
            how = f"group_size {self.group} and " if self.group else ""
            raise InputError(
                f"expert_replace: the budget is {budget:,} bytes of the {whole:,} that experts "
                f"take, but with {how}rank {self.rank(model.moe_blocks[0][1])} they take {least:,} "
                f"at least ({round_up(least, whole)}); raise the budget"
            )
        if budget >= whole:
            raise InputError(
                f"expert_replace: the budget is {budget:,} bytes, and experts take {whole:,}; "
                "nothing to do, lower the budget"
            )

    def _suggest_rank(self, model: Model, sizes: Sequence[int]) -> str:
        """Return which ranks save something, as text."""
        highest = min(min(layer.experts[0].gate.shape) for _, layer in model.moe_blocks)
        least = 0 if self.group else 1
        for rank in range(highest, least - 1, -1):
            if base_sharing.compute_most_saved(self._compute_costs(model, repeat(rank)), sizes):
                return f"a rank of at least {least} and at most {rank}"
        return "with: linear, as there are too few experts to share anything"

    def choose_groups(
        self,
        model: Model,
        scores: Sequence[Sequence[float]],
        factors: Sequence[float],
        similar: Sequence[Tensor],
    ) -> list[list[list[int]]]:
        """Return the groups of experts that are replaced, by MoE layer; without bases, of one each.

        Args:
            model: the model.
            scores: importance of experts, by layer.
            factors: factors of the threshold, by layer.
            similar: similarity of the experts of a layer, [E, E], by layer; without bases, nothing.
        """
        costs, ordered = self.compute_costs(model), base_sharing.order_candidates(scores, factors)
        if self.group is None:  # layers need one expert that stays
            best = [max(range(len(own)), key=lambda j: (own[j], j)) for own in scores]
            ordered = [(layer, expert) for layer, expert in ordered if expert != best[layer]]
        chosen = base_sharing.choose_replaced(
            ordered, costs, count_expert_bytes(model), self.nbytes(model)
        )
        if self.group is None:
            return [[[j] for j in own] for own in chosen]
        found = []
        for own, cost, importance, alike in zip(chosen, costs, scores, similar, strict=True):
            groups = expert_groups.group_by_similarity(
                own, importance, alike, cost.count_groups(len(own))
            )
            # An expert without others in its group stays as it is, which takes no more.
            found.append([group for group in groups if len(group) > 1])
        return found

    def plan(self, model: Model) -> Model:
        """Return shapes, as if the last experts of each layer went in turns."""
        blocks = model.moe_blocks
        last = [[float(len(m.experts) - n) for n in range(len(m.experts))] for _, m in blocks]
        alike = [torch.zeros(len(own), len(own)) for own in last]
        groupings = self.choose_groups(model, last, [1.0] * len(blocks), alike)
        for (block, layer), groups in zip(blocks, groupings, strict=True):
            if groups:
                model = model.replace_block(share_bases(block, layer, groups, self.rank(layer)))
        return model


def compute_similarity(
    how: Literal["router", "weights", "random"],
    block: Block,
    layer: MoELayer,
    logits: Tensor,
    seed: int,
) -> Tensor:
    """Compute the similarity of the experts of a layer, float64 [E, E].

    Args:
        how: by cosines of router logits or of weights, or at random.
        block: the block.
        layer: its layer.
        logits: products of columns of router logits, [E, E].
        seed: for random.
    """
    if how == "router":
        return expert_groups.compute_cosines(logits)
    count = len(layer.experts)
    if how == "random":
        draw = torch.Generator().manual_seed(seed * 1_000_003 + block.origin)
        return torch.rand(count, count, generator=draw, dtype=torch.float64)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for part in PARTS:
        # A few rows at a time, as all experts may not fit into memory at once.
        weights = [getattr(expert, part) for expert in layer.experts]
        for at in range(0, weights[0].shape[0], ROWS_PER_CHUNK):
            some = [weight.load()[at : at + ROWS_PER_CHUNK].flatten() for weight in weights]
            whole = torch.stack(some).float()
            gram += (whole @ whole.T).double()
    return expert_groups.compute_cosines(gram)


@dataclass
class Builder(KeptTransform):
    """Builds bases and factors, block after block.

    Attributes:
        sharing: extent of the sharing.
        context: context of the pass.
        groups: experts that are replaced, by the index of their block.
        importance: of all experts, likewise.
        fitted: factors begin as the nearest to the difference from the base; otherwise as zero.
        seed: seed of factors that begin as zero.
    """

    sharing: Sharing
    context: PassContext
    groups: Mapping[int, list[list[int]]]
    importance: Mapping[int, list[float]]
    fitted: bool
    seed: int
    _grams: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Return the changed model."""
        context, model = self.context, self.context.model
        if self._whitens:
            model, _ = walk.walk(
                model,
                context.tokens,
                transform=self,
                propagate=False,
                advance=context.reporter.advance,
                label="expert_replace",
                memory=context.memory,
                kept=self.kept,
                needs_hidden=False,
            )
        else:
            for block, _ in model.moe_blocks:
                model = model.replace_block(self.change(block))
        check_budget(context.model, model, self.sharing.nbytes(context.model), self.notes)
        return Outcome(model, changed=tuple(self.changed), notes=tuple(self.notes))

    @property
    def _whitens(self) -> bool:
        return self.fitted and any(
            self.sharing.rank(layer) for _, layer in self.context.model.moe_blocks
        )

    def observe(self, trace: BlockTrace, source: BlockTrace | None = None) -> None:
        """Sum up products of inputs of experts that get factors, weighted by the gate."""
        routing = trace.routing
        if routing is None:
            return
        for own in self.groups[trace.block.index]:
            for j in own:
                token, place = torch.where(routing.ids == j)
                x, gate = routing.inputs[token], routing.weights[token, place, None]
                for name, inputs in (("outer", x), ("inner", trace.expert_hidden(j, x))):
                    weighted = inputs * gate
                    gram = self._grams.get((j, name))
                    found = weighted.T @ weighted
                    self._grams[j, name] = found if gram is None else gram.add_(found)

    def compute(self, block: Block) -> tuple[Block, Any] | None:
        """Return the block with bases and factors; its shape follows from its groups."""
        layer, groups = block.mlp, self.groups.get(block.index)
        if not isinstance(layer, MoELayer) or not groups:
            self._grams.clear()
            return None
        numbers: dict[str, Tensor] = {}
        for part in PARTS:
            self._compute_part(block, layer, part, groups, numbers)
        self._grams.clear()
        origins = [[layer.experts[j].origin for j in own] for own in groups]
        shown = ", ".join("+".join(map(str, own)) for own in origins)
        self.changed.append(f"block {block.index}: experts {shown}")
        return self.put(self.reshape(block, {}), numbers), {}

    def reshape(self, block: Block, shape: Any) -> Block:
        """Return the block with bases and factors, without numbers."""
        layer = block.mlp
        assert isinstance(layer, MoELayer)
        return share_bases(block, layer, self.groups[block.index], self.sharing.rank(layer))

    def _compute_part(
        self,
        block: Block,
        layer: MoELayer,
        part: str,
        groups: Sequence[Sequence[int]],
        numbers: dict[str, Tensor],
    ) -> None:
        """Compute bases and factors of one of the three matrices."""
        rank = self.sharing.rank(layer)
        position = len(layer.experts) - sum(map(len, groups))
        for own in groups:
            weights = {j: getattr(layer.experts[j], part).load().float() for j in own}
            base = torch.zeros_like(weights[own[0]])
            if len(own) > 1:
                shares = [self.importance[block.index][j] for j in own]
                base = base_sharing.average_matrices(list(weights.values()), shares)
                numbers[f"experts.{position}.{part}"] = base
                position += 1
            for j in own if rank else ():
                found = self._compute_factors(block, j, part, weights[j] - base, rank)
                numbers[f"members.{j}.{part}.first"], numbers[f"members.{j}.{part}.second"] = found

    def _compute_factors(
        self, block: Block, j: int, part: str, lacking: Tensor, rank: int
    ) -> tuple[Tensor, Tensor]:
        if not self.fitted:
            place = (self.seed, block.origin, j, PARTS.index(part))
            seed = sum(n * 1_000_003**power for power, n in enumerate(reversed(place)))
            draw = torch.Generator().manual_seed(seed % 2**63)
            outs, ins = lacking.shape
            return low_rank.make_zero_factors((outs, ins), rank, draw)
        gram = self._grams[j, "inner" if part == "down" else "outer"]
        return low_rank.factorize_low_rank(lacking, gram, rank)


def estimate_product_bytes(layer: MoELayer) -> int:
    """Estimate the bytes of products of inputs of a layer's experts, and of one factorization."""
    width, hidden = layer.experts[0].gate.shape
    # In float64: ridged products, their root, the matrix and the product with it; and the smaller
    # Gram matrix with the results of LAPACK.
    work = 2 * max(width, hidden) ** 2 + 3 * width * hidden + 3 * min(width, hidden) ** 2
    added = 4 * max(width, hidden) ** 2  # products of one batch
    return 4 * len(layer.experts) * (width**2 + hidden**2) + added + 8 * work
