"""An outline of a model from ``config.json`` alone, of any model type.

Of a family that is supported, transformers' own model is looked at; of another one its settings,
and the reason why nothing can be done with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from moe2edge.errors import Moe2EdgeError, Unsupported
from moe2edge.model.anatomy import Anatomy
from moe2edge.model.architecture import Architecture, find_architecture
from moe2edge.model.config_parser import parse_config
from moe2edge.model.family import Family, find_counts, find_family, read_settings
from moe2edge.model.transformers_config import read_text_config
from moe2edge.model.trial_run import try_config

# Names of the number of layers where transformers has no common one for a family.
LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """A model as its config describes it; None and nothing is what it does not say.

    Attributes:
        model_type: value of ``model_type``.
        text_type: that of the text model, which may be a part of it.
        architecture: class of transformers.
        blocks: number of layers.
        experts: number of experts of each layer that has some, or the only number that is known.
        top_k: number of experts that a token chooses, of each of these layers.
        parameters: number of parameters of the text model.
        active_parameters: those of which a token makes use.
        family: the row of the family, where it is supported.
        source: transformers' model of it, where the family is supported.
        reason: why nothing can be done with it; empty where something can.
    """

    model_type: str
    text_type: str
    architecture: str | None
    blocks: int | None
    experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    parameters: int | None = None
    active_parameters: int | None = None
    family: Family | None = None
    source: Architecture | None = None
    reason: str = ""


def outline_config(given: Mapping[str, Any]) -> Outline:
    """Outline the model of a ``config.json``.

    Raises:
        InputError: it names no model type, or transformers refuses it.
    """
    try:
        family = find_family(given)
        settings = parse_config(family, given)
        architecture = find_architecture(family, settings)
        anatomy = architecture.anatomy
        if family.generic:
            try_config(architecture)
    except Unsupported as error:
        return _sketch(given, str(error))
    layers = [layer for layer in anatomy if layer.experts is not None]
    places = [n for n, layer in enumerate(anatomy) if layer.experts is not None]
    top_k = [architecture.get_top_k(n) for n in places]
    # A tied head is there once; what routers keep beside their parameters is stored, too.
    tensors = {id(t): t.numel() for t in architecture.model.state_dict(keep_vars=True).values()}
    parameters = sum(tensors.values())
    unused = sum(map(_count_unused, layers, top_k))
    reason = "" if layers else f"no layer of this {family.model_type} has experts; it is dense"
    return Outline(
        str(given["model_type"]),
        family.model_type,
        family.architecture,
        len(anatomy),
        tuple(layer.count for layer in layers),
        tuple(top_k),
        parameters,
        parameters - unused,
        family if layers else None,
        architecture,
        reason,
    )


def _count_unused(layer: Anatomy, top_k: int) -> int:
    """Count the parameters of experts that a token does not choose."""
    inside = f"{layer.experts}."
    sizes = (prod(shape) for path, shape in layer.shapes.items() if path.startswith(inside))
    return sum(sizes) // layer.count * max(layer.count - top_k, 0)


# ---- other models --------------------------------------------------------------------------------


def _sketch(given: Mapping[str, Any], reason: str) -> Outline:
    """Outline a model with which nothing can be done."""
    kind = str(given["model_type"])
    text, settings = kind, given
    blocks = None
    try:
        config = read_text_config(given)
        text, settings = str(config.model_type), read_settings(config)
        blocks = getattr(config, "num_hidden_layers", None)
    except (Moe2EdgeError, RuntimeError):  # a type that transformers does not know, as often
        inner = given.get("text_config")
        settings = inner if isinstance(inner, Mapping) else given
    if type(blocks) is not int:
        numbers = (settings.get(key) for key in LAYER_KEYS)
        blocks = next((number for number in numbers if type(number) is int), None)
    named = given.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    _, counts = find_counts(settings) or ("", None)
    experts = counts if isinstance(counts, list) else [counts]
    return Outline(
        kind,
        text,
        architecture if isinstance(architecture, str) else None,
        blocks,
        tuple(number for number in experts if type(number) is int),
        reason=reason,
    )
