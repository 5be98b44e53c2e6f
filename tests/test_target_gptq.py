"""What the target ``gptq`` accepts and writes; its numbers are tested in ``test_loading.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.model.block import is_quantizable
from moe2edge.model.family import FAMILIES
from moe2edge.model.hf_config import build_config
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage import safetensors_files
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, make_checkpoint

GPTQ = find_target("gptq")
Change = Callable[[Quantized], Quantized]


def rounded(weight: Weight, scheme: Scheme, change: Change = lambda q: q) -> Weight:
    """Return a handle on ``weight`` rounded to nearest."""

    def make() -> Quantized:
        return change(round_to_nearest(weight.load(), scheme))

    return replace(weight, load=lambda: make().dequantize(), scheme=scheme, load_quantized=make)


def quantized(
    folder: Path, group_size: int = 32, only: Callable[[str], bool] = is_quantizable
) -> Model:
    model = open_checkpoint(str(folder)).model
    scheme = Scheme(group_size=group_size)
    for block in model.blocks:
        new = {role: rounded(w, scheme) for role, w in block.weights() if only(role)}
        model = model.replace_block(block.with_weights(new))
    return model


def swap(model: Model, role: str, weight: Weight, index: int = 1) -> Model:
    return model.replace_block(model.blocks[index].with_weights({role: weight}))


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    GPTQ.accepts(model)
    GPTQ.write(model, folder)
    return folder


EXPERT = {
    "mixtral": "block_sparse_moe.experts.5.w2",
    "qwen2_moe": "mlp.experts.5.down_proj",
    "qwen3_moe": "mlp.experts.5.down_proj",
    "olmoe": "mlp.experts.5.down_proj",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family: str, tiny: Make, tmp_path: Path) -> None:
    model = quantized(tiny(family, dtype="bfloat16"))
    folder = written(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    stem = f"model.layers.1.{EXPERT[family]}"
    parts = {name: t for name, t in tensors.items() if name.startswith(f"{stem}.")}
    assert {n.removeprefix(f"{stem}."): (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        "qweight": (torch.int32, (4, 64)),  # [in / 8, out]
        "qzeros": (torch.int32, (1, 8)),  # [groups, out / 8]
        "scales": (torch.float16, (1, 64)),  # [groups, out]
        "g_idx": (torch.int32, (32,)),
    }
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            assert (tensor == 0x77777777).all()
        if name.endswith("g_idx"):
            assert torch.equal(tensor, (torch.arange(len(tensor)) // 32).int())
        if name.endswith(".weight"):
            assert tensor.dtype == torch.bfloat16
    # (nibble - 8) * scale, written out once by hand.
    number = int(tensors[f"{stem}.qweight"][2, 7]) >> 12 & 15
    value = (number - 8) * float(tensors[f"{stem}.scales"][0, 7])
    down = next(w for name, _, w in model.tensors() if name == f"{stem}.weight")
    assert float(down.load()[7, 2 * 8 + 3]) == value


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_config(group_size: int, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    model = quantized(make_checkpoint(tmp_path / "source", "olmoe", **wide), group_size)
    folder = written(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    assert [name.partition(":")[0] for name in settings.pop("meta")["quantizer"]] == ["moe2edge"]
    assert settings == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    assert config == add_older_spellings(build_config(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_reads_back(family: str, tiny: Make, tmp_path: Path) -> None:
    model = quantized(tiny(family))
    found = dict(GPTQ.tensors(written(model, tmp_path / "out")))
    assert found.keys() == {name for name, _, _ in model.tensors()}
    for name, _, weight in model.tensors():
        back = found[name]
        if weight.scheme is None:
            assert isinstance(back, torch.Tensor)
            assert torch.equal(back, weight.load())
        else:
            assert isinstance(back, Quantized)
            assert back.scheme == weight.scheme
            assert torch.equal(back.q, weight.quantized().q), name
            assert torch.equal(back.scales, weight.quantized().scales), name


def test_reopens_in_float32_or_as_users_run_it(tiny: Make, tmp_path: Path) -> None:
    folder = written(quantized(tiny("olmoe")), tmp_path / "out")
    exact, usual = GPTQ.reopen(folder, exact=True), GPTQ.reopen(folder)
    assert isinstance(exact, TorchRuntime)
    assert isinstance(usual, TorchRuntime)
    assert (exact.model.dtype, usual.model.dtype) == (torch.float32, torch.bfloat16)


def test_unquantized_models_are_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    with pytest.raises(
        Unsupported, match=r"not quantized, .*rtn or gptq, or export to hf"
    ) as caught:
        GPTQ.accepts(model)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("missed", "entries"),
    [
        # One of many of its name: each block names it.
        ("experts.3.up", [rf"-:model\.layers\.{n}\.mlp\.experts\.3\.up_proj" for n in range(3)]),
        ("attention.o_proj.weight", [r"-:model\.layers\.\d+\.self_attn\.o_proj"]),
        ("shared.down", [r"-:model\.layers\.\d+\.mlp\.shared_expert\.down_proj"]),
        ("dense.gate", [r"-:model\.layers\.\d+\.mlp\.gate_proj"]),
    ],
)
def test_matrices_may_stay_unquantized(missed: str, entries: list[str], tmp_path: Path) -> None:
    mixed: dict[str, Any] = {"mlp_only_layers": [1]} if missed.startswith("dense") else {}
    source = make_checkpoint(tmp_path / "source", "qwen2_moe", **mixed)
    model = quantized(source, only=lambda role: is_quantizable(role) and role != missed)
    folder = written(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["dynamic"]) == (4, {entry: {} for entry in entries})
    assert verify.audit(GPTQ, folder, model) > 10
    apart = missed in ("experts.3.up", "dense.gate")  # of experts, or of gate and up, that are one
    assert verdicts(model)["vLLM"] == ("no" if apart else "as read")


def test_other_models_that_do_not_fit_are_refused(tiny: Make) -> None:
    folder = tiny("olmoe")
    plain, model = open_checkpoint(str(folder)).model, quantized(folder)
    router = dict(plain.blocks[1].weights())["router.weight"]
    with pytest.raises(Unsupported, match=r"gate\.weight in the source's precision"):
        GPTQ.accepts(swap(model, "router.weight", rounded(router, Scheme(group_size=32))))
    query = plain.blocks[1].attention["q_proj.weight"]
    for scheme, message in (
        (Scheme(bits=3, group_size=32), r"w3a16, groups of 32; .*hf:dequantize=true"),
        (Scheme(group_size=16), "w4a16, groups of 16; target gptq holds 2, 4, 8 bits in groups of"),
        (Scheme(group_size=128), "64 inputs, which groups of 128 do not divide"),
    ):
        with pytest.raises(Unsupported, match=message):
            GPTQ.accepts(swap(model, "attention.q_proj.weight", replace(query, scheme=scheme)))


def test_sizes_that_do_not_fill_a_word_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral", intermediate_size=36)
    with pytest.raises(Unsupported, match=r"w1\.weight has shape \[36, 64\].*divisible by 8"):
        GPTQ.accepts(quantized(source, only=is_quantizable))


@pytest.mark.parametrize("inexact", [1 / 3, 1 + 2**-9, 2.0**20], ids=["thirds", "float16", "large"])
def test_scales_that_a_reader_would_round_are_refused(
    inexact: float, tiny: Make, tmp_path: Path
) -> None:
    model = quantized(tiny("olmoe"))
    query = open_checkpoint(str(tiny("olmoe"))).model.blocks[1].attention["q_proj.weight"]

    def spoil(numbers: Quantized) -> Quantized:
        scales = numbers.scales.clone()
        scales[3, 1] = inexact
        return replace(numbers, scales=scales)

    bad = swap(model, "attention.q_proj.weight", rounded(query, Scheme(group_size=32), spoil))
    with pytest.raises(VerificationFailed, match=r"layers\.1\.self_attn\.q_proj.*scales"):
        written(bad, tmp_path / "out")


def test_a_matrix_is_loaded_once(tiny: Make, tmp_path: Path) -> None:
    query = open_checkpoint(str(tiny("olmoe"))).model.blocks[1].attention["q_proj.weight"]
    calls: list[str] = []

    def count(numbers: Quantized) -> Quantized:
        calls.append("load")
        return numbers

    counted = rounded(query, Scheme(group_size=32), count)
    model = swap(quantized(tiny("olmoe")), "attention.q_proj.weight", counted)
    written(model, tmp_path / "out")
    assert calls == ["load"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_writes_are_the_same_bytes(family: str, tiny: Make, tmp_path: Path) -> None:
    model = quantized(tiny(family))
    one, two = written(model, tmp_path / "1"), written(model, tmp_path / "2")
    names = sorted(path.name for path in one.iterdir())
    assert names == ["config.json", "model.safetensors", "quantize_config.json"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_size_is_predicted(
    family: str, shard_bytes: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", shard_bytes)
    model = quantized(tiny(family))
    folder = written(model, tmp_path / "out")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert GPTQ.estimate(model).disk == pytest.approx(size, rel=0.02)


def verdicts(model: Model) -> dict[str, str]:
    return {loader.program: loader.verdict for loader in GPTQ.loaders(model)}


def test_programs_that_load_it(tiny: Make, tmp_path: Path) -> None:
    usual = {
        "moe2edge": "yes",
        "transformers": "no",
        "GPTQModel": "yes",
        "vLLM": "as read",
        "SGLang": "as read",
        "kt-kernel": "yes",
        "llama.cpp": "no",
        "mlx-lm": "no",
    }
    assert verdicts(quantized(tiny("olmoe"))) == usual
    others = {"GPTQModel": "no", "kt-kernel": "not tried"}
    assert verdicts(quantized(tiny("mixtral"))) == usual | others
    mixed: dict[str, Any] = {"mlp_only_layers": [1]}
    dense = make_checkpoint(tmp_path / "mixed", "qwen3_moe", **mixed)
    others = dict.fromkeys(("GPTQModel", "SGLang"), "no")
    assert verdicts(quantized(dense)) == usual | others


def with_scheme(model: Model, roles: str, scheme: Scheme, *blocks: int) -> Model:
    """Only in shapes."""
    for index in blocks or range(len(model.blocks)):
        weights = dict(model.blocks[index].weights())
        new = {
            r: replace(w, scheme=scheme)
            for r, w in weights.items()
            if r.startswith(roles) and is_quantizable(r)
        }
        model = model.replace_block(model.blocks[index].with_weights(new))
    return model


@pytest.mark.parametrize(
    ("roles", "scheme", "blocks", "gptqmodel", "vllm", "sglang"),
    [
        ("attention", Scheme(8, 32), (), "not tried", "as read", "as read"),
        ("attention", Scheme(8, 32), (0,), "not tried", "as read", "as read"),
        ("attention.v", Scheme(8, 32), (), "not tried", "no", "no"),
        ("experts", Scheme(8, 32), (0,), "not tried", "as read", "no"),
        ("experts.2", Scheme(8, 32), (1,), "not tried", "no", "no"),
        ("experts", Scheme(4, -1), (0, 1, 2), "not tried", "as read", "as read"),
        ("experts", Scheme(2, 32), (0,), "not tried", "no", "no"),
        ("attention", Scheme(4, 32, symmetric=False), (), "not tried", "no", "no"),
    ],
)
def test_programs_that_take_several_schemes(
    roles: str,
    scheme: Scheme,
    blocks: tuple[int, ...],
    gptqmodel: str,
    vllm: str,
    sglang: str,
    tiny: Make,
) -> None:
    found = verdicts(with_scheme(quantized(tiny("qwen2_moe")), roles, scheme, *blocks))
    assert (found["GPTQModel"], found["vLLM"], found["SGLang"]) == (gptqmodel, vllm, sglang)
    assert found["moe2edge"] == "yes"


def test_only_moe2edge_loads_layers_of_unequal_size(tiny: Make) -> None:
    model = quantized(tiny("olmoe"))
    block, layer = model.moe_blocks[1]
    model = model.replace_block(replace(block, mlp=layer.keep([0, 1])))
    GPTQ.accepts(model)
    found = verdicts(model)
    assert found.pop("moe2edge") == "yes"
    assert found.pop("kt-kernel") == "not tried"
    assert set(found.values()) == {"no"}
