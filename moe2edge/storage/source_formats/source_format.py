"""Interface of the readers: a handle on the dequantized numbers for the plain name of a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import InputError
from moe2edge.model.weights import Weight, cast_to_stored
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.source_formats.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Scales of activations and of the cache of keys and values. Programs that compute in few bits need
# them; the numbers of the weights do not depend on them.
ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "input_amax", "activation_scale",
    "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point",
    "v_zero_point", "kv_scale",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized tensor of a checkpoint.

    Attributes:
        shape: of the dequantized tensor.
        decode: computes the numbers, float32; of a fused tensor, of one entry of its first
            dimension, or of all where it gets None.
        scheme: how integers are kept; None: the tensor is not one of integers that can be.
        load_quantized: reads them.
        problem: why integers are not kept, where the tensor holds some.
        scale_dtype: dtype of the scales of integers.
    """

    shape: tuple[int, ...]
    decode: Callable[[int | None], Tensor] = field(repr=False)
    scheme: Scheme | None = None
    load_quantized: Callable[[], Quantized] | None = field(default=None, repr=False)
    problem: str = ""
    scale_dtype: str = ""


@dataclass(frozen=True)
class SourceFormat(ABC):
    """Reader of one format.

    Attributes:
        tensors: all tensors of the checkpoint.
        settings: ``quantization_config``.
        dtype: dtype of the dequantized tensors, as safetensors spells it. What is not kept in
            integers is rounded to it once, from float32.
    """

    # Parts of a quantized tensor: what follows the name of its module.
    PARTS: ClassVar[tuple[str, ...]]
    # The same of a fused tensor: what follows its name.
    FUSED: ClassVar[tuple[str, ...]] = ()

    tensors: Mapping[str, StoredTensor] = field(repr=False)
    settings: Mapping[str, Any]
    dtype: str = "BF16"

    # ---- what a format defines -------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the format for reports, such as ``GPTQ, 4 bits in groups of 128``."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what is not carried on, such as the rounding of activations."""
        return ()

    @abstractmethod
    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a quantized tensor by its plain name; None: it is not quantized, or not there.

        Args:
            name: ``X.weight``, or that of a fused tensor, ``X.experts.gate_up_proj``.
            shape: expected shape.

        Raises:
            InputError: a part is missing, or has the wrong shape or dtype.
            Unsupported: a setting of the tensor is not read.
        """

    # ---- what all have ---------------------------------------------------------------------------

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        """Make a handle on a dequantized tensor; None if it is not a quantized one.

        A fused tensor is dequantized one entry of its first dimension at a time.

        Raises:
            InputError: a part is missing, or has the wrong shape or dtype.
            Unsupported: a setting of the tensor is not read.
        """
        source = self._find_checked(name, shape)
        if source is None:
            return None
        if source.scheme is not None:
            return Weight(
                name,
                shape,
                self.dtype,
                load=lambda: source.decode(None),
                scheme=source.scheme,
                load_quantized=source.load_quantized,
                scale_dtype=source.scale_dtype,
            )
        return Weight(name, shape, self.dtype, load=lambda: self._load(source))

    def expert(self, name: str, shape: tuple[int, ...], index: int) -> Weight | None:
        """Make a handle on one entry of a fused tensor, of which nothing else is read.

        Args:
            name: name of the fused tensor.
            shape: its expected shape.
            index: the entry.

        Raises:
            InputError: as in `weight`.
        """
        source = self._find_checked(name, shape)
        if source is None:
            return None
        return Weight(
            f"{name}[{index}]",
            shape[1:],
            self.dtype,
            load=lambda: cast_to_stored(source.decode(index), self.dtype),
        )

    def list_parts(self, name: str) -> tuple[str, ...]:
        """List the tensors that a quantized tensor consists of, by its plain name."""
        stem = get_stem(name)
        kinds = (*self.PARTS, *self._activations)
        parts = [f"{stem}.{part}" for part in kinds] if stem != name else []
        fused = [] if name.endswith(".weight") else [f"{name}{part}" for part in self.FUSED]
        return tuple(part for part in (*parts, *fused) if part in self.tensors)

    @cached_property
    def _activations(self) -> tuple[str, ...]:
        """Those of `ACTIVATIONS` that the checkpoint has at all."""
        found = {name[name.rfind(".") + 1 :] for name in self.tensors}
        return tuple(part for part in ACTIVATIONS if part in found)

    def count_bytes(self, name: str) -> int:
        """Count the bytes that a quantized tensor takes in the checkpoint."""
        return sum(self.tensors[part].nbytes for part in self.list_parts(name))

    def explains(self, name: str) -> bool:
        """Return whether a tensor that no weight consists of may be there all the same."""
        return name.rpartition(".")[2] in ACTIVATIONS

    def is_kept(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a quantized tensor keeps its integers."""
        source = self.find(name, shape)
        return source is not None and source.scheme is not None

    def take_parts(self, name: str, parts: Sequence[str]) -> list[StoredTensor]:
        """Return parts of a tensor that all have to be there.

        Raises:
            InputError: one is missing.
        """
        stem = get_stem(name)
        found = [self.tensors.get(f"{stem}.{part}") for part in parts]
        missing = [part for part, tensor in zip(parts, found, strict=True) if tensor is None]
        if missing:
            have = ", ".join(part.removeprefix(f"{stem}.") for part in self.list_parts(name))
            raise InputError(
                f"{stem} has {have}, but no {missing[0]}, which {self.name} needs; download the "
                "checkpoint again"
            )
        return [tensor for tensor in found if tensor is not None]

    def _find_checked(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a tensor, and refuse it if it has another shape than the config asks for."""
        source = self.find(name, shape)
        if source is not None and source.shape != shape:
            raise make_shape_error(name, self.name, source.shape, shape)
        return source

    def _load(self, source: QuantizedTensor) -> Tensor:
        """Compute the numbers of a tensor in its dtype; a fused one by its entries."""
        import torch

        if len(source.shape) < 3:
            return cast_to_stored(source.decode(None), self.dtype)
        entries = range(source.shape[0])
        return torch.stack([cast_to_stored(source.decode(n), self.dtype) for n in entries])


def get_stem(name: str) -> str:
    """Return the name of a module for the name of its weight; other names are as they are."""
    return name.removesuffix(".weight")


def make_shape_error(
    name: str, kind: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> InputError:
    """Make the error for a tensor of another shape than the config asks for."""
    turned = ""
    if sorted(found) == sorted(expected):
        turned = "; rows and columns are exchanged"
    elif len(found) == len(expected):
        turned = "; some tools cut fused experts along the wrong axis"
    return InputError(
        f"{name} ({kind}) holds {list(found)} numbers, but config.json asks for {list(expected)}"
        f"{turned}: such a folder is not usable, quantize the model again with another tool"
    )


def check_part(part: StoredTensor, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    """Refuse a part of another shape or dtype.

    Raises:
        InputError: so.
    """
    if part.shape != shape or part.dtype not in dtypes:
        raise InputError(
            f"{part.name} is {part.dtype} {list(part.shape)}, expected {' or '.join(dtypes)} "
            f"{list(shape)}; config.json is not that of these files, or the folder is damaged: "
            "download it again"
        )
