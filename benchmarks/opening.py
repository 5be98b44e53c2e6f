"""Time and memory of opening a checkpoint with as many tensors as a model of 30 billion weights.

48 blocks of 128 experts, which are 18,432 matrices in 16 files, in the layouts of Qwen3-30B-A3B and
GLM-4.5, a family without a row. The files are sparse and take no room on the disk. Each opening is
a process of its own; what importing the libraries takes is not counted. ::

    python -m benchmarks.opening [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

BLOCKS, EXPERTS, FILES = 48, 128, 16
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD, VOCAB = 2048, 768, 32, 4, 128, 151936
CONFIG = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 6144,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "num_experts_per_tok": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
OWN = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 0},
}
# Opens a folder and prints seconds, those of the process, and bytes, all beyond the imports.
OPEN = """
import json, sys, time
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, CONFIG_MAPPING
from moe2edge.storage.checkpoint import open_checkpoint
import importlib
for name in ("architecture", "build", "hf_config", "config_parser"):
    importlib.import_module("moe2edge.model." + name)
kind = sys.argv[2]
importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")

def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before, begun, cpu = used(), time.perf_counter(), time.process_time()
model = open_checkpoint(Path(sys.argv[1])).model
seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
assert len(model.blocks) == 48 and list(model.expert_counts) == [128] * 48
print(json.dumps([seconds, cpu, used() - before]))
"""


def list_tensors(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of a model of the family."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for block in range(BLOCKS):
        layer = f"model.layers.{block}"
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{layer}.self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
        yield f"{layer}.self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"{layer}.self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
        mlps = [f"{layer}.mlp.experts.{expert}" for expert in range(EXPERTS)]
        if family == "qwen3_moe":
            yield f"{layer}.self_attn.q_norm.weight", (HEAD,)
            yield f"{layer}.self_attn.k_norm.weight", (HEAD,)
        else:
            yield f"{layer}.mlp.gate.e_score_correction_bias", (EXPERTS,)
            mlps.append(f"{layer}.mlp.shared_experts")
        for mlp in mlps:
            yield f"{mlp}.gate_proj.weight", (WIDTH, HIDDEN)
            yield f"{mlp}.up_proj.weight", (WIDTH, HIDDEN)
            yield f"{mlp}.down_proj.weight", (HIDDEN, WIDTH)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_checkpoint(folder: Path, family: str) -> int:
    """Write sparse files with an index and a config; return the number of tensors."""
    tensors = list(list_tensors(family))
    names, size = {}, -(-len(tensors) // FILES)
    for n in range(FILES):
        file, header, at = f"model-{n + 1:05}-of-{FILES:05}.safetensors", {}, 0
        for name, shape in tensors[n * size : (n + 1) * size]:
            ends = [at, at + 2 * prod(shape)]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": ends}
            names[name], at = file, ends[1]
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": family, **CONFIG, **OWN[family]}
    (folder / "config.json").write_text(json.dumps(config))
    return len(tensors)


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for family in OWN:
        with tempfile.TemporaryDirectory() as place:
            count = write_checkpoint(Path(place), family)
            command = [sys.executable, "-c", OPEN, place, family]
            found = []
            for _ in range(given.rounds):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        seconds, cpu, nbytes = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"{family}: {count:,} tensors opened in {seconds:.2f} s ({cpu:.2f} s of CPU), "
            f"{nbytes / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
