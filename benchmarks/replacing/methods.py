"""The methods of the study: recipes that leave a part of the experts' bytes, and their training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe2edge import Model

# Parts of the experts' bytes that are left.
SIZES = (0.5, 0.7)
# LightMoE's end of annealing, as a part of the steps (0.1 to 0.5 in the paper).
ANNEAL = 0.3
# For factors without a base: a part of the rank at which they are as large as an expert.
SVD_PART = 0.4
DRAWS = 3


@dataclass(frozen=True)
class Method:
    """One line of the results.

    Attributes:
        name: in the table.
        size: part of the experts' bytes that is to be left; 1: all of them.
        passes: the recipe before training.
        recover: options of the training that differ from the default; None: no training.
        fewer: bits besides 4 to which the trained model is quantized.
    """

    name: str
    size: float
    passes: list[dict[str, dict[str, Any]]]
    recover: dict[str, Any] | None = field(default_factory=dict)
    fewer: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name in the file of results."""
        return f"{self.size:g} | {self.name}"


def count_kept(model: Model, size: float) -> list[int]:
    """Return the experts that stay in each layer, a part of all; later layers keep the odd ones."""
    sizes = model.expert_counts
    total = int(size * sum(sizes) + 1e-9)
    each, more = divmod(total, len(sizes))
    return [each + (n >= len(sizes) - more) for n in range(len(sizes))]


def compute_svd_rank(model: Model) -> int:
    """Return the rank of factors without a base."""
    width, hidden = model.moe_blocks[0][1].experts[0].gate.shape
    return int(SVD_PART * width * hidden / (width + hidden))


def list_methods(model: Model) -> Iterator[Method]:
    """Yield all methods of a model."""
    yield Method("source", 1.0, [], fewer=(3, 2))
    for bits in (8, 4, 3, 2):
        yield Method(f"GPTQ {bits} bits", 1.0, [{"gptq": {"bits": bits}}], None)
    for size in SIZES:
        yield from _of_size(model, size)


def _of_size(model: Model, size: float) -> Iterator[Method]:
    keep = count_kept(model, size)
    base = {"with": "base", "budget": size, "factors": "zero"}

    def replaced(name: str, options: dict[str, Any], **recover: Any) -> Method:
        return Method(name, size, [{"expert_replace": options}], recover)

    yield replaced("LightMoE, annealed", base, anneal=ANNEAL)
    yield replaced("LightMoE, not annealed", base)
    yield Method("drop, reap", size, [{"expert_drop": {"keep": keep, "criterion": "reap"}}])
    yield replaced("linear maps", {"with": "linear", "budget": size})
    yield replaced(
        "SVD of each expert", {"with": "svd", "budget": size, "rank": compute_svd_rank(model)}
    )
    yield replaced("base and SVD factors", {**base, "factors": "svd"})
    yield replaced("base only", {**base, "rank": 0})
    yield replaced("base only, annealed", {**base, "rank": 0}, anneal=ANNEAL)
    yield replaced("random groups, annealed", {**base, "similarity": "random"}, anneal=ANNEAL)
    yield replaced("constants", {"with": "constant", "keep": keep})
    for merge in ("hc-smoe", "m-smoe", "ream"):
        yield Method(f"merge, {merge}", size, [{"expert_merge": {"method": merge, "keep": keep}}])
    for seed in range(DRAWS):
        options = {"keep": keep, "criterion": "random", "seed": seed}
        yield Method(f"drop, random {seed}", size, [{"expert_drop": options}])
