"""Run layers without a router, without an MLP, and with dynamic skipping in onnxruntime-genai.

    ENVIRONMENT/bin/python benchmarks/genai_reader/forms.py

ENVIRONMENT is the one that `run.sh` makes. One random model for each family and form, int4; exits
with 1 if one disagrees with our own session on the same graph.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from click.testing import CliRunner
from read import compare

from moe2edge.cli import main as moe2edge
from moe2edge.families import FAMILIES
from moe2edge.testing import make_checkpoint, make_tokenizer

# What is done to a model of three layers with six experts, and the source's top-k.
FORMS = {
    "a dropped layer": ("{layer_drop: {drop: 1}}", 2),
    "a norm alone": ("{layer_drop: {drop: 1, norm: false}}", 2),
    "an expert alone": ("{expert_drop: {keep: [6, 1, 6], clamp_top_k: true}}", 2),
    "no routed expert": ("{expert_drop: {keep: [6, 0, 6], clamp_top_k: true}}", 2),
    "skipping, top-2": ("expert_skip", 2),
    "skipping, top-3": ("expert_skip", 3),
}
SIZES = [
    "--set", "evaluation.samples=3", "--set", "evaluation.length=64",
    "--set", "calibration.samples=2", "--set", "calibration.length=64",
]  # fmt: skip


def main() -> int:
    passed = True
    print(f"onnxruntime-genai {version('onnxruntime-genai')}")
    for family in FAMILIES:
        for name, (steps, top_k) in FORMS.items():
            with tempfile.TemporaryDirectory() as parent:
                source, out, recipe = (Path(parent) / part for part in ("in", "out", "r.yaml"))
                # Weights of a trained model's size: larger ones blow up what int8 rounds.
                make_checkpoint(source, family, num_experts_per_tok=top_k, initializer_range=0.05)
                make_tokenizer(source)
                recipe.write_text(f"passes: [{steps}, rtn]")
                command = ["export", str(source), "-t", "onnx", "-r", str(recipe), "-o", str(out)]
                result = CliRunner().invoke(moe2edge, [*command, *SIZES])
                if result.exit_code:
                    print(result.stderr)
                    return 1
                rows, ok = compare(out)
            difference = rows["logits, to our session"].partition(" ")[0]
            tokens = rows["greedy tokens, equal"]
            print(f"{family:10} {name:17} {difference} relative, {tokens} tokens: {rows['result']}")
            passed &= ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
