"""Error of linear maps of a layer that are fitted together, and of maps fitted one by one.

    python -m benchmarks.replacing.joint --model MODEL --data DIR [--sweeps 3] [--seeds 2]

A token that chose two replaced experts gets the sum of two maps, so that one can make up for the
error of the other. Each map is fitted again to the error that the others leave, in turns:
coordinate descent on the error of the whole layer. Half of the experts, rank 16, the texts of
before_recovery.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._study import QUIET
from benchmarks.replacing import before_recovery as setup
from moe2edge.calibration import observation, walk
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.numerics import reduced_rank
from moe2edge.numerics.reduced_rank import ReducedRankFit, RegressionSums
from moe2edge.passes._replace_maps import plan_replacements
from moe2edge.testing import InMemory

RIDGE = 0.01


def apply_map(fit: ReducedRankFit, x: Tensor) -> Tensor:
    """Compute the output of a map for x [n, hidden]."""
    return (fit.constant + x.double() @ fit.first.T @ fit.second.T).float()


@dataclass
class Joint:
    """A rewrite of layers that keeps all inputs and outputs of experts, and fits maps in turns.

    Attributes:
        sweeps: number of times that each map is fitted again.
        seen: the trace of each batch.
        missed: error of each layer before and after the sweeps.
    """

    sweeps: int
    store: InMemory = field(default_factory=InMemory)
    seen: list[observation.BlockTrace] = field(default_factory=list)
    missed: list[tuple[float, float]] = field(default_factory=list)

    def observe(
        self, trace: observation.BlockTrace, source: observation.BlockTrace | None = None
    ) -> None:
        """Keep a trace."""
        self.seen.append(trace)

    def change(self, block: Block) -> Block:
        """Replace the half of the experts whose own maps have the smallest error."""
        layer = block.mlp
        assert isinstance(layer, MoELayer)
        routings = [s.routing for s in self.seen if s.routing is not None]
        x = torch.cat([r.inputs for r in routings])
        ids, weights = (torch.cat([getattr(r, k) for r in routings]) for k in ("ids", "weights"))
        count = len(layer.experts)
        gates = torch.zeros(len(x), count).scatter_(1, ids, weights)
        rows = {n: torch.where(ids == n)[0] for n in range(count)}
        outputs = {n: self.seen[0].expert_output(n, x[rows[n]]) for n in range(count)}

        def fitted(n: int, wanted: Tensor) -> ReducedRankFit:
            sums = RegressionSums(x.shape[1])
            sums.add(x[rows[n]], wanted, gates[rows[n], n])
            return reduced_rank.fit_reduced_rank(sums, setup.RANK, RIDGE)

        fits = {n: fitted(n, outputs[n]) for n in range(count)}
        gone = sorted(sorted(fits, key=lambda n: fits[n].residual)[: count // 2])
        lacking = torch.zeros_like(x)
        for n in gone:
            gate = gates[rows[n], n, None]
            lacking[rows[n]] += gate * (outputs[n] - apply_map(fits[n], x[rows[n]]))
        before = float(lacking.square().sum())
        for n in gone * self.sweeps:
            gate = gates[rows[n], n, None]
            lacking[rows[n]] += gate * apply_map(fits[n], x[rows[n]])
            fits[n] = fitted(n, lacking[rows[n]] / gate)
            lacking[rows[n]] -= gate * apply_map(fits[n], x[rows[n]])
        self.missed.append((before, float(lacking.square().sum())))
        self.seen.clear()
        numbers = {}
        for place, n in enumerate(gone):
            for part in ("constant", "first", "second"):
                numbers[f"substitutes.{place}.{part}"] = getattr(fits[n], part).float()
        return self.store.put(
            plan_replacements(block, layer, dict.fromkeys(gone, setup.RANK)), numbers
        )


def main() -> None:
    """Print the excess loss of both for each seed, and the errors of the layers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    prepared = setup.prepare(given.model, given.data, given.seeds)
    model = prepared.bench.model
    source = prepared.loss(model)
    for seed, ids in enumerate(prepared.calibration):
        for sweeps in (0, given.sweeps):
            joint = Joint(sweeps)
            result, _ = walk.walk(model, ids, transform=joint, advance=QUIET.advance, label="")
            excess = prepared.loss(result) - source
            changes = ", ".join(f"{after / before - 1:+.1%}" for before, after in joint.missed)
            print(
                f"seed {seed}, {sweeps} sweeps: excess {excess:.4f}; layers {changes}", flush=True
            )


if __name__ == "__main__":
    main()
