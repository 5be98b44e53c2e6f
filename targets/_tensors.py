"""Helpers of the targets that write safetensors: plans and sizes of files, tensors of zeros."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from moe2edge.errors import Unsupported
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import BYTES, DTYPES, Weight
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.storage.safetensors_files import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Added MLPs are a multiple of this wide: a tile of vLLM's 4-bit kernels, which group sizes divide.
TILE = 128


def plan_plain(name: str, weight: Weight) -> PlannedTensor:
    """Plan a tensor that is written as it is in the source."""
    return PlannedTensor(name, weight.shape, weight.dtype, weight.load)


# Name, shape and dtype of a tensor in a file.
Entry = tuple[str, tuple[int, ...], str]


def estimate_file_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """Compute the bytes of the safetensors file that will hold ``tensors``, with its header."""
    return count_file_bytes((t.name, t.shape, t.dtype) for t in tensors)


def count_file_bytes(entries: Iterable[Entry]) -> int:
    """Compute the bytes of the safetensors file of these tensors, with its header.

    In small models the header matters: a GPTQ checkpoint has four tensors per matrix. Its entries
    are counted as JSON spells them, without blanks, since encoding them takes seconds.
    """
    known: dict[tuple[tuple[int, ...], str], tuple[int, int]] = {}
    data = header = 0
    digits = 1
    for name, shape, dtype in entries:
        kind = known.get((shape, dtype))
        if kind is None:
            numbers = ",".join(map(str, shape))
            text = f'"":{{"dtype":"{dtype}","shape":[{numbers}],"data_offsets":[,]}},'
            kind = known[shape, dtype] = prod(shape) * BYTES[dtype], len(text)
        data += kind[0]
        header += kind[1] + len(name) + digits
        digits = len(str(data))
        header += digits
    return data + header


def has_dense_blocks(model: Model) -> bool:
    """Test if some block has a dense MLP where others have an MoE layer."""
    return any(not isinstance(block.mlp, MoELayer) for block in model.blocks)


def check_group_size(name: str, ins: int, scheme: Scheme, *, whole_rows: bool = False) -> None:
    """Refuse a matrix whose inputs the groups of its scheme do not divide.

    Args:
        name: its name on disk.
        ins: its number of inputs.
        scheme: its scheme.
        whole_rows: whether the target holds one scale per row.

    Raises:
        Unsupported: so.
    """
    if ins % scheme.width(ins):
        other = ", or to -1 for whole rows" if whole_rows else ""
        raise Unsupported(
            f"{name} has {ins} inputs, which groups of {scheme.group_size} do not divide; set "
            f"group_size to a smaller number{other}"
        )


# ---- zeros ---------------------------------------------------------------------------------------


def fit_scheme(scheme: Scheme | None, *widths: int) -> Scheme | None:
    """Return ``scheme`` if its groups fit all numbers of inputs, else its per-channel form."""
    if scheme is None or all(width % scheme.width(width) == 0 for width in widths):
        return scheme
    return replace(scheme, group_size=WHOLE_ROW)


def make_zeros(shape: tuple[int, ...], dtype: str, scheme: Scheme | None = None) -> Weight:
    """Make a tensor of zeros; with a scheme, a quantized matrix [out, in]."""

    def load() -> Tensor:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, DTYPES[dtype]))

    if scheme is None:
        return Weight("zeros", shape, dtype, load)
    return Weight(
        "zeros",
        shape,
        dtype,
        load=lambda: _make_quantized_zeros(shape, scheme).dequantize(),
        scheme=scheme,
        load_quantized=lambda: _make_quantized_zeros(shape, scheme),
    )


def pad(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """Pad a matrix with zeros on the right and below, up to ``shape``."""
    if weight.shape == shape:
        return weight
    outs, ins = weight.shape

    def load() -> Tensor:
        original = weight.load()
        padded = original.new_zeros(shape)
        padded[:outs, :ins] = original
        return padded

    def load_quantized() -> Quantized:
        return _pad_quantized(weight.quantized(), shape)

    return replace(
        weight, shape=shape, load=load, load_quantized=weight.load_quantized and load_quantized
    )


def _make_quantized_zeros(shape: tuple[int, ...], scheme: Scheme) -> Quantized:
    """Make zeros [out, in] as integers, with scales of one; zero points are mid-range."""
    import torch

    from moe2edge.numerics.grid import Quantized

    outs, ins = shape
    q = torch.full(shape, scheme.zero_point, dtype=torch.uint8)
    scales = torch.ones(outs, scheme.groups(ins))
    zeros = None
    if not scheme.symmetric:
        zeros = torch.full((outs, scheme.groups(ins)), scheme.zero_point, dtype=torch.uint8)
    order = None
    if scheme.ordered:
        order = torch.arange(ins, dtype=torch.int32) // scheme.width(ins)
    return Quantized(q, scales, scheme, zeros, order)


def _pad_quantized(original: Quantized, shape: tuple[int, ...]) -> Quantized:
    """Pad a matrix with zeros on the right and below, with its groups unchanged."""
    scheme, (outs, ins) = original.scheme, original.q.shape
    padded = _make_quantized_zeros(shape, scheme)
    groups = original.scales.shape[1]
    padded.scales[:outs, :groups] = original.scales
    if original.zeros is not None and padded.zeros is not None:
        padded.zeros[:outs, :groups] = original.zeros
        # Per-channel groups become wider, so the added integers must be the row's own zero point.
        padded.q[:] = padded.zeros.repeat_interleave(scheme.width(shape[1]), dim=1)
    padded.q[:outs, :ins] = original.q
    if original.order is not None and padded.order is not None:
        padded.order[:ins] = original.order
    return padded
