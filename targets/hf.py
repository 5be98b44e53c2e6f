"""Plain safetensors, dtypes as in the source; in layout ``uniform`` for stock transformers.

Quantized numbers can be written as the numbers that they stand for, which takes as many bytes as
if nothing was quantized, and is read by everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model.layers import DTYPES, Weight, cast_to_stored
from moe2edge.model.model import Model
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.safetensors_files import Planned, read_all, read_header, write_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.targets import _layouts
from moe2edge.targets._layouts import Layout
from moe2edge.targets._tensors import estimate_file_bytes, has_dense_blocks, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Hf(Target):
    """A checkpoint of the source's own kind, with fewer experts or blocks.

    Attributes:
        layout: how layers that differ are held: ``uniform`` and ``mlp-only`` are for stock
            transformers and what reads its folders, ``natural`` is for ``moe2edge.load``.
        dequantize: write quantized numbers as what they stand for, rounded to the source's dtype.
    """

    summary: ClassVar[str] = "plain safetensors that stock transformers loads, unquantized"
    streams: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "uniform"
    dequantize: bool = False

    def __post_init__(self) -> None:
        _layouts.check_layout(self.layout)

    def accepts(self, model: Model) -> None:
        """Refuse quantized numbers unless they are dequantized, and layers that do not fit.

        Raises:
            Unsupported: with the targets and layouts that hold such a model.
        """
        self.stored(model)

    def stored(self, model: Model) -> Model:
        """The model as the layout holds it, with no number quantized.

        Raises:
            Unsupported: the layout cannot hold it, or it is quantized and is to stay so.
        """
        quantized = next((w for _, _, w in model.tensors() if w.scheme), None)
        if quantized is not None and not self.dequantize:
            raise Unsupported(
                f"target hf holds unquantized weights only, but {quantized.name} is "
                f"{quantized.scheme}; export to gptq or onnx, or to hf:dequantize=true, which "
                "takes as many bytes as if nothing was quantized"
            )
        return _dequantized(_layouts.convert_layout(model, self.layout, "hf"))

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and all parameters in memory in the dtype of the source."""
        held = self.stored(model)
        return Estimate(held.nbytes, estimate_file_bytes(_plan(held)))

    def write(self, model: Model, folder: Path) -> None:
        """Write ``config.json`` and the weights, one tensor in memory at a time.

        Raises:
            Unsupported: the layout cannot hold the model.
        """
        model = self.stored(model)
        write_json(folder / "config.json", hf_config.build_transformers_dict(model))
        write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Every tensor of the folder by its name on disk."""
        yield from read_all(folder)

    def streamed(self, folder: Path) -> Model:
        """The folder as a model."""
        return open_stored_model(open_checkpoint(str(folder)))

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """The folder in stock transformers: float32 if ``exact``, else the dtype of its embeddings.

        Where layers have something of their own, it is ``moe2edge.load`` that opens it.

        Raises:
            InputError: a file of the folder is missing or damaged.
            VerificationFailed: transformers cannot load it, or reports a tensor as missing,
                unexpected or of another shape.
        """
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime, open_source

        dtype = "float32" if exact else _stored_dtype(folder)
        if "per_layer_config" in open_checkpoint(str(folder)).config:
            return TorchRuntime(load(folder, dtype=getattr(torch, dtype)))
        return open_source(folder, dtype=dtype, strict=True)

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """The folder with every chosen expert run."""
        from moe2edge.runtime.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Which programs load the folder; what was not run is said to be read."""
        held = self.stored(model)
        if model.scheme is not None:
            size = "dequantized: as large as if nothing was quantized"
            plain = replace(self, dequantize=False).loaders(held)
            return tuple(replace(known, note=f"{known.note}; {size}") for known in plain)
        vllm, model = _layouts.judge_vllm(model, held), held
        ours = Loader("moe2edge", "yes", "moe2edge.load(folder)")
        if not model.is_uniform:
            others = ("transformers", "vLLM", "SGLang", "llama.cpp")
            return (ours, *_layouts.list_refusing_loaders(model, *others))
        dense = has_dense_blocks(model)
        kind = model.family.model_type
        if dense:
            llama = Loader("llama.cpp", "no", "it wants a router in every block")
            sglang = Loader("SGLang", "no", "0.5.23, as read, takes every block for an MoE layer")
        else:
            llama = Loader("llama.cpp", "not tried", f"with {kind}")
            if kind in ("mixtral", "qwen3_moe"):
                note = "it ran GGUF files with as few experts and blocks; its converter was not run"
                llama = Loader("llama.cpp", "as read", note)
            sglang = Loader("SGLang", "as read", "0.5.23")
        return (
            Loader(
                "transformers",
                "yes",
                f"{model.family.architecture}; every export is reopened in it",
            ),
            ours,
            vllm,
            sglang,
            llama,
        )


def _dequantized(model: Model) -> Model:
    """The model with what its integers stand for, in the source's dtype."""
    for block in model.blocks:
        new = {role: _plain_form(weight) for role, weight in block.weights() if weight.scheme}
        if new:
            model = model.replace_block(block.with_weights(new))
    return model


def _plain_form(weight: Weight) -> Weight:
    def load() -> Tensor:
        return cast_to_stored(weight.load(), weight.dtype)

    return replace(weight, load=load, scheme=None, load_quantized=None)


def _plan(model: Model) -> list[Planned]:
    return [plan_plain(name, weight) for name, _, weight in model.tensors()]


def _stored_dtype(folder: Path) -> str:
    """Dtype of the stored embeddings; that of most of a checkpoint, but not always of its norms."""
    path = open_checkpoint(str(folder)).files.get(EMBEDDINGS)
    if path is None:
        raise VerificationFailed(f"{folder} has no {EMBEDDINGS}; export it again")
    dtype = read_header(path, EMBEDDINGS)[1]
    if dtype not in DTYPES:
        raise VerificationFailed(f"{EMBEDDINGS} in {folder} is {dtype}; export it again")
    return DTYPES[dtype]
