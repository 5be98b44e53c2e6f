"""The tensors of a quantized checkpoint: headers now, numbers or some of their rows when needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.storage.safetensors_files import TensorEntry, open_file, read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: its name.
        path: its file.
        shape: its shape.
        dtype: its dtype as the file spells it.
        nbytes: its size in the file.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """Read it.

        Args:
            rows: first row, and the one after the last; None: all.
        """
        return read_tensor(self.path, self.name, rows)

    def read_slice(self, index: int | None) -> Tensor:
        """Read one entry of the first dimension, without that dimension; None: all of it."""
        return self.read() if index is None else self.read((index, index + 1))[0]


class StoredTensors(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint by name."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Take the file of each tensor."""
        self._files = files
        self._headers: dict[Path, Mapping[str, TensorEntry]] = {}
        self._found: dict[str, StoredTensor] = {}

    def __getitem__(self, name: str) -> StoredTensor:
        """Return a tensor."""
        if name in self._found:
            return self._found[name]
        path = self._files[name]
        # Looked up once: `open_file` asks the file system each time.
        if path not in self._headers:
            self._headers[path] = open_file(path)
        entry = self._headers[path][name]
        tensor = StoredTensor(name, path, entry.shape, entry.dtype, entry.nbytes)
        self._found[name] = tensor
        return tensor

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, ``default`` if there is none; without an exception, which is slow."""
        return self[name] if name in self._files else default

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)
