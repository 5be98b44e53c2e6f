"""Plain safetensors, as stock transformers loads them; dtypes as in the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.checkpoint import Planned, read_all, write_checkpoint, write_json
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model import Model
from moe2edge.target import Loader, Runtime, Target
from moe2edge.targets._tensors import file_nbytes, has_dense_blocks, plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized


@dataclass(frozen=True)
class Hf(Target):
    """A checkpoint of the source's own kind, with fewer experts or blocks."""

    summary: ClassVar[str] = "plain safetensors that stock transformers loads, unquantized"

    def accepts(self, model: Model) -> None:
        """Refuse quantized numbers and layers of unequal size.

        Raises:
            Unsupported: with the targets that hold such a model.
        """
        quantized = next((w for _, _, w in model.tensors() if w.scheme), None)
        if quantized is not None and quantized.scheme is not None:
            raise Unsupported(
                f"target hf holds unquantized weights only, but {quantized.name} is "
                f"{quantized.scheme.name}; export to gptq or onnx, or quantize nothing"
            )
        if not model.is_uniform:
            layers = ", ".join(
                f"{len(layer.experts)} experts top-{layer.router.top_k}"
                for _, layer in model.moe_blocks
            )
            raise Unsupported(
                f"target hf needs MoE layers of one size, because stock transformers loads no "
                f"other, but they have {layers}; keep as many in each, or export to onnx, or "
                "quantize and export to gptq"
            )

    def nbytes(self, model: Model) -> int:
        """Bytes of the weight files."""
        return file_nbytes(_plan(model))

    def write(self, model: Model, folder: Path) -> None:
        """Write ``config.json`` and the weights, one tensor in memory at a time."""
        write_json(folder / "config.json", model.family.config_of(model))
        write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Every tensor of the folder by its name on disk."""
        yield from read_all(folder)

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """The folder in stock transformers, float32 whether ``exact`` or not.

        Raises:
            VerificationFailed: transformers cannot load it, or reports a tensor as missing,
                unexpected or of another shape.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from moe2edge.torch_runtime import TorchRuntime

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                # Not raised but reported, so that the tensors can be named.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise VerificationFailed(f"transformers cannot load {folder}: {reason}") from error
        if wrong := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
            raise VerificationFailed(
                f"transformers loads {folder} with {wrong}; it does not hold what its "
                "config.json asks for: export it again"
            )
        return TorchRuntime(model)

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Which programs load the folder; what was not run is said to be read."""
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
            Loader("transformers", "yes", "stock classes; every export is reopened in it"),
            Loader("moe2edge", "yes", "moe2edge.load(folder)"),
            Loader("vLLM", "as read", "0.33"),
            sglang,
            llama,
        )


def _plan(model: Model) -> list[Planned]:
    return [plain(name, weight) for name, _, weight in model.tensors()]
