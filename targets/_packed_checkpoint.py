"""Base of checkpoints in safetensors that store a matrix in few bits as several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.model.model import Model
from moe2edge.model.stored_layout import list_stored_integers
from moe2edge.pipeline.target import Loader, LoaderRule
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.safetensors_files import PlannedTensor
from moe2edge.targets import _layouts
from moe2edge.targets._layout_checkpoint import LayoutCheckpoint
from moe2edge.targets._loaders import judge_loaders, list_rules
from moe2edge.targets._tensors import Entry, count_file_bytes, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight

# Shape and dtype, as safetensors spells it, of each tensor that stores a matrix.
StoredParts = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class PackedCheckpoint(LayoutCheckpoint):
    """Base of targets that `moe2edge.load` runs, and that store a matrix in parts of its name."""

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
                plan.append(plan_plain(self.name_part(name), weight))
                continue
            stem = name.removesuffix(".weight")
            for part, (shape, dtype) in self.plan_parts(weight).items():
                own = self.name_part(f"{stem}.{part}")
                plan.append(PlannedTensor(own, shape, dtype, part_of(name, part)))
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
        held = self.stored(model)
        count = self.count_held(held)
        memory = sum(count(name, weight) for name, _, weight in held.tensors())
        weights = ((name, weight) for name, _, weight in list_stored_integers(held))
        return Estimate(memory, count_file_bytes(self._list_entries(weights)))

    def _list_entries(self, weights: Iterable[tuple[str, Weight]]) -> Iterator[Entry]:
        """Yield name, shape and dtype of each tensor of a folder, in the order of the file."""
        known: dict[tuple[object, ...], StoredParts] = {}
        for name, weight in weights:
            if weight.scheme is None:
                yield self.name_part(name), weight.shape, weight.dtype
                continue
            kind = weight.shape, id(weight.scheme), weight.dtype, weight.kept, weight.scale_dtype
            if (parts := known.get(kind)) is None:
                parts = known[kind] = self.plan_parts(weight)
            stem = name.removesuffix(".weight") + "."
            for part, (shape, dtype) in parts.items():
                yield self.name_part(stem + part), shape, dtype

    def name_part(self, name: str) -> str:
        """Return the name that a tensor has in a folder of this target."""
        return name

    def count_held(self, stored: Model) -> Callable[[str, Weight], int]:
        """Return a function that counts the bytes of a tensor in memory."""
        import torch

        from moe2edge.runtime.int4 import plan_packing

        packed = set(plan_packing(stored, torch.bfloat16).packed)
        return lambda name, weight: weight.nbytes if name in packed else 2 * weight.count

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder by ``moe2edge.load``: in float32 if ``exact``, else in bfloat16."""
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(load(folder, dtype=torch.float32 if exact else torch.bfloat16))

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions."""
        return list_rules(self.name)

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the folder."""
        return judge_loaders(self.name, model, self.stored(model), asdict(self))
