"""Base of checkpoints in safetensors whose layout says how layers that differ are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe2edge.model.model import Model
from moe2edge.pipeline.target import Target
from moe2edge.runtime.operator_times import PhaseTimes
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.safetensors_files import check_index
from moe2edge.targets._layouts import Layout, check_layout


@dataclass(frozen=True)
class LayoutCheckpoint(Target):
    """Base of targets of every family that transformers or `moe2edge.load` run.

    Attributes:
        layout: how layers that differ are stored.
    """

    streams: ClassVar[bool] = True
    any_family: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    runtime_nbytes: ClassVar[int] = 437_000_000
    layout: Layout = "natural"

    def __post_init__(self) -> None:
        check_layout(self.layout)

    def check_derived(self, folder: Path) -> None:
        """Compare the index with the shards.

        Raises:
            VerificationFailed: names the tensor.
        """
        check_index(folder)

    def streamed(self, folder: Path) -> Model:
        """Open the folder as a model."""
        return open_stored_model(open_checkpoint(str(folder)))

    def profile_operators(
        self, folder: Path, ids: Sequence[int], gen_tokens: int
    ) -> tuple[PhaseTimes, ...] | None:
        """Run a text in torch.profiler."""
        from moe2edge.runtime.torch_profiler import profile_torch
        from moe2edge.runtime.torch_runtime import TorchRuntime

        runtime = self.reopen(folder)
        assert isinstance(runtime, TorchRuntime)
        return profile_torch(runtime, ids, gen_tokens)

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open the folder so that every chosen expert runs."""
        from moe2edge.runtime.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))
