"""Output folders: written beside their final name, renamed at the end, never half there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from moe2edge.artifact import MANIFEST, is_artifact, present_files
from moe2edge.checkpoint import Planned, as_stored, read_json, read_tensor, write_safetensors
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.model import Block, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized

MARKER = ".moe2edge-partial"


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output name that is taken.

    Raises:
        InputError: something that is not ours is there, or something of ours and not ``force``.
    """
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist; make it first")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or not _is_ours(out):
        raise InputError(f"{out} exists and was not written by moe2edge; choose another name")
    if not force:
        raise InputError(f"{out} exists; choose another name, or replace it with --force")
    if strange := _strange_files(out):
        raise InputError(
            f"{out} holds files that moe2edge did not write, such as {strange[0]}, and --force "
            "would delete them; move them away"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is an output, or holds nothing but outputs."""
    children = list(folder.iterdir())
    return is_artifact(folder) or (bool(children) and all(map(is_artifact, children)))


def _strange_files(out: Path) -> list[str]:
    """Files in an output, or in a folder of outputs, that no manifest names."""
    folders = [out] if is_artifact(out) else sorted(out.iterdir())
    return [
        str((folder / name).relative_to(out))
        for folder in folders
        for name in sorted(present_files(folder).keys() - _listed(folder) - {MANIFEST})
    ]


def _listed(folder: Path) -> set[str]:
    """Files that a manifest names, whatever version wrote it."""
    files = read_json(folder / MANIFEST).get("files")
    return set(files) if isinstance(files, dict) else set()


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        DoesNotFit: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise DoesNotFit(
            f"{out.parent} has {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB"
        )


def check_memory(
    needed: int,
    purpose: str = "verifying the output loads it in float32",
    remedy: str = "export on a larger one, or to onnx",
) -> None:
    """Refuse to begin what the machine could not hold, or not verify at the end.

    Args:
        needed: bytes.
        purpose: what needs them.
        remedy: what to do.

    Raises:
        DoesNotFit: the machine has less memory.
    """
    total = psutil.virtual_memory().total
    if total < needed:
        raise DoesNotFit(
            f"{purpose}, which needs {needed / 1e9:.1f} GB of memory; this machine has "
            f"{total / 1e9:.1f} GB: {remedy}"
        )


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """Folder to write into and a work folder, both gone or renamed to ``out`` at the end.

    A leftover of an export that was killed is recognized by its marker and removed; one that is
    still running is left alone.

    Raises:
        InputError: ``OUT.partial`` is not ours, or another export is writing it.
    """
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(partial):
        _remove_stale(partial)
    partial.mkdir()
    try:
        mine = psutil.Process()
        marker = {"pid": mine.pid, "started": mine.create_time()}
        (partial / MARKER).write_text(json.dumps(marker))
        content, work = partial / "out", partial / "work"
        content.mkdir()
        work.mkdir()
        yield content, work
        _move_into_place(content, out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(partial: Path) -> None:
    if partial.is_dir() and not any(partial.iterdir()):  # killed before it was marked
        partial.rmdir()
        return
    try:
        marker: dict[str, Any] = json.loads((partial / MARKER).read_text())
        pid, started = int(marker["pid"]), float(marker["started"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{partial} exists and is not ours; move it away") from error
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(pid).create_time() - started) < 1:
            raise InputError(f"another export (process {pid}) is writing {partial}")
    shutil.rmtree(partial)


def _move_into_place(content: Path, out: Path, partial: Path) -> None:
    """Rename; what was there before stays until the new folder has its name."""
    sync_folder(content)
    old = partial / "old"
    try:
        if out.exists():
            out.rename(old)
        content.rename(out)
    except BaseException:  # an interrupt, too, must not cost the old folder
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class WorkFolder:
    """Solved numbers on disk, a file for each time a block is solved, until a target packs them."""

    folder: Path

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save numbers by role; return the block with handles that read them back.

        A tensor that is not quantized takes the dtype of what it replaces.
        """
        before = len(list(self.folder.glob(f"block-{block.origin:05}-*.safetensors")))
        path = self.folder / f"block-{block.origin:05}-{before}.safetensors"
        weights = dict(block.weights())
        planned: list[Planned] = []
        for role, value in numbers.items():
            planned += _planned(role, value, weights[role])
        write_safetensors(path, planned)
        return block.with_weights(
            {role: _handle(weights[role], path, role, value) for role, value in numbers.items()}
        )


def _planned(role: str, value: Quantized | Tensor, weight: Weight) -> list[Planned]:
    import torch

    from moe2edge.packing import pack_bytes

    if isinstance(value, torch.Tensor):
        return [Planned(role, weight.shape, weight.dtype, lambda: as_stored(value, weight.dtype))]
    packed, scales, zeros = pack_bytes(value.q, value.scheme.bits), value.scales, value.zeros
    planned = [
        Planned(f"{role}.q", tuple(packed.shape), "U8", lambda: packed),
        Planned(f"{role}.scales", tuple(scales.shape), "F32", lambda: scales),
    ]
    if zeros is not None:
        planned.append(Planned(f"{role}.zeros", tuple(zeros.shape), "U8", lambda: zeros))
    return planned


def _handle(weight: Weight, path: Path, role: str, value: Quantized | Tensor) -> Weight:
    """Handle on saved numbers; holds on to none of them."""
    import torch

    if isinstance(value, torch.Tensor):
        return replace(weight, load=lambda: read_tensor(path, role))
    scheme = value.scheme

    def load_quantized() -> Quantized:
        from moe2edge.packing import unpack_bytes
        from moe2edge.rounding import Quantized

        q = unpack_bytes(read_tensor(path, f"{role}.q"), scheme.bits, weight.shape[1])
        zeros = None if scheme.symmetric else read_tensor(path, f"{role}.zeros")
        return Quantized(q, read_tensor(path, f"{role}.scales"), scheme, zeros)

    def load() -> Tensor:
        return load_quantized().dequantize()

    return replace(weight, load=load, scheme=scheme, load_quantized=load_quantized)
