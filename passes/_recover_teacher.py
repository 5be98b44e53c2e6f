"""The source as teacher: its most likely next tokens of a text, saved on disk; and the losses.

The text is walked through the source block by block, so the source is never in memory as a whole.
Samples are processed in pieces; a piece that is on disk, and is what was written, is not computed
again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe2edge.calibration import walk
from moe2edge.model.model import Model
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import Memory
from moe2edge.storage.records import append_record, is_sound, recover_records
from moe2edge.storage.safetensors_files import PlannedTensor, read_tensor, write_durably

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of a piece. Each piece reads all blocks of the source once, with the hidden states of all
# of its tokens in memory.
PIECE_TOKENS = 1 << 15
# Bytes of a saved token: its id as int32, its log-probability as float16.
KEPT_NBYTES = 6
# Least probability that all other tokens have together.
LEAST_PROBABILITY = 1e-6
# File with a record of each piece.
PIECES = "source-pieces.jsonl"


def estimate_teacher_bytes(samples: int, length: int, top: int) -> int:
    """Estimate the bytes on disk of the ``top`` most likely tokens of a text."""
    return samples * (length - 1) * top * KEPT_NBYTES


@dataclass(frozen=True)
class Teacher:
    """The most likely next tokens at every position but the last, by the source.

    Attributes:
        folder: folder of their files.
        piece: number of samples in a file.
    """

    folder: Path
    piece: int

    @classmethod
    def ask(
        cls,
        source: Model,
        tokens: Tensor,
        top: int,
        folder: Path,
        reporter: Reporter,
        memory: Memory,
    ) -> Teacher:
        """Compute the most likely next tokens, as far as they are not on disk.

        Args:
            source: the model.
            tokens: int64 [samples, length].
            top: number of tokens to save for each position.
            folder: folder of the files, for this text, source and ``top`` alone.
            reporter: gets progress and the estimated time.
            memory: limit of the walk.
        """
        piece = max(1, PIECE_TOKENS // tokens.shape[1])
        teacher = cls(folder, piece)
        known = teacher._read_digests(reporter)
        reported = False
        for at in range(0, len(tokens), piece):
            path, part = teacher._get_path(at), tokens[at : at + piece]
            if path.name in known and is_sound(path, known[path.name]):
                continue
            if path.name in known:
                reporter.log(f"recover: {path.name} is not what was written: it is computed again")
            label = f"recover: predictions of the source, samples {at} to {at + len(part) - 1}"
            begun = time.perf_counter()
            hidden = walk.observe(source, part, (), reporter.advance, label, memory)
            digest = _write(path, source, hidden, top)
            append_record(folder / PIECES, {"name": path.name, "sha256": digest})
            left = (len(tokens) - at) / len(part) - 1
            if left > 0 and not reported:
                minutes = left * (time.perf_counter() - begun) / 60
                reporter.log(
                    f"recover: about {minutes:.1f} minutes to run the source on the other samples"
                )
                reported = True
        return teacher

    def _read_digests(self, reporter: Reporter) -> dict[str, str]:
        """Read the digests of the pieces that are on disk."""
        records, damaged = recover_records(self.folder / PIECES)
        if damaged:
            reporter.log(f"recover: {PIECES} is not what was written: pieces are computed again")
        return {record["name"]: record["sha256"] for record in records}

    def _get_path(self, sample: int) -> Path:
        return self.folder / f"source-{sample // self.piece:05}.safetensors"

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read ids int64 and log-probabilities float32 of samples, both [rows, length - 1, top]."""
        ids, log_p = [], []
        for row in rows.tolist():
            path, at = self._get_path(row), row % self.piece
            ids.append(read_tensor(path, "ids")[at].long())
            log_p.append(read_tensor(path, "log_p")[at].float())
        return torch.stack(ids), torch.stack(log_p)

    def forget(self) -> None:
        """Remove the files."""
        for path in self.folder.glob("source-*"):
            path.unlink()


def _write(path: Path, source: Model, hidden: Tensor, top: int) -> str:
    """Save the most likely next tokens at each position of some samples; return the digest."""
    samples, length, _ = hidden.shape
    shape = (samples, length - 1, top)
    ids = torch.empty(shape, dtype=torch.int32)
    log_p = torch.empty(shape, dtype=torch.float16)
    for n, logits in enumerate(walk.compute_logits(source, hidden)):
        best = logits[:-1].log_softmax(-1).topk(top)
        ids[n], log_p[n] = best.indices.int(), best.values.half()
    return write_durably(
        path,
        [
            PlannedTensor("ids", shape, "I32", lambda: ids),
            PlannedTensor("log_p", shape, "F16", log_p.cpu),
        ],
    )


# ---- losses --------------------------------------------------------------------------------------


def compute_text_loss(ids: Tensor, logits: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the next tokens, in nats.

    Args:
        ids: int64 [samples, length].
        logits: [samples, length, vocabulary].
    """
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def compute_distance(ids: Tensor, log_p: Tensor, logits: Tensor, *, bucket: bool = False) -> Tensor:
    """Compute the mean of ``sum_v p(v) (log p(v) - log q(v))`` over positions, in nats.

    v runs over the source's most likely tokens only; p is the source's distribution over these,
    scaled to sum to one, and q the student's over the whole vocabulary. With ``bucket``, p is not
    scaled, and all other tokens together are one more v, for both.

    Args:
        ids: the most likely tokens, int64 [samples, length - 1, top].
        log_p: their log-probabilities by the source.
        logits: logits of the student, [samples, length, vocabulary].
        bucket: whether all other tokens count as one.
    """
    log_q = logits[:, :-1].log_softmax(-1).gather(-1, ids)
    if bucket:
        log_p, log_q = _append_others(log_p), _append_others(log_q)
    else:
        log_p = log_p.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _append_others(logs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens together to those of some tokens."""
    # In half precision, the probabilities of a whole vocabulary may add up to more than one.
    known = logs.exp().sum(-1, keepdim=True).clamp(max=1 - LEAST_PROBABILITY)
    return torch.cat([logs, torch.log1p(-known)], -1)


@dataclass(frozen=True)
class Objective:
    """Loss of a training: cross-entropy of the text, distance from the source, or both.

    Attributes:
        teacher: predictions of the source; None: cross-entropy alone.
        text_share: weight of the cross-entropy; the distance has the rest of one.
        bucket: argument of `compute_distance`.
    """

    teacher: Teacher | None = None
    text_share: float = 1.0
    bucket: bool = False

    def __call__(self, rows: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """Compute the loss of some samples.

        Args:
            rows: their indices, int64 [rows].
            ids: the samples, int64 [rows, length].
            logits: logits of the student, [rows, length, vocabulary].
        """
        if self.teacher is None:
            return compute_text_loss(ids, logits)
        top, log_p = (t.to(logits.device) for t in self.teacher.read(rows))
        loss = compute_distance(top, log_p, logits, bucket=self.bucket)
        if not self.text_share:
            return loss
        return self.text_share * compute_text_loss(ids, logits) + (1 - self.text_share) * loss
