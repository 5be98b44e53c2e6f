"""What the targets that write safetensors share: planning a file, its size, tensors of zeros."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import DTYPES, Weight
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.storage.safetensors_files import Planned

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Width of MLPs that are made, in whole tiles of vLLM's 4-bit kernels; every group size divides it.
TILE = 128


def plan_plain(name: str, weight: Weight) -> Planned:
    """A tensor that is written as it is in the source."""
    return Planned(name, weight.shape, weight.dtype, weight.load)


def estimate_file_bytes(tensors: Iterable[Planned]) -> int:
    """Bytes of the safetensors file that will hold ``tensors``, with its header.

    In small models the header counts: a GPTQ checkpoint has four tensors per matrix.
    """
    data = header = 0
    for t in tensors:
        offsets = [data, data + t.nbytes]
        entry = {t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}}
        header += len(json.dumps(entry, separators=(",", ":"))) - 1
        data += t.nbytes
    return data + header


def has_dense_blocks(model: Model) -> bool:
    """Whether some block has a dense MLP where others have an MoE layer."""
    return any(not isinstance(block.mlp, MoELayer) for block in model.blocks)


# ---- zeros ---------------------------------------------------------------------------------------


def fit_scheme(scheme: Scheme | None, *widths: int) -> Scheme | None:
    """``scheme`` for matrices of so many inputs; with whole rows where its groups do not fit."""
    if scheme is None or all(width % scheme.width(width) == 0 for width in widths):
        return scheme
    return replace(scheme, group_size=WHOLE_ROW)


def make_zeros(shape: tuple[int, ...], dtype: str, scheme: Scheme | None = None) -> Weight:
    """A tensor of zeros; with a scheme a matrix [out, in] that is quantized."""

    def load() -> Tensor:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, DTYPES[dtype]))

    if scheme is None:
        return Weight("zeros", shape, dtype, load)
    return Weight(
        "zeros",
        shape,
        dtype,
        load=lambda: _quantized_zeros(shape, scheme).dequantize(),
        scheme=scheme,
        load_quantized=lambda: _quantized_zeros(shape, scheme),
    )


def pad(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A matrix with zeros to the right of it and below, up to ``shape``."""
    if weight.shape == shape:
        return weight
    outs, ins = weight.shape

    def load() -> Tensor:
        numbers = weight.load()
        whole = numbers.new_zeros(shape)
        whole[:outs, :ins] = numbers
        return whole

    def load_quantized() -> Quantized:
        return _padded(weight.quantized(), shape)

    return replace(
        weight, shape=shape, load=load, load_quantized=weight.load_quantized and load_quantized
    )


def _quantized_zeros(shape: tuple[int, ...], scheme: Scheme) -> Quantized:
    """Zeros [out, in] as integers, with scales of one; every zero point is the middle."""
    import torch

    from moe2edge.numerics.grid import Quantized

    outs, ins = shape
    q = torch.full(shape, scheme.zero_point, dtype=torch.uint8)
    scales = torch.ones(outs, scheme.groups(ins))
    zeros = None
    if not scheme.symmetric:
        zeros = torch.full((outs, scheme.groups(ins)), scheme.zero_point, dtype=torch.uint8)
    return Quantized(q, scales, scheme, zeros)


def _padded(numbers: Quantized, shape: tuple[int, ...]) -> Quantized:
    """A matrix with zeros to the right of it and below; groups stay as they are."""
    scheme, (outs, ins) = numbers.scheme, numbers.q.shape
    whole = _quantized_zeros(shape, scheme)
    groups = numbers.scales.shape[1]
    whole.scales[:outs, :groups] = numbers.scales
    if numbers.zeros is not None and whole.zeros is not None:
        whole.zeros[:outs, :groups] = numbers.zeros
        # A group that is a whole row grows, and zero is its own zero point there.
        whole.q[:] = whole.zeros.repeat_interleave(scheme.width(shape[1]), dim=1)
    whole.q[:outs, :ins] = numbers.q
    return whole
