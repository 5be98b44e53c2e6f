"""Compress and decompress matrices with compressed-tensors itself; run in its environment.

    python peer_compressor.py OUT

Writes one folder for each scheme: ``model.safetensors`` and ``config.json`` as compressed-tensors
makes them, and ``decompressed.safetensors`` with the numbers that it reads back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

STEM = "model.layers.0.mlp.experts.3.up_proj"
OUTS, INS = 64, 96
Parts = dict[str, torch.Tensor]


def make_integers(bits: int, *, symmetric: bool) -> tuple[str, dict[str, Any], Parts]:
    """Make integers in groups of 32 with their scales and zero points."""
    half = 1 << (bits - 1)
    scale = (torch.rand(OUTS, INS // 32) * 0.1 + 0.01).bfloat16()
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-half, half, scale.shape, dtype=torch.int8)
    q = torch.randint(-half, half, (OUTS, INS))
    spread = [each.float().repeat_interleave(32, 1) for each in (scale, zeros)]
    weight = ((q - spread[1]) * spread[0]).bfloat16()
    arguments = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": 32,
    }  # fmt: skip
    parts = {"weight": weight, "weight_scale": scale}
    return (
        "pack-quantized",
        arguments,
        parts if symmetric else {**parts, "weight_zero_point": zeros},
    )


def make_channels() -> tuple[str, dict[str, Any], Parts]:
    """Make integers of 8 bits with a scale for each row."""
    parts = {
        "weight": torch.randn(OUTS, INS).bfloat16(),
        "weight_scale": torch.full((OUTS, 1), 0.03),
    }
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return "int-quantized", arguments, {**parts, "weight_scale": parts["weight_scale"].bfloat16()}


def make_blocks() -> tuple[str, dict[str, Any], Parts]:
    """Make floats of 8 bits with a scale for each block of 32 by 32."""
    scale = torch.rand(OUTS // 32, INS // 32) * 0.01 + 0.01
    arguments = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "block",
        "block_structure": [32, 32],
    }  # fmt: skip
    return "float-quantized", arguments, {"weight": torch.randn(OUTS, INS), "weight_scale": scale}


def make_nvfp4() -> tuple[str, dict[str, Any], Parts]:
    """Make floats of 4 bits with scales of 16 and one of the whole."""
    scale = (torch.rand(OUTS, INS // 16) * 200 + 100).to(torch.float8_e4m3fn)
    parts = {
        "weight": torch.randn(OUTS, INS),
        "weight_scale": scale.float(),
        "weight_global_scale": torch.tensor([600.0]),
    }
    arguments = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
        "group_size": 16, "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    return "nvfp4-pack-quantized", arguments, parts


SCHEMES = {
    "int4": lambda: make_integers(4, symmetric=True),
    "int4-asymmetric": lambda: make_integers(4, symmetric=False),
    "int3": lambda: make_integers(3, symmetric=True),
    "int8-asymmetric": lambda: make_integers(8, symmetric=False),
    "w8": make_channels,
    "fp8-blocks": make_blocks,
    "nvfp4": make_nvfp4,
}


def main() -> None:
    """Write all schemes."""
    torch.manual_seed(0)
    for name, make in SCHEMES.items():
        form, arguments, parts = make()
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**arguments), format=form
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(dict(parts), scheme)
        weight = compressor.decompress(dict(stored), scheme)["weight"]
        out = Path(sys.argv[1]) / name
        out.mkdir(parents=True, exist_ok=True)
        tensors = {f"{STEM}.{part}": value.contiguous() for part, value in stored.items()}
        save_file(tensors, out / "model.safetensors")
        save_file({f"{STEM}.weight": weight.contiguous()}, out / "decompressed.safetensors")
        settings = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        }
        config = {
            "quantization_config": settings,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        (out / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
