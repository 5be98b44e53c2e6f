"""Experts that Expert Drop keeps when it scores in bfloat16 products, and in float32 ones.

    python -m benchmarks.trimming.compute MODEL ...

For every criterion that needs a walk and three numbers of dropped experts, choices are compared.
Where they differ, the KL divergence from the source is measured for both. MODEL has weights in
bfloat16. A processor without native products computes the same numbers, slowly.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import moe2edge
from benchmarks._held_out import load_samples
from moe2edge.calibration import walk
from moe2edge.calibration.observation import Facts
from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver
from moe2edge.model.model import Model
from moe2edge.numerics import metrics
from moe2edge.passes.expert_drop import ExpertDrop

CRITERIA = ("routing-score", "frequency", "soft-frequency", "ean", "reap", "man", "msan", "mone")
KEPT = (0.75, 0.5, 0.25)


def gather(model: Model, ids: Tensor, dtype: torch.dtype) -> Facts:
    """Return what the criteria need, from a walk with products in ``dtype``."""
    kinds = (RoutingObserver, OutputObserver)
    return walk.gather(model, ids, kinds, lambda *_: None, "", dtype=dtype)


def measure_kl(source: Model, model: Model, ids: Tensor) -> float:
    """Return the mean KL divergence from the source, in nats per token."""
    found = [
        walk.compute_logits(one, walk.observe(one, ids, (), lambda *_: None, ""))
        for one in (model, source)
    ]
    kl = metrics.measure(ids, *found).kl
    assert kl is not None
    return kl


def compare(name: str) -> None:
    """Print the choices of a model that differ, and what they cost."""
    checkpoint = moe2edge.open_checkpoint(name)
    model = checkpoint.model
    texts = [
        load_samples(checkpoint, purpose, {"samples": count, "length": 512}).ids
        for purpose, count in (("calibration", 32), ("evaluation", 16))
    ]
    facts = [gather(model, texts[0], dtype) for dtype in (torch.float32, torch.bfloat16)]
    tried = differing = moved = 0
    for criterion in CRITERIA:
        for keep in KEPT:
            step = ExpertDrop(keep=keep, criterion=criterion, clamp_top_k=True)
            wide, narrow = (step.apply(model, found).model for found in facts)
            pairs = list(zip(wide.blocks, narrow.blocks, strict=True))
            others = sum(len({*a.expert_origins} - {*b.expert_origins}) for a, b in pairs)
            tried, moved = tried + sum(wide.expert_counts), moved + others
            if not others:
                continue
            differing += 1
            kl = [measure_kl(model, one, texts[1]) for one in (wide, narrow)]
            print(f"{name}: {criterion}, keep {keep}: {others} of {sum(wide.expert_counts)} others")
            print(f"    KL {kl[0]:.5f} in float32, {kl[1]:.5f} in bfloat16", flush=True)
    cases = len(CRITERIA) * len(KEPT)
    print(f"{name}: {differing} of {cases} choices differ, by {moved} of {tried} experts")


def main() -> None:
    """Compare the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    for name in parser.parse_args().models:
        compare(name)


if __name__ == "__main__":
    main()
