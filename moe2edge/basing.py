"""The work of replacing groups of experts by bases with factors: a walk, then numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from moe2edge import bases, walk
from moe2edge.layers import PARTS, Expert, Factors, Member, MoELayer, Weight
from moe2edge.model import Block, Model
from moe2edge.pipeline import Lab, Outcome, planned

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.walk import Seen


def experts_nbytes(model: Model) -> int:
    """Bytes of routed experts, and of what answers in their place."""
    return sum(
        weight.nbytes
        for block, _ in model.moe_blocks
        for role, weight in block.weights()
        if role.startswith(("experts.", "members.", "substitutes."))
    )


def shared(block: Block, layer: MoELayer, groups: Sequence[Sequence[int]], rank: int) -> Block:
    """The block whose groups of experts share a base each; of one, factors are all.

    Numbers of bases and factors are not there yet; experts that stay come before bases.
    """

    def weight(like: Weight, name: str, *shape: int) -> Weight:
        return planned(replace(like, name=name, shape=shape, scheme=None, load_quantized=None))

    gone = {j: n for n, own in enumerate(groups) for j in own}
    based = [own for own in groups if len(own) > 1]
    stay = [j for j in range(len(layer.experts)) if j not in gone]
    experts = [layer.experts[j] for j in stay]
    for own in based:
        like = layer.experts[own[0]]
        numbers = {
            p: weight(
                getattr(like, p),
                f"{p} of base {like.origin} in block {block.origin}",
                *getattr(like, p).shape,
            )
            for p in PARTS
        }
        experts.append(Expert(**numbers, origin=like.origin))
    members = []
    for j, expert in enumerate(layer.experts):
        if j not in gone:
            members.append(Member(expert.origin, stay.index(j)))
            continue
        own = groups[gone[j]]
        factors = {}
        for part in PARTS if rank else ():
            like = getattr(expert, part)
            outs, ins = like.shape
            name = f"of {part} of member {expert.origin} in block {block.origin}"
            factors[part] = Factors(
                weight(like, f"first factor {name}", rank, ins),
                weight(like, f"second factor {name}", outs, rank),
            )
        base = len(stay) + based.index(own) if len(own) > 1 else None
        members.append(Member(expert.origin, base, factors))
    return replace(block, mlp=replace(layer, experts=tuple(experts), members=tuple(members)))


@dataclass
class Builder:
    """Builds bases and factors, block after block.

    Attributes:
        fitted: factors begin as the nearest to what is lacking; otherwise as zero.
        rank: of the factors of a layer.
        seed: of factors that begin as zero.
        lab: what there is at hand.
        groups: experts that are replaced, by the index of their block.
        importance: of all experts, likewise.
        changed, notes: for the report.
    """

    fitted: bool
    rank: Callable[[MoELayer], int]
    seed: int
    lab: Lab
    groups: Mapping[int, list[list[int]]]
    importance: Mapping[int, list[float]]
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _grams: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def run(self) -> Outcome:
        """The changed model."""
        lab, model = self.lab, self.lab.model
        if self._whitens:
            model = walk.rewrite(
                model,
                lab.tokens,
                self.see,
                self.change,
                lab.watcher.advance,
                "expert_replace",
                lab.memory,
                propagate=False,
            )
        else:
            for block, _ in model.moe_blocks:
                model = model.replace_block(self.change(block))
        before, after = experts_nbytes(lab.model), experts_nbytes(model)
        self.notes.append(
            f"experts, bases and factors take {after:,} bytes of {before:,} ({after / before:.1%})"
        )
        return Outcome(model, changed=tuple(self.changed), notes=tuple(self.notes))

    @property
    def _whitens(self) -> bool:
        return self.fitted and any(self.rank(layer) for _, layer in self.lab.model.moe_blocks)

    def see(self, seen: Seen) -> None:
        """Sum up products of inputs of what will have factors, weighted by the gate."""
        routing = seen.routing
        if routing is None:
            return
        for own in self.groups[seen.block.index]:
            for j in own:
                token, place = torch.where(routing.ids == j)
                x, gate = routing.inputs[token], routing.weights[token, place, None]
                for name, inputs in (("outer", x), ("inner", seen.expert_hidden(j, x))):
                    weighted = inputs * gate
                    gram = self._grams.get((j, name))
                    found = weighted.T @ weighted
                    self._grams[j, name] = found if gram is None else gram.add_(found)

    def change(self, block: Block) -> Block:
        """The block with bases and factors."""
        layer, groups = block.mlp, self.groups.get(block.index)
        if not isinstance(layer, MoELayer) or not groups:
            self._grams.clear()
            return block
        numbers: dict[str, Tensor] = {}
        for part in PARTS:
            self._part(block, layer, part, groups, numbers)
        self._grams.clear()
        origins = [[layer.experts[j].origin for j in own] for own in groups]
        shown = ", ".join("+".join(map(str, own)) for own in origins)
        self.changed.append(f"block {block.index}: experts {shown}")
        return self.lab.store.put(shared(block, layer, groups, self.rank(layer)), numbers)

    def _part(
        self,
        block: Block,
        layer: MoELayer,
        part: str,
        groups: Sequence[Sequence[int]],
        numbers: dict[str, Tensor],
    ) -> None:
        """Bases and factors of one of the three matrices."""
        rank = self.rank(layer)
        position = len(layer.experts) - sum(map(len, groups))
        for own in groups:
            weights = {j: getattr(layer.experts[j], part).load().float() for j in own}
            base = torch.zeros_like(weights[own[0]])
            if len(own) > 1:
                shares = [self.importance[block.index][j] for j in own]
                base = bases.weighted_mean(list(weights.values()), shares)
                numbers[f"experts.{position}.{part}"] = base
                position += 1
            for j in own if rank else ():
                found = self._factors(block, j, part, weights[j] - base, rank)
                numbers[f"members.{j}.{part}.first"], numbers[f"members.{j}.{part}.second"] = found

    def _factors(
        self, block: Block, j: int, part: str, lacking: Tensor, rank: int
    ) -> tuple[Tensor, Tensor]:
        if not self.fitted:
            place = (self.seed, block.origin, j, PARTS.index(part))
            seed = sum(n * 1_000_003**power for power, n in enumerate(reversed(place)))
            draw = torch.Generator().manual_seed(seed % 2**63)
            outs, ins = lacking.shape
            return bases.untrained((outs, ins), rank, draw)
        return bases.low_rank(
            lacking, self._grams.get((j, "inner" if part == "down" else "outer")), rank
        )
