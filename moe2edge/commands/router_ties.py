"""Equal rows in routers: runtimes break the tie between their experts each in its own way.

Where two experts have the same score and only one place is left among the chosen, PyTorch, ONNX
Runtime and others take different ones. That is harmless if the experts are equal as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe2edge.errors import Unsupported
from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS, Full
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.stages import plan_passes
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

# Distance of two rows, relative to their size, below which float32 cannot tell their scores apart.
EQUAL = 1e-7


@dataclass(frozen=True)
class Tie:
    """Rows of a router that give the same score and run different experts.

    Attributes:
        block: index of the block.
        experts: what they run, as numbered in the source.
        top_k: rows that the router chooses.
    """

    block: int
    experts: tuple[int, ...]
    top_k: int

    def __str__(self) -> str:
        """Describe the tie for messages."""
        *first, last = map(str, self.experts)
        return (
            f"block {self.block}: the router's rows of experts {', '.join(first)} and {last} are "
            f"equal (top-{self.top_k})"
        )


class TieJudge:
    """Judges the routers of a model as soon as no later pass can change which rows they have."""

    def __init__(self, targets: Sequence[Target], reporter: Reporter) -> None:
        self._targets = targets
        self._reporter = reporter
        self._done = False

    def look(self, model: Model, passes: Sequence[Pass]) -> None:
        """Look at a model that ``passes`` are still to change.

        Raises:
            Unsupported: rows are equal, and a target's runtime would choose other experts.
        """
        if self._done or not keep_routers(passes, model):
            return
        ties = find_ties(model)
        # Experts that are equal need not stay so: training, or other calibration, parts them.
        self._done = bool(ties) or not any(True for _ in _list_equal_rows(model))
        if not ties:
            return
        more = f", and {len(ties) - 1} more such groups" if len(ties) > 1 else ""
        for target in self._targets:
            if not target.chooses_as_torch:
                raise Unsupported(
                    f"{ties[0]}{more}: of experts with equal scores the runtime of target "
                    f"{target.name} chooses others than PyTorch; leave out all but one of them "
                    "(expert_drop, or decisions in which they are taken out), or export to hf or "
                    "gptq"
                )
        self._reporter.log(
            f"warning: {ties[0]}{more}: which of them a token gets depends on the runtime"
        )


def keep_routers(passes: Sequence[Pass], model: Model) -> bool:
    """Return whether no pass removes, adds or changes rows of a router."""
    if any(step.changes_routers for step in passes):
        return False
    after = plan_passes(passes, model).result
    routers = [
        [(block.origin, layer.router.weight.load) for block, layer in m.moe_blocks]
        for m in (model, after)
    ]
    return routers[0] == routers[1]


def find_ties(model: Model) -> list[Tie]:
    """Find the ties in the routers of a model; reads routers, and the experts of equal rows."""
    found = []
    for block, layer, rows in _list_equal_rows(model):
        distinct = _list_distinct(layer, rows)
        if len(distinct) > 1:
            origins = tuple(layer.rows[row].origin for row in distinct)
            found.append(Tie(block.index, origins, layer.router.top_k))
    return found


def _list_equal_rows(model: Model) -> Iterator[tuple[Block, MoELayer, list[int]]]:
    """Yield groups of equal rows of routers, where not all experts are chosen."""
    for block, layer in model.moe_blocks:
        if layer.router.top_k < layer.router_rows:
            for rows in _group_equal(layer.router.weight.load().float()):
                yield block, layer, rows


def _group_equal(rows: Tensor) -> list[list[int]]:
    """Group the numbers of equal rows [n, hidden]; rows that equal no other are left out."""
    import torch

    exact = rows.double()
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(exact, exact, compute_mode=mode)
    sizes = exact.norm(dim=1)
    alike = distances <= EQUAL * torch.maximum(sizes[:, None], sizes)
    alike |= torch.eye(len(rows), dtype=torch.bool)  # also where numbers are not finite
    groups: dict[int, list[int]] = {}
    for n, row in enumerate(alike):
        groups.setdefault(int(row.nonzero()[0]), []).append(n)
    return [group for group in groups.values() if len(group) > 1]


def _list_distinct(layer: MoELayer, rows: Sequence[int]) -> list[int]:
    """List of some rows those that run experts of other numbers than all before them."""
    distinct: list[int] = []
    for row in rows:
        if not any(_run_the_same(layer, row, other) for other in distinct):
            distinct.append(row)
    return distinct


def _run_the_same(layer: MoELayer, first: int, second: int) -> bool:
    """Return whether two rows run the same numbers."""
    import torch

    one, other = layer.rows[first], layer.rows[second]
    if not (isinstance(one, Full) and isinstance(other, Full)):
        return False
    if one.expert == other.expert:
        return True
    pairs = (
        [getattr(layer.experts[row.expert], part).load() for row in (one, other)] for part in PARTS
    )
    return all(torch.equal(*pair) for pair in pairs)
