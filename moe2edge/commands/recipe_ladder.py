"""Recipes for a budget: a fixed ladder, from what costs least quality to what takes least room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import yaml

from moe2edge.commands.forecast import Forecast, TargetForecast, refuse_like_export
from moe2edge.errors import DoesNotFit
from moe2edge.pipeline.recipe import Recipe, parse
from moe2edge.progress import format_bytes

# Passes of each rung, best first. Quantization comes before trimming: 8 bits cost no quality and 4
# bits little, while a quarter of the experts costs more (docs/results.md).
_QUANTIZED = (
    "[]",
    "[gptq: {bits: 8}]",
    "[gptq: {bits: 8, head: 8, embedding: 8}]",
    "[gptq]",
    "[gptq: {head: 8, embedding: 8}]",
)
# Recipes that are shown.
SHOWN_CHOICES = 5
_SMALLEST = _QUANTIZED[-2:]
_KEPT = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True)
class Limits:
    """Limits of an output, in bytes; None: any number.

    Attributes:
        memory: while it runs.
        disk: of its folder.
    """

    memory: int | None = None
    disk: int | None = None

    def find_excess(self, one: TargetForecast) -> str:
        """Say what of an output is over the limits; empty if nothing is."""
        needed = one.resident - one.droppable
        if self.memory is not None and needed > self.memory:
            return f"{one.target} takes {format_bytes(needed)} of memory while running"
        if self.disk is not None and one.disk > self.disk:
            return f"{one.target} takes {format_bytes(one.disk)} on the disk"
        return ""

    def measure_excess(self, forecast: Forecast) -> float:
        """Return the largest part of a limit that an output takes; above one it does not fit."""
        parts = [0.0]
        for one in forecast.targets:
            needed = one.resident - one.droppable
            parts += [needed / self.memory] if self.memory else []
            parts += [one.disk / self.disk] if self.disk else []
        return max(parts)

    def __str__(self) -> str:
        """Return the limits as options."""
        told = (("--budget", self.memory), ("--disk", self.disk))
        return " and ".join(f"{name} {format_bytes(size)}" for name, size in told if size)


@dataclass(frozen=True)
class Choice:
    """A recipe that fits.

    Attributes:
        passes: its passes, as YAML in one line.
        recipe: the recipe.
        forecast: what its export gives and takes.
    """

    passes: str
    recipe: Recipe
    forecast: Forecast

    @property
    def text(self) -> str:
        """The recipe as YAML, for ``export -r``; with its texts where they are not the default."""
        short = f"passes: {self.passes}\n"
        return short if parse(short) == self.recipe else self.recipe.render()


def list_rungs() -> Iterator[str]:
    """Yield the passes of each rung as YAML, best first."""
    yield from _QUANTIZED
    for keep in _KEPT:
        yield f"[expert_drop: {{keep: {keep}}}]"
        for quantized in _SMALLEST:
            yield f"[expert_drop: {{keep: {keep}}}, {quantized[1:]}"


def choose_recipes(
    limits: Limits,
    settings: Sequence[str],
    forecast: Callable[[Recipe], Forecast],
    given: Recipe | None = None,
) -> list[Choice]:
    """Choose the best recipes of the ladder whose outputs all fit, best first.

    Args:
        limits: what each output may take.
        settings: values of ``--set`` that every recipe has, such as those of texts.
        forecast: says what an export by a recipe gives and takes.
        given: the only recipe to try; None: those of the ladder.

    Raises:
        DoesNotFit: none fits; names the smallest, and the target that it is too large for.
        InputError, Unsupported: no recipe can be exported to all targets.
    """
    able, fitting, last = list[Choice](), list[Choice](), None
    # By choices that depend on the model, such as one tensor that is head and embedding, two rungs
    # may be one.
    known: set[str] = set()
    rungs = ((passes, parse(f"passes: {passes}", settings)) for passes in list_rungs())
    for passes, recipe in rungs if given is None else ((_write_passes(given), given),):
        last = Choice(passes, recipe, forecast(recipe))
        if last.forecast.refusals or last.forecast.recipe in known:
            continue
        known.add(last.forecast.recipe)
        able.append(last)
        if limits.measure_excess(last.forecast) <= 1:
            fitting.append(last)
        if len(fitting) == SHOWN_CHOICES:
            break
    if fitting:
        return fitting
    if not able and last is not None:
        refuse_like_export(last.forecast)
    smallest = min(able, key=lambda one: limits.measure_excess(one.forecast))
    worst = next(filter(None, map(limits.find_excess, smallest.forecast.targets)))
    if given is not None:
        raise DoesNotFit(
            f"the recipe does not fit {limits}: {worst}; raise the limit, or leave the recipe out, "
            "and one that fits is chosen"
        )
    # A folder is as large for any context.
    shorter = ", lower --context," if limits.memory is not None else ""
    raise DoesNotFit(
        f"nothing fits {limits}: by the smallest recipe, passes: {smallest.passes}, {worst}; raise "
        f"the limit{shorter} or take a smaller model"
    )


def _write_passes(recipe: Recipe) -> str:
    """Write the passes of a recipe as YAML in one line."""
    passes = yaml.safe_load(recipe.render())["passes"]
    text: str = yaml.safe_dump(passes, default_flow_style=True, width=1 << 20, sort_keys=False)
    return text.strip()
