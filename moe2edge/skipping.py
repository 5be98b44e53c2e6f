"""Dynamic skipping: thresholds from calibration text, and how much is skipped.

The rule is that of Efficient Expert Pruning and Skipping (https://arxiv.org/abs/2402.14800), which
knows two experts per token: the second is left out where ``w2 < beta * w1``, and beta is the
median of ``w2 / w1``. For any k, each place i after the first has a threshold of its own, the same
quantile of ``w_i / w_1``. What is carried out at run time is `moe2edge.modules.skipping`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge.layers import MoELayer
from moe2edge.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.target import Runtime
    from moe2edge.walk import Seen

# Of `measure_times`: tokens that follow the prompt, and runs of each kind.
STEPS, RUNS = 32, 5


@dataclass(frozen=True)
class WeightRatios:
    """``w_i / w_1`` of every token, float32 [tokens, k - 1], by the origin of the block."""

    ratios: Mapping[int, Tensor]


class RatioObserver:
    """Gathers `WeightRatios`; 4 (k - 1) bytes per token and layer."""

    def __init__(self) -> None:
        self._ratios: dict[int, list[Tensor]] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        if seen.routing is not None:
            weights = seen.routing.weights
            ratios = weights[:, 1:] / weights[:, :1]
            self._ratios.setdefault(seen.block.origin, []).append(ratios)

    def fact(self) -> WeightRatios:
        """The ratios."""
        return WeightRatios({key: torch.cat(parts) for key, parts in self._ratios.items()})


def thresholds(ratios: Tensor, quantile: float) -> tuple[float, ...]:
    """A quantile of each column of ``ratios`` [tokens, k - 1]; 0.5 gives medians.

    It is laid in the middle between two neighbouring ratios: on one of them, rounding would decide
    whether that token skips, and runtimes would differ. For an even number of tokens the quantile
    0.5 is the median; for an odd one it lies between the median and the ratio below.
    """
    found = []
    for column in ratios.double().T:
        ordered = torch.sort(column).values
        values = torch.unique(ordered)
        place = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
        above = int(torch.searchsorted(values, place))
        lower = values[above - 1] if above else torch.zeros(())
        found.append(float((lower + values[above]) / 2))
    return tuple(found)


def removed(model: Model) -> Model:
    """``model`` with every chosen expert run."""
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=())
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    return model


@dataclass(frozen=True)
class SkipRates:
    """How often dynamic skipping left out a routed expert.

    Attributes:
        routed: routed places seen, by the origin of the block.
        skipped: those of them that were left out.
    """

    routed: Mapping[int, int]
    skipped: Mapping[int, int]

    @property
    def rate(self) -> float:
        """Part of all routed places that was left out; of layers that skip."""
        return sum(self.skipped.values()) / max(1, sum(self.routed.values()))


class SkipObserver:
    """Gathers `SkipRates` of layers that skip."""

    def __init__(self) -> None:
        self._routed: dict[int, int] = {}
        self._skipped: dict[int, int] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        layer, key = seen.block.mlp, seen.block.origin
        if not isinstance(layer, MoELayer) or not layer.router.skip_below or seen.routing is None:
            return
        left_out = int((seen.routing.ids == layer.choices).sum())
        self._routed[key] = self._routed.get(key, 0) + seen.routing.ids.numel()
        self._skipped[key] = self._skipped.get(key, 0) + left_out

    def fact(self) -> SkipRates:
        """The rates."""
        return SkipRates(self._routed, self._skipped)


@dataclass(frozen=True)
class SkipTimes:
    """What skipping saves in a runtime; medians over interleaved runs, milliseconds.

    Attributes:
        prefill: of a prompt, with skipping.
        prefill_without: with every chosen expert run.
        decode: of one further token, with skipping.
        decode_without: with every chosen expert run.
        prompt: tokens of the prompt.
        runs: of each kind.
    """

    prefill: float
    prefill_without: float
    decode: float
    decode_without: float
    prompt: int
    runs: int


def measure_times(runtime: Runtime, without: Runtime, ids: Sequence[int]) -> SkipTimes:
    """Time one text in two runtimes by turns: a prompt, and its last `STEPS` tokens one by one."""
    steps = min(STEPS, len(ids) - 1)
    prompt, rest = ids[:-steps], ids[-steps:]
    taken: dict[str, list[float]] = {}
    for run in range(RUNS + 1):
        for name, one in (("", runtime), ("_without", without)):
            begun = time.perf_counter()
            one.start(prompt)
            started = time.perf_counter()
            for token in rest:
                one.step(token)
            if run:  # the first one warms up
                taken.setdefault(f"prefill{name}", []).append(started - begun)
                decode = (time.perf_counter() - started) / len(rest)
                taken.setdefault(f"decode{name}", []).append(decode)
    found = {name: round(1e3 * statistics.median(values), 4) for name, values in taken.items()}
    return SkipTimes(**found, prompt=len(prompt), runs=RUNS)
