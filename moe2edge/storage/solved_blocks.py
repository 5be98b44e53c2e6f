"""Solved numbers of blocks on disk, and handles on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.errors import WorkDamaged
from moe2edge.model.block import Block
from moe2edge.model.weights import Weight, cast_to_stored
from moe2edge.numerics.scheme import Pattern, Scheme
from moe2edge.storage.records import is_sound
from moe2edge.storage.safetensors_files import PlannedTensor, open_file, read_tensor, write_durably

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized


def attach_numbers(block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
    """Return the block with handles on numbers by role, as if they were read back from disk."""
    return block.with_weights(attach_rest_numbers(dict(block.weights()), numbers))


def attach_rest_numbers(
    rest: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
) -> dict[str, Weight]:
    """Return handles on numbers of some tensors, by the same names."""
    import torch

    def make_handle(weight: Weight, value: Quantized | Tensor) -> Weight:
        if isinstance(value, torch.Tensor):
            return replace(weight, load=lambda: cast_to_stored(value, weight.dtype))
        return replace(
            weight, load=value.dequantize, scheme=value.scheme, load_quantized=lambda: value
        )

    return {name: make_handle(rest[name], value) for name, value in numbers.items()}


# By role: bits, group size, symmetric.
Schemes = dict[str, tuple[int, int, bool]]
# By role: zeros, length of a run.
Patterns = dict[str, tuple[float, int | None]]


def save(
    path: Path, weights: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
) -> tuple[str, Schemes, Patterns]:
    """Save numbers of some weights by role or name.

    Return digest, schemes and patterns, which `open_handles` takes. A tensor that is not quantized
    takes the dtype of the one that it replaces.
    """
    import torch

    planned: list[PlannedTensor] = []
    schemes: Schemes = {}
    patterns: Patterns = {}
    for role, value in numbers.items():
        planned += _plan_tensors(role, value, weights[role])
        if not isinstance(value, torch.Tensor):
            scheme = value.scheme
            schemes[role] = (scheme.bits, scheme.group_size, scheme.symmetric)
        if (pattern := weights[role].pattern) is not None:
            patterns[role] = (pattern.zeros, pattern.of)
    return write_durably(path, planned), schemes, patterns


def estimate_saved_bytes(weight: Weight) -> int:
    """Estimate the bytes that `save` takes for the numbers of a planned weight."""
    from moe2edge.numerics.packing import compute_packed_shape

    if (scheme := weight.scheme) is None:
        return weight.nbytes
    outs, ins = weight.shape
    # Each group has a scale in float32, and a zero point in one byte.
    per_group = 4 if scheme.symmetric else 5
    return outs * (compute_packed_shape((ins,), scheme.bits)[0] + per_group * scheme.groups(ins))


def _plan_tensors(role: str, value: Quantized | Tensor, weight: Weight) -> list[PlannedTensor]:
    """Plan the tensors in which the numbers of one weight are saved."""
    import torch

    from moe2edge.numerics.packing import compute_packed_shape, pack_bytes

    if isinstance(value, torch.Tensor):
        return [
            PlannedTensor(
                role, weight.shape, weight.dtype, lambda: cast_to_stored(value, weight.dtype)
            )
        ]
    bits, scales, zeros = value.scheme.bits, value.scales, value.zeros
    shape = compute_packed_shape(tuple(value.q.shape), bits)
    planned = [
        PlannedTensor(f"{role}.q", shape, "U8", lambda: pack_bytes(value.q, bits)),
        PlannedTensor(f"{role}.scales", tuple(scales.shape), "F32", lambda: scales),
    ]
    if zeros is not None:
        planned.append(PlannedTensor(f"{role}.zeros", tuple(zeros.shape), "U8", lambda: zeros))
    return planned


def open_handles(
    weights: Mapping[str, Weight],
    path: Path,
    sha256: str,
    schemes: Mapping[str, tuple[int, int, bool]],
    patterns: Mapping[str, tuple[float, int | None]],
) -> dict[str, Weight]:
    """Open handles on what `save` wrote for some of ``weights``; they keep no numbers in memory.

    The digest of the file is compared before the first number is read.
    """
    handles: dict[str, Weight] = {}
    numbers = _CheckedNumbers(path, sha256)
    for name in open_file(path).keys():  # noqa: SIM118
        role = name.removesuffix(".q")
        if role not in weights:  # scales and zero points
            continue
        weight = weights[role]
        if role in patterns:
            weight = replace(weight, pattern=Pattern(*patterns[role]))
        if role in schemes:
            handles[role] = _make_quantized_handle(weight, numbers, role, Scheme(*schemes[role]))
        else:
            handles[role] = _make_plain_handle(weight, numbers, role)
    return handles


@dataclass
class _CheckedNumbers:
    """File of numbers; days may pass between writing it and packing what it holds.

    Attributes:
        path: the file.
        sha256: its digest.
        checked: whether the digest was compared.
    """

    path: Path
    sha256: str
    checked: bool = False

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            WorkDamaged: the file is not what was written.
        """
        if not self.checked and not is_sound(self.path, self.sha256):
            raise WorkDamaged(
                f"{self.path} is not what was written to it; check the disk, and run the same "
                "command again, which computes it again"
            )
        self.checked = True
        return read_tensor(self.path, name)


def _make_plain_handle(weight: Weight, numbers: _CheckedNumbers, role: str) -> Weight:
    return replace(weight, load=lambda: numbers.read(role))


def _make_quantized_handle(
    weight: Weight, numbers: _CheckedNumbers, role: str, scheme: Scheme
) -> Weight:
    def load_quantized() -> Quantized:
        from moe2edge.numerics.grid import Quantized
        from moe2edge.numerics.packing import unpack_bytes

        q = unpack_bytes(numbers.read(f"{role}.q"), scheme.bits, weight.shape[1])
        zeros = None if scheme.symmetric else numbers.read(f"{role}.zeros")
        return Quantized(q, numbers.read(f"{role}.scales"), scheme, zeros)

    def load() -> Tensor:
        return load_quantized().dequantize()

    return replace(weight, load=load, scheme=scheme, load_quantized=load_quantized)
