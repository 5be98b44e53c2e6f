"""Turn a quantized checkpoint into plain safetensors that stock transformers loads.

    python -m benchmarks.slimming.dequantize RESULT OUT [--dtype float32]

Reads GPTQ (version 1 and 2; the names of the family on disk, or those of GPTQModel), the
``pack-quantized`` format of compressed-tensors, and plain tensors. The decoding is written
from the formats alone and shares nothing with moe2edge. One matrix is in memory at a time, and any
tensor that is missing, unexpected or of another shape is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe2edge.storage.safetensors_files import PlannedTensor, write_checkpoint
from moe2edge.storage.text_files import write_json

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
Reader = Callable[[str, Read, "Format"], Tensor]


# ---- names -------------------------------------------------------------------------------------


def list_expected(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of each matrix and vector of the family, by its name without ``.weight``."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{k}": s for k, s in _block(config).items()}
    return shapes


def _block(config: Mapping[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, config["num_key_value_heads"] * size
    shapes: Shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    if config["model_type"] == "mixtral":
        stem, parts, experts = "block_sparse_moe", ("w1", "w3", "w2"), config["num_local_experts"]
    elif config["model_type"] == "olmoe":
        stem, parts, experts = "mlp", tuple(MIXTRAL), config["num_experts"]
        shapes |= {"self_attn.q_norm": (queries,), "self_attn.k_norm": (keys,)}
    else:
        raise SystemExit(f"{config['model_type']} is no family that this script knows")
    shapes[f"{stem}.gate"] = (experts, hidden)
    width = config["intermediate_size"]
    gate, up, down = parts
    for n in range(experts):
        shapes[f"{stem}.experts.{n}.{gate}"] = (width, hidden)
        shapes[f"{stem}.experts.{n}.{up}"] = (width, hidden)
        shapes[f"{stem}.experts.{n}.{down}"] = (hidden, width)
    return shapes


def find_disk_name(name: str, model_type: str) -> str:
    """Return the family's name on disk for a name of GPTQModel or llm-compressor."""
    if model_type != "mixtral":
        return name
    name = re.sub(r"\.mlp\.(?=gate$|experts\.)", ".block_sparse_moe.", name)
    return re.sub(r"(?<=\.)(gate|up|down)_proj$", lambda m: MIXTRAL[m[0]], name)


# ---- formats -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """The format of stored matrices.

    Attributes:
        bits: per weight.
        group_size: inputs that share a scale.
        less: number that was subtracted from stored zero points (GPTQ version 1).
    """

    bits: int
    group_size: int
    less: int = 0


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words [rows, n] without gaps into integers [rows, n * 32 / bits].

    The lowest bits of a word come first, and with 3 bits some numbers lie across two words. GPTQ
    and compressed-tensors have this in common.
    """
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    at = torch.arange(words.shape[1] * 32 // bits) * bits
    word, shift = at // 32, at % 32
    return (wide[:, word] >> shift | wide[:, word + 1] << (32 - shift)) & ((1 << bits) - 1)


def read_gptq(stem: str, read: Read, form: Format) -> Tensor:
    """Read a matrix [out, in] of GPTQ, which packs and stores it transposed."""
    q = unpack(read(f"{stem}.qweight").T, form.bits)
    zeros = unpack(read(f"{stem}.qzeros"), form.bits).T + form.less
    scales, groups = read(f"{stem}.scales").T.float(), read(f"{stem}.g_idx").long()
    return (q - zeros[:, groups]).float() * scales[:, groups]


def read_packed(stem: str, read: Read, form: Format) -> Tensor:
    """Read a matrix [out, in] of compressed-tensors, symmetric."""
    outs, ins = read(f"{stem}.weight_shape").tolist()
    q = unpack(read(f"{stem}.weight_packed"), form.bits)[:outs, :ins]
    groups = torch.arange(ins) // form.group_size
    scales = read(f"{stem}.weight_scale").float()
    return (q - (1 << form.bits - 1)).float() * scales[:, groups]


def read_plain(stem: str, read: Read, form: Format) -> Tensor:
    """Read a tensor that is stored as it is."""
    return read(f"{stem}.weight").float()


READERS: dict[frozenset[str], Reader] = {
    frozenset({"qweight", "qzeros", "scales", "g_idx"}): read_gptq,
    frozenset({"weight_packed", "weight_scale", "weight_shape"}): read_packed,
    frozenset({"weight"}): read_plain,
}


def parse_format(config: Mapping[str, Any]) -> Format:
    """Return the format that ``config.json`` gives for the weights.

    Raises:
        SystemExit: it is none of the formats that are read here.
    """
    found = config.get("quantization_config")
    if found is None:
        return Format(bits=0, group_size=0)
    if found["quant_method"] == "gptq":
        versions = {"gptq": 1, "gptq_v2": 0}
        return Format(found["bits"], found["group_size"], versions[found["checkpoint_format"]])
    (group,) = found["config_groups"].values()
    weights = group["weights"]
    known = {"type": "int", "strategy": "group", "symmetric": True}
    if found["format"] != "pack-quantized" or any(weights[k] != v for k, v in known.items()):
        raise SystemExit(f"this is read here: pack-quantized, {known}; found {weights}")
    if weights["actorder"] not in (None, "static"):
        raise SystemExit(f"activation order {weights['actorder']} is not read here")
    return Format(weights["num_bits"], weights["group_size"])


# ---- from folder to folder ---------------------------------------------------------------------


def open_tensors(folder: Path, files: ExitStack) -> dict[str, Read]:
    """Return a function to read each tensor of a folder."""
    found: dict[str, Read] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = files.enter_context(safe_open(path, "pt"))
        found |= {name: file.get_tensor for name in file.keys()}  # noqa: SIM118
    return found


def group_by_matrix(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the parts of each matrix, by its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        stem, _, part = name.rpartition(".")
        found[stem].add(part)
    return found


def check_names(stems: Mapping[str, str], shapes: Shapes) -> None:
    """Refuse a folder that lacks a matrix or has one too many.

    Raises:
        SystemExit: with some names.
    """
    if missing := sorted(set(shapes) - set(stems)):
        raise SystemExit(f"{len(missing)} missing: {missing[:5]}")
    if unexpected := sorted(set(stems) - set(shapes)):
        raise SystemExit(f"{len(unexpected)} unexpected: {unexpected[:5]}")


def dequantize(result: Path, out: Path, dtype: str) -> None:
    """Write the plain model.

    Raises:
        SystemExit: a tensor is missing, unexpected, of another shape or kind, or not finite.
    """
    config = json.loads((result / "config.json").read_text())
    form = parse_format(config)
    shapes = list_expected(config)
    spelled, torch_dtype = DTYPES[dtype]
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        reads = open_tensors(result, files)
        parts = group_by_matrix(reads)
        # A tied head is left out on disk, but GPTQModel may write it.
        if config["tie_word_embeddings"]:
            parts.pop("lm_head", None)
        stems = {find_disk_name(stem, config["model_type"]): stem for stem in parts}
        if len(stems) < len(parts):
            raise SystemExit("the folder has two tensors for one place")
        check_names(stems, shapes)

        def make(name: str) -> Tensor:
            stem = stems[name]
            reader = READERS.get(frozenset(parts[stem]))
            if reader is None:
                raise SystemExit(f"{stem} has {sorted(parts[stem])}, which is no known format")
            tensor = reader(stem, lambda key: reads[key](key), form)
            if tuple(tensor.shape) != shapes[name]:
                raise SystemExit(f"{stem} has {tuple(tensor.shape)}, expected {shapes[name]}")
            if not tensor.isfinite().all():
                raise SystemExit(f"{stem} has numbers that are not finite")
            return tensor.to(torch_dtype)

        write_checkpoint(
            out,
            [PlannedTensor(f"{n}.weight", s, spelled, partial(make, n)) for n, s in shapes.items()],
        )
    for name in COPIED:
        if (result / name).exists():
            shutil.copyfile(result / name, out / name)
    config.pop("quantization_config", None)
    write_json(out / "config.json", {**config, "dtype": dtype})


def main() -> None:
    """Dequantize a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    given = parser.parse_args()
    dequantize(given.result, given.out, given.dtype)


if __name__ == "__main__":
    main()
