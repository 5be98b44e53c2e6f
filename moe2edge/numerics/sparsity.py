"""Zeros of sparse matrices: which weights become zero, and whether they are. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def mask_smallest(scores: Tensor, count: int) -> Tensor:
    """Mask exactly ``count`` of the smallest scores of each row; among equal ones the first.

    Args:
        scores: [..., n], no NaN.
        count: from 0 to n.

    Returns:
        bool [..., n].
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < last, scores == last
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= room))


def has_zeros(matrix: Tensor, length: int, count: int) -> bool:
    """Return whether each run of ``length`` weights of a matrix [out, in] has ``count`` zeros.

    Runs that are longer than a row are adjacent whole columns, the blocks of SparseGPT.
    """
    outs, ins = matrix.shape
    if length > ins:
        matrix = matrix.reshape(outs, -1, length // outs).transpose(0, 1)
    zeros = (matrix == 0).reshape(-1, length).sum(-1)
    return bool((zeros >= count).all())
