"""Handles on the tensors of a checkpoint, quantized or not, by their plain names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.model.block import is_quantizable
from moe2edge.model.disk_names import get_plain_name
from moe2edge.model.edits import change_weights
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight, dequantize_weight
from moe2edge.storage.safetensors_files import make_weight
from moe2edge.storage.source_formats.aliases import list_aliases
from moe2edge.storage.source_formats.source_format import SourceFormat

if TYPE_CHECKING:
    from torch import Tensor


# Axes of a tensor of all experts.
FUSED_AXES = 3


class SourceTensors:
    """Gives handles, and remembers what they were made of.

    Attributes:
        used: the tensors in the files of which handles were made.
        quantized: bytes of each quantized tensor in the files, by its plain name.
    """

    def __init__(self, files: Mapping[str, Path], form: SourceFormat | None) -> None:
        """Take the file of each tensor, and the format of those that are quantized."""
        self._files, self._form = files, form
        self.used: set[str] = set()
        self.quantized: dict[str, int] = {}

    def list_names(self) -> list[str]:
        """List the plain names of all tensors, and those of further parts as they are."""
        return [get_plain_name(name) for name in self._files]

    def take(self, name: str, shape: tuple[int, ...] | None) -> Weight | None:
        """Return the handle on a tensor; None: there is none under any name.

        Args:
            name: its plain name.
            shape: its shape; None: whatever it has, and its dtype as well.

        Raises:
            InputError: parts of a quantized tensor are missing, or do not fit.
            Unsupported: its dtype, or a setting of it, is not read.
        """
        if shape is None:
            return self._take_plain(name, any_dtype=True)
        if self._form is None:
            return self._take_plain(name)
        for each in list_aliases(name):
            weight = self._form.weight(each, shape)
            if weight is not None:
                self.used.update(self._form.list_parts(each))
                self.quantized[name] = self._form.count_bytes(each)
                sliced = self._slice(each, shape) if len(shape) == FUSED_AXES else None
                return replace(weight, name=name, kept=weight.scheme is not None, load_slice=sliced)
            if each in self._files:
                return self._take_plain(each)
        return None

    def list_spare(self) -> set[str]:
        """List the tensors that no handle was made of, and that no format explains."""
        spare = set(self._files) - self.used
        form = self._form
        return spare if form is None else {name for name in spare if not form.explains(name)}

    def _slice(self, name: str, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        """Return a function that reads one entry of the first axis of a quantized tensor."""
        form = self._form
        assert form is not None, "nothing is quantized"

        def load_slice(index: int) -> Tensor:
            found = form.expert(name, shape, index)
            assert found is not None, f"{name} is not quantized"
            return found.load()

        return load_slice

    def _take_plain(self, name: str, *, any_dtype: bool = False) -> Weight | None:
        """Return the handle on a tensor that is stored as it is."""
        if name not in self._files:
            return None
        self.used.add(name)
        return make_weight(self._files[name], name, any_dtype=any_dtype)


def dequantize_ends(model: Model) -> Model:
    """Return a model in which only those weights keep integers that quantizing passes select.

    Routers, embeddings and heads of some sources are quantized; passes see them as plain numbers,
    and targets write them so, unless a pass quantizes an embedding or a head anew.
    """

    def change(role: str, weight: Weight) -> Weight | None:
        return dequantize_weight(weight) if weight.scheme and not is_quantizable(role) else None

    model = change_weights(model, change)
    rest = {n: dequantize_weight(w) if w.scheme else w for n, w in model.rest.items()}
    return replace(model, rest=rest)
