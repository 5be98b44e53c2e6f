"""Simulate the gate of timings on machines of three kinds.

    python -m benchmarks.gate.simulate [RUNS] > benchmarks/gate/simulated.txt

The logarithm of the time of a run is the offset of the host, a drift (autoregressive, 0.9), noise
of the process, and now and then a spike. Base and head run in turns, A B and B A. Before, the noise
floor is measured on as many pairs of base with itself; after a change comes a second round.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from moe2edge.numerics.paired_changes import (
    Judgement,
    estimate_change,
    judge_change,
    judge_rounds,
    measure_floor,
)

TOLERANCE = 0.03
# Factor from one run to the next of the drift, and mean size of a spike.
AUTOREGRESSION, SPIKE = 0.9, 0.15


@dataclass(frozen=True)
class Machine:
    """Noise of the logarithm of a run's time.

    Attributes:
        host: standard deviation between jobs, which is the same for all runs of one.
        drift: standard deviation of the drift.
        process: standard deviation of a run.
        spikes: probability of a spike in a run.
    """

    host: float
    drift: float
    process: float
    spikes: float

    def run(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Return the logarithms of the times of ``count`` runs, one after another."""
        steps = random.normal(0, self.drift * np.sqrt(1 - AUTOREGRESSION**2), count)
        drift, now = np.empty(count), random.normal(0, self.drift)
        for n, step in enumerate(steps):
            now = drift[n] = AUTOREGRESSION * now + step
        noise = random.normal(0, self.process, count) + random.normal(0, self.host)
        spikes = (random.random(count) < self.spikes) * random.exponential(SPIKE, count)
        return np.asarray(drift + noise + spikes)

    def run_pairs(
        self, random: np.random.Generator, pairs: int, effect: float
    ) -> tuple[list[float], list[float]]:
        """Return the times of base and head, which takes ``1 + effect`` times as long."""
        times = self.run(random, 2 * pairs).reshape(pairs, 2)
        # The second pair runs head first, and so on.
        times[1::2] = times[1::2, ::-1]
        base, head = np.exp(times[:, 0]), np.exp(times[:, 1]) * (1 + effect)
        return base.tolist(), head.tolist()


MACHINES = {
    "quiet": Machine(0.003, 0.003, 0.007, 0.01),
    "hosted": Machine(0.03, 0.02, 0.02, 0.05),
    "noisy": Machine(0.06, 0.05, 0.04, 0.15),
}


def judge_once(
    machine: Machine, random: np.random.Generator, pairs: int, effect: float
) -> Judgement:
    """Run the gate once, as ``moe2edge compare`` does with two folders."""
    floor = measure_floor(*machine.run_pairs(random, pairs, 0))
    rounds = [machine.run_pairs(random, pairs, effect)]
    if judge_change(estimate_change(*rounds[0]), TOLERANCE, floor=floor) in (
        "regressed",
        "improved",
    ):
        rounds.append(machine.run_pairs(random, pairs, effect))
    return judge_rounds(rounds, TOLERANCE, floor=floor)


def count_judgements(
    name: str, runs: int, pairs: int, effect: float, seed: int = 1
) -> dict[Judgement, int]:
    """Count what the gate says of ``runs`` jobs on a machine."""
    random = np.random.default_rng(seed)
    found = [judge_once(MACHINES[name], random, pairs, effect) for _ in range(runs)]
    return {word: found.count(word) for word in sorted(set(found))}


def main(runs: int) -> None:
    """Print a line for each machine, number of pairs and effect."""
    for name in MACHINES:
        for pairs in (10, 20):
            for effect in (0, 0.05, 0.1, 0.15, -0.1):
                found = count_judgements(name, runs, pairs, effect)
                said = ", ".join(f"{word} {count}" for word, count in found.items())
                print(f"{name}, {pairs} pairs, {effect:+.0%}: {said} of {runs}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)
