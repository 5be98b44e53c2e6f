"""Files that a run reads for long: one that changes under way is an error, never a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moe2edge.errors import InputError
from moe2edge.storage.text_files import hash_file

# Size, time of the last change in nanoseconds, and number of the file in its file system.
_State = tuple[int, int, int]


class InputFiles:
    """Files as they were at the first look.

    Sizes, times and numbers of files are compared; where they differ, digests decide.
    """

    def __init__(
        self,
        files: Iterable[Path],
        weights: Iterable[Path] = (),
        hash_weights: Callable[[], str] = str,
        known: Mapping[Path, str] | None = None,
    ) -> None:
        """Look at the files; nothing is read.

        Args:
            files: small files, each with a digest of its own.
            weights: files that have one digest in common.
            hash_weights: computes that digest from what is there now.
            known: digests of ``files`` that are known without reading them.
        """
        self._weights, self._hash_weights = frozenset(weights), hash_weights
        self._states = {path: _look_at(path) for path in (*files, *self._weights)}
        self._digests = dict(known or {})

    def settle(self, weights_sha256: str) -> None:
        """Note the digests, after the first reading.

        Args:
            weights_sha256: the digest that the weights have in common.

        Raises:
            InputError: a file has changed since the first look.
        """
        self.check()
        self._digests = {
            path: weights_sha256 if path in self._weights else hash_file(path)
            for path, state in self._states.items()
            if state is not None
        }
        self.check()

    def check(self) -> None:
        """Compare all files with the first look.

        Raises:
            InputError: one is gone, or holds something else.
        """
        for path, before in list(self._states.items()):
            now = _look_at(path)
            if now == before:
                continue
            if now is None or not self._holds_the_same(path):
                what = "is gone or cannot be read" if now is None else "has changed"
                raise InputError(
                    f"{path} {what} since this run began to use it; run the same command again "
                    "once it stays as it is"
                )
            alike = self._weights if path in self._weights else (path,)
            self._states.update({each: _look_at(each) for each in alike})

    def _holds_the_same(self, path: Path) -> bool:
        if path not in self._digests:
            return False
        try:
            found = self._hash_weights() if path in self._weights else hash_file(path)
        except (InputError, OSError):
            return False
        return found == self._digests[path]


def _look_at(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
