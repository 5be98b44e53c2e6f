"""Memory of the source check: blocks that transformers holds at once, and the bytes they take."""

from __future__ import annotations

from collections.abc import Iterable

from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.runtime.memory import IMPORTED

# Share of the memory, as its inverse, that transformers' blocks may take at once in float32, and
# their most: loading takes two thirds more, and larger groups save hardly any time.
MEMORY_PARTS, MOST_GROUP_BYTES = 4, 3 << 29
# Dtypes that float32 holds in half of the bytes.
NARROW = ("BF16", "F16")


def choose_stock_group(model: Model, limit: int) -> tuple[int, bool]:
    """Choose the number of blocks that transformers holds at once, and whether it is the model.

    Args:
        model: the source.
        limit: bytes for the whole process.
    """
    room = min(max(0, limit - IMPORTED) // MEMORY_PARTS, MOST_GROUP_BYTES)
    whole = 4 * model.parameters <= room
    size = len(model.blocks) if whole else max(1, room // max(1, model.block_nbytes))
    return size, whole


def is_narrow(weights: Iterable[Weight]) -> bool:
    """Return whether all tensors are of one dtype of 16 bits, in which transformers loads them."""
    found = {weight.dtype for weight in weights}
    return len(found) == 1 and found <= set(NARROW) and not any(w.scheme for w in weights)


def estimate_source_check(model: Model, limit: int) -> int:
    """Estimate the bytes that the source check holds at most, beside imported libraries."""
    size, whole = choose_stock_group(model, limit)
    if whole:
        return _estimate_loading(model.blocks, model.rest.values())
    largest = sorted(model.blocks, key=lambda block: -block.parameters)[:size]
    return max(_estimate_loading(largest), _estimate_loading((), model.rest.values()))


def _estimate_loading(blocks: Iterable[Block], rest: Iterable[Weight] = ()) -> int:
    """Estimate the bytes of tensors while transformers loads them, and while they become float32.

    The files are mapped. Experts are there a second time until they have become one tensor: in
    float32, where that is what they are loaded in, those of all blocks, which threads load ahead.
    """
    experts, weights = [0], list(rest)
    for block in blocks:
        own = [(role, weight) for role, weight in block.weights()]
        weights += [weight for _, weight in own]
        experts.append(sum(w.nbytes for role, w in own if role.startswith("experts.")))
    stored, wide = sum(w.nbytes for w in weights), sum(4 * w.count for w in weights)
    if is_narrow(weights):
        return max(2 * stored + 4 * max(experts) // 3, stored + wide + max(experts) // 3)
    parameters = sum(w.count for w in weights)
    return stored + wide + 4 * parameters * sum(experts) // max(1, stored)
