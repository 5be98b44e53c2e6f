"""Write a random OLMoE of the built-in model's shape as a GPTQ checkpoint, rounded to nearest.

python benchmarks/readers/gptqmodel/make_random.py FOLDER [FAMILY]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from moe2edge import open_checkpoint
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.testing import make_checkpoint, make_tokenizer, quantize

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
WIDTHS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 16, "intermediate_size": 128},
    "mixtral": {"num_local_experts": 16, "intermediate_size": 128},
    "qwen2_moe": {
        "num_experts": 16,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "qwen3_moe": {"num_local_experts": 16, "moe_intermediate_size": 128, "intermediate_size": 256},
}


def main(folder: Path, family: str = "olmoe") -> None:
    """Make the source in a temporary folder, and the checkpoint in ``folder``."""
    with tempfile.TemporaryDirectory() as source:
        settings = {**SHAPE, **WIDTHS[family]}
        make_checkpoint(Path(source), family, dtype="bfloat16", **settings)
        model = quantize(open_checkpoint(source).model, Scheme(group_size=128))
        folder.mkdir(parents=True)
        find_target("gptq").accepts(model)
        find_target("gptq").write(model, folder)
    make_tokenizer(folder)
    print(f"{folder}: {model.parameters:,} parameters, group {model.scheme}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
