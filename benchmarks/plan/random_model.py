"""Write a checkpoint of random numbers for a config, tensor by tensor, with the built-in tokenizer.

A vocabulary that is larger than the tokenizer's is filled by entries that no text has. ::

    python -m benchmarks.plan.random_model wide out-wide
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe2edge.storage.checkpoint import BUILTIN_FOLDER
from moe2edge.storage.hollow import plan_checkpoint
from moe2edge.storage.safetensors_files import PlannedTensor, write_checkpoint

_QWEN = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu",
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "max_position_embeddings": 4096,
    "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "eos_token_id": 0, "num_hidden_layers": 8,
    "intermediate_size": 2048,
}  # fmt: skip
# Models that are small enough to be exported in a minute or two.
MODELS: Mapping[str, Mapping[str, Any]] = {
    # 0.46 billion parameters, most of them in experts.
    "wide": {
        **_QWEN, "hidden_size": 1024, "moe_intermediate_size": 512, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 32000,
    },
}  # fmt: skip


def write_random_model(config: Mapping[str, Any], folder: Path) -> Path:
    """Write config, tokenizer and random weights into a new folder, and return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUILTIN_FOLDER / name, folder / name)
    draw = torch.Generator().manual_seed(0)
    write_checkpoint(folder, [_fill(one, draw) for one in plan_checkpoint(config)])
    return folder


def _fill(planned: PlannedTensor, draw: torch.Generator) -> PlannedTensor:
    """Give a planned tensor numbers with which hidden states stay of one size."""

    def make() -> Tensor:
        if len(planned.shape) == 1:
            return torch.ones(planned.shape, dtype=torch.bfloat16)
        numbers = torch.randn(planned.shape, generator=draw, dtype=torch.bfloat16)
        return numbers.mul_(planned.shape[-1] ** -0.5)

    return replace(planned, make=make)


if __name__ == "__main__":
    write_random_model(MODELS[sys.argv[1]], Path(sys.argv[2]))
