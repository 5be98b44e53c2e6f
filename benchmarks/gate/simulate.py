"""Simulate the gate of timings on machines of three kinds.

    python -m benchmarks.gate.simulate [RUNS] > benchmarks/gate/simulated.txt

The logarithm of the time of a run is the offset of the host, a drift (autoregressive, 0.9), noise
of the process, and now and then a spike. In the first round base, base and head run in turns, A A B
and B A A; it is extended once where it can say nothing. After a change comes a second round of as
many turns, A B and B A.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe2edge.numerics.paired_changes import (
    Judgement,
    PairedRuns,
    choose_step,
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

    def run_turns(
        self, random: np.random.Generator, turns: int, effects: Sequence[float]
    ) -> list[list[float]]:
        """Return the times of sides that run in turns, A B C and C B A.

        Args:
            random: source of the noise.
            turns: number of turns.
            effects: fraction by which each side takes longer.
        """
        times = self.run(random, len(effects) * turns).reshape(turns, len(effects))
        times[1::2] = times[1::2, ::-1]
        found: list[list[float]] = (np.exp(times) * (1 + np.array(effects))).T.tolist()
        return found


MACHINES = {
    "quiet": Machine(0.003, 0.003, 0.007, 0.01),
    "hosted": Machine(0.03, 0.02, 0.02, 0.05),
    "noisy": Machine(0.06, 0.05, 0.04, 0.15),
}


def judge_once(
    machine: Machine, random: np.random.Generator, pairs: int, effect: float
) -> Judgement:
    """Run the gate once, as ``moe2edge compare`` does with two folders."""
    again, base, head = machine.run_turns(random, pairs, (0, 0, effect))
    trial = PairedRuns(TOLERANCE, again, (base, head))
    if choose_step([trial.judge_first()], extended=False) == "extend":
        trial = trial.extend(*machine.run_turns(random, pairs, (0, 0, effect)))
    if choose_step([trial.judge_first()], extended=True) == "confirm":
        turns = len(trial.again)
        trial = trial.confirm(*machine.run_turns(random, turns, (0, effect)))
    return trial.judge()


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
