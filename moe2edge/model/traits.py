"""Traits of blocks: what a pass may need of the experts that it works on.

Each is found by looking at transformers' own layer; a family of the table has what its row says.
A trait that no pass needs costs nothing: it is looked for when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from moe2edge.model.architecture import Architecture, find_layers
from moe2edge.model.body import find_body

if TYPE_CHECKING:
    from moe2edge.model.family import Family
    from moe2edge.model.stock_router import StockRouter

Found = TypeVar("Found")
# Tokens and inner size with which an activation is tried.
TRIED = (4, 8)


class Trait(Enum):
    """A trait of a block with experts, in the words of messages.

    Attributes:
        TABLE: its family has a row in the table, from which everything about its blocks is known.
        GATED: experts have a gate beside up.
        SILU: between their matrices, experts compute ``silu(gate) * up`` and nothing else.
        UNBIASED: the matrices of experts have no biases.
        ROUTER: experts are scored by a matrix, and chosen by these scores, so that the router can
            be asked what it does when some of them go: see `StockRouter`.
        APART: without the experts, what a layer adds is known, and which norms go with them.
        SOFTMAX: these scores are products with the input of the layer, of which the router takes
            the softmax and the k best, with no bias and no groups.
    """

    TABLE = "a family of the table"
    GATED = "experts with a gate"
    SILU = "experts that compute silu(gate) * up"
    UNBIASED = "experts without biases"
    ROUTER = "experts that are chosen by the scores of one matrix"
    APART = "experts that can go by themselves"
    SOFTMAX = "a router without biases and groups that takes the softmax of its scores"


def find_missing(
    family: Family, architecture: Architecture, needs: Sequence[Trait], blocks: Iterable[int] = ()
) -> tuple[Trait, str] | None:
    """Find the first trait that a block of a model lacks, and say where; None: none is missing.

    Families of the table lack nothing. Other models are looked at block by block.

    Args:
        family: of the model.
        architecture: of its source.
        needs: the traits.
        blocks: numbers in the source of the blocks to look at; none: all that have experts.

    >>> from types import SimpleNamespace
    >>> find_missing(SimpleNamespace(generic=False), None, [Trait.TABLE]) is None
    True
    """
    if not family.generic:
        return None
    if Trait.TABLE in needs:
        return Trait.TABLE, f"{family.model_type} is not"
    places = tuple(blocks) or [n for n, one in enumerate(architecture.anatomy) if one.experts]
    for need in needs:
        for index in places:
            if not _has(architecture, index, need):
                return need, f"block {index} does not have"
    return None


def _has(architecture: Architecture, index: int, trait: Trait) -> bool:
    return _look(architecture, index, _FINDERS[trait])


def _look(
    architecture: Architecture, index: int, at: Callable[[Architecture, int], Found]
) -> Found:
    """Return what a look at a layer finds, which looks once."""
    key = (at.__name__, index)
    if key not in architecture.looks:
        architecture.looks[key] = at(architecture, index)
    found: Found = architecture.looks[key]
    return found


def _is_gated(architecture: Architecture, index: int) -> bool:
    form = architecture.anatomy[index].form
    return form is not None and form.gated


def _is_unbiased(architecture: Architecture, index: int) -> bool:
    form = architecture.anatomy[index].form
    return form is not None and not form.biased


def _computes_silu(architecture: Architecture, index: int) -> bool:
    """Return whether the experts of a layer do to random numbers what silu and a product do."""
    import torch
    from torch.nn.functional import silu

    anatomy = architecture.anatomy[index]
    if anatomy.form is None or not anatomy.form.gated:
        return False
    experts: Any = find_layers(architecture.model)[1][index].get_submodule(str(anatomy.experts))
    tokens, width = TRIED
    draw = torch.Generator().manual_seed(0)
    # Large numbers as well: some activations are silu until a limit.
    both = torch.randn(tokens, 2 * width, generator=draw) * torch.tensor([[1.0], [1], [1e3], [1e3]])
    gate, up = both.chunk(2, dim=1)
    if not anatomy.form.concatenated:
        both = torch.stack([gate, up], dim=2).flatten(1)
    return torch.allclose(experts._apply_gate(both), silu(gate) * up, rtol=1e-4, atol=1e-4)


def _make_bare_router(architecture: Architecture, index: int) -> StockRouter:
    """Make the router of a layer of the source, with numbers that only tell its rule."""
    from moe2edge.model.stock_router import StockRouter

    layer = find_layers(architecture.model)[1][index]
    return StockRouter(layer, architecture.anatomy[index], architecture.get_top_k(index))


def _chooses_by_scores(architecture: Architecture, index: int) -> bool:
    """Return whether a router chooses the right number of experts, and no absent one."""
    import torch

    count = architecture.anatomy[index].count
    kept = torch.arange(count) % 4 < 3
    scores = torch.randn(TRIED[0], count, generator=torch.Generator().manual_seed(0))
    try:
        router = _make_bare_router(architecture, index)
        ids, weights = router.choose(scores, kept)
    except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError):
        return False
    whole = ids.shape == weights.shape == (TRIED[0], min(router.top_k, int(kept.sum())))
    return whole and bool(kept[ids].all())


def _stands_apart(architecture: Architecture, index: int) -> bool:
    return find_body(architecture, index) is not None


def _takes_softmax(architecture: Architecture, index: int) -> bool:
    return _chooses_by_scores(architecture, index) and bool(find_softmax(architecture, index))


def find_softmax(architecture: Architecture, index: int) -> tuple[bool, float] | None:
    """Find the rule of a router of the source that takes a softmax: see `StockRouter.softmax`."""
    return _look(architecture, index, _read_softmax)


def _read_softmax(architecture: Architecture, index: int) -> tuple[bool, float] | None:
    return _make_bare_router(architecture, index).softmax


def scales_to_one_sum(architecture: Architecture, index: int) -> bool:
    """Return whether a router of the source gives all tokens weights of the same sum."""
    return _look(architecture, index, _read_sum)


def _read_sum(architecture: Architecture, index: int) -> bool:
    return _make_bare_router(architecture, index).normalizes


_FINDERS: Mapping[Trait, Callable[[Architecture, int], bool]] = {
    Trait.GATED: _is_gated,
    Trait.SILU: _computes_silu,
    Trait.UNBIASED: _is_unbiased,
    Trait.ROUTER: _chooses_by_scores,
    Trait.APART: _stands_apart,
    Trait.SOFTMAX: _takes_softmax,
}
