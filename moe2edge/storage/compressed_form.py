"""The form of output folders in compressed-tensors' ``pack-quantized``: schemes and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import BITS, WHOLE_ROW, Scheme
from moe2edge.storage.source_formats.compressed import BY_CLASS, CompressedSource
from moe2edge.storage.source_formats.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from moe2edge.numerics.grid import Quantized

COMPRESSED = "compressed-tensors"
PACKED = "pack-quantized"
SCALE_PART = "weight_scale"


@dataclass(frozen=True)
class CompressedForm:
    """Schemes and matrices of a folder in compressed-tensors.

    Attributes:
        source: the reader of the format.
    """

    source: CompressedSource

    @classmethod
    def make(
        cls, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> CompressedForm:
        """Take the tensors of a folder and its ``quantization_config``.

        Raises:
            Unsupported: it is not as `moe2edge.targets.compressed_tensors` writes it.
        """
        form = cls(CompressedSource(tensors, settings))
        found = [settings.get("format")]
        found += [group.get("format", PACKED) for group in form.source.groups.values()]
        if any(each != PACKED for each in found):
            raise Unsupported(
                f"compressed-tensors in format {found} is not supported; only {PACKED!r} can be "
                "loaded"
            )
        for group in form.source.groups.values():
            _read_scheme(group)
        return form

    def find_scheme(self, module: str) -> Scheme | None:
        """Return the scheme of a module's matrix, by its name on disk without ``.weight``."""
        ranked = [] if self.source.is_ignored(module) else self.source.rank_groups(module)
        return _read_scheme(ranked[0][1]) if ranked else None

    def find_override(self, module: str) -> Scheme | None:
        """Return the scheme of a module that is named, or matched by a pattern."""
        ranked = [] if self.source.is_ignored(module) else self.source.rank_groups(module)
        return _read_scheme(ranked[0][1]) if ranked and ranked[0][0] < BY_CLASS else None

    def take(self, name: str, shape: tuple[int, ...]) -> Weight | None:
        """Return the handle on a matrix of integers; None: it is not stored as one."""
        weight = self.source.weight(name, shape)
        if weight is None or weight.scheme is None:
            return None
        quantized = weight.quantized

        def load_quantized() -> Quantized:
            numbers = quantized()
            if not numbers.scales.isfinite().all():
                raise VerificationFailed(
                    f"{SCALE_PART} of {name} is not finite; the file was changed, export it again"
                )
            return numbers

        return replace(
            weight, load=lambda: load_quantized().dequantize(), load_quantized=load_quantized
        )

    def plan(
        self, module: str, shape: tuple[int, ...], scheme: Scheme
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each tensor that a matrix has to be stored in, by name."""
        stored = self.source.tensors.get(f"{module}.{SCALE_PART}")
        dtype = stored.dtype if stored is not None and stored.dtype in ("BF16", "F16") else "F16"
        parts = plan_compressed_tensors(shape, scheme, dtype)
        return {f"{module}.{part}": header for part, header in parts.items()}


def plan_compressed_tensors(
    shape: tuple[int, ...], scheme: Scheme, dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each tensor of a matrix [out, in] in ``pack-quantized``.

    Args:
        shape: of the matrix.
        scheme: its scheme.
        dtype: of the scales.
    """
    outs, ins = shape
    groups = scheme.groups(ins)
    parts = {
        "weight_packed": ((outs, -(-ins * scheme.bits // 32)), "I32"),
        SCALE_PART: ((outs, groups), dtype),
        "weight_shape": ((2,), "I64"),
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = ((-(-outs * scheme.bits // 32), groups), "I32")
    return parts


def encode_compressed_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return ``weights`` of a group of ``config_groups``, as the library spells it."""
    whole = scheme.group_size == WHOLE_ROW
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "group_size": None if whole else scheme.group_size,
        "strategy": "channel" if whole else "group",
        "dynamic": False,
    }


def _read_scheme(group: Mapping[str, Any]) -> Scheme:
    """Read the scheme of a group.

    Raises:
        Unsupported: `encode_compressed_scheme` does not write it.
    """
    weights = group.get("weights")
    found = dict(weights) if isinstance(weights, Mapping) else {}
    bits, size = found.get("num_bits"), found.get("group_size")
    if bits in BITS and (size is None or type(size) is int):
        scheme = Scheme(int(bits), size or WHOLE_ROW, found.get("symmetric") is not False)
        if encode_compressed_scheme(scheme).items() <= found.items():
            return scheme
    raise Unsupported(
        f"config_groups has weights {weights}, which is not supported; only integers of "
        f"{', '.join(map(str, BITS))} bits in groups or whole rows can be loaded"
    )
