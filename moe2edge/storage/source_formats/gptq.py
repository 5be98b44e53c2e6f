"""GPTQ checkpoints: AutoGPTQ, GPTQModel, and auto-round with its packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.numerics.scheme import WHOLE_ROW
from moe2edge.storage.source_formats.aliases import list_aliases
from moe2edge.storage.source_formats.integers import (
    GROUP_RANGE,
    SCALE_DTYPES,
    Integers,
    describe_groups,
    match_pattern,
    read_number,
)
from moe2edge.storage.source_formats.source_format import (
    QuantizedTensor,
    SourceFormat,
    check_part,
    get_stem,
    make_shape_error,
)

if TYPE_CHECKING:
    from torch import Tensor

GPTQ_SOURCE_BITS = (2, 3, 4, 5, 6, 7, 8)
# Number that was taken off stored zero points, by the name of the layout.
TAKEN_OFF = {"gptq": 1, "gptq_v2": 0}
# Layouts that auto-round calls otherwise.
AUTO_ROUND_GPTQ = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
MODULE_KEYS = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GptqModule:
    """Settings of one module.

    Attributes:
        bits: bits per weight.
        group_size: inputs that share a scale; -1: all.
        sym: zero points are the middle.
        desc_act: inputs may be in the order of their activations.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> GptqModule:
        """Read the settings.

        Raises:
            Unsupported: one is not read.
        """
        sym, desc_act = settings.get("sym", True), settings.get("desc_act", False)
        for key, value in (("sym", sym), ("desc_act", desc_act)):
            if type(value) is not bool:
                raise Unsupported(f"{where}: {key} is {value!r}; read are true and false")
        return cls(
            read_number(settings, "bits", GPTQ_SOURCE_BITS, where),
            read_number(settings, "group_size", GROUP_RANGE, where),
            sym,
            desc_act,
        )


@dataclass(frozen=True)
class GptqSource(SourceFormat):
    """Integers packed along the inputs, zero points along the outputs, all transposed.

    ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales``
    [groups, out], ``g_idx`` int32 [in]. Version 1 (``gptq``) stores zero points minus one; a zero
    point of 0 is stored as the largest integer.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __post_init__(self) -> None:
        _ = self.layout, self.main

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        main = self.main
        kind = "" if main.sym else ", asymmetric"
        order = ", in the order of activations" if main.desc_act else ""
        return f"GPTQ, {main.bits} bits in {describe_groups(main.group_size)}{kind}{order}"

    @cached_property
    def layout(self) -> str:
        """Name of the layout.

        Raises:
            Unsupported: it is none that is read.
        """
        found = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        if self.settings.get("quant_method") == "auto-round":
            packing = self.settings.get("packing_format", "auto_round:auto_gptq")
            found = AUTO_ROUND_GPTQ.get(str(packing), packing)
        dtype = self.settings.get("pack_dtype", "int32")
        if found not in TAKEN_OFF or dtype != "int32" or self.settings.get("is_marlin_format"):
            raise Unsupported(
                f"quantization_config: GPTQ in layout {found!r}, pack_dtype {dtype!r} is not read; "
                "read are 'gptq' and 'gptq_v2' in int32: save it again in one of these, or start "
                "from the unquantized checkpoint"
            )
        return str(found)

    @cached_property
    def main(self) -> GptqModule:
        """Settings of modules without their own."""
        return GptqModule.parse(self.settings, "quantization_config")

    def find_module(self, name: str) -> GptqModule:
        """Return the settings of a module, by its name without ``.weight``.

        GPTQModel has patterns in ``dynamic``, of which the first that matches holds; auto-round
        has names in ``extra_config``.

        Raises:
            Unsupported: a pattern or setting is not read.
        """
        names = tuple(list_aliases(name))
        extra = self.settings.get("extra_config") or {}
        for each in names:
            if isinstance(extra, Mapping) and isinstance(extra.get(each), Mapping):
                return self._override(extra[each], f"extra_config, {each}")
        for pattern, own in (self.settings.get("dynamic") or {}).items():
            where = f"dynamic, {pattern}"
            if match_pattern(pattern.removeprefix("+:").removeprefix("-:"), names, where):
                if pattern.startswith("-:"):
                    raise InputError(
                        f"quantization_config: {where} says that {name} is not quantized, but it "
                        "has integers; config.json is not that of these files"
                    )
                return self._override(own, where)
        return self.main

    def _override(self, own: Mapping[str, Any], where: str) -> GptqModule:
        """Return the usual settings with those of some modules in their place."""
        usual = {key: getattr(self.main, key) for key in MODULE_KEYS}
        known = {key: value for key, value in own.items() if key in MODULE_KEYS}
        return GptqModule.parse({**usual, **known}, f"quantization_config: {where}")

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a matrix by its integers."""
        stem = get_stem(name)
        if stem == name or f"{stem}.qweight" not in self.tensors:
            return None
        module = self.find_module(stem)
        words, zeros, scales = self.take_parts(name, ("qweight", "qzeros", "scales"))
        order = self.tensors.get(f"{stem}.g_idx")
        ins, outs = words.shape[0] * 32 // module.bits, words.shape[-1]
        if (outs, ins) != shape:
            # With other bits, or in another layout, it would fit: say which is wrong.
            raise self._explain(name, module, words.shape, (outs, ins), shape)
        matrix = Integers(
            stem, (outs, ins), module.bits, module.group_size, module.sym, scales.dtype,
            read_q=lambda: _unpack(words.read().T, module.bits, ins),
            read_scales=lambda: scales.read().T,
            read_zeros=lambda: self._read_zeros(zeros.read(), module.bits, outs),
        )  # fmt: skip
        if order is not None:
            check_part(order, (ins,), ("I32", "I64"))
            if module.desc_act and module.group_size != WHOLE_ROW:
                matrix = replace(matrix, read_order=order.read)
        check_part(words, (ins * module.bits // 32, outs), ("I32",))
        check_part(zeros, (matrix.groups, -(-outs * module.bits // 32)), ("I32",))
        check_part(scales, (matrix.groups, outs), SCALE_DTYPES)
        return matrix.make_source()

    def explains(self, name: str) -> bool:
        """Return whether it is a bias of zeros, which AutoGPTQ adds to matrices without one."""
        if super().explains(name):
            return True
        bias = self.tensors[name] if name.endswith(".bias") else None
        if bias is None or f"{name.removesuffix('.bias')}.qweight" not in self.tensors:
            return False
        return not bool(bias.read().any())

    def _read_zeros(self, words: Tensor, bits: int, outs: int) -> Tensor:
        """Read zero points, uint8 [out, groups]."""
        stored = _unpack(words, bits, outs).T.contiguous()
        return (stored + TAKEN_OFF[self.layout]) & ((1 << bits) - 1)

    def _explain(
        self,
        name: str,
        module: GptqModule,
        words: tuple[int, ...],
        found: tuple[int, int],
        shape: tuple[int, ...],
    ) -> InputError:
        """Make the error for integers that are not those of the expected matrix."""
        outs, ins = shape if len(shape) == 2 else (0, 0)
        if words == (ins, outs * module.bits // 32):
            return InputError(
                f"{name} is packed along the outputs, as AWQ does it, but quantization_config says "
                f"quant_method {self.settings.get('quant_method')}; correct quant_method to awq"
            )
        if words[-1] == outs and ins and (words[0] * 32) % ins == 0:
            return InputError(
                f"{name} is stored in {words[0] * 32 // ins} bits, but quantization_config says "
                f"{module.bits}; correct bits, or the patterns of single modules (dynamic)"
            )
        return make_shape_error(name, "GPTQ", found, shape)


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack a stream of integers."""
    from moe2edge.numerics.decoding import unpack_words

    return unpack_words(words, bits, count)
