"""The bytes of tensors in safetensors files: hashed, compared, and searched for what is not finite.

Files are read in pieces that fit into the cache of a processor, so that looking at every number
costs little beside hashing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.errors import InputError
from moe2edge.storage.safetensors_files import open_file, read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# Bytes that are read at a time; a multiple of the width of every dtype.
PIECE_BYTES = 1 << 19
# By dtype: unsigned integers of its width, the bits beside the sign, and the least value of these
# bits that is not finite in float32, in which models are computed.
_BITS = {
    "BF16": ("uint16", 0x7FFF, 0x7F80),
    "F16": ("uint16", 0x7FFF, 0x7C00),
    "F32": ("uint32", 0x7FFF_FFFF, 0x7F80_0000),
    "F64": ("uint64", 0x7FFF_FFFF_FFFF_FFFF, 0x47EF_FFFF_F000_0000),
    # The first two have no infinities, and one kind of NaN.
    "F8_E4M3": ("uint8", 0x7F, 0x7F),
    "F8_E8M0": ("uint8", 0xFF, 0xFF),
    "F8_E5M2": ("uint8", 0x7F, 0x7C),
}


def hash_tensors(path: Path) -> tuple[str, tuple[str, ...]]:
    """Hash a safetensors file, and look at every number in it on the way.

    Returns:
        The SHA-256 digest of the file, and the tensors that hold numbers that are not finite in
        float32.
    """
    digest = hashlib.sha256()
    found = []
    entries = sorted(open_file(path).items(), key=lambda entry: entry[1].start)
    with path.open("rb", buffering=0) as file:
        for name, entry in entries:
            for piece in _read(file, entry.start - file.tell()):
                digest.update(piece.data)
            finite = True
            for piece in _read(file, entry.nbytes):
                digest.update(piece.data)
                finite = finite and _is_finite(piece, entry.dtype)
            if not finite:
                found.append(name)
        for rest in iter(lambda: file.read(PIECE_BYTES), b""):
            digest.update(rest)
    return digest.hexdigest(), tuple(found)


def have_same_bytes(first: tuple[Path, str], second: tuple[Path, str]) -> bool:
    """Compare two tensors byte by byte; each is given by its file and name."""
    entries = [open_file(path)[name] for path, name in (first, second)]
    if entries[0].nbytes != entries[1].nbytes:
        return False
    with first[0].open("rb", buffering=0) as one, second[0].open("rb", buffering=0) as other:
        one.seek(entries[0].start)
        other.seek(entries[1].start)
        pieces = zip(_read(one, entries[0].nbytes), _read(other, entries[1].nbytes), strict=True)
        return all(bool((a == b).all()) for a, b in pieces)


def have_same_numbers(first: tuple[Path, str], second: tuple[Path, str]) -> bool:
    """Compare the numbers of two tensors, which may have two dtypes; as in `have_same_bytes`."""
    one, other = (open_file(path)[name] for path, name in (first, second))
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return have_same_bytes(first, second)
    rows = zip(read_tensor(*first), read_tensor(*second), strict=True)
    return all(bool((a.double() == b.double()).all()) for a, b in rows)


def find_broken_rows(matrix: Tensor) -> tuple[int, ...]:
    """Find the rows of a matrix that hold numbers that are not finite in float32."""
    return tuple(n for n, row in enumerate(matrix) if not row.float().isfinite().all())


def _read(file: FileIO, count: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the next ``count`` bytes in pieces; each is overwritten by the next."""
    import numpy as np

    buffer = np.empty(min(count, PIECE_BYTES), np.uint8)
    while count > 0:
        piece = buffer[: min(count, PIECE_BYTES)]
        view, filled = piece.data, 0
        while filled < len(piece):
            got = file.readinto(view[filled:])
            if not got:
                raise InputError(f"{file.name} became shorter while it was read; start again")
            filled += got
        count -= filled
        yield piece


def _is_finite(piece: NDArray[np.uint8], dtype: str) -> bool:
    """Return whether all numbers of a piece are finite in float32; integers are."""
    if dtype not in _BITS:
        return True
    kind, magnitude, infinity = _BITS[dtype]
    bits = piece.view(kind)
    return int((bits & bits.dtype.type(magnitude)).max(initial=0)) < infinity
