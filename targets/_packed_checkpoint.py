"""Base of checkpoints in safetensors that store a matrix in few bits as several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.model.model import Model
from moe2edge.model.stored_layout import list_stored_integers
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.safetensors_files import PlannedTensor, check_index
from moe2edge.targets import _layouts
from moe2edge.targets._layouts import Layout
from moe2edge.targets._loaders import judge_loaders
from moe2edge.targets._tensors import estimate_file_bytes, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight
    from moe2edge.numerics.grid import Quantized

# Shape and dtype, as safetensors spells it, of each tensor that stores a matrix.
StoredParts = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class PackedCheckpoint(Target):
    """Base of targets that `moe2edge.load` runs, and that store a matrix in parts of its name.

    Attributes:
        layout: how layers that differ are stored.
    """

    streams: ClassVar[bool] = True
    any_family: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "natural"

    def __post_init__(self) -> None:
        _layouts.check_layout(self.layout)

    def plan_parts(self, weight: Weight) -> StoredParts:
        """Return the tensors that store a quantized matrix, by the end of their names."""
        raise NotImplementedError

    def pack(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """Pack a quantized matrix into the tensors of `plan_parts`.

        Raises:
            VerificationFailed: the format cannot hold its numbers.
        """
        raise NotImplementedError

    def plan_tensors_of(self, model: Model) -> list[PlannedTensor]:
        """Plan all tensors of a folder; a matrix is packed once, when its first part is read."""
        weights = {name: weight for name, _, weight in list_stored_integers(model)}

        @lru_cache(maxsize=1)
        def packed(name: str) -> dict[str, Tensor]:
            return self.pack(name, weights[name])

        def part_of(name: str, part: str) -> Callable[[], Tensor]:
            return lambda: packed(name)[part]

        plan = []
        for name, weight in weights.items():
            if weight.scheme is None:
                plan.append(plan_plain(name, weight))
                continue
            stem = name.removesuffix(".weight")
            for part, (shape, dtype) in self.plan_parts(weight).items():
                plan.append(PlannedTensor(f"{stem}.{part}", shape, dtype, part_of(name, part)))
        return plan

    def stored(self, model: Model) -> Model:
        """Return the model as the layout holds it.

        Raises:
            Unsupported: the layout cannot hold it.
        """
        return _layouts.convert_layout(model, self.layout, self.name)

    def find_dtype(self, model: Model) -> str:
        """Return the dtype in which `reopen` runs a folder."""
        return "bfloat16"

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and in memory what runs in 4 bits, the rest in bfloat16."""
        import torch

        from moe2edge.runtime.int4 import plan_packing

        held = self.stored(model)
        packed = set(plan_packing(held, torch.bfloat16).packed)
        memory = sum(w.nbytes if n in packed else 2 * w.count for n, _, w in held.tensors())
        return Estimate(memory, estimate_file_bytes(self.plan_tensors_of(held)))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back, quantized matrices as integers and scales.

        Raises:
            InputError: parts of a matrix are missing or do not fit.
            VerificationFailed: a tensor is missing, unexpected or of another shape, or parts hold
                what this target does not write.
        """
        for name, _, weight in self.streamed(folder).tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def check_derived(self, folder: Path) -> None:
        """Compare the index with the shards.

        Raises:
            VerificationFailed: names the tensor.
        """
        check_index(folder)

    def streamed(self, folder: Path) -> Model:
        """Open the folder as a model."""
        return open_stored_model(open_checkpoint(str(folder)))

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder by ``moe2edge.load``: in float32 if ``exact``, else in bfloat16."""
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(load(folder, dtype=torch.float32 if exact else torch.bfloat16))

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open the folder so that every chosen expert runs."""
        from moe2edge.runtime.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the folder."""
        return judge_loaders(self.name, model, self.stored(model))
