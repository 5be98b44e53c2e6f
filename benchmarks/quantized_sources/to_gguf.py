"""Write folders that GPTQModel quantized as GGUF files, and compare the integers.

    sh benchmarks/slimming/install_peers.sh PEERS       # GPTQModel
    python -m benchmarks.quantized_sources.to_gguf PEERS WORK

Needs ``pip install -e '.[cpu,gguf]'``. Tiny random Mixtral and Qwen3-MoE models are quantized in
groups of 32 and exported without a pass. Integers and scales of all experts are read from the
source by `benchmarks.slimming.dequantize`, and from the file by the library gguf; nothing of
moe2edge reads either. Exits with 1 where they differ.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.quantized_sources.run import (
    FAMILIES,
    PARTS,
    SIZES,
    list_peers,
    quantize,
    read_integers,
)
from moe2edge.storage.checkpoint import BUILTIN_FOLDER
from moe2edge.testing import make_checkpoint

# Bytes of a block of Q4_0: a scale, and two integers in each byte.
BLOCK, SCALE = 18, 2


def read_file(path: Path) -> dict[tuple[int, int, str], tuple[Tensor, ...]]:
    """Read integers, zero points and scales of each matrix of an expert, [out, ...]."""
    found = {}
    for one in gguf.GGUFReader(path).tensors:
        layer, _, part = one.name.removeprefix("blk.").removesuffix("_exps.weight").partition(".")
        if not one.name.endswith("_exps.weight"):
            continue
        assert one.tensor_type.name == "Q4_0", one.tensor_type
        blocks = np.array(one.data).reshape(*one.data.shape[:2], -1, BLOCK)
        scales = np.ascontiguousarray(blocks[..., :SCALE]).view(np.float16)[..., 0]
        bytes_ = blocks[..., SCALE:]
        q = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=-1)
        for expert, (rows, own) in enumerate(zip(q, scales, strict=True)):
            wide = torch.from_numpy(own.astype(np.float32))
            key = int(layer), expert, f"{part.removeprefix('ffn_')}_proj"
            found[key] = torch.from_numpy(rows).flatten(1), torch.full(wide.shape, 8), wide
    return found


def compare(source: Path, path: Path) -> tuple[int, int]:
    """Return how many matrices of experts are equal, and how many there are."""
    old, new = read_integers(source), read_file(path)
    assert old.keys() == new.keys(), (len(old), len(new))
    assert {part for _, _, part in new} == set(PARTS.values())
    equal = sum(
        all(torch.equal(a.float(), b.float()) for a, b in zip(old[key], new[key], strict=True))
        for key in new
    )
    return equal, len(new)


def main() -> int:
    """Print a line for each family; return 1 if integers differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peers", type=Path)
    parser.add_argument("work", type=Path)
    given = parser.parse_args()
    work, peers = given.work.resolve(), given.peers.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(1, 96, (16, 64)))
    print(f"GPTQModel 7.7.0, gguf {version('gguf')}, xllamacpp {version('xllamacpp')}")
    wrong = 0
    for family in FAMILIES:
        model = work / family
        if not model.exists():
            sizes = {k: v for k, v in SIZES.items() if family != "mixtral" or "moe_" not in k}
            sizes |= {} if family == "mixtral" else {"norm_topk_prob": True}
            make_checkpoint(model, family, dtype="bfloat16", vocab_size=4096, **sizes)
            for file in BUILTIN_FOLDER.glob("tokenizer*"):
                shutil.copy(file, model)
        name, command = next(list_peers(peers, model, tokens))
        folder, out = work / f"{family}-gptqmodel", work / f"{family}-gguf"
        if failed := quantize(command, folder):
            print(f"{family}: {name} made no folder: {failed}")
            return 1
        for file in model.glob("tokenizer*"):
            shutil.copy(file, folder)
        command = [sys.executable, "-m", "moe2edge", "export", folder, "-t", "gguf", "-o", out,
                   "-r", "as-is", "--eval", "none", "--force", "-q"]  # fmt: skip
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        equal, count = compare(folder, out / "model.gguf")
        wrong += equal != count
        print(f"{family}: integers and scales of {equal} of {count} matrices of experts equal")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
