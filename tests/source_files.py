"""Checkpoints quantized in the formats of other programs, written from their definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme

# What programs quantize: matrices of attention and experts, not routers, embeddings and heads.
MATRIX = re.compile(r".*_proj\.weight|.*\.w[123]\.weight")
GROUP = 32


def as_words(bits: list[int]) -> list[int]:
    """Join bits, the lowest first, to signed words of 32."""
    words = []
    for start in range(0, len(bits), 32):
        word = sum(bit << n for n, bit in enumerate(bits[start : start + 32]))
        words.append(word - (1 << 32) if word >> 31 else word)
    return words


def stream(numbers: Tensor, bits: int) -> Tensor:
    """Pack rows as streams of bits."""
    rows = [
        as_words([int(n) >> b & 1 for n in row for b in range(bits)]) for row in numbers.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def mix_columns(rows: Tensor) -> Tensor:
    """Put columns in the order of AWQ: of eight, the first, the third, ..., then the others."""
    return rows.reshape(len(rows), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)


# ---- whole folders -------------------------------------------------------------------------------


def encode_gptq(weight: Tensor) -> dict[str, Tensor]:
    """Encode a matrix as GPTQModel does."""
    numbers = round_to_nearest(weight, Scheme(4, GROUP))
    scales = (numbers.scales * 1.001).half()  # not exact in bfloat16
    middle = torch.full((scales.shape[1], len(weight)), 7)
    order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {
        "qweight": stream(numbers.q, 4).T,
        "qzeros": stream(middle, 4),
        "scales": scales.T,
        "g_idx": order,
    }


def encode_ordered(weight: Tensor) -> dict[str, Tensor]:
    """Encode a matrix as GPTQModel does with desc_act: inputs belong to groups in any order."""
    count = weight.shape[1]
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = encode_gptq(weight[:, mixed])
    back = mixed.argsort()
    numbers = round_to_nearest(weight[:, mixed], Scheme(4, GROUP))
    return {**parts, "qweight": stream(numbers.q[:, back], 4).T, "g_idx": parts["g_idx"][back]}


def encode_awq(weight: Tensor) -> dict[str, Tensor]:
    """Encode a matrix as AutoAWQ does."""
    numbers = round_to_nearest(weight, Scheme(4, GROUP, symmetric=False))
    assert numbers.zeros is not None
    return {
        "qweight": stream(mix_columns(numbers.q.T), 4),
        "qzeros": stream(mix_columns(numbers.zeros.T), 4),
        "scales": numbers.scales.half().T,
    }


def encode_packed(weight: Tensor) -> dict[str, Tensor]:
    """Encode a matrix as llm-compressor does."""
    numbers = round_to_nearest(weight, Scheme(4, GROUP))
    return {
        "weight_packed": stream(numbers.q, 4),
        "weight_scale": numbers.scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def encode_fp8(weight: Tensor) -> dict[str, Tensor]:
    """Encode a matrix in blocks of 24, of which those at the edges are short."""
    rows, columns = (-(-n // 24) for n in weight.shape)
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.5
    spread = scales.repeat_interleave(24, 0).repeat_interleave(24, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    return {"weight": (weight / spread).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {**GPTQ, "checkpoint_format": "gptq"},
    "gptq, ordered": {**GPTQ, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
            }
        },
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [24, 24]},
}
ENCODERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "gptq": encode_gptq,
    "gptq, ordered": encode_ordered,
    "awq": encode_awq,
    "compressed-tensors": encode_packed,
    "fp8": encode_fp8,
}


def rename(stem: str, form: str) -> str:
    """Return the name that the usual program of a format gives a module of Mixtral."""
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    if form == "fp8" or ".block_sparse_moe." not in stem:
        return stem
    if form != "compressed-tensors" and re.search(r"\.(w[123]|gate)$", stem):
        stem = stem.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"w[123]$", lambda found: parts[found[0]], stem)


def split_experts(name: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield single experts of a tensor [experts, out, in] of all, or the tensor itself.

    Experts that lie otherwise are left as they are.
    """
    tensor, (stem, _, kind) = tensors[name], name.rpartition(".")
    both, down = (tensors.get(f"{stem}.{part}") for part in ("gate_up_proj", "down_proj"))
    if both is None or down is None or both.shape[1:] != (2 * down.shape[2], down.shape[1]):
        yield name, tensor
        return
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    for n, expert in enumerate(tensor):
        for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{stem}.{n}.{part}.weight", matrix.contiguous()


def quantize_folder(source: Path, out: Path, form: str) -> dict[str, dict[str, Tensor]]:
    """Write a checkpoint in another format; return the parts of each matrix by its plain name.

    Matrices whose rows are no whole groups stay as they are, as in the programs themselves.
    """
    out.mkdir()
    written: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    tensors = load_file(source / "model.safetensors")
    for name, tensor in {k: v for old in tensors for k, v in split_experts(old, tensors)}.items():
        stem = rename(name.removesuffix(".weight"), form)
        if not MATRIX.fullmatch(name) or tensor.shape[1] % GROUP or len(tensor) % 8:
            written[f"{stem}.weight" if name.endswith(".weight") else stem] = tensor
            continue
        parts[name] = {k: v.contiguous() for k, v in ENCODERS[form](tensor.float()).items()}
        written |= {f"{stem}.{part}": value for part, value in parts[name].items()}
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = SETTINGS[form]
    (out / "config.json").write_text(json.dumps(config))
    for path in source.glob("*token*"):
        (out / path.name).write_bytes(path.read_bytes())
    return parts
