"""Output folders with safetensors, opened as a `Model` from headers only.

A tensor that is missing, unexpected or of another shape is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.build import TakeTensor, build_model
from moe2edge.model.edits import change_weights
from moe2edge.model.family import FAMILIES, find_family
from moe2edge.model.model import Model
from moe2edge.model.stored_layout import list_stored, list_stored_integers
from moe2edge.model.weights import BYTES, DTYPE_BYTES, Weight
from moe2edge.numerics.scheme import GROUP_SIZES, WHOLE_ROW, Scheme
from moe2edge.storage.checkpoint import Checkpoint, has_own_layers
from moe2edge.storage.compressed_form import COMPRESSED, CompressedForm
from moe2edge.storage.patterns import compile_pattern
from moe2edge.storage.safetensors_files import read_header, read_tensor
from moe2edge.storage.source_formats.aliases import NUMBERED, list_aliases, name_on_hub
from moe2edge.storage.source_formats.recognition import read_method
from moe2edge.storage.source_formats.stored_tensors import StoredTensors

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

Header = tuple[tuple[int, ...], str]
# The group of each input, which auto-round does not write.
ORDER_PART = "g_idx"
GPTQ_PARTS = ("qweight", "qzeros", "scales", ORDER_PART)
GPTQ_BITS = (2, 4, 8)
GPTQ_GROUPS = (*GROUP_SIZES, WHOLE_ROW)
# Settings that a GPTQ checkpoint must have: with any other its numbers would be misread.
GPTQ_V1 = {"quant_method": "gptq", "lm_head": False, "pack_dtype": "int32"}
# The same numbers, by the config of another library; zero points are stored minus one as well.
AUTO_ROUND, AUTO_ROUND_PACKING = "auto-round", "auto_round:auto_gptq"
GPTQ_SCHEME = ("bits", "group_size", "sym", "desc_act")


def open_stored_model(checkpoint: Checkpoint) -> Model:
    """Open the model in an output folder, quantized or not, from headers only.

    Raises:
        Unsupported: a quantization that moe2edge does not write, or an unknown family.
        VerificationFailed: a tensor is missing, unexpected or of another shape.
    """
    config = dict(checkpoint.config)
    quantization = config.pop("quantization_config", None)
    settings = None if quantization is None else _read_settings(checkpoint, quantization)
    stored = _StoredTensors(checkpoint, settings)
    model = build_stored_model(config, stored.weight, stored.names)
    stored.check(model)
    model.verify()
    # Integers say nothing of the dtype that they were rounded from; it is that of the embedding.
    dtype = model.embedding.dtype
    return change_weights(model, lambda _, w: replace(w, dtype=dtype) if w.scheme else None)


def build_stored_model(
    config: Mapping[str, Any], take: TakeTensor, names: Iterable[str] = ()
) -> Model:
    """Build the model of a config that moe2edge wrote, whose layers may differ.

    Arguments and errors are those of `build_model`.
    """
    common, layers = copy.deepcopy(dict(config)), {}
    if has_own_layers(common):
        # Some classes of transformers take a config without the key for an old one.
        part = hf_config.find_text_part(common)
        layers, part["per_layer_config"] = part["per_layer_config"], {}
        if str(common.get("model_type")) not in FAMILIES:
            part["per_layer_config"], layers = hf_config.split_layers(layers)
    family = find_family(common)
    if family.generic:
        hf_config.restore_common_count(common, family, layers)
    return hf_config.decode_layers(build_model(family, common, take, names), layers, take)


def _read_settings(
    checkpoint: Checkpoint, quantization: Mapping[str, Any]
) -> GptqSettings | CompressedForm:
    """Read a ``quantization_config``.

    Raises:
        Unsupported: moe2edge does not write it.
    """
    if (method := read_method(quantization)) == "mlx":
        raise Unsupported(
            f"{checkpoint.source} is a folder for mlx-lm; run it with mlx-lm, or with moe2edge "
            "generate"
        )
    if method == AUTO_ROUND:
        return read_auto_round_settings(quantization)
    if method == COMPRESSED:
        return CompressedForm.make(StoredTensors(checkpoint.files), quantization)
    return read_gptq_settings(quantization)


# ---- quantization settings -----------------------------------------------------------------------


@dataclass(frozen=True)
class GptqSettings:
    """Schemes of the matrices of a GPTQ checkpoint.

    Attributes:
        main: scheme of every matrix that no pattern matches.
        dynamic: patterns for the start of a module's name, each with the scheme of what it
            matches, None for matrices that are not quantized; the first match counts.
        by_class: whether parts of experts have the names of transformers' classes, and matrices
            no tensor for the order of inputs.
    """

    main: Scheme
    dynamic: tuple[tuple[Any, Scheme | None], ...] = ()
    by_class: bool = False

    def find_scheme(self, module: str) -> Scheme | None:
        """Return the scheme of a module's matrix, by its name on disk without ``.weight``."""
        return self.find_override(module, self.main)

    def find_override(self, module: str, usual: Scheme | None = None) -> Scheme | None:
        """Return the scheme that a pattern gives to a module's matrix, else ``usual``."""
        names = tuple(list_aliases(module)) if self.by_class else (module,)
        matching = (s for pattern, s in self.dynamic if any(map(pattern.match, names)))
        return next(matching, usual)

    def plan(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Header]:
        """Return shape and dtype of each tensor that a matrix has to be stored in, by name."""
        parts = plan_gptq_tensors(shape, scheme)
        if self.by_class:
            del parts[ORDER_PART]
        return {f"{module}.{part}": header for part, header in parts.items()}


def read_gptq_settings(settings: Mapping[str, Any]) -> GptqSettings:
    """Parse a ``quantization_config``.

    Raises:
        Unsupported: it is not GPTQ version 1 as `moe2edge.targets.gptq` writes it.
    """
    found = {"quant_method": settings.get("quant_method")}
    found |= {"lm_head": bool(settings.get("lm_head"))}
    found |= {"pack_dtype": settings.get("pack_dtype", "int32")}
    layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
    main = _parse_scheme({key: settings.get(key) for key in GPTQ_SCHEME})
    if found != GPTQ_V1 or layout != "gptq" or main is None:
        shown = {**found, **{key: settings.get(key) for key in GPTQ_SCHEME}}
        raise Unsupported(
            f"quantization {shown}, format {layout!r} is not supported; only {_LOADABLE}"
        )
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise Unsupported(f"dynamic is {dynamic!r}; only patterns with settings can be loaded")
    return GptqSettings(
        main, tuple(_parse_override(key, override, main) for key, override in dynamic.items())
    )


def read_auto_round_settings(settings: Mapping[str, Any]) -> GptqSettings:
    """Parse a ``quantization_config`` of auto-round.

    Raises:
        Unsupported: it is not as `moe2edge.targets.gptq` writes it.
    """
    packing, extra = settings.get("packing_format"), settings.get("extra_config") or {}
    main = _parse_scheme({"desc_act": False, **settings})
    if packing != AUTO_ROUND_PACKING or main is None or not isinstance(extra, Mapping):
        raise Unsupported(
            f"quantization by auto-round with packing_format {packing!r} is not supported; only "
            f"{AUTO_ROUND_PACKING!r} in bits and groups as of 'gptq' can be loaded"
        )
    found = []
    for key, own in extra.items():
        # A pattern has a backslash before each point; all other keys are names.
        pattern = key if "\\" in key else f"{re.escape(key)}$"
        unquantized = isinstance(own, Mapping) and own.get("bits") == 16
        found.append(_parse_override(f"{'-' if unquantized else '+'}:{pattern}", own, main))
    return GptqSettings(main, tuple(found), by_class=True)


_LOADABLE = (
    f"{GPTQ_V1}, bits {', '.join(map(str, GPTQ_BITS))}, group_size "
    f"{', '.join(map(str, GPTQ_GROUPS))}, sym and desc_act true or false, format 'gptq' can be "
    "loaded"
)


def _parse_scheme(settings: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme of bits, group size and symmetry; None if it cannot be loaded."""
    bits, group, symmetric, ordered = (settings[key] for key in GPTQ_SCHEME)
    if bits not in GPTQ_BITS or group not in GPTQ_GROUPS or not isinstance(symmetric, bool):
        return None
    if not isinstance(ordered, bool):
        return None
    return Scheme(bits, group, symmetric, ordered)


def _parse_override(key: str, settings: Any, main: Scheme) -> tuple[Any, Scheme | None]:
    """Parse an entry of ``dynamic``: ``-:pattern`` is not quantized, any other has a scheme.

    Raises:
        Unsupported: it has an unknown setting, or its key is not a pattern.
    """
    try:
        pattern = compile_pattern(key.removeprefix("-:").removeprefix("+:"))
    except ValueError as error:
        raise Unsupported(f"dynamic {key!r}: {error}; only patterns can be loaded") from error
    if key.startswith("-:"):
        return pattern, None
    scheme = None
    if isinstance(settings, Mapping) and set(settings) <= set(GPTQ_SCHEME):
        usual = {"bits": main.bits, "group_size": main.group_size, "sym": main.symmetric}
        usual["desc_act"] = main.ordered
        scheme = _parse_scheme({**usual, **settings})
    if scheme is None:
        raise Unsupported(f"dynamic {key!r}: {settings!r}; only {_LOADABLE}")
    return pattern, scheme


# ---- tensors -------------------------------------------------------------------------------------


class _StoredTensors:
    """Tensors of an output folder."""

    def __init__(
        self, checkpoint: Checkpoint, settings: GptqSettings | CompressedForm | None
    ) -> None:
        self._source = checkpoint.source
        self._settings = settings
        self._files = checkpoint.files
        # Names on disk, by those that the family has on the hub.
        self._disk = dict(zip(self._files, self._files, strict=True))
        if self._by_class and checkpoint.config.get("model_type") in NUMBERED:
            self._disk = {name_on_hub(name): name for name in self._files}
        self._headers: dict[str, Header] = {
            name: read_header(self._files[held], held) for name, held in self._disk.items()
        }

    @property
    def _by_class(self) -> bool:
        return isinstance(self._settings, GptqSettings) and self._settings.by_class

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._headers

    def weight(self, name: str, shape: tuple[int, ...] | None) -> Weight:
        """Make a handle on a tensor that a model of this config has; `check` finds missing ones."""
        if shape is None:
            shape = self._headers.get(name, ((), ""))[0]
        if isinstance(self._settings, CompressedForm):
            if (found := self._settings.take(name, shape)) is not None:
                return found
            return self._make_plain(name, shape)
        scheme = self._find_scheme(name)
        if f"{_get_stem(name)}.qweight" in self._headers and scheme is not None:
            return Weight(
                name,
                shape,
                "F32",
                load=lambda: self._read_quantized(name, scheme).dequantize(),
                scheme=scheme,
                load_quantized=lambda: self._read_quantized(name, scheme),
            )
        return self._make_plain(name, shape)

    def _make_plain(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Make a handle on a tensor that is stored as it is."""
        dtype = self._headers.get(name, ((), "F32"))[1]
        return Weight(name, shape, dtype, load=lambda: self._read(name))

    def _find_scheme(self, name: str) -> Scheme | None:
        """Return the scheme of a matrix by its name on disk."""
        return None if self._settings is None else self._settings.find_scheme(_get_stem(name))

    def _read(self, name: str) -> Tensor:
        held = self._disk[name]
        return read_tensor(self._files[held], held)

    def _read_quantized(self, name: str, scheme: Scheme) -> Quantized:
        """Read integers and scales of a matrix.

        Raises:
            VerificationFailed: zero points, input order or scales are not as moe2edge writes them.
        """
        import torch

        from moe2edge.numerics.grid import Quantized
        from moe2edge.numerics.packing import unpack_gptq

        held = GPTQ_PARTS[:-1] if self._by_class else GPTQ_PARTS
        parts = {part: self._read(f"{_get_stem(name)}.{part}") for part in held}
        q, scales, zeros = unpack_gptq(parts, scheme.bits)
        # Stored minus one; 0, which only sources have, as the largest integer.
        low, high = (scheme.zero_point,) * 2 if scheme.symmetric else (0, scheme.largest)
        if ((zeros < low) | (zeros > high)).any():
            expected = f"{low} throughout" if scheme.symmetric else f"{low} to {high}"
            raise VerificationFailed(
                f"{_get_stem(name)}.qzeros holds zero points from {int(zeros.min())} to "
                f"{int(zeros.max())}, expected {expected}; the file was changed, export it again"
            )
        width = scheme.width(q.shape[1])
        order, found = torch.arange(q.shape[1], dtype=torch.int32) // width, parts.get(ORDER_PART)
        found = order if found is None else found
        if scheme.ordered and ((found < 0) | (found >= scheme.groups(q.shape[1]))).any():
            raise VerificationFailed(
                f"{_get_stem(name)}.g_idx names groups that do not exist; the file was changed, "
                "export it again"
            )
        if not scheme.ordered and not torch.equal(found, order):
            raise VerificationFailed(
                f"{_get_stem(name)}.g_idx reorders the inputs, expected input // {width}; the file "
                "was changed, export it again"
            )
        if not scales.isfinite().all():
            raise VerificationFailed(
                f"{_get_stem(name)}.scales are not finite; the file was changed, export it again"
            )
        kept = found if scheme.ordered else None
        return Quantized(q, scales, scheme, None if scheme.symmetric else zeros, kept)

    def _list_expected(self, model: Model) -> Iterator[tuple[str, str, Weight]]:
        """Yield the tensors as they have to be stored, with roles where there are integers."""
        if self._settings is not None:
            return list_stored_integers(model)
        return ((name, "", weight) for name, weight in list_stored(model))

    def check(self, model: Model) -> None:
        """Compare the headers with the tensors that ``model`` must have.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        expected: dict[str, Header] = {}
        plain: set[str] = set()
        for name, role, weight in self._list_expected(model):
            scheme = None
            if self._settings is not None and is_quantizable(role):
                scheme = self._settings.find_scheme(_get_stem(name))
            elif self._settings is not None and is_low_rank(role):
                scheme = self._settings.find_override(_get_stem(name))
            if scheme is None:
                expected[name] = (weight.shape, weight.dtype)
                plain |= set() if name in model.carried else {name}
            else:
                assert self._settings is not None
                expected |= self._settings.plan(_get_stem(name), weight.shape, scheme)
        for problem, names in (
            ("lacks", expected.keys() - self._headers.keys()),
            ("has unexpected", self._headers.keys() - expected.keys()),
        ):
            if names:
                raise VerificationFailed(
                    f"{self._source} {problem} {len(names)} tensors, such as {min(names)}; the "
                    f"folder does not hold the {len(model.blocks)} blocks of its config.json: "
                    "export it again"
                )
        for name, header in expected.items():
            if self._headers[name] != header or header[1] not in BYTES:
                raise VerificationFailed(
                    f"{name} has shape and dtype {self._headers[name]}, but config.json asks for "
                    f"{header}; export it again"
                )
            if name in plain and header[1] not in DTYPE_BYTES:
                raise VerificationFailed(
                    f"{name} in {self._source} is {header[1]}; export it again"
                )


def _get_stem(name: str) -> str:
    """Return the name of a module without ``.weight``."""
    return name.removesuffix(".weight")


def plan_gptq_tensors(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Header]:
    """Return shape and dtype of each tensor of a matrix [out, in] in GPTQ version 1."""
    (outs, ins), per_word = shape, 32 // scheme.bits
    groups = scheme.groups(ins)
    headers: tuple[Header, ...] = (
        ((ins // per_word, outs), "I32"),
        ((groups, outs // per_word), "I32"),
        ((groups, outs), "F16"),
        ((ins,), "I32"),
    )
    return dict(zip(GPTQ_PARTS, headers, strict=True))
