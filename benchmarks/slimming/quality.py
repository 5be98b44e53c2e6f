"""Perplexity of a model and of its source, and KL(source || model), with stock transformers.

    python -m benchmarks.slimming.quality SOURCE PLAIN EVAL.npy

In float32; nats per token; one JSON document on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: Path) -> Any:
    """Load the model in float32, if stock transformers finds every tensor and no other."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise SystemExit(f"{folder}: {what}: {sorted(map(str, found[what]))[:5]}")
    return model.eval()


def compute_log_probabilities(model: Any, row: Tensor) -> Tensor:
    """Compute log-probabilities of next tokens of a sample, float32 [length - 1, vocabulary]."""
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)


@torch.no_grad()
def measure(source: Any, model: Any, ids: Tensor) -> dict[str, float]:
    """Compute the figures over all samples, int64 [samples, length]."""
    nll = {"source": 0.0, "result": 0.0}
    kl, agree = 0.0, 0
    for row in ids:
        theirs, mine = compute_log_probabilities(source, row), compute_log_probabilities(model, row)
        for name, log in (("source", theirs), ("result", mine)):
            nll[name] -= float(log.gather(1, row[1:, None]).double().sum())
        kl += float((theirs.exp() * (theirs - mine)).double().sum())
        agree += int((theirs.argmax(-1) == mine.argmax(-1)).sum())
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return {
        "tokens": tokens,
        "source_perplexity": math.exp(nll["source"] / tokens),
        "perplexity": math.exp(nll["result"] / tokens),
        "kl": kl / tokens,
        "top1": agree / tokens,
    }


def main() -> None:
    """Compare two folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("eval", type=Path, help="int64 [samples, length], .npy")
    given = parser.parse_args()
    ids = torch.from_numpy(np.load(given.eval))
    print(json.dumps(measure(load(given.source), load(given.plain), ids)))


if __name__ == "__main__":
    main()
