"""The cells of the study: each is a recipe that moe2edge runs, and the seed of its calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCORED = ("routing-score", "frequency", "soft-frequency", "ean", "reap", "man", "msan", "mone")
UNSEEING = ("magnitude", "aimer")
DRAWS = 10
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One line of the results.

    Attributes:
        group: table that it stands in.
        method: name of the method.
        setting: amount that is removed.
        passes: the recipe.
        seed: of the calibration samples, or of the random draw.
        domains: domains of the calibration text; empty: equal parts of all.
    """

    group: str
    method: str
    setting: str
    passes: list[dict[str, dict[str, Any]]]
    seed: int = 0
    domains: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name in the file of results."""
        on = "+".join(self.domains) or "all"
        return f"{self.group} | {self.method} | {self.setting} | {on} | {self.seed}"


def list_cells(domains: tuple[str, ...], experts: int, blocks: int) -> Iterator[Cell]:
    """Yield all cells of a model."""
    for dropped, keep in (("25 %", 0.75), ("50 %", 0.5)):
        yield from _expert_drop(dropped, keep)
        yield from _search(dropped, keep, experts)
        yield from _budgets(dropped, keep)
    for count in (1, 2, 3):
        if count < blocks:
            yield from _depth(count)
    yield from _skipping()
    if len(domains) > 1:
        yield from _tasks(domains)


def _expert_drop(dropped: str, keep: float) -> Iterator[Cell]:
    for criterion in SCORED:
        for seed in SEEDS:
            step = {"expert_drop": {"keep": keep, "criterion": criterion}}
            yield Cell("experts", criterion, dropped, [step], seed)
    for criterion in UNSEEING:
        step = {"expert_drop": {"keep": keep, "criterion": criterion}}
        yield Cell("experts", criterion, dropped, [step])
    for seed in range(DRAWS):
        step = {"expert_drop": {"keep": keep, "criterion": "random", "seed": seed}}
        yield Cell("experts", "random", dropped, [step], seed)


def _search(dropped: str, keep: float, experts: int) -> Iterator[Cell]:
    # One set of samples where a layer takes a minute.
    methods, seeds = (
        (("exhaustive", "greedy"), SEEDS) if experts <= 12 else (("greedy", "beam"), (0,))
    )
    for method in methods:
        for progressive in (False, True):
            name = f"search, {method}{', progressive' if progressive else ''}"
            step = {"expert_search": {"keep": keep, "method": method, "progressive": progressive}}
            for seed in seeds:
                yield Cell("experts", name, dropped, [step], seed)
    for criterion in ("mone", "reap"):
        first = {"expert_drop": {"keep": keep, "criterion": criterion}}
        yield Cell("experts", f"{criterion}, then routing", dropped, [first, {"routing": {}}])


def _budgets(dropped: str, keep: float) -> Iterator[Cell]:
    for criterion in ("mone", "reap"):
        step = {"expert_drop": {"keep": keep, "criterion": criterion, "scope": "global"}}
        yield Cell("budgets", f"{criterion}, one budget for all", dropped, [step])
        options = {"keep": keep, "criterion": criterion}
        yield Cell("budgets", f"{criterion}, expert_budget", dropped, [{"expert_budget": options}])


def _depth(count: int) -> Iterator[Cell]:
    for norm in (True, False):
        name = f"layer_drop{'' if norm else ', norm stays'}"
        yield Cell("depth", name, str(count), [{"layer_drop": {"drop": count, "norm": norm}}])
    for consecutive in (False, True):
        name = f"block_drop{', consecutive' if consecutive else ''}"
        step = {"block_drop": {"drop": count, "consecutive": consecutive}}
        yield Cell("depth", name, str(count), [step])


def _skipping() -> Iterator[Cell]:
    for quantile in (0.25, 0.5, 0.75):
        step = {"expert_skip": {"quantile": quantile}}
        yield Cell("skipping", "expert_skip", f"quantile {quantile}", [step])
    for keep in (0.75, 0.5):
        drop = {"expert_drop": {"keep": keep, "criterion": "mone"}}
        name = f"mone keep {keep}, expert_skip"
        yield Cell("skipping", name, "quantile 0.5", [drop, {"expert_skip": {}}])


def _tasks(domains: tuple[str, ...]) -> Iterator[Cell]:
    for domain in domains:
        for criterion in ("mone", "reap"):
            step = {"expert_drop": {"keep": 0.5, "criterion": criterion}}
            yield Cell("tasks", criterion, "50 %", [step], domains=(domain,))
        step = {"expert_search": {"keep": 0.5}}
        yield Cell("tasks", "search", "50 %", [step], domains=(domain,))
