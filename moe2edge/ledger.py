"""What outlives a killed export: solved blocks and the stream behind them, with a journal.

A block counts as finished when its line is in the journal. Before that its numbers and the hidden
states of all samples after it are in files of their own, each written under another name, made
durable, and renamed; a line that is cut short is no line. So a later run goes on behind the last
finished block with the very numbers that the first one had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.checkpoint import Planned, as_stored, open_file, read_tensor, write_safetensors
from moe2edge.errors import InputError
from moe2edge.layers import Weight
from moe2edge.model import Block
from moe2edge.pipeline import Done
from moe2edge.scheme import Pattern, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized

JOURNAL = "journal.jsonl"
HIDDEN = "hidden"


@dataclass(frozen=True)
class Unit:
    """A line of the journal: one block, finished in one step of a recipe.

    Attributes:
        step: position of the pass in the recipe.
        block: index of the block in the model that the pass got.
        origins: of the block and of its experts in the source, so that it is known again.
        numbers: file with its numbers.
        schemes: of the quantized tensors by role: bits, group size, symmetric.
        patterns: of the sparse tensors by role: zeros, of how many.
        stream: file with the hidden states after the block; None if the pass looks at none.
        done: what there is to tell of it.
    """

    step: int
    block: int
    origins: tuple[int, ...]
    numbers: str
    schemes: Mapping[str, tuple[int, int, bool]]
    patterns: Mapping[str, tuple[float, int | None]]
    stream: str | None
    done: Done


class Journal:
    """The finished blocks of a work folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there, and forget a last line that is cut short."""
        self.folder = folder
        self._path = folder / JOURNAL
        self.units: dict[tuple[int, int], Unit] = {}
        whole = 0
        data = self._path.read_bytes() if self._path.exists() else b""
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._take(json.loads(line))
            whole += len(line)
        if whole < len(data):
            os.truncate(self._path, whole)

    def _take(self, raw: dict[str, Any]) -> None:
        done = Done(**{k: _tuple(v) for k, v in raw.pop("done").items()})
        unit = Unit(**{k: _tuple(v) for k, v in raw.items()}, done=done)
        self.units[unit.step, unit.block] = unit

    def add(self, unit: Unit) -> None:
        """Count a block as finished."""
        with self._path.open("ab") as file:
            file.write(json.dumps(asdict(unit)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.units[unit.step, unit.block] = unit


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass
class FileLedger:
    """The finished blocks of one step.

    Attributes:
        journal: where they are listed.
        step: position of the pass in the recipe.
    """

    journal: Journal
    step: int
    _stream: str | None = field(default=None, init=False)

    def restore(self, block: Block) -> tuple[Block, Done] | None:
        """A block as it was solved before, with what there is to tell; None if it was not."""
        unit = self.journal.units.get((self.step, block.index))
        if unit is None:
            return None
        if unit.origins != _origins(block):
            raise InputError(
                f"block {block.index} of the unfinished export had other experts "
                f"({unit.origins[1:]}) than are chosen now ({_origins(block)[1:]}); begin anew "
                "with --resume never"
            )
        self._stream = unit.stream
        path = self.journal.folder / unit.numbers
        found = handles(dict(block.weights()), path, unit.schemes, unit.patterns)
        return block.with_weights(found), unit.done

    def stream(self) -> Tensor | None:
        """Hidden states behind the last block that was restored."""
        if self._stream is None:
            return None
        return read_tensor(self.journal.folder / self._stream, HIDDEN)

    def finish(
        self,
        block: Block,
        numbers: Mapping[str, Quantized | Tensor],
        done: Done,
        hidden: Tensor | None,
    ) -> Block:
        """Save a solved block and the stream behind it; the block with handles on its numbers."""
        stem = f"{self.step}-{block.index:05}"
        path = self.journal.folder / f"block-{stem}.safetensors"
        weights = dict(block.weights())
        schemes, patterns = save(path, weights, numbers)
        stream = None
        if hidden is not None:
            stream = f"stream-{stem}.safetensors"
            whole = Planned(HIDDEN, tuple(hidden.shape), "F32", hidden.cpu)
            write_durably(self.journal.folder / stream, [whole])
        unit = Unit(
            self.step, block.index, _origins(block), path.name, schemes, patterns, stream, done
        )
        self.journal.add(unit)
        if self._stream is not None:
            (self.journal.folder / self._stream).unlink(missing_ok=True)
        self._stream = stream
        return block.with_weights(handles(weights, path, schemes, patterns))


def _origins(block: Block) -> tuple[int, ...]:
    """Where a block and its experts are from."""
    return (block.origin, *block.expert_origins)


def in_memory(block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
    """The block with handles on numbers by role, as they are read back once they are saved."""
    import torch

    weights = dict(block.weights())

    def handle(weight: Weight, value: Quantized | Tensor) -> Weight:
        if isinstance(value, torch.Tensor):
            return replace(weight, load=lambda: as_stored(value, weight.dtype))
        return replace(
            weight, load=value.dequantize, scheme=value.scheme, load_quantized=lambda: value
        )

    return block.with_weights({r: handle(weights[r], value) for r, value in numbers.items()})


def rest_in_memory(rest: Mapping[str, Weight], numbers: Mapping[str, Tensor]) -> dict[str, Weight]:
    """The same of tensors outside of blocks, those that have numbers, by name."""

    def handle(weight: Weight, value: Tensor) -> Weight:
        return replace(weight, load=lambda: as_stored(value, weight.dtype))

    return {name: handle(rest[name], value) for name, value in numbers.items()}


# ---- numbers on disk -----------------------------------------------------------------------------


def write_durably(path: Path, tensors: list[Planned]) -> None:
    """Write a safetensors file that has its name only when it is whole and on the disk."""
    beside = path.with_name(path.name + ".tmp")
    write_safetensors(beside, tensors)
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


Schemes = dict[str, tuple[int, int, bool]]
Patterns = dict[str, tuple[float, int | None]]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never half there; its name is durable after `sync_folder`."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def save(
    path: Path, weights: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
) -> tuple[Schemes, Patterns]:
    """Save numbers of some weights by role or name; what `handles` wants to know about them.

    A tensor that is not quantized takes the dtype of what it replaces.
    """
    import torch

    planned: list[Planned] = []
    schemes: Schemes = {}
    patterns: Patterns = {}
    for role, value in numbers.items():
        planned += _planned(role, value, weights[role])
        if not isinstance(value, torch.Tensor):
            scheme = value.scheme
            schemes[role] = (scheme.bits, scheme.group_size, scheme.symmetric)
        if (pattern := weights[role].pattern) is not None:
            patterns[role] = (pattern.zeros, pattern.of)
    write_durably(path, planned)
    return schemes, patterns


def nbytes(weight: Weight) -> int:
    """Bytes that `save` takes for the numbers of a planned weight."""
    from moe2edge.packing import packed_shape

    if (scheme := weight.scheme) is None:
        return weight.nbytes
    outs, ins = weight.shape
    # A scale in float32, a zero point in a byte.
    of_group = 4 if scheme.symmetric else 5
    return outs * (packed_shape((ins,), scheme.bits)[0] + of_group * scheme.groups(ins))


def _planned(role: str, value: Quantized | Tensor, weight: Weight) -> list[Planned]:
    import torch

    from moe2edge.packing import pack_bytes, packed_shape

    if isinstance(value, torch.Tensor):
        return [Planned(role, weight.shape, weight.dtype, lambda: as_stored(value, weight.dtype))]
    bits, scales, zeros = value.scheme.bits, value.scales, value.zeros
    shape = packed_shape(tuple(value.q.shape), bits)
    planned = [
        Planned(f"{role}.q", shape, "U8", lambda: pack_bytes(value.q, bits)),
        Planned(f"{role}.scales", tuple(scales.shape), "F32", lambda: scales),
    ]
    if zeros is not None:
        planned.append(Planned(f"{role}.zeros", tuple(zeros.shape), "U8", lambda: zeros))
    return planned


def handles(
    weights: Mapping[str, Weight],
    path: Path,
    schemes: Mapping[str, tuple[int, int, bool]],
    patterns: Mapping[str, tuple[float, int | None]],
) -> dict[str, Weight]:
    """Handles on what `save` wrote for some of ``weights``; they hold on to no numbers."""
    found: dict[str, Weight] = {}
    for name in open_file(path).keys():  # noqa: SIM118
        role = name.removesuffix(".q")
        if role not in weights:  # scales and zero points
            continue
        weight = weights[role]
        if role in patterns:
            weight = replace(weight, pattern=Pattern(*patterns[role]))
        if role in schemes:
            found[role] = _quantized_handle(weight, path, role, Scheme(*schemes[role]))
        else:
            found[role] = _plain_handle(weight, path, role)
    return found


def _plain_handle(weight: Weight, path: Path, role: str) -> Weight:
    return replace(weight, load=lambda: read_tensor(path, role))


def _quantized_handle(weight: Weight, path: Path, role: str, scheme: Scheme) -> Weight:
    def load_quantized() -> Quantized:
        from moe2edge.packing import unpack_bytes
        from moe2edge.rounding import Quantized

        q = unpack_bytes(read_tensor(path, f"{role}.q"), scheme.bits, weight.shape[1])
        zeros = None if scheme.symmetric else read_tensor(path, f"{role}.zeros")
        return Quantized(q, read_tensor(path, f"{role}.scales"), scheme, zeros)

    def load() -> Tensor:
        return load_quantized().dequantize()

    return replace(weight, load=load, scheme=scheme, load_quantized=load_quantized)
