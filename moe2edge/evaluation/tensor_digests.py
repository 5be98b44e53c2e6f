"""Numbers of tensors, as they are compared: integers and scales where they are quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor


def load_numbers(weight: Weight) -> Tensor | Quantized:
    """Load the numbers of a weight: integers and scales if it is quantized."""
    return weight.quantized() if weight.scheme else weight.load()


def compute_digest(value: Tensor | Quantized) -> str:
    """Compute the SHA-256 of dtype, shape and numbers; of integers and scales if quantized."""
    digest = hashlib.sha256()
    if isinstance(value, Quantized):
        digest.update(f"{value.scheme.name} {value.scheme.group_size}\n".encode())
    for part in _list_parts(value):
        digest.update(f"{part.dtype} {list(part.shape)}\n".encode())
        digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _list_parts(value: Tensor | Quantized) -> Iterator[Tensor]:
    """Yield the tensors that make up a value."""
    if not isinstance(value, Quantized):
        yield value
        return
    yield from (value.q, value.scales)
    if value.zeros is not None:
        yield value.zeros
    if value.order is not None:
        yield value.order


def are_equal(a: Tensor | Quantized, b: Tensor | Quantized) -> bool:
    """Test if two values have the same dtype, scheme and numbers."""
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same = (torch.equal(*pair) for pair in zip(_list_parts(a), _list_parts(b), strict=True))
        return a.scheme == b.scheme and all(same)
    if isinstance(a, Quantized) or isinstance(b, Quantized):
        return False
    # Bytes, not numbers: rows of an embedding that no text reaches may hold what is not finite.
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(part.contiguous().view(-1).view(torch.uint8) for part in (a, b)))
