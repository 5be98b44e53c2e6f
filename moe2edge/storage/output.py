"""An output folder with safetensors as a `Model`, from headers only.

A tensor that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model.build import build_model
from moe2edge.model.family import find_family
from moe2edge.model.model import Model, is_low_rank, is_quantizable
from moe2edge.model.weights import DTYPE_BYTES, Weight
from moe2edge.numerics.scheme import GROUP_SIZES, WHOLE_ROW, Scheme
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.safetensors_files import read_header, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

Header = tuple[tuple[int, ...], str]
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
GPTQ_BITS = (2, 4, 8)
GPTQ_GROUPS = (*GROUP_SIZES, WHOLE_ROW)
# What a GPTQ checkpoint must say of itself; anything else would be read as other numbers.
GPTQ_V1 = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
GPTQ_SCHEME = ("bits", "group_size", "sym")


def open_stored_model(checkpoint: Checkpoint) -> Model:
    """The model in an output folder, quantized or not, from headers only.

    Raises:
        Unsupported: another quantization than ours, or a family that is not known.
        VerificationFailed: a tensor is missing, unexpected or of another shape.
    """
    config = dict(checkpoint.config)
    found = config.pop("quantization_config", None)
    settings = None if found is None else read_gptq_settings(found)
    own = config.pop("per_layer_config", None) or {}
    family = find_family(config)
    stored = _Stored(checkpoint, settings)
    model = hf_config.decode_layers(build_model(family, config, stored.weight), own, stored.weight)
    stored.check(model)
    model.verify()
    return model


# ---- what a checkpoint says of itself ------------------------------------------------------------


@dataclass(frozen=True)
class GptqSettings:
    """Which scheme the matrices of a GPTQ checkpoint have.

    Attributes:
        main: the scheme of all that no pattern matches.
        dynamic: patterns for the start of a module's name, each with the scheme of what it
            matches, None for matrices that are not quantized; the first that matches holds.
    """

    main: Scheme
    dynamic: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()

    def of(self, module: str) -> Scheme | None:
        """Scheme of the matrix of a module, by its name on disk without ``.weight``."""
        return self.named(module, self.main)

    def named(self, module: str, usual: Scheme | None = None) -> Scheme | None:
        """The same of a matrix that a pattern must name to be quantized."""
        matching = (scheme for pattern, scheme in self.dynamic if pattern.match(module))
        return next(matching, usual)


def read_gptq_settings(settings: Mapping[str, Any]) -> GptqSettings:
    """What a ``quantization_config`` says.

    Raises:
        Unsupported: something else than GPTQ version 1 as `moe2edge.targets.gptq` writes it.
    """
    found = {key: settings.get(key) for key in ("quant_method", "desc_act")}
    found |= {"lm_head": bool(settings.get("lm_head"))}
    found |= {"pack_dtype": settings.get("pack_dtype", "int32")}
    layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
    main = _scheme({key: settings.get(key) for key in GPTQ_SCHEME})
    if found != GPTQ_V1 or layout != "gptq" or main is None:
        shown = {**found, **{key: settings.get(key) for key in GPTQ_SCHEME}}
        raise Unsupported(f"quantization {shown}, format {layout!r}; only {_LOADABLE}")
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise Unsupported(f"dynamic is {dynamic!r}; only patterns with settings can be loaded")
    return GptqSettings(main, tuple(_override(key, own, main) for key, own in dynamic.items()))


_LOADABLE = (
    f"{GPTQ_V1}, bits {', '.join(map(str, GPTQ_BITS))}, group_size "
    f"{', '.join(map(str, GPTQ_GROUPS))}, sym true or false, format 'gptq' can be loaded"
)


def _scheme(settings: Mapping[str, Any]) -> Scheme | None:
    """The scheme of bits, group size and symmetry, None if it is none that can be loaded."""
    bits, group, symmetric = (settings[key] for key in GPTQ_SCHEME)
    if bits not in GPTQ_BITS or group not in GPTQ_GROUPS or not isinstance(symmetric, bool):
        return None
    return Scheme(bits, group, symmetric)


def _override(key: str, own: Any, main: Scheme) -> tuple[re.Pattern[str], Scheme | None]:
    """An entry of ``dynamic``: ``-:pattern`` is not quantized, all else has its own scheme.

    Raises:
        Unsupported: it has a setting that is not known, or no pattern.
    """
    try:
        pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise Unsupported(f"dynamic {key!r}: {error}; only patterns can be loaded") from error
    if key.startswith("-:"):
        return pattern, None
    scheme = None
    if isinstance(own, Mapping) and set(own) <= set(GPTQ_SCHEME):
        usual = {"bits": main.bits, "group_size": main.group_size, "sym": main.symmetric}
        scheme = _scheme({**usual, **own})
    if scheme is None:
        raise Unsupported(f"dynamic {key!r}: {own!r}; only {_LOADABLE}")
    return pattern, scheme


# ---- what it holds -------------------------------------------------------------------------------


class _Stored:
    """The tensors of a folder."""

    def __init__(self, checkpoint: Checkpoint, settings: GptqSettings | None) -> None:
        self._source = checkpoint.source
        self._settings = settings
        self._files = checkpoint.files
        self._headers: dict[str, Header] = {
            name: read_header(path, name) for name, path in self._files.items()
        }

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Handle on a tensor that a model of this config has; `check` tells if it is there."""
        scheme = self._scheme(name)
        if f"{_stem(name)}.qweight" in self._headers and scheme is not None:
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

    def _scheme(self, name: str) -> Scheme | None:
        """What the settings say of a matrix, by its name on disk."""
        return None if self._settings is None else self._settings.of(_stem(name))

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def _quantized(self, name: str, scheme: Scheme) -> Quantized:
        """Integers and scales of a matrix.

        Raises:
            VerificationFailed: zero points, the order of inputs or the scales are not ours.
        """
        import torch

        from moe2edge.numerics.grid import Quantized
        from moe2edge.numerics.packing import unpack_gptq

        parts = {part: self._read(f"{_stem(name)}.{part}") for part in GPTQ_PARTS}
        q, scales, zeros = unpack_gptq(parts, scheme.bits)
        # Stored minus one, so that one beyond the largest integer is what zero would be.
        low, high = (scheme.zero_point,) * 2 if scheme.symmetric else (1, scheme.largest)
        if ((zeros < low) | (zeros > high)).any():
            expected = f"{low} throughout" if scheme.symmetric else f"{low} to {high}"
            raise VerificationFailed(
                f"{_stem(name)}.qzeros holds zero points from {int(zeros.min())} to "
                f"{int(zeros.max())}, expected {expected}; the file was changed, export it again"
            )
        width = scheme.width(q.shape[1])
        order = torch.arange(q.shape[1], dtype=torch.int32) // width
        if not torch.equal(parts["g_idx"], order):
            raise VerificationFailed(
                f"{_stem(name)}.g_idx reorders the inputs, expected input // {width}; the file "
                "was changed, export it again"
            )
        if not scales.isfinite().all():
            raise VerificationFailed(
                f"{_stem(name)}.scales are not finite; the file was changed, export it again"
            )
        return Quantized(q, scales, scheme, None if scheme.symmetric else zeros)

    def check(self, model: Model) -> None:
        """Hold the headers against what ``model`` must have.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        wanted: dict[str, Header] = {}
        for name, role, weight in model.tensors():
            scheme = None
            if self._settings is not None and is_quantizable(role):
                scheme = self._settings.of(_stem(name))
            elif self._settings is not None and is_low_rank(role):
                scheme = self._settings.named(_stem(name))
            if scheme is None:
                wanted[name] = (weight.shape, weight.dtype)
            else:
                parts = plan_gptq_tensors(weight.shape, scheme)
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


def plan_gptq_tensors(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Header]:
    """Shape and dtype of each tensor that stands for a matrix [out, in] in GPTQ version 1."""
    (outs, ins), per_word = shape, 32 // scheme.bits
    groups = scheme.groups(ins)
    headers: tuple[Header, ...] = (
        ((ins // per_word, outs), "I32"),
        ((groups, outs // per_word), "I32"),
        ((groups, outs), "F16"),
        ((ins,), "I32"),
    )
    return dict(zip(GPTQ_PARTS, headers, strict=True))
