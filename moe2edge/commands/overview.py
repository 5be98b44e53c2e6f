"""An overview of a model: its structure, and what can be done with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.family import FIRST_CLASS
from moe2edge.model.outline import Outline, outline_config
from moe2edge.model.traits import find_missing
from moe2edge.model.transformers_config import ALIASES
from moe2edge.pipeline import registry
from moe2edge.storage.safetensors_files import open_file
from moe2edge.storage.source_formats.recognition import (
    choose_reader,
    drop_settings,
    find_settings,
    read_method,
)
from moe2edge.storage.weight_files import has_weights

if TYPE_CHECKING:
    from moe2edge.model.model import Model
    from moe2edge.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Overview:
    """A model, and what can be done with it.

    Attributes:
        outline: what ``config.json`` says of it.
        model: the model, where its weights are there and can be read.
        nbytes: bytes of all tensors; None: there are none.
        quantization: name of the format of quantized tensors; None: they are not quantized.
        passes, targets: those that work on the family; none: see ``outline.reason``.
        notes: lines on what was read, or not read.
    """

    outline: Outline
    model: Model | None
    nbytes: int | None
    quantization: str | None
    passes: tuple[str, ...]
    targets: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_first_class(self) -> bool:
        """True if tests try every pass on its family, in the forms in which its models exist."""
        family = self.outline.family
        return family is not None and (not family.generic or family.model_type in FIRST_CLASS)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; null is what is not known."""
        seen = self.outline
        return {
            "family": seen.text_type,
            "model_type": seen.model_type,
            "architecture": seen.architecture,
            "blocks": seen.blocks,
            "expert_counts": list(seen.experts),
            "top_k": list(seen.top_k),
            "parameters": seen.parameters,
            "active_parameters": seen.active_parameters,
            "bytes": self.nbytes,
            "quantization": self.quantization,
            "first_class": self.is_first_class,
            "passes": list(self.passes),
            "targets": list(self.targets),
            "reason": seen.reason or None,
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Yield it as lines of text."""
        if self.model is not None:
            yield str(self.model)
        else:
            yield from _describe(self.outline)
        if self.quantization is not None:
            yield f"quantized: {self.quantization}"
        yield from (f"note: {note}" for note in self.notes)
        if self.outline.reason:
            yield f"nothing can be done with it: {self.outline.reason}"
            return
        if self.is_first_class:
            yield "family: first-class; tests try every pass on it"
        yield f"passes: {', '.join(self.passes)}"
        yield f"targets: {', '.join(self.targets)}"


def make_overview(checkpoint: Checkpoint) -> Overview:
    """Look at the config and the headers of a checkpoint, whatever model it is of.

    Raises:
        InputError: the config or the weights cannot be read, or contradict each other.
    """
    seen, notes = outline_config(drop_settings(checkpoint.config)), list[str]()
    model, nbytes = None, None
    settings = find_settings(checkpoint.config)
    quantization = None
    try:
        if settings is not None:
            quantization = read_method(settings)
            choose_reader(quantization, settings)
        if has_weights(checkpoint.folder):
            files = checkpoint.files
            nbytes = sum(open_file(path)[name].nbytes for name, path in files.items())
            model = None if seen.reason else checkpoint.model
    except Unsupported as error:
        seen = replace(seen, reason=seen.reason or str(error), family=None)
    if model is not None:
        form = checkpoint.source_format
        quantization = None if form is None else form.name
        seen = _take_numbers(seen, model)
        notes += checkpoint.notes
    elif nbytes is None:
        notes.append(f"only config.json was read: {_explain_missing(checkpoint)}")
    elif quantization is None:
        entries = (open_file(path)[name] for name, path in checkpoint.files.items())
        seen = replace(seen, parameters=sum(prod(entry.shape) for entry in entries))
    passes, targets = _list_usable(seen)
    return Overview(seen, model, nbytes, quantization, passes, targets, tuple(notes))


def _take_numbers(seen: Outline, model: Model) -> Outline:
    """Return an outline with the numbers of the model that is stored."""
    return replace(
        seen,
        blocks=len(model.blocks),
        experts=model.expert_counts,
        top_k=tuple(layer.router.top_k for _, layer in model.moe_blocks),
        parameters=model.parameters,
        active_parameters=model.active_parameters,
    )


def _explain_missing(checkpoint: Checkpoint) -> str:
    """Say why no weights were read."""
    try:
        _ = checkpoint.weights
    except (InputError, Unsupported) as error:
        return str(error)
    return "the weights are of no use without a reader"


def _list_usable(seen: Outline) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the passes and of the targets that work on a model."""
    family, source = seen.family, seen.source
    if family is None or source is None:
        return (), ()
    targets = [registry.find_target(name) for name in registry.list_targets()]
    return (
        tuple(
            name
            for name in registry.list_passes()
            if find_missing(family, source, registry.find_pass(name).needs) is None
        ),
        tuple(target.name for target in targets if target.supports(family)),
    )


def _describe(seen: Outline) -> Iterator[str]:
    """Yield lines on a model of which only the config is known, or that nothing reads."""
    name = seen.text_type
    if seen.model_type in ALIASES:
        name += f", named {seen.model_type}"
    elif seen.model_type != seen.text_type:
        name += f", a part of {seen.model_type}"
    parts = [f"{seen.architecture} ({name})" if seen.architecture else name]
    if seen.blocks is not None:
        parts.append(f"{seen.blocks} blocks")
    if seen.parameters is not None:
        parts.append(f"{seen.parameters:,} parameters")
    if seen.active_parameters is not None:
        parts.append(f"{seen.active_parameters:,} active")
    yield ", ".join(parts)
    if seen.experts:
        pairs = Counter(zip_longest(seen.experts, seen.top_k))
        for (count, top_k), layers in pairs.items():
            chosen = "" if top_k is None else f", top-{top_k}"
            where = f" in {layers} blocks" if seen.top_k else ""
            yield f"{count} experts{chosen}{where}"
