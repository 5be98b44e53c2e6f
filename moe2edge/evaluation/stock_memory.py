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
        return _estimate_loading(model, model.blocks, model.rest.values())
    largest = sorted(model.blocks, key=lambda block: -block.parameters)[:size]
    ends = _estimate_loading(model, (), model.rest.values())
    return max(_estimate_loading(model, largest), ends)


def _estimate_loading(model: Model, blocks: Iterable[Block], rest: Iterable[Weight] = ()) -> int:
    """Estimate the bytes of tensors while transformers loads them, and while they become float32.

    A file is mapped while a tensor is a part of it. Experts that are single ones become one tensor,
    which no longer is. Where they are loaded in float32, threads load those of all blocks ahead.
    """
    merged, plain, parameters = [0], [0], 0
    weights = list(rest)
    plain += [weight.nbytes for weight in weights]
    for block in blocks:
        anatomy = model.architecture.anatomy[block.origin]
        single = anatomy.experts and model.names.has_single_experts(block.origin, anatomy)
        for role, weight in block.weights():
            weights.append(weight)
            if not role.startswith("experts."):
                plain.append(weight.nbytes)
        experts = [w for role, w in block.weights() if role.startswith("experts.")]
        parameters += sum(w.count for w in experts)
        # Gate and up are one tensor, two thirds of all.
        (merged if single else plain).append(sum(w.nbytes for w in experts) * 2 // 3)
    stored, wide = sum(w.nbytes for w in weights), sum(4 * w.count for w in weights)
    if not is_narrow(weights):
        return stored + wide + 4 * parameters
    return wide + (max(merged) if max(merged) > max(plain) else stored)
