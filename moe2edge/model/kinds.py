"""Kinds of blocks: those that differ in their place alone are looked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from moe2edge.model.block import Block, BlockKind
from moe2edge.model.weights import Weight

Look = TypeVar("Look")


def look_at_blocks(blocks: Iterable[Block], look: Callable[[Block], Look]) -> Iterator[Look]:
    """Yield what ``look`` returns of each block; blocks of one kind are looked at once.

    Args:
        blocks: the blocks.
        look: depends on roles, shapes, dtypes and schemes of tensors, and on the routing.
    """
    known: dict[BlockKind, Look] = {}
    for block in blocks:
        if block.kind not in known:
            known[block.kind] = look(block)
        yield known[block.kind]


def sum_weights(weights: Iterable[Weight], measure: Callable[[Weight], int]) -> int:
    """Return the sum of what ``measure`` returns; handles of one form are measured once.

    Args:
        weights: the handles.
        measure: depends on shape, dtype and scheme.
    """
    known: dict[tuple[tuple[int, ...], str, int], int] = {}
    total = 0
    for weight in weights:
        # Schemes are alive, and most are one object, whose identity is found sooner.
        form = weight.shape, weight.dtype, id(weight.scheme)
        if (size := known.get(form)) is None:
            size = known[form] = measure(weight)
        total += size
    return total
