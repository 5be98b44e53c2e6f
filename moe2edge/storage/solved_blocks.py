"""Solved numbers of a block on the disk, and handles on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.model.model import Block
from moe2edge.model.weights import Weight, cast_to_stored
from moe2edge.numerics.scheme import Pattern, Scheme
from moe2edge.storage.safetensors_files import Planned, open_file, read_tensor, write_durably

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized


def attach_numbers(block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
    """The block with handles on numbers by role, as they are read back once they are saved."""
    import torch

    weights = dict(block.weights())

    def handle(weight: Weight, value: Quantized | Tensor) -> Weight:
        if isinstance(value, torch.Tensor):
            return replace(weight, load=lambda: cast_to_stored(value, weight.dtype))
        return replace(
            weight, load=value.dequantize, scheme=value.scheme, load_quantized=lambda: value
        )

    return block.with_weights({r: handle(weights[r], value) for r, value in numbers.items()})


def attach_rest_numbers(
    rest: Mapping[str, Weight], numbers: Mapping[str, Tensor]
) -> dict[str, Weight]:
    """The same of tensors outside of blocks, those that have numbers, by name."""

    def handle(weight: Weight, value: Tensor) -> Weight:
        return replace(weight, load=lambda: cast_to_stored(value, weight.dtype))

    return {name: handle(rest[name], value) for name, value in numbers.items()}


Schemes = dict[str, tuple[int, int, bool]]
Patterns = dict[str, tuple[float, int | None]]


def save(
    path: Path, weights: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
) -> tuple[Schemes, Patterns]:
    """Save numbers of some weights by role or name; what `open_handles` wants to know about them.

    A tensor that is not quantized takes the dtype of what it replaces.
    """
    import torch

    planned: list[Planned] = []
    schemes: Schemes = {}
    patterns: Patterns = {}
    for role, value in numbers.items():
        planned += _planned(role, value, weights[role])
        if not isinstance(value, torch.Tensor):
            scheme = value.scheme
            schemes[role] = (scheme.bits, scheme.group_size, scheme.symmetric)
        if (pattern := weights[role].pattern) is not None:
            patterns[role] = (pattern.zeros, pattern.of)
    write_durably(path, planned)
    return schemes, patterns


def estimate_saved_bytes(weight: Weight) -> int:
    """Bytes that `save` takes for the numbers of a planned weight."""
    from moe2edge.numerics.packing import compute_packed_shape

    if (scheme := weight.scheme) is None:
        return weight.nbytes
    outs, ins = weight.shape
    # A scale in float32, a zero point in a byte.
    of_group = 4 if scheme.symmetric else 5
    return outs * (compute_packed_shape((ins,), scheme.bits)[0] + of_group * scheme.groups(ins))


def _planned(role: str, value: Quantized | Tensor, weight: Weight) -> list[Planned]:
    import torch

    from moe2edge.numerics.packing import compute_packed_shape, pack_bytes

    if isinstance(value, torch.Tensor):
        return [
            Planned(role, weight.shape, weight.dtype, lambda: cast_to_stored(value, weight.dtype))
        ]
    bits, scales, zeros = value.scheme.bits, value.scales, value.zeros
    shape = compute_packed_shape(tuple(value.q.shape), bits)
    planned = [
        Planned(f"{role}.q", shape, "U8", lambda: pack_bytes(value.q, bits)),
        Planned(f"{role}.scales", tuple(scales.shape), "F32", lambda: scales),
    ]
    if zeros is not None:
        planned.append(Planned(f"{role}.zeros", tuple(zeros.shape), "U8", lambda: zeros))
    return planned


def open_handles(
    weights: Mapping[str, Weight],
    path: Path,
    schemes: Mapping[str, tuple[int, int, bool]],
    patterns: Mapping[str, tuple[float, int | None]],
) -> dict[str, Weight]:
    """Handles on what `save` wrote for some of ``weights``; they hold on to no numbers."""
    found: dict[str, Weight] = {}
    for name in open_file(path).keys():  # noqa: SIM118
        role = name.removesuffix(".q")
        if role not in weights:  # scales and zero points
            continue
        weight = weights[role]
        if role in patterns:
            weight = replace(weight, pattern=Pattern(*patterns[role]))
        if role in schemes:
            found[role] = _quantized_handle(weight, path, role, Scheme(*schemes[role]))
        else:
            found[role] = _plain_handle(weight, path, role)
    return found


def _plain_handle(weight: Weight, path: Path, role: str) -> Weight:
    return replace(weight, load=lambda: read_tensor(path, role))


def _quantized_handle(weight: Weight, path: Path, role: str, scheme: Scheme) -> Weight:
    def load_quantized() -> Quantized:
        from moe2edge.numerics.grid import Quantized
        from moe2edge.numerics.packing import unpack_bytes

        q = unpack_bytes(read_tensor(path, f"{role}.q"), scheme.bits, weight.shape[1])
        zeros = None if scheme.symmetric else read_tensor(path, f"{role}.zeros")
        return Quantized(q, read_tensor(path, f"{role}.scales"), scheme, zeros)

    def load() -> Tensor:
        return load_quantized().dequantize()

    return replace(weight, load=load, scheme=scheme, load_quantized=load_quantized)
