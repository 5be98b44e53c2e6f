"""Orders of rows and columns in which llama.cpp holds tensors, and numbers that it holds changed.

Each function returns a pair of functions, for `moe2edge.targets._gguf_forms.GgufForm`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from moe2edge.targets._gguf_forms import Value, concatenate_rows, select_rows

if TYPE_CHECKING:
    from torch import Tensor

Parts = tuple[Value, ...]
Pair = tuple[Callable[[Value], Parts], Callable[[Parts], Value]]
# Returns the source's number of each row, for a number of rows.
Order = Callable[[int], "Tensor"]


def find_rotated_order(heads: int, rows: int) -> Tensor:
    """Return the order of rows with which neighbours are rotated, not halves of heads.

    Args:
        heads: number of heads.
        rows: number of rows of all of them.

    Returns:
        The source's number of each row, int64 [rows].
    """
    import torch

    halves = torch.arange(rows).view(heads, 2, rows // heads // 2)
    return halves.transpose(1, 2).reshape(-1)


def order_values(keys: int, values: int, width: int, skip: int, rows: int) -> Tensor:
    """Return the order of rows in which heads of values of one head of keys are not neighbours.

    Args:
        keys: heads of keys.
        values: heads of values.
        width: rows of a head.
        skip: rows in front of them, which stay.
        rows: number of rows of all.

    Returns:
        The source's number of each row, int64 [rows].
    """
    import torch

    own = torch.arange(skip, rows).view(keys, values // keys, width)
    return torch.cat([torch.arange(skip), own.transpose(0, 1).reshape(-1)])


def order_value_columns(keys: int, values: int, width: int) -> Pair:
    """Order columns as `order_values` orders rows; groups of integers move as a whole."""
    from moe2edge.numerics.grid import Quantized

    def move(value: Value, *, back: bool) -> Value:
        if not isinstance(value, Quantized):
            order = order_values(keys, values, width, 0, value.shape[1])
            return value[:, order.argsort() if back else order]

        def move_groups(part: Tensor) -> Tensor:
            size = width * part.shape[1] // value.q.shape[1]
            order = order_values(keys, values, size, 0, part.shape[1])
            return part[:, order.argsort() if back else order]

        zeros = None if value.zeros is None else move_groups(value.zeros)
        return Quantized(move_groups(value.q), move_groups(value.scales), value.scheme, zeros)

    return lambda value: (move(value, back=False),), lambda parts: move(parts[0], back=True)


def squeeze(axis: int, order: Order | None = None) -> Pair:
    """Leave an axis of one entry out, with the other rows in an order."""

    def split(value: Tensor) -> Parts:
        value = value if order is None else value[order(len(value))]
        return (value.squeeze(axis),)

    def join(parts: Parts) -> Tensor:
        value: Tensor = parts[0].unsqueeze(axis)
        return value if order is None else value[order(len(value)).argsort()]

    return split, join


def add_one() -> Pair:
    """Hold weights around zero as factors."""
    return lambda value: (value.float() + 1,), lambda parts: parts[0] - 1


def negate_exponential(order: Order | None) -> Pair:
    """Hold logarithms of decays as negative decays, in an order."""

    def split(value: Tensor) -> Parts:
        value = -value.float().exp()
        return (value if order is None else value[order(len(value))],)

    def join(parts: Parts) -> Tensor:
        value: Tensor = (-parts[0]).log()
        return value if order is None else value[order(len(value)).argsort()]

    return split, join


def split_keys_and_values(heads: int, keys: int, values: int) -> Pair:
    """Cut what expands latent states, [heads * (keys + values), latent], into its two halves.

    Those of keys are transposed: [heads, latent, keys] and [heads, values, latent].
    """
    import torch

    def split(value: Tensor) -> Parts:
        own = value.view(heads, keys + values, -1)
        return own[:, :keys].transpose(1, 2).contiguous(), own[:, keys:].contiguous()

    def join(parts: Parts) -> Tensor:
        return torch.cat([parts[0].transpose(1, 2), parts[1]], dim=1).flatten(0, 1)

    return split, join


def split_mixed_rows(keys: int, values: int, wide: int, size: int) -> Pair:
    """Cut rows that stand by head of keys (queries, keys, values, gates) into first and gates.

    Args:
        keys: heads of keys.
        values: heads of values.
        wide: rows of a head of queries, or of keys.
        size: rows of a head of values, or of gates.
    """
    import torch

    def find_orders() -> tuple[Tensor, Tensor]:
        each = values // keys * size
        own = torch.arange(keys * 2 * (wide + each)).view(keys, -1)
        ends = (0, wide, 2 * wide, 2 * wide + each, 2 * (wide + each))
        parts = [own[:, first:last].reshape(-1) for first, last in pairwise(ends)]
        return torch.cat(parts[:3]), parts[3]

    def split(value: Value) -> Parts:
        return tuple(select_rows(value, order) for order in find_orders())

    def join(parts: Parts) -> Value:
        order = torch.cat(find_orders()).argsort()
        return select_rows(concatenate_rows(parts), order)

    return split, join
