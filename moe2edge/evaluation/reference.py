"""The reference of an output: what its tensors, logits and files have to be.

It is recorded at export, from the model in memory: logits of a PyTorch run on the same packed
numbers, at the first positions and at the far end of the context, a digest of the numbers of each
tensor, and a record of the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe2edge.calibration import walk
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.evaluation.far_end import (
    COMPARED,
    FarEnd,
    FarEndHidden,
    choose_positions,
    observe_far_end,
)
from moe2edge.evaluation.folder_record import REFERENCE, FolderRecord
from moe2edge.evaluation.margins import SAMPLES
from moe2edge.evaluation.tensor_digests import compute_digest, load_numbers
from moe2edge.model.model import Model
from moe2edge.numerics import metrics
from moe2edge.storage.text_files import make_read_error, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of the record of a folder and of headers in a reference, about.
RECORD_BYTES = 4000
# Tokens of the prefill, and tokens that are decoded after it.
PREFILL = 32
PARITY_STEPS = 32


@dataclass(frozen=True)
class Reference:
    """Tokens, logits and digests that an output is compared with.

    Attributes:
        ids: the recorded tokens, int64 [samples, length].
        prefill: number of tokens of the prefill; the others follow one by one.
        logits: float32 [samples, length - prefill + 1, vocabulary], after the prefill and after
            each later token.
        digests: SHA-256 of the numbers of each tensor, by its name on disk.
        source_kl: KL to the source on ``ids``, in nats per token; None if it was not measured.
        far: the same at the far end of the context; None if the context is short, or an earlier
            version wrote the reference.
        record: files of the output; None in a reference that an earlier version wrote.
    """

    ids: Tensor
    prefill: int
    logits: Tensor
    digests: Mapping[str, str]
    source_kl: float | None
    far: FarEnd | None = None
    record: FolderRecord | None = None

    def save(self, folder: Path) -> str:
        """Write the reference into an output folder; return the SHA-256 of the file.

        The file has no time stamps, so equal references are equal files.
        """
        notes: dict[str, Any] = {
            "prefill": self.prefill,
            "digests": dict(self.digests),
            "source_kl": self.source_kl,
        }
        tensors = {"ids": self.ids, "logits": self.logits}
        if self.far is not None:
            far = {"ids": self.far.ids, "positions": self.far.positions, "logits": self.far.logits}
            tensors |= {f"far.{name}": tensor for name, tensor in far.items()}
        if self.record is not None:
            notes["record"] = self.record.to_json()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        notes["sha256"] = _seal(notes, tensors)
        metadata = {"reference": json.dumps(notes, sort_keys=True)}
        return write_bytes(folder / REFERENCE, save(tensors, metadata))

    def keep_first(self) -> Reference:
        """Return the reference with one prompt, and nothing at the far end."""
        return replace(self, ids=self.ids[:1], logits=self.logits[:1], far=None)

    def for_stored(self, model: Model, stored: Model) -> Reference:
        """Return the reference of an output that stores ``model`` as the tensors of ``stored``.

        Only tensors that ``model`` does not have are read. Where quantized numbers are written
        dequantized, in a dtype that rounds them, the logits become those of the rounded numbers.

        Args:
            model: the model that this reference was recorded from.
            stored: the same model, with the tensors that the target writes.
        """
        known = {id(weight): self.digests[name] for name, _, weight in model.tensors()}
        digests = {
            name: known.get(id(weight)) or compute_digest(load_numbers(weight))
            for name, _, weight in stored.tensors()
        }
        if model.scheme is None or stored.scheme is not None:
            return replace(self, digests=digests)
        logits, there = observe_far_end(stored, self.ids, self.far, "reference")
        far = self.far
        if far is not None and there is not None:
            far = replace(far, logits=there)
        return replace(self, digests=digests, logits=logits[:, self.prefill - 1 :].clone(), far=far)

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read the reference of an output folder, as `save` wrote it.

        Raises:
            VerificationFailed: the file is missing or damaged.
        """
        path = folder / REFERENCE
        if not path.exists():
            raise VerificationFailed(
                f"{folder} has no {REFERENCE}; it cannot be verified: export it again"
            )
        try:
            # Opened twice: see `moe2edge.storage.safetensors_files.open_file`.
            with path.open("rb"), safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["reference"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # References of earlier versions have neither a digest nor a record.
            sealed = notes.pop("sha256", None)
            if (sealed or "record" in notes) and sealed != _seal(notes, tensors):
                raise VerificationFailed(
                    f"{REFERENCE} does not hold what was recorded; export {folder} again"
                )
            ids, logits = tensors["ids"], tensors["logits"]
            samples, length = ids.shape
            steps = length - notes["prefill"] + 1
            if ids.dtype != torch.int64 or logits.shape[:-1] != (samples, steps):
                raise ValueError(f"logits {list(logits.shape)} for tokens {list(ids.shape)}")
            names = ("far.ids", "far.positions", "far.logits")
            far = FarEnd(*(tensors[name] for name in names)) if names[0] in tensors else None
            record = FolderRecord.from_json(notes["record"]) if "record" in notes else None
            digests, kl = notes["digests"], notes["source_kl"]
            return cls(ids, notes["prefill"], logits, digests, kl, far, record)
        except OSError as error:
            raise VerificationFailed(str(make_read_error(path, error))) from error
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise VerificationFailed(
                f"{path.name} cannot be read: {error}; export {folder} again"
            ) from error


def estimate_reference_bytes(model: Model, stored: Model, length: int) -> int:
    """Estimate the bytes of the reference of an output.

    Args:
        model: the planned model.
        stored: the same as a target stores it.
        length: tokens of a sample of the evaluation text.
    """
    length = min(length, PREFILL + PARITY_STEPS)
    steps = length - min(PREFILL, length - 1) + 1
    rows, tokens = SAMPLES * steps, SAMPLES * length
    far = choose_positions(model, length)
    if far is not None:
        rows, tokens = rows + COMPARED, tokens + 2 * len(far)
    # A digest in hexadecimal digits, with the marks of JSON.
    names = sum(len(name) + 70 for name, _, _ in stored.tensors())
    return 4 * rows * model.vocabulary + 8 * tokens + names + RECORD_BYTES


def _seal(notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of all that a reference holds."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {compute_digest(tensors[name])}".encode())
    return digest.hexdigest()


def record(
    model: Model,
    ids: Tensor,
    source_logits: Sequence[Tensor] | None,
    hidden: Tensor,
    far: FarEndHidden | None = None,
) -> Reference:
    """Record the reference of a model in memory.

    Args:
        model: the model as it will be written.
        ids: the tokens, int64 [samples, length]; see `moe2edge.evaluation.margins`.
        source_logits: logits of the source [length, vocabulary] on each row of ``ids``; None does
            not compare with the source.
        hidden: hidden states of ``model`` after its last block on ``ids``, float32
            [samples, length, hidden].
        far: the same at the far end of the context; None records nothing there.

    Raises:
        InputError: logits are not finite.
    """
    logits = torch.stack(list(walk.compute_logits(model, hidden)))
    if not logits.isfinite().all():
        raise InputError(
            "the model gives logits that are not finite, in float32; weights of the source are too "
            "large, or a pass made them so: the source check finds the block where it is the source"
        )
    prefill = min(PREFILL, ids.shape[1] - 1)
    digests = {name: compute_digest(load_numbers(weight)) for name, _, weight in model.tensors()}
    kl = None
    if source_logits is not None:
        kl = metrics.measure(ids, logits, source_logits).kl or 0.0
    there = None if far is None else far.compute(model)
    return Reference(ids, prefill, logits[:, prefill - 1 :].clone(), digests, kl, there)
