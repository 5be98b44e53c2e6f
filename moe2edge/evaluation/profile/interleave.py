"""Run labelled jobs in turns, so that what changes on a machine meanwhile meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from moe2edge.errors import InputError
from moe2edge.progress import QUIET, Reporter

T = TypeVar("T")

# order(number of jobs, number of the round) -> places of the jobs, in the order of running
RoundOrder = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True)
class Job(Generic[T]):
    """A measurement that can be repeated.

    Attributes:
        label: its name, unique among those that run in turns.
        run: measures once, in a fresh process.
    """

    label: str
    run: Callable[[], T]


@dataclass(frozen=True)
class Round(Generic[T]):
    """One measurement of every job.

    Attributes:
        order: labels in the order of running.
        found: what each job returned, by its label.
    """

    order: tuple[str, ...]
    found: Mapping[str, T]


def mirror_order(count: int, number: int) -> Sequence[int]:
    """Return the places of jobs in a round: forwards and backwards in turns.

    A drift that is even over two rounds then hits all jobs alike.

    >>> mirror_order(3, 0), mirror_order(3, 1)
    ([0, 1, 2], [2, 1, 0])
    """
    places = list(range(count))
    return places[::-1] if number % 2 else places


def run_in_turns(
    jobs: Sequence[Job[T]],
    rounds: int,
    *,
    order: RoundOrder = mirror_order,
    stop: Callable[[Sequence[Round[T]]], bool] = lambda _: False,
    reporter: Reporter = QUIET,
    at: str = "measure",
) -> tuple[Round[T], ...]:
    """Run every job once a round.

    Args:
        jobs: the jobs.
        rounds: largest number of rounds.
        order: the order of the jobs in each round.
        stop: asked after each round with all so far; True ends before ``rounds``.
        reporter: receives progress after each job.
        at: name of the progress.

    Raises:
        InputError: two jobs have one label, or there is no job or no round.
    """
    labels = [job.label for job in jobs]
    if not jobs or rounds < 1 or len(set(labels)) != len(labels):
        raise InputError(
            f"{len(jobs)} jobs ({', '.join(labels)}) and {rounds} rounds; give one round or more, "
            "and each job once, with a name of its own"
        )
    done: list[Round[T]] = []
    for number in range(rounds):
        found: dict[str, T] = {}
        for place in order(len(jobs), number):
            found[labels[place]] = jobs[place].run()
            reporter.advance(at, number * len(jobs) + len(found), rounds * len(jobs))
        assert len(found) == len(jobs), "an order must name every job"
        done.append(Round(tuple(found), {label: found[label] for label in labels}))
        if stop(done):
            break
    return tuple(done)
