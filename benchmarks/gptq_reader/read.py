"""Hold what GPTQModel reads from a folder against what moe2edge wrote.

Called by ``run.sh``. Dequantized weights must be equal to the bit; logits, which GPTQModel's CPU
kernels compute in bfloat16, must be within 5 % of those of ``moe2edge.load`` in float32.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel

import moe2edge
from moe2edge.packing import unpack_int32
from moe2edge.registry import target
from moe2edge.rounding import Quantized, dequantize

LIMIT = 0.05


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """Weights [out, in] of a quantized linear module, from the tensors that GPTQModel holds.

    In memory it holds version 2 of the format, whose zero points are not stored minus one.
    """
    q = unpack_int32(module.qweight, dim=0).T.float()
    zeros = unpack_int32(module.qzeros, dim=1).T.float()
    scales = module.scales.T.float()
    groups = module.g_idx.long()
    return (q - zeros[:, groups]) * scales[:, groups]


def main(folder: Path) -> int:
    theirs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    modules = dict(theirs.model.named_modules())
    compared = different = 0
    for name, value in target("gptq").tensors(folder):
        if not isinstance(value, Quantized):
            continue
        module = modules[name.removesuffix(".weight")]
        mine = dequantize(value.q, value.scales, value.scheme)
        compared += 1
        different += not torch.equal(dequantized(module), mine)
    ids = torch.arange(1, 65)[None] * 37 % theirs.model.config.vocab_size
    with torch.no_grad():
        found = theirs.model(input_ids=ids).logits.float()
        expected = moe2edge.load(folder, dtype=torch.float32)(ids).logits
    relative = float((found - expected).norm() / expected.norm())
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    versions = {n: importlib.metadata.version(n) for n in ("gptqmodel", "torch", "transformers")}
    print(f"read by: {versions}")
    print(f"quantized matrices: {compared}, with other numbers: {different}")
    print(f"logits: relative error {relative:.4f} (limit {LIMIT}), same top-1 {agree:.1%}")
    return int(different > 0 or compared == 0 or relative > LIMIT)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
