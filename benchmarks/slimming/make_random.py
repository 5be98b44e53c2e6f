"""A Mixtral of random weights in bfloat16, for time and memory; says nothing about quality.

python -m benchmarks.slimming.make_random OUT [--blocks 11] [--hidden 1024] [--width 3584]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe2edge.storage.checkpoint import BUILTIN_FOLDER

HEAD_SIZE, HEADS_PER_KEY = 64, 4
SPREAD = 0.02
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

Shapes = dict[str, tuple[int, ...]]


def make_config(
    blocks: int, hidden: int, width: int, experts: int, vocabulary: int
) -> dict[str, object]:
    """Return the content of ``config.json``."""
    heads = hidden // HEAD_SIZE
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": SPREAD,
        "intermediate_size": width,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": blocks,
        "num_key_value_heads": max(heads // HEADS_PER_KEY, 1),
        "num_local_experts": experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def list_block_shapes(index: int, hidden: int, width: int, experts: int) -> Shapes:
    """Return the shapes of the tensors of a block, by their names on disk."""
    keys = max(hidden // HEAD_SIZE // HEADS_PER_KEY, 1) * HEAD_SIZE
    stem = f"model.layers.{index}"
    shapes: Shapes = {
        f"{stem}.input_layernorm.weight": (hidden,),
        f"{stem}.post_attention_layernorm.weight": (hidden,),
        f"{stem}.self_attn.q_proj.weight": (hidden, hidden),
        f"{stem}.self_attn.k_proj.weight": (keys, hidden),
        f"{stem}.self_attn.v_proj.weight": (keys, hidden),
        f"{stem}.self_attn.o_proj.weight": (hidden, hidden),
        f"{stem}.block_sparse_moe.gate.weight": (experts, hidden),
    }
    for n in range(experts):
        expert = f"{stem}.block_sparse_moe.experts.{n}"
        shapes[f"{expert}.w1.weight"] = (width, hidden)
        shapes[f"{expert}.w2.weight"] = (hidden, width)
        shapes[f"{expert}.w3.weight"] = (width, hidden)
    return shapes


def list_shards(
    blocks: int, hidden: int, width: int, experts: int, vocabulary: int
) -> Iterator[Shapes]:
    """Yield the shapes of each file: embeddings, a block each, norm and head."""
    yield {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(blocks):
        yield list_block_shapes(index, hidden, width, experts)
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def draw_numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return ones for a norm, else normal random numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * SPREAD).to(torch.bfloat16)


def make_random(out: Path, blocks: int, hidden: int, width: int, experts: int, seed: int) -> Path:
    """Write the model, one file's tensors in memory at a time."""
    vocabulary = len(json.loads((BUILTIN_FOLDER / "tokenizer.json").read_text())["model"]["vocab"])
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    size = 0
    for n, shapes in enumerate(list_shards(blocks, hidden, width, experts, vocabulary), start=1):
        name = f"model-{n:05}-of-{blocks + 2:05}.safetensors"
        tensors = {key: draw_numbers(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(BUILTIN_FOLDER / name, out / name)
    # Last, because a folder with a config is taken for a model that is complete.
    found = make_config(blocks, hidden, width, experts, vocabulary)
    (out / "config.json").write_text(json.dumps(found, indent=2))
    return out


def main() -> None:
    """Write a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make_random(given.out, given.blocks, given.hidden, given.width, given.experts, given.seed)


if __name__ == "__main__":
    main()
