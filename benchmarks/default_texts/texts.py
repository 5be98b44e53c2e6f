"""The texts that are compared, as tokens: by name and seed, kept in a folder."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _texts
from benchmarks._held_out import describe_text, load_samples
from benchmarks._study import QUIET
from moe2edge import Checkpoint
from moe2edge.calibration import self_sampling
from moe2edge.calibration.builtin_texts import GENERAL_FOLDER, GENERAL_KINDS
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.storage.tokenizer import load_tokenizer

# What recipes have by default; samples of evaluation text in each domain.
SAMPLES, LENGTH, EVALUATION = 128, 512, 24
# The last commit whose built-in text was that of Python's standard library.
OLD_COMMIT = "007197cd8d0e4942a01f53a9fb74e2d1511086b2"
OLD_FILE = "moe2edge/builtin/tiny-moe/calibration.txt"
# Texts that the model writes: temperature, and candidates for each sequence that is kept.
WRITTEN = {"self": (1.2, 4), "self-plain": (1.2, 1), "self-1.0": (1.0, 1)}


class Texts:
    """Tokens for a model.

    Attributes:
        checkpoint: the model.
        folder: where tokens are kept once they were made.
        domains: the kinds of text that the model knows.
        files: the domains' texts by purpose and domain.
    """

    def __init__(
        self, checkpoint: Checkpoint, data: Path, folder: Path, domains: tuple[str, ...]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.folder, self.domains = checkpoint, folder, domains
        self.files = _texts.write_texts(data, folder)
        old = folder / "builtin-old.txt"
        if not old.exists():
            old.write_bytes(
                subprocess.run(
                    ("git", "show", f"{OLD_COMMIT}:{OLD_FILE}"), check=True, capture_output=True
                ).stdout
            )

    def load(self, name: str, seed: int) -> Tensor:
        """Return tokens int64 [samples, length] for calibration."""
        path = self.folder / f"{name}-{seed}.pt"
        if not path.exists():
            torch.save(self._make(name, seed), path)
        ids: Tensor = torch.load(path)
        return ids

    def load_evaluation(self) -> dict[str, Tensor]:
        """Return held-out tokens by domain."""
        path = self.folder / "evaluation.pt"
        if not path.exists():
            torch.save({d: self._cut((d,), EVALUATION) for d in self.domains}, path)
        ids: dict[str, Tensor] = torch.load(path)
        return ids

    def _cut(self, domains: tuple[str, ...], samples: int) -> Tensor:
        text = describe_text(self.files["evaluation"], domains, samples, LENGTH)
        return load_samples(self.checkpoint, "evaluation", text).ids

    def _make(self, name: str, seed: int) -> Tensor:
        if "+" in name:
            # Equal parts, one after the other in turn.
            parts = [self.load(part, seed) for part in name.split("+")]
            share = SAMPLES // len(parts)
            return torch.stack([part[:share] for part in parts], 1).flatten(0, 1)
        if name in WRITTEN:
            return self._write(*WRITTEN[name], seed)
        text: Mapping[str, Any]
        if name == "general":
            kinds = {kind: GENERAL_FOLDER / f"calibration-{kind}.txt" for kind in GENERAL_KINDS}
            text = describe_text(kinds, tuple(kinds), SAMPLES, LENGTH, seed)
            return load_samples(self.checkpoint, "calibration", text).ids
        if name == "own":
            files = self.files["calibration"]
            text = describe_text(files, self.domains, SAMPLES, LENGTH, seed)
        else:
            place = str(self.folder / "builtin-old.txt") if name == "builtin-old" else name
            text = {"text": place, "samples": SAMPLES, "length": LENGTH, "seed": seed}
        return load_samples(self.checkpoint, "calibration", text).ids

    def _write(self, temperature: float, width: int, seed: int) -> Tensor:
        """Let the model write, as `self_sampling` does."""
        before = self_sampling.TEMPERATURE, self_sampling.WIDTH
        self_sampling.TEMPERATURE, self_sampling.WIDTH = temperature, width
        try:
            runtime: Any = open_source(self.checkpoint.folder)
            start = load_tokenizer(self.checkpoint.folder).bos_token_id
            shape = SAMPLES, LENGTH
            return self_sampling.write_text(
                runtime.model, self.checkpoint.model, start, shape, seed, QUIET
            )
        finally:
            self_sampling.TEMPERATURE, self_sampling.WIDTH = before
