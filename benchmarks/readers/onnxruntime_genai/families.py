"""Run one random model of every family in onnxruntime-genai; exits with 1 if one disagrees.

    ENVIRONMENT/bin/python benchmarks/readers/onnxruntime_genai/families.py

ENVIRONMENT is made by `run.sh`. Windows, biases and dense blocks are switched on where the family
has them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from read import compare

import moe2edge
from moe2edge.testing import make_checkpoint, make_tokenizer

SWITCHES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 24},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"attention_bias": True, "num_key_value_heads": 1},
    "olmoe": {"clip_qkv": 4.0, "norm_topk_prob": True},
}
SIZES = ["evaluation.samples=3", "evaluation.length=64"]


def main() -> int:
    """Compare every family; return the exit code."""
    passed = True
    for family, switches in SWITCHES.items():
        with tempfile.TemporaryDirectory() as parent:
            source, out = Path(parent) / "source", Path(parent) / "out"
            make_checkpoint(source, family, **switches)
            make_tokenizer(source)
            moe2edge.export(source, moe2edge.parse_recipe("w4-rtn", SIZES), "onnx", out)
            rows, ok = compare(out)
        settings = ", ".join(f"{key}={value}" for key, value in switches.items())
        print(f"{family}, {settings}")
        for name, value in rows.items():
            print(f"  {name:26} {value}")
        passed &= ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
