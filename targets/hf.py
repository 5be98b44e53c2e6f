"""Plain safetensors in the source's dtypes; in layout ``uniform`` for stock transformers.

Quantized weights can be written dequantized. They then take as many bytes as if nothing was
quantized, and every program reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from moe2edge.errors import Unsupported
from moe2edge.model import hf_config
from moe2edge.model.edits import change_weights
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.stored_layout import list_stored
from moe2edge.model.weights import DTYPES, dequantize_weight
from moe2edge.pipeline.holders import name_holders
from moe2edge.pipeline.target import Loader, LoaderRule
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import has_own_layers, open_checkpoint
from moe2edge.storage.safetensors_files import (
    PlannedTensor,
    write_checkpoint,
)
from moe2edge.storage.text_files import write_json
from moe2edge.targets import _layouts
from moe2edge.targets._layout_checkpoint import LayoutCheckpoint
from moe2edge.targets._layouts import Layout
from moe2edge.targets._loaders import judge_loaders, list_rules
from moe2edge.targets._tensors import estimate_file_bytes, plan_plain


@dataclass(frozen=True)
class Hf(LayoutCheckpoint):
    """A checkpoint in the source's format, with fewer experts or blocks.

    Attributes:
        layout: how layers that differ are stored: ``uniform`` and ``mlp-only`` are for stock
            transformers and programs that read its folders, ``natural`` is for ``moe2edge.load``.
        dequantize: write quantized weights dequantized, rounded to the source's dtype.
    """

    summary: ClassVar[str] = "plain safetensors that stock transformers loads, unquantized"
    runtime_nbytes: ClassVar[int] = 500_000_000
    loads_by_transformers: ClassVar[bool] = True
    layout: Layout = "uniform"
    dequantize: bool = False

    def accepts(self, model: Model) -> None:
        """Refuse quantized weights unless `dequantize` is set, and layers that the layout lacks.

        The integers of a quantized source are dequantized without being asked for.

        Raises:
            Unsupported: names the targets and layouts that hold such a model.
        """
        self.stored(model)

    def stored(self, model: Model) -> Model:
        """Return the model as the layout holds it, with all weights dequantized.

        Raises:
            Unsupported: the layout cannot hold it, or it is quantized and `dequantize` is not set.
        """
        quantized = [w for _, _, w in model.tensors() if w.scheme and not w.kept]
        if quantized and not self.dequantize:
            others = name_holders(model, "hf", "hf:dequantize=true")
            raise Unsupported(
                f"target hf holds unquantized weights only, but {quantized[0].name} is "
                f"{quantized[0].scheme}; export to {others}, which takes as many bytes as if "
                "nothing was quantized"
            )
        if (dtype := self.find_dtype(model)) == "float64":
            raise Unsupported(
                f"target hf would be run in {dtype}, as its config.json says, which the experts of "
                "transformers do not run in; convert the source to float32 (dtype=torch.float32 in "
                f"from_pretrained, then save_pretrained), or export to {name_holders(model, 'hf')}"
            )
        return _dequantize(_layouts.convert_layout(model, self.layout, "hf"))

    def find_dtype(self, model: Model) -> str:
        """Return the dtype in which transformers runs a folder, by its config or its weights."""
        return _find_dtype(model.config, model.embedding.dtype)

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and all parameters in memory in the dtype of the source."""
        held = self.stored(model)
        return Estimate(held.nbytes, estimate_file_bytes(_plan(held)))

    def count_mapped(self, model: Model) -> int:
        """Count the experts, of which transformers makes one tensor beside the map of the file."""
        stored = self.stored(model)
        if not stored.is_uniform:
            return 0
        return sum(w.nbytes for _, role, w in stored.tensors() if role.startswith("experts."))

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``config.json`` and the weights, one tensor in memory at a time.

        Raises:
            Unsupported: the layout cannot hold the model.
        """
        model = self.stored(model)
        config = add_older_spellings(hf_config.build_transformers_dict(model))
        written = {"config.json": write_json(folder / "config.json", config)}
        return written | write_checkpoint(folder, _plan(model))

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in transformers: in float32 if ``exact``, else as transformers would.

        A folder with a ``per_layer_config`` is opened by ``moe2edge.load`` instead.

        Raises:
            InputError: a file of the folder is missing or damaged.
            VerificationFailed: transformers cannot load it, or reports a tensor as missing,
                unexpected or of another shape.
        """
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime, open_source

        config = open_checkpoint(str(folder)).config
        dtype = (
            "float32" if exact else _read_dtype(config) or self.find_dtype(self.streamed(folder))
        )
        if has_own_layers(config):
            return TorchRuntime(load(folder, dtype=getattr(torch, dtype)))
        runtime = open_source(folder, dtype=dtype, strict=True)
        self.streamed(folder)  # sees also what transformers converts, or does not look at
        return runtime

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions."""
        return list_rules("hf")

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the folder."""
        stored = self.stored(model)
        if model.scheme is None:
            return judge_loaders("hf", model, stored)
        size = "dequantized: as large as if nothing was quantized"
        # Judged as if the model had been given in the form that is stored.
        loaders = judge_loaders("hf", stored, stored)
        return tuple(replace(loader, note=f"{loader.note}; {size}") for loader in loaders)


def _dequantize(model: Model) -> Model:
    """Return the model with its quantized weights dequantized, in the source's dtype."""
    rest = {n: dequantize_weight(w) for n, w in model.rest.items() if w.scheme}
    model = model.replace_rest(rest) if rest else model
    return change_weights(model, lambda _, w: dequantize_weight(w) if w.scheme else None)


def _plan(model: Model) -> list[PlannedTensor]:
    return [plan_plain(name, weight) for name, weight in list_stored(model)]


def _find_dtype(config: Mapping[str, Any], stored: str) -> str:
    """Return the dtype that transformers runs a folder in: that of its config, else the stored one.

    Args:
        config: content of ``config.json``.
        stored: dtype of the embedding, as safetensors spells it.
    """
    return _read_dtype(config) or DTYPES[stored]


def _read_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config names; None: none that weights can have."""
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named) if named in DTYPES.values() else None
