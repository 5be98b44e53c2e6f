"""Digests of the bytes that were to be written, held against what the disk gives back.

A disk may keep something else than it was given. A digest of what is read back would call that
right for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from moe2edge.errors import DiskFailed
from moe2edge.storage.text_files import hash_file

# Zeros that are hashed at a time.
_ZEROS = bytes(1 << 16)


class FileDigest:
    """SHA-256 of a file whose pieces are not written in order.

    A piece that comes before its turn is kept until then; where no piece comes, there are zeros.
    """

    def __init__(self) -> None:
        """Begin with an empty file."""
        self._digest = hashlib.sha256()
        self._end = 0
        self._early: dict[int, bytes] = {}

    def add(self, start: int, data: memoryview | bytes) -> None:
        """Add a piece; the one that is next is not copied."""
        if start == self._end:
            self._digest.update(data)
            self._end += len(data)
        else:
            self._early[start] = bytes(data)

    def settle(self, end: int) -> None:
        """Take all before ``end`` as written."""
        for start in sorted(self._early):
            self._fill(start)
            self.add(start, self._early.pop(start))
        self._fill(end)

    def _fill(self, end: int) -> None:
        """Add zeros up to ``end``."""
        while self._end < end:
            self.add(self._end, _ZEROS[: end - self._end])

    def finish(self, size: int) -> str:
        """Return the digest of the file, which has ``size`` bytes."""
        self.settle(size)
        return self._digest.hexdigest()


def hash_written(path: Path, sha256: str | None) -> str:
    """Compute the SHA-256 of a file that was written, and compare it.

    Args:
        path: the file.
        sha256: digest of what was to be written; None: it is not known.

    Raises:
        DiskFailed: the disk gives back something else.
    """
    found = hash_file(path)
    if sha256 not in (None, found):
        raise DiskFailed(
            f"{path} is not what was written to it; check the disk, and run the same command again"
        )
    return found


@contextlib.contextmanager
def blame_disk(folder: Path, written: Mapping[str, str]) -> Iterator[None]:
    """Check, where something fails with a folder, that it holds what was written to it.

    Args:
        folder: the folder.
        written: digests of files that were written to it, by their names relative to it.

    Raises:
        DiskFailed: it does not; else the error itself is raised.
    """
    try:
        yield
    except Exception:
        for name, sha256 in written.items():
            hash_written(folder / name, sha256)
        raise
