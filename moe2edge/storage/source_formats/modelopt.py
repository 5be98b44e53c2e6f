"""Checkpoints of NVIDIA Model-Optimizer: FP8 with one scale, and NVFP4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.storage.source_formats.fp8 import ROUNDED_ACTIVATIONS
from moe2edge.storage.source_formats.scaled import FLOATS, NVFP4_GROUP, make_paired, make_scaled
from moe2edge.storage.source_formats.source_format import (
    QuantizedTensor,
    SourceFormat,
    check_part,
    get_stem,
)

ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION", "FP8_PER_CHANNEL_PER_TOKEN")
# Parts of a module whose inputs are scaled, or rotated, before it.
SMOOTHED = ("pre_quant_scale", "weight_quantizer", "svdquant_lora_a")


@dataclass(frozen=True)
class ModeloptSource(SourceFormat):
    """Matrices F8_E4M3 times a scale, or pairs of E2M1 times scales of 16 and one of the whole."""

    PARTS: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_scale_2")

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise Unsupported(
                f"quantization_config: quant_algo {self.algorithm!r} of modelopt is not read; read "
                f"are {', '.join(ALGORITHMS)}: start from the unquantized checkpoint"
            )

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        return f"modelopt, {self.algorithm}"

    @property
    def algorithm(self) -> str:
        """Name that modelopt gives the format."""
        found = self.settings.get("quant_algo") or read_nested(self.settings).get("quant_algo")
        return str(found or "").upper()

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what becomes of activations."""
        return (ROUNDED_ACTIVATIONS.format("few bits"),)

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a matrix by dtype."""
        weight, stem = self.tensors.get(name), get_stem(name)
        if weight is None or stem == name or weight.dtype not in (*FLOATS, "U8"):
            return None
        if smoothed := [part for part in SMOOTHED if f"{stem}.{part}" in self.tensors]:
            raise Unsupported(
                f"{stem} has a {smoothed[0]}, which changes its inputs and is not read; start from "
                "the unquantized checkpoint"
            )
        (scale,) = self.take_parts(name, ("weight_scale",))
        if weight.dtype in FLOATS:
            if len(scale.shape) > 2:
                raise Unsupported(
                    f"{scale.name} has shape {list(scale.shape)}; read are one scale, and one for "
                    "each row: start from the unquantized checkpoint"
                )
            return make_scaled(weight, scale, None)
        _, whole = self.take_parts(name, ("weight_scale", "weight_scale_2"))
        if len(weight.shape) != 2:
            raise InputError(f"{name} has shape {list(weight.shape)}, expected a matrix")
        check_part(scale, (weight.shape[0], math.ceil(2 * weight.shape[1] / NVFP4_GROUP)), FLOATS)
        return make_paired(weight, scale, NVFP4_GROUP, whole)


def read_nested(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of settings that modelopt may put them in."""
    inner = settings.get("quantization")
    return inner if isinstance(inner, Mapping) else {}
