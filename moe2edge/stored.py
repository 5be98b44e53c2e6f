"""An output folder with safetensors as a `Model`, from headers only.

A tensor that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe2edge import per_layer
from moe2edge.checkpoint import Checkpoint, header, read_tensor
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.families import family_of
from moe2edge.model import DTYPE_BYTES, Model, Weight, is_quantizable
from moe2edge.scheme import GROUP_SIZES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized

Header = tuple[tuple[int, ...], str]
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What a GPTQ checkpoint must say of itself; anything else would be read as other numbers.
GPTQ_V1 = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "lm_head": False}


def stored_model(checkpoint: Checkpoint) -> Model:
    """The model in an output folder, quantized or not, from headers only.

    Raises:
        Unsupported: another quantization than ours, or a family that is not known.
        VerificationFailed: a tensor is missing, unexpected or of another shape.
    """
    config = dict(checkpoint.config)
    scheme = _scheme(config.pop("quantization_config", None))
    own = config.pop("per_layer_config", None) or {}
    family = family_of(config)
    stored = _Stored(checkpoint, scheme)
    model = per_layer.read(family.build(config, stored.weight), own, stored.weight)
    stored.check(model)
    model.verify()
    return model


def _scheme(settings: Mapping[str, Any] | None) -> Scheme | None:
    """Scheme of a ``quantization_config``."""
    if settings is None:
        return None
    found = {key: settings.get(key) for key in GPTQ_V1} | {"lm_head": bool(settings.get("lm_head"))}
    layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
    group = settings.get("group_size")
    if found != GPTQ_V1 or layout != "gptq" or group not in GROUP_SIZES:
        raise Unsupported(
            f"quantization {found}, format {layout!r}, group_size {group}; only {GPTQ_V1}, format "
            f"'gptq', group_size {', '.join(map(str, GROUP_SIZES))} can be loaded"
        )
    return Scheme(bits=4, group_size=group)


class _Stored:
    """The tensors of a folder."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme | None) -> None:
        self._source = checkpoint.source
        self._scheme = scheme
        self._files = checkpoint.files
        self._headers: dict[str, Header] = {
            name: header(path, name) for name, path in self._files.items()
        }

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Handle on a tensor that a model of this config has; `check` tells if it is there."""
        if f"{_stem(name)}.qweight" in self._headers and self._scheme is not None:
            scheme = self._scheme
            return Weight(
                name,
                shape,
                self._headers.get("model.embed_tokens.weight", ((), "F32"))[1],
                load=lambda: self._quantized(name, scheme).dequantize(),
                scheme=scheme,
                load_quantized=lambda: self._quantized(name, scheme),
            )
        dtype = self._headers.get(name, ((), "F32"))[1]
        return Weight(name, shape, dtype, load=lambda: self._read(name))

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def _quantized(self, name: str, scheme: Scheme) -> Quantized:
        """Integers and scales of a matrix.

        Raises:
            VerificationFailed: zero points, the order of inputs or the scales are not ours.
        """
        import torch

        from moe2edge.packing import unpack_gptq
        from moe2edge.rounding import Quantized

        parts = {part: self._read(f"{_stem(name)}.{part}") for part in GPTQ_PARTS}
        q, scales, zeros = unpack_gptq(parts, scheme.bits)
        if (zeros != scheme.zero_point).any():
            raise VerificationFailed(
                f"{_stem(name)}.qzeros holds zero points from {int(zeros.min())} to "
                f"{int(zeros.max())}, expected {scheme.zero_point} throughout; the file was "
                "changed, export it again"
            )
        order = torch.arange(q.shape[1], dtype=torch.int32) // scheme.group_size
        if not torch.equal(parts["g_idx"], order):
            raise VerificationFailed(
                f"{_stem(name)}.g_idx reorders the inputs, expected input // "
                f"{scheme.group_size}; the file was changed, export it again"
            )
        if not scales.isfinite().all():
            raise VerificationFailed(
                f"{_stem(name)}.scales are not finite; the file was changed, export it again"
            )
        return Quantized(q, scales, scheme)

    def check(self, model: Model) -> None:
        """Hold the headers against what ``model`` must have.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        wanted: dict[str, Header] = {}
        for name, role, weight in model.tensors():
            if weight.scheme is None or not is_quantizable(role):
                wanted[name] = (weight.shape, weight.dtype)
            else:
                parts = gptq_parts(weight.shape, weight.scheme)
                wanted |= {f"{_stem(name)}.{part}": want for part, want in parts.items()}
        for found, names in (
            ("lacks", wanted.keys() - self._headers.keys()),
            ("has unexpected", self._headers.keys() - wanted.keys()),
        ):
            if names:
                raise VerificationFailed(
                    f"{self._source} {found} {len(names)} tensors, such as {min(names)}; the "
                    f"folder does not hold the {len(model.blocks)} blocks of its config.json: "
                    "export it again"
                )
        for name, want in wanted.items():
            if self._headers[name] != want or want[1] not in {*DTYPE_BYTES, "I32"}:
                raise VerificationFailed(
                    f"{name} is {self._headers[name]}, but config.json asks for {want}; "
                    "export it again"
                )


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def gptq_parts(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Header]:
    """Shape and dtype of each tensor that stands for a matrix [out, in] in GPTQ version 1."""
    outs, ins = shape
    groups = ins // scheme.group_size
    headers: tuple[Header, ...] = (
        ((ins // 8, outs), "I32"),
        ((groups, outs // 8), "I32"),
        ((groups, outs), "F16"),
        ((ins,), "I32"),
    )
    return dict(zip(GPTQ_PARTS, headers, strict=True))
