"""The format of a quantized source, and what of its numbers an output keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe2edge.model.model import Model
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class SourceQuantization:
    """The quantized matrices of a source, and what becomes of those that an output still has.

    Attributes:
        name: of the format.
        matrices: quantized matrices of the source.
        nbytes: that they take in its files.
        kept: whose integers nothing changes.
        dequantized: that are stored as plain numbers, rounded to the dtype of the model.
        requantized: that were dequantized and quantized anew, which loses a little again.
        notes: what is not carried on.
    """

    name: str
    matrices: int
    nbytes: int
    kept: int
    dequantized: int
    requantized: int
    notes: tuple[str, ...] = ()

    @classmethod
    def count(cls, checkpoint: Checkpoint, result: Model) -> SourceQuantization | None:
        """Count what becomes of the quantized matrices; None: the source has none.

        Args:
            checkpoint: the source.
            result: the model after all passes, as a target stores it.
        """
        form = checkpoint.source_format
        source = checkpoint.model
        if form is None:
            return None
        sizes = checkpoint.tensors.quantized
        loads = {w.load for _, _, w in source.tensors() if _get_tensor(w.name) in sizes}
        kept = dequantized = requantized = 0
        for _, _, weight in result.tensors():
            kept += weight.kept
            if _get_tensor(weight.name) not in sizes or weight.kept:
                continue
            if weight.scheme is None:
                dequantized += 1
            elif weight.load not in loads:
                requantized += 1
        nbytes = sum(sizes.values())
        return cls(form.name, len(sizes), nbytes, kept, dequantized, requantized, form.notes)

    def describe(self, target: str) -> str:
        """Describe it in a sentence, for one target."""
        said = [f"integers of {self.kept} are kept"] if self.kept else []
        if self.dequantized:
            said.append(f"{self.dequantized} are stored as plain numbers")
        if self.requantized:
            said.append(f"{self.requantized} are quantized anew, which is not lossless")
        return (
            f"{target}: of the {self.matrices} matrices of the source in {self.name} "
            f"({self.nbytes / 1e6:.2f} MB), {', '.join(said) or 'none is left'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all as plain data."""
        return asdict(self)


def _get_tensor(name: str) -> str:
    """Return the tensor in files of which a handle, by its name, may be a slice."""
    return name.partition("[")[0]


def count_by_target(
    checkpoint: Checkpoint, result: Model, targets: Sequence[Target]
) -> dict[str, dict[str, Any]]:
    """Count what becomes of the quantized matrices of a source, for each target; empty: none."""
    found = {}
    for target in targets:
        counted = SourceQuantization.count(checkpoint, target.stored(result))
        if counted is not None:
            found[target.name] = counted.to_json()
    return found


def list_format_lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each target, and what is not carried on."""
    notes: dict[str, None] = {}
    for target, counted in found.items():
        own = SourceQuantization(**counted)
        yield own.describe(target)
        notes |= dict.fromkeys(own.notes)
    yield from notes


def report_source_format(
    checkpoint: Checkpoint, result: Model, targets: Sequence[Target], reporter: Reporter
) -> None:
    """Report, before any work, what becomes of the numbers of a quantized source."""
    found = count_by_target(checkpoint, result, targets)
    for line in list_format_lines(found):
        reporter.log(line)
    anew = any(counted["requantized"] for counted in found.values())
    if anew and any(weight.kept for _, _, weight in checkpoint.model.tensors()):
        reporter.log(
            "warning: the recipe quantizes integers of the source anew; a recipe without a "
            "quantizing pass keeps them, such as -r as-is or -r trim"
        )
