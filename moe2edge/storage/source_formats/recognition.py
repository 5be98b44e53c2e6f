"""The reader of a checkpoint: chosen by ``quantization_config``, and confirmed by the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.weights import DTYPES
from moe2edge.storage.source_formats.awq import AUTO_ROUND_AWQ, AwqSource
from moe2edge.storage.source_formats.compressed import CompressedSource
from moe2edge.storage.source_formats.fp8 import Fp8Source
from moe2edge.storage.source_formats.gptq import GptqSource
from moe2edge.storage.source_formats.modelopt import ModeloptSource
from moe2edge.storage.source_formats.mxfp4 import Mxfp4Source
from moe2edge.storage.source_formats.scaled import FLOATS
from moe2edge.storage.source_formats.source_format import SourceFormat
from moe2edge.storage.source_formats.stored_tensors import StoredTensor

KEYS = ("quantization_config", "compression_config")
# Configs inside of a config that may have the key.
INNER_CONFIGS = ("text_config", "llm_config", "language_config")
READERS: Mapping[str, type[SourceFormat]] = {
    "mxfp4": Mxfp4Source,
    "fp8": Fp8Source,
    "fbgemm_fp8": Fp8Source,
    "gptq": GptqSource,
    "awq": AwqSource,
    "compressed-tensors": CompressedSource,
    "modelopt": ModeloptSource,
}
AUTO_ROUND_COMPRESSED = "auto_round:llm_compressor"
# Ends of names that only tensors of a format have.
MARKS: Mapping[str, str] = {
    ".qweight": "gptq or awq",
    "_blocks": "mxfp4",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_scale_2": "modelopt",
}
MARKED: Mapping[type[SourceFormat], tuple[str, ...]] = {
    Mxfp4Source: ("mxfp4",),
    Fp8Source: ("fp8", "8-bit floats"),
    GptqSource: ("gptq or awq",),
    AwqSource: ("gptq or awq",),
    CompressedSource: ("compressed-tensors", "8-bit floats", "8-bit integers"),
    ModeloptSource: ("modelopt", "8-bit floats"),
}
DEQUANTIZE = "start from the checkpoint that it was made from"


def find_source_format(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> SourceFormat | None:
    """Find the reader of a checkpoint; None: it is not quantized.

    Args:
        config: content of ``config.json``.
        tensors: its tensors, of which only headers are read.

    Raises:
        InputError: config and tensors contradict each other.
        Unsupported: the format is not read.
    """
    settings = find_settings(config)
    found = set(_list_marks(tensors))
    if settings is None:
        if found:
            raise InputError(
                f"the tensors are quantized ({min(found)}), but config.json has no "
                "quantization_config; put it there, from the original config.json, or from the "
                "quantize_config.json or hf_quant_config.json beside it"
            )
        return None
    method = read_method(settings)
    kind = choose_reader(method, settings)
    if kind is CompressedSource and settings.get("format") == "dense" and not found:
        return None
    expected = MARKED[kind]
    if not found.intersection(expected):
        raise InputError(
            f"config.json says quant_method {method!r}, but the tensors are "
            f"{min(found) if found else 'not quantized'}; "
            + (
                "correct quantization_config in config.json"
                if found
                else "take quantization_config out of config.json"
            )
        )
    if others := {each for each in found if each not in expected and not each.startswith("8-bit")}:
        raise InputError(
            f"config.json says quant_method {method!r}, but some tensors are {min(others)}; the "
            "folder mixes two checkpoints: download it again"
        )
    return kind(tensors, settings, _find_dtype(config, tensors))


def find_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the settings of a quantized checkpoint, also where they are inside of ``text_config``.

    Raises:
        InputError: there are several that differ, or they are no settings.
    """
    found = [settings for settings in _list_settings(config) if settings]
    if not found:
        return None
    if not isinstance(found[0], Mapping) or any(other != found[0] for other in found[1:]):
        raise InputError(
            f"config.json has {len(found)} entries of {' and '.join(KEYS)} that differ or are no "
            "settings; leave the one of the original checkpoint"
        )
    return found[0]


def drop_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the settings of a quantized checkpoint, wherever they are."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    for inner in INNER_CONFIGS:
        if isinstance(plain.get(inner), Mapping):
            plain[inner] = {k: v for k, v in plain[inner].items() if k not in KEYS}
    return plain


def _list_settings(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield all values of the keys."""
    for place in (config, *(config.get(inner) for inner in INNER_CONFIGS)):
        if isinstance(place, Mapping):
            yield from (place.get(key) for key in KEYS)


def read_method(settings: Mapping[str, Any]) -> str:
    """Read the method; some tools name it only by other keys.

    Raises:
        InputError: it is not named.
    """
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method = settings.get("quant_method") or settings.get("method")
    if method is None and settings.get("config_groups"):
        method = "compressed-tensors"
    producer = settings.get("producer") or {}
    if method is None and isinstance(producer, Mapping) and producer.get("name") == "modelopt":
        method = "modelopt"
    # MLX writes these and none of the settings of GPTQ and AWQ.
    theirs = {"desc_act", "sym", "zero_point"}.intersection(settings)
    if method is None and {"bits", "group_size"} <= set(settings) and not theirs:
        return "mlx"
    if method is None:
        raise InputError(
            "quantization_config in config.json names no quant_method; put it there, as it is in "
            "the original checkpoint"
        )
    return str(method).lower()


def choose_reader(method: str, settings: Mapping[str, Any]) -> type[SourceFormat]:
    """Choose the reader of a method.

    Raises:
        Unsupported: there is none.
    """
    if method in READERS:
        return READERS[method]
    if method in ("auto-round", "intel/auto-round"):
        packing = settings.get("packing_format")
        if settings.get("rotation_config"):
            raise Unsupported(
                "quantization_config: auto-round with rotation_config rotates hidden states, which "
                f"is not read; {DEQUANTIZE}"
            )
        if packing == AUTO_ROUND_COMPRESSED:
            return CompressedSource
        return AwqSource if packing in AUTO_ROUND_AWQ else GptqSource
    if method.startswith("bitsandbytes"):
        raise Unsupported(
            "quantization_config: bitsandbytes is not read; dequantize it with transformers "
            f"(model.dequantize(), then save_pretrained), or {DEQUANTIZE}"
        )
    raise Unsupported(
        f"quantization_config: quant_method {method!r} is not read; read are "
        f"{', '.join(READERS)} and auto-round: {DEQUANTIZE}"
    )


def _list_marks(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield the formats that names and dtypes of tensors are marks of."""
    ends = tuple(MARKS)
    for name in tensors:
        if name.endswith(ends):
            yield next(MARKS[end] for end in ends if name.endswith(end))
        elif name.endswith((".weight", "_proj")):
            dtype = tensors[name].dtype
            if dtype in FLOATS:
                yield "8-bit floats"
            elif dtype == "I8":
                yield "8-bit integers"


def _find_dtype(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """Find the dtype of what is not quantized: that of the embedding, else that of the config."""
    for name in tensors:
        if name.endswith("embed_tokens.weight") and tensors[name].dtype in DTYPES:
            return tensors[name].dtype
    return find_config_dtype(config)


def find_config_dtype(config: Mapping[str, Any]) -> str:
    """Find the dtype that a config names, as safetensors spells it; BF16 if it names none."""
    inner = [config.get(key) for key in INNER_CONFIGS]
    for place in (config, *(each for each in inner if isinstance(each, Mapping))):
        named = place.get("dtype") or place.get("torch_dtype")
        for spelled, dtype in DTYPES.items():
            if named == dtype:
                return spelled
    return "BF16"
