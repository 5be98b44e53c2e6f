"""Checkpoints of compressed-tensors: llm-compressor, Kimi-K2, auto-round's ``llm_compressor``.

Each module has the format that its own tensors have, and the scheme of the group of
``config_groups`` whose targets match it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.storage.source_formats.aliases import list_aliases
from moe2edge.storage.source_formats.fp8 import ROUNDED_ACTIVATIONS, read_block
from moe2edge.storage.source_formats.integers import (
    GROUP_RANGE,
    SCALE_DTYPES,
    Integers,
    match_pattern,
    read_number,
)
from moe2edge.storage.source_formats.scaled import (
    FLOATS,
    NVFP4_GROUP,
    ScaleBlock,
    make_paired,
    make_scaled,
)
from moe2edge.storage.source_formats.source_format import (
    QuantizedTensor,
    SourceFormat,
    check_part,
    get_stem,
    make_shape_error,
)
from moe2edge.storage.source_formats.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

CT_FORMATS = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
MX_GROUP = 32
# How closely a target matches a module.
BY_NAME, BY_PATTERN, BY_CLASS = 0, 1, 2
PACKED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)

# Unpacks a number of integers from each row of words.
Unpack = Callable[["Tensor", int], "Tensor"]


@dataclass(frozen=True)
class CompressedSource(SourceFormat):
    """Integers of few bits in words, 8-bit integers and floats, and 4-bit floats."""

    PARTS: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape",
        "weight_g_idx", "weight_global_scale",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._check_settings()

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        kinds = sorted({_describe(group.get("weights") or {}) for group in self.groups.values()})
        return f"compressed-tensors, {', '.join(kinds) or self.settings.get('format')}"

    @cached_property
    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """The groups of modules with one scheme, by name."""
        groups = self.settings.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(
            isinstance(group, Mapping) for group in groups.values()
        ):
            raise InputError(f"quantization_config: config_groups is {groups!r}, expected groups")
        return groups

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what becomes of activations and of the cache."""
        said = []
        for group in self.groups.values():
            activations = group.get("input_activations")
            if isinstance(activations, Mapping) and activations.get("num_bits", 16) < 16:
                kind = "integers" if activations.get("type") == "int" else "floats"
                said.append(ROUNDED_ACTIVATIONS.format(f"{activations['num_bits']}-bit {kind}"))
        if self.settings.get("kv_cache_scheme"):
            said.append(
                "programs that run it as it is round the cache of keys and values; here it is not"
            )
        return tuple(dict.fromkeys(said))

    def _check_settings(self) -> None:
        """Refuse what changes numbers and is not read.

        Raises:
            Unsupported: so.
        """
        found = [self.settings.get("format", "dense")]
        found += [group["format"] for group in self.groups.values() if group.get("format")]
        if unread := [each for each in found if each not in CT_FORMATS]:
            raise Unsupported(
                f"quantization_config: compressed-tensors format {unread[0]!r} is not read; read "
                f"are {', '.join(CT_FORMATS)}: start from the unquantized checkpoint"
            )
        sparsity = (self.settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise Unsupported(
                f"quantization_config: sparsity_config has format {sparsity!r}, and only 'dense' "
                "is read; start from the uncompressed checkpoint"
            )
        if (self.settings.get("transform_config") or {}).get("config_groups"):
            raise Unsupported(
                "quantization_config: transform_config rotates hidden states while the model runs, "
                "which is not read; quantize without it, or start from the unquantized checkpoint"
            )

    # ---- tensors ---------------------------------------------------------------------------------

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a matrix by its parts."""
        stem = get_stem(name)
        if stem == name:
            return None
        packed, plain = (self.tensors.get(f"{stem}.{part}") for part in self.PARTS[:2])
        if packed is not None and plain is not None:
            raise InputError(
                f"{stem} is there twice, as weight and as weight_packed; take one of them away"
            )
        if packed is not None and packed.dtype == "I32":
            return self._find_packed(name, packed, shape)
        if packed is not None:
            return self._find_pairs(name, packed)
        if plain is not None and plain.dtype in (*FLOATS, "I8"):
            return self._find_bytes(name, plain)
        return None

    def find_weights(self, stem: str) -> Mapping[str, Any]:
        """Return the scheme of a module: of targets, names come before patterns, then classes.

        Raises:
            InputError: no group has it, or it is ignored.
        """
        if self.is_ignored(stem):
            raise InputError(
                f"{stem} is quantized, but quantization_config ignores it; config.json is not that "
                "of these files: download it again"
            )
        ranked = self.rank_groups(stem)
        if not ranked:
            raise InputError(
                f"{stem} is quantized, but no target of config_groups in quantization_config "
                "matches it; config.json is not that of these files: download it again"
            )
        found = ranked[0][1].get("weights")
        if not isinstance(found, Mapping):
            raise InputError(f"{stem} is quantized, but its group in config_groups has no weights")
        return found

    def is_ignored(self, stem: str) -> bool:
        """Return whether a module is one of those that stay as they are."""
        names = tuple(list_aliases(stem))
        return any(_is_target(target, names) for target in self.settings.get("ignore") or ())

    def rank_groups(self, stem: str) -> list[tuple[int, Mapping[str, Any]]]:
        """List the groups whose targets match a module with the rank of the target, best first."""
        names = tuple(list_aliases(stem))
        ranked = [
            (rank, group)
            for group in self.groups.values()
            for target in group.get("targets") or ()
            if (rank := _rank(target, names)) is not None
        ]
        return sorted(ranked, key=lambda each: each[0])

    def _find_packed(
        self, name: str, packed: StoredTensor, shape: tuple[int, ...]
    ) -> QuantizedTensor:
        """Find a matrix of integers in words; zero points are packed along the outputs."""
        stem = get_stem(name)
        weights = self.find_weights(stem)
        where = f"config_groups of {stem}"
        bits = read_number(weights, "num_bits", PACKED_BITS, where)
        group = -1
        if weights.get("group_size") is not None:
            group = read_number(weights, "group_size", GROUP_RANGE, where)
        if len(shape) != 2 or packed.shape[:1] != shape[:1] or len(packed.shape) != 2:
            outs, words = packed.shape[0], packed.shape[-1]
            raise make_shape_error(name, self.name, (outs, words * 32 // bits), shape)
        outs, ins = shape
        unpack = _choose_unpacking(name, packed, bits, ins)
        (scales,) = self.take_parts(name, ("weight_scale",))
        stored_shape = self.tensors.get(f"{stem}.weight_shape")
        zeros = self.tensors.get(f"{stem}.weight_zero_point")
        order = self.tensors.get(f"{stem}.weight_g_idx")

        def read_q() -> Tensor:
            if stored_shape is not None and tuple(stored_shape.read().tolist()) != shape:
                raise make_shape_error(name, self.name, tuple(stored_shape.read().tolist()), shape)
            return unpack(packed.read(), ins)

        symmetric = bool(weights.get("symmetric", True))
        matrix = Integers(
            stem, (outs, ins), bits, group, symmetric, scales.dtype,
            read_q=read_q,
            read_scales=lambda: scales.read().reshape(-1, matrix.groups).expand(outs, -1),
            read_zeros=None if zeros is None else _read_zeros(zeros, bits, outs, unpack),
            read_order=None if order is None else order.read,
        )  # fmt: skip
        if zeros is None and not symmetric:
            self.take_parts(name, ("weight_zero_point",))
        if scales.shape not in ((outs, matrix.groups), (1,), (), (1, 1)):
            check_part(scales, (outs, matrix.groups), SCALE_DTYPES)
        return matrix.make_source()

    def _find_pairs(self, name: str, packed: StoredTensor) -> QuantizedTensor:
        """Find a matrix of 4-bit floats: NVFP4 with a scale of the whole to divide by, or MXFP4."""
        scale = self.take_parts(name, ("weight_scale",))[0]
        check_part(packed, packed.shape, ("U8",))
        whole = self.tensors.get(f"{get_stem(name)}.weight_global_scale")
        if whole is None and scale.dtype in FLOATS:
            self.take_parts(name, ("weight_global_scale",))
        group = MX_GROUP if whole is None else NVFP4_GROUP
        return make_paired(packed, scale, group, whole, divides=True)

    def _find_bytes(self, name: str, weight: StoredTensor) -> QuantizedTensor:
        """Find a matrix of 8-bit integers or floats."""
        stem = get_stem(name)
        weights = self.find_weights(stem)
        (scale,) = self.take_parts(name, ("weight_scale",))
        zeros = self.tensors.get(f"{stem}.weight_zero_point")
        source = make_scaled(weight, scale, _find_block(weights), zeros)
        outs, ins = weight.shape
        group = weights.get("group_size") or -1
        groups = 1 if group == -1 else -(-ins // group)
        if weight.dtype != "I8" or scale.shape != (outs, groups):
            return source
        matrix = Integers(
            stem, (outs, ins), 8, group, bool(weights.get("symmetric", True)), scale.dtype,
            read_q=lambda: _shift(weight.read(), 8),
            read_scales=scale.read,
            read_zeros=None if zeros is None else lambda: _shift(zeros.read(), 8),
        )  # fmt: skip
        return source if matrix.problem else matrix.make_source()


def _describe(weights: Mapping[str, Any]) -> str:
    """Describe the scheme of a group."""
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    letter = "" if weights.get("symmetric", True) else ", asymmetric"
    spread = weights.get("group_size") or weights.get("block_structure")
    at = f" in groups of {spread}" if isinstance(spread, int) and spread > 0 else ""
    if isinstance(spread, list):
        at = f" in blocks of {' x '.join(map(str, spread))}"
    return f"{bits}-bit {kind}{at}{letter}"


def _rank(target: str, names: tuple[str, ...]) -> int | None:
    """Return how closely a target matches a module: `BY_NAME`, pattern, class; None: it does not.

    Targets with a capital letter are classes, such as ``Linear``.
    """
    if target in names:
        return BY_NAME
    if target.startswith("re:"):
        return BY_PATTERN if _is_target(target, names) else None
    return BY_CLASS if target[:1].isupper() else None


def _is_target(target: str, names: tuple[str, ...]) -> bool:
    """Return whether a target matches a module by name or pattern."""
    if target.startswith("re:"):
        return match_pattern(target.removeprefix("re:"), names, "quantization_config")
    return target in names


def _find_block(weights: Mapping[str, Any]) -> ScaleBlock | None:
    """Return the block of a scheme that has blocks or groups."""
    if weights.get("block_structure") is not None:
        return read_block(weights, "block_structure")
    group = weights.get("group_size")
    return (1, group) if type(group) is int and group > 0 else None


def _choose_unpacking(name: str, packed: StoredTensor, bits: int, ins: int) -> Unpack:
    """Return the function that unpacks: the words are one stream, or older, whole numbers.

    Raises:
        InputError: the words are neither.
    """
    found = packed.shape[1]
    streamed, whole = -(-ins * bits // 32), -(-ins // (32 // bits))
    if found not in (streamed, whole):
        shape = (packed.shape[0], found * 32 // bits)
        raise make_shape_error(
            name, f"compressed-tensors, {bits} bits", shape, (packed.shape[0], ins)
        )

    def unpack(words: Tensor, count: int) -> Tensor:
        from moe2edge.numerics import decoding

        one = decoding.unpack_words if found == streamed else decoding.unpack_whole
        return one(words, bits, count)

    return unpack


def _read_zeros(zeros: StoredTensor, bits: int, outs: int, unpack: Unpack) -> Callable[[], Tensor]:
    """Return the function that reads zero points: packed along the outputs, or older, signed."""
    if zeros.dtype == "I32":
        return lambda: unpack(zeros.read().T, outs).T.contiguous()
    check_part(zeros, zeros.shape, ("I8",))
    return lambda: _shift(zeros.read(), bits).reshape(outs, -1)


def _shift(signed: Tensor, bits: int) -> Tensor:
    """Return signed integers as those from zero on, uint8."""
    import torch

    return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
