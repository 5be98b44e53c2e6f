"""Tensors and settings of an MLX folder: integers of all experts in one tensor, written and read.

A weight is ``scale * q + bias``. For symmetric integers the bias is the scale times a power of two,
so that it is as exact as the scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from moe2edge.errors import VerificationFailed
from moe2edge.model.build import build_model
from moe2edge.model.family import find_family
from moe2edge.model.hf_config import build_transformers_config, build_transformers_dict
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import DTYPES, Weight
from moe2edge.numerics.scheme import BITS, Scheme
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.safetensors_files import PlannedTensor
from moe2edge.storage.source_formats.stored_tensors import StoredTensors
from moe2edge.targets._mlx_rows import ROWS, MlxPlace, MlxRow

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

WORD = 32
# Keys of the settings, of which mlx-lm reads the first, and writes both.
MLX_KEYS = ("quantization", "quantization_config")
SETTINGS = ("group_size", "bits")


# ---- settings ------------------------------------------------------------------------------------


def build_mlx_config(model: Model) -> dict[str, Any]:
    """Build ``config.json``: all settings with the names that mlx-lm reads, and the schemes.

    transformers leaves out what is as usual, and has one place for all of the rotary embedding.
    """
    whole = build_transformers_config(model)
    config = add_older_spellings({**whole.to_dict(), **build_transformers_dict(model)})
    aliases = ((alias, name) for alias, name in whole.attribute_map.items() if name in config)
    config = {alias: config[name] for alias, name in aliases} | config
    if config.get("head_dim") is None and config.get("num_attention_heads"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim"):
        part = config["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1
        config.setdefault("rotary_dim", int(config["head_dim"] * part))
    config = {**get_row(model).filled, **config}
    config["dtype"] = DTYPES[model.embedding.dtype]
    if settings := _build_settings(model):
        config |= dict.fromkeys(MLX_KEYS, settings)
    return config


def _build_settings(model: Model) -> dict[str, Any]:
    """Build ``quantization``: the scheme of most modules, and those of others; false: none."""
    schemes: dict[str, Scheme | None] = {}
    for name, _, weight in model.tensors():
        place = get_row(model).place(name)
        if place.kind == "weight" and len(weight.shape) > 1:
            schemes[place.module] = weight.scheme
    counts = Counter(scheme for scheme in schemes.values() if scheme is not None)
    if not counts:
        return {}
    main = counts.most_common(1)[0][0]
    others = {module: scheme for module, scheme in schemes.items() if scheme != main}
    return {**_encode(main), "mode": "affine"} | {
        module: False if scheme is None else _encode(scheme) for module, scheme in others.items()
    }


def _encode(scheme: Scheme) -> dict[str, int]:
    return {"group_size": scheme.group_size, "bits": scheme.bits}


def get_row(model: Model) -> MlxRow:
    """Return the row of a model's family."""
    return ROWS[model.family.model_type]


# ---- writing -------------------------------------------------------------------------------------


def plan_mlx_tensors(model: Model) -> list[PlannedTensor]:
    """Plan all tensors of the folder; those of the experts of a layer are packed once together."""
    row, dtype = get_row(model), model.embedding.dtype
    found: dict[MlxPlace, list[Weight]] = {}
    for name, _, weight in model.tensors():
        place = row.place(name)
        found.setdefault(replace(place, expert=None if place.expert is None else 0), []).append(
            weight
        )

    @lru_cache(maxsize=1)
    def packed(place: MlxPlace) -> dict[str, Tensor]:
        return _pack(place, found[place], dtype)

    def part_of(place: MlxPlace, part: str) -> Callable[[], Tensor]:
        return lambda: packed(place)[part]

    planned = []
    for place, weights in found.items():
        for part, (shape, kind) in _plan_parts(place, weights[0], len(weights), dtype).items():
            name = f"{place.module}.{part}" if place.kind else place.module
            planned.append(PlannedTensor(name, shape, kind, part_of(place, part)))
    return planned


def _plan_parts(
    place: MlxPlace, weight: Weight, count: int, dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each tensor in which ``count`` weights are stored, by its kind."""
    stack = () if place.expert is None else (count,)
    if weight.scheme is None:
        return {place.kind: ((*stack, *weight.shape), weight.dtype)}
    outs, ins = weight.shape
    groups = (*stack, outs, weight.scheme.groups(ins))
    words = ins * weight.scheme.bits // WORD
    return {
        "weight": ((*stack, outs, words), "U32"),
        "scales": (groups, dtype),
        "biases": (groups, dtype),
    }


def _pack(place: MlxPlace, weights: list[Weight], dtype: str) -> dict[str, Tensor]:
    """Pack the weights of one place; of experts, one by one.

    Raises:
        VerificationFailed: a scale is not exact in the dtype of the model.
    """
    import torch

    parts: dict[str, list[Tensor]] = {}
    for weight in weights:
        if weight.scheme is None:
            parts.setdefault(place.kind, []).append(weight.load())
        else:
            for part, tensor in _pack_one(weight, dtype).items():
                parts.setdefault(part, []).append(tensor)
    if place.expert is None:
        return {part: tensors[0] for part, tensors in parts.items()}
    return {part: torch.stack(tensors) for part, tensors in parts.items()}


def _pack_one(weight: Weight, dtype: str) -> dict[str, Tensor]:
    import torch

    from moe2edge.numerics.packing import pack_words

    numbers = weight.quantized()
    middle = -numbers.scheme.zero_point * numbers.scales
    cast = {"scales": numbers.scales, "biases": middle}
    narrow = {part: exact.to(getattr(torch, DTYPES[dtype])) for part, exact in cast.items()}
    for part, exact in cast.items():
        if not torch.equal(narrow[part].float(), exact):
            raise VerificationFailed(
                f"{weight.name} has {part} that {DTYPES[dtype]} cannot represent exactly, and an "
                "MLX folder has one dtype; quantize it anew in the recipe, or export to gptq"
            )
    return {"weight": pack_words(numbers.q, numbers.scheme.bits).view(torch.uint32), **narrow}


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlxFolder:
    """The tensors of a folder, by the names that they have in files of the source.

    Attributes:
        checkpoint: the folder.
    """

    checkpoint: Checkpoint

    @cached_property
    def model(self) -> Model:
        """The model of the folder, from headers only.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        config = {k: v for k, v in self.checkpoint.config.items() if k not in MLX_KEYS}
        family = find_family(config)
        model = build_model(family, config, self._take, list(self._list_names()))
        self._check(model)
        model.verify()
        return model

    @cached_property
    def tensors(self) -> StoredTensors:
        """Headers of all tensors."""
        return StoredTensors(self.checkpoint.files)

    @cached_property
    def row(self) -> MlxRow:
        """Row of the family.

        Raises:
            VerificationFailed: there is none.
        """
        kind = str(self.checkpoint.config.get("model_type"))
        if kind not in ROWS:
            raise VerificationFailed(
                f"{self.checkpoint.source} is a folder of {kind}, which target mlx does not write; "
                "export it again"
            )
        return ROWS[kind]

    def _list_names(self) -> Iterator[str]:
        """Yield the names of all tensors in files of the source."""
        for name, tensor in self.tensors.items():
            if not name.endswith((".scales", ".biases")):
                yield from self.row.list_names(name, tensor.shape[0] if tensor.shape else 1)

    def _find_scheme(self, module: str) -> Scheme | None:
        """Return the scheme of a module.

        Raises:
            VerificationFailed: the settings are not as `build_mlx_config` writes them.
        """
        settings = self.checkpoint.config.get(MLX_KEYS[0])
        if settings is None or f"{module}.scales" not in self.tensors:
            return None
        own = settings.get(module, settings) if isinstance(settings, Mapping) else None
        bits, group = (
            own.get(key) if isinstance(own, Mapping) else None for key in ("bits", "group_size")
        )
        if bits not in BITS or type(group) is not int or group <= 0:
            raise VerificationFailed(
                f"quantization in config.json gives {module} {own!r:.200}, which target mlx does "
                "not write; export it again"
            )
        return Scheme(int(bits), group)

    def _take(self, name: str, shape: tuple[int, ...] | None) -> Weight:
        """Make a handle on a tensor; `_check` finds missing ones."""
        place = self.row.place(name)
        stored = self.tensors.get(place.name)
        if shape is None:
            shape = stored.shape[place.expert is not None :] if stored is not None else ()
        scheme = self._find_scheme(place.module) if place.kind == "weight" else None
        if scheme is None:
            dtype = stored.dtype if stored is not None else "F32"
            return Weight(name, shape, dtype, load=lambda: self._read(place, place.kind))
        return Weight(
            name,
            shape,
            self.tensors[f"{place.module}.scales"].dtype,
            load=lambda: self._read_quantized(place, scheme).dequantize(),
            scheme=scheme,
            load_quantized=lambda: self._read_quantized(place, scheme),
        )

    def _read(self, place: MlxPlace, part: str) -> Tensor:
        """Read a tensor of a module, or that of one expert."""
        stored = self.tensors[f"{place.module}.{part}" if part else place.module]
        return stored.read() if place.expert is None else stored.read_slice(place.expert)

    def _read_quantized(self, place: MlxPlace, scheme: Scheme) -> Quantized:
        """Read integers and scales of a matrix.

        Raises:
            VerificationFailed: biases are not those of symmetric integers.
        """
        import torch

        from moe2edge.numerics.decoding import unpack_words
        from moe2edge.numerics.grid import Quantized

        words, scales, biases = (self._read(place, p) for p in ("weight", "scales", "biases"))
        scales, ins = scales.float(), scales.shape[1] * scheme.group_size
        if not scales.isfinite().all():
            raise VerificationFailed(f"{place.module}.scales are not finite; export it again")
        if not torch.equal(biases.float(), -scheme.zero_point * scales):
            raise VerificationFailed(
                f"{place.module}.biases are not -{scheme.zero_point} times the scales; the file "
                "was changed, export it again"
            )
        return Quantized(unpack_words(words.view(torch.int32), scheme.bits, ins), scales, scheme)

    def _check(self, model: Model) -> None:
        """Compare the headers with the tensors that ``model`` must have.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        expected: dict[str, tuple[tuple[int, ...], str]] = {}
        counts = Counter(self.row.place(name).name for name, _, _ in model.tensors())
        for name, _, weight in model.tensors():
            place = self.row.place(name)
            parts = _plan_parts(place, weight, counts[place.name], model.embedding.dtype)
            for part, header in parts.items():
                expected[f"{place.module}.{part}" if part else place.module] = header
        for problem, names in (
            ("lacks", expected.keys() - set(self.tensors)),
            ("has unexpected", set(self.tensors) - expected.keys()),
        ):
            if names:
                raise VerificationFailed(
                    f"{self.checkpoint.source} {problem} {len(names)} tensors, such as "
                    f"{min(names)}; export it again"
                )
        for name, header in expected.items():
            found = (self.tensors[name].shape, self.tensors[name].dtype)
            if found != header:
                raise VerificationFailed(
                    f"{name} has shape and dtype {found}, but config.json asks for {header}; "
                    "export it again"
                )
