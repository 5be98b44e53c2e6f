"""A source model with held-out text: what compressed models are compared on, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks._study import QUIET
from moe2edge import Checkpoint, Model
from moe2edge.calibration import tokens, walk
from moe2edge.calibration.tokens import Tokens
from moe2edge.commands.texts import choose_text
from moe2edge.numerics import metrics
from moe2edge.pipeline.recipe import parse_section
from moe2edge.storage.tokenizer import load_tokenizer


def describe_text(
    files: Mapping[str, Path], domains: Sequence[str], samples: int, length: int, seed: int = 0
) -> dict[str, Any]:
    """Return a text section of a recipe: samples in equal parts of some domains.

    Args:
        files: of each domain; none: the built-in text.
        domains: what is taken of them.
        samples: in all.
        length: tokens in a sample.
        seed: decides which samples.
    """
    options: dict[str, Any] = {"samples": samples, "length": length, "seed": seed}
    if files:
        options["text"] = ",".join(f"{domain}:1" for domain in domains)
        options["sources"] = {domain: {"text": str(files[domain])} for domain in domains}
    return options


def load_samples(checkpoint: Checkpoint, purpose: str, text: Mapping[str, Any]) -> Tokens:
    """Return the samples that a text section of a recipe means for a model."""
    source = choose_text(parse_section(purpose, text), checkpoint.source)
    limits = (source.length, checkpoint.model.vocabulary)
    return tokens.load_tokens(source, load_tokenizer(checkpoint.folder), purpose, limits)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, and what the source makes of it.

    Attributes:
        source: the model.
        ids: int64 [samples, length] by domain.
        hidden: states of the source behind its last block, float32 [samples, length, hidden].
    """

    source: Model
    ids: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]

    @classmethod
    def run(cls, source: Model, ids: Mapping[str, Tensor]) -> HeldOut:
        """Run the source over the text."""
        return cls(source, ids, {domain: _run(source, part) for domain, part in ids.items()})

    def measure(self, model: Model, observers: Sequence[Any] = ()) -> dict[str, Any]:
        """Return perplexity, and KL to the source in nats per token, of each domain.

        Args:
            model: to be compared.
            observers: take in what its blocks do.
        """
        found: dict[str, Any] = {"perplexity": {}, "kl": {}}
        for domain, ids in self.ids.items():
            hidden = _run(model, ids, observers)
            source = walk.compute_logits(self.source, self.hidden[domain])
            result = metrics.measure(ids, walk.compute_logits(model, hidden), source)
            found["perplexity"][domain] = result.perplexity
            found["kl"][domain] = result.kl
        return found


def _run(model: Model, ids: Tensor, observers: Sequence[Any] = ()) -> Tensor:
    return walk.observe(model, ids, observers, QUIET.advance, "")
