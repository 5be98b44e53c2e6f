"""Run in onnxruntime-genai: layers without router or MLP, with skipping, replaced, tied experts.

    ENVIRONMENT/bin/python benchmarks/readers/onnxruntime_genai/forms.py

ENVIRONMENT is made by `run.sh`. One random model for each family and form, int4; exits
with 1 if one disagrees with our own session on the same graph.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from read import compare

import moe2edge
from moe2edge.calibration import walk
from moe2edge.evaluation.reference import record
from moe2edge.model.experts import PARTS, Factors, Full, Tied
from moe2edge.model.family import FAMILIES
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import make_checkpoint, make_tokenizer, quantize

# Passes for a model of three layers with six experts, and the source's top-k.
FORMS = {
    "a dropped layer": ("{layer_drop: {drop: 1}}", 2),
    "a norm alone": ("{layer_drop: {drop: 1, norm: false}}", 2),
    "an expert alone": ("{expert_drop: {keep: [6, 1, 6], clamp_top_k: true}}", 2),
    "no routed expert": ("{expert_drop: {keep: [6, 0, 6], clamp_top_k: true}}", 2),
    "skipping, top-2": ("expert_skip", 2),
    "skipping, top-3": ("expert_skip", 3),
    "constants": ("{expert_replace: {with: constant, keep: 3}}", 2),
    "linear maps": ("{expert_replace: {with: linear, keep: 3, rank: 4, min_tokens: 0}}", 2),
    "maps and skipping": (
        "expert_skip, {expert_replace: {with: linear, keep: 2, rank: 4, min_tokens: 0}}",
        3,
    ),
    # With random factors, by no recipe.
    "members": ("", 2),
}
TEXTS = {
    "evaluation": {"samples": 3, "length": 64},
    "calibration": {"samples": 2, "length": 64},
}


def export_passes(source: Path, steps: str, out: Path) -> None:
    """Export the source after the passes ``steps`` and `rtn`."""
    recipe = {**TEXTS, "passes": yaml.safe_load(f"[{steps}, rtn]")}
    moe2edge.export(source, recipe, "onnx", out)


def export_tied(source: Path, _: str, out: Path) -> None:
    """Export tied experts: two with factors on a base, two without, and one of factors alone."""
    model = quantize(moe2edge.open_checkpoint(source).model, Scheme(group_size=32))
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Weight:
        numbers = 0.05 * torch.randn(shape, generator=draw)
        return Weight("new", shape, "F32", lambda: numbers)

    for block, layer in model.moe_blocks:
        shapes = {part: getattr(layer.experts[0], part).shape for part in PARTS}

        def factors(shapes: dict[str, tuple[int, int]] = shapes) -> dict[str, Factors]:
            return {p: Factors(weight(4, i), weight(o, 4)) for p, (o, i) in shapes.items()}

        rows = (
            Tied(0, 0, factors()),
            Tied(1, 0, factors()),
            Full(2, 1),
            Full(3, 1),
            Full(4, 2),
            Tied(5, None, factors()),
        )
        mlp = replace(layer, experts=layer.experts[:3], rows=rows)
        model = model.replace_block(replace(block, mlp=mlp))
    out.mkdir()
    make_tokenizer(out)
    Onnx().write(model, out)
    ids = torch.randint(1, 96, (2, 64), generator=draw)
    hidden = walk.observe(model, ids, (), lambda *_: None, "")
    record(model, ids, None, hidden).save(out)


def main() -> int:
    """Compare every family and form; return the exit code."""
    passed = True
    print(f"onnxruntime-genai {version('onnxruntime-genai')}")
    for family in FAMILIES:
        for name, (steps, top_k) in FORMS.items():
            with tempfile.TemporaryDirectory() as parent:
                source, out = Path(parent) / "in", Path(parent) / "out"
                # Weights of a trained model's size: larger ones blow up what int8 rounds.
                make_checkpoint(source, family, num_experts_per_tok=top_k, initializer_range=0.05)
                make_tokenizer(source)
                (export_passes if steps else export_tied)(source, steps, out)
                rows, ok = compare(out)
            difference = rows["logits, to our session"].partition(" ")[0]
            tokens = rows["greedy tokens, equal"]
            print(f"{family:10} {name:17} {difference} relative, {tokens} tokens: {rows['result']}")
            passed &= ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
