"""Target ``mlx``: its tensors and config, what it refuses, and what mlx-lm computes.

Where mlx-lm is not installed, such as on Windows, it is not run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from every_family import make_folder
from moe2edge.commands.write_target import fit_for_targets
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.evaluation.far_end import PlacedRuntime
from moe2edge.model.edits import change_weights
from moe2edge.model.model import Model
from moe2edge.model.weights import plan_weight
from moe2edge.numerics.packing import pack_bytes
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target, make_target
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets._mlx_rows import ROWS
from moe2edge.testing import Make, make_checkpoint, quantize, quantize_ends

TARGET = find_target("mlx")
W3, W4, W8 = Scheme(3, 32), Scheme(4, 32), Scheme(8, 32)
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(5))
PREFILL = 10


def open_quantized(folder: Path, scheme: Scheme = W4) -> Model:
    """Open a folder with every matrix rounded whose inputs groups divide, but for kv_b_proj."""
    model = open_checkpoint(str(folder)).model
    weights = (pair for block in model.blocks for pair in block.weights())
    odd = {role for role, w in weights if len(w.shape) == 2 and w.shape[1] % scheme.group_size}
    return quantize(model, scheme, lambda role: role not in odd and "kv_b_proj" not in role)


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    TARGET.accepts(model)
    TARGET.write(model, folder)
    assert verify.audit(TARGET, folder, TARGET.stored(model)) > 20
    TARGET.check_derived(folder)
    return folder


def compare(model: Model, folder: Path) -> None:
    """Compare mlx-lm with transformers, for a whole text and in steps."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    runtime = TARGET.reopen(written(model, folder), exact=True)
    assert runtime.dtype == "float32"
    stock = TorchRuntime(build_transformers_model(model, torch.float32, packed=False))
    expected = stock.logits(IDS)
    torch.testing.assert_close(runtime.logits(IDS), expected, atol=3e-4, rtol=0)
    ids = IDS[0, : PREFILL + 4].tolist()
    rows = [runtime.start(ids[:PREFILL]), *(runtime.step(token) for token in ids[PREFILL:])]
    torch.testing.assert_close(
        torch.stack(rows), expected[0, PREFILL - 1 : PREFILL + 4], atol=3e-4, rtol=0
    )
    if isinstance(runtime, PlacedRuntime):
        positions = torch.tensor([3, 50, 90, 127])
        found = runtime.logits_at(IDS[0, :4], positions)
        placed = stock.logits_at(IDS[0, :4], positions)
        torch.testing.assert_close(found, placed, atol=3e-4, rtol=0)
    assert isinstance(runtime, PlacedRuntime) or model.family.generic


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_mlx_lm_computes_the_same(family: str, tiny: Make, tmp_path: Path) -> None:
    compare(open_quantized(tiny(family)), tmp_path / "out")


SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
            "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5,
        }
    },
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5e5}},
    "lfm2_moe": {"tie_word_embeddings": True},
}  # fmt: skip
QUICK = ("gpt_oss", "lfm2_moe")


@pytest.mark.parametrize(
    "family",
    [
        name if name in QUICK else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.rest])
        for name in ROWS
    ],
)
def test_every_row(family: str, tmp_path: Path) -> None:
    """Experts with biases and in one tensor, and names that differ; all others in all cells."""
    window = {"sliding_window": None} if family in ("mixtral", "qwen2_moe", "qwen3_moe") else {}
    make_folder(tmp_path / "source", family, **{**window, **SETTINGS.get(family, {})})
    compare(open_quantized(tmp_path / "source"), tmp_path / "out")


def test_scaled_rotary_embeddings_and_parts_in_other_schemes(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 5e5}
    make_checkpoint(tmp_path / "source", "olmoe", rope_parameters=rope, norm_topk_prob=True)
    model = open_checkpoint(str(tmp_path / "source")).model
    model = quantize(model, W3, lambda role: role.endswith("up"))
    model = quantize(model, W8, lambda role: role.endswith("down"))
    compare(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: settings[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32, "bits": settings["bits"], "mode": "affine"
    }  # fmt: skip
    assert settings["model.layers.0.mlp.gate"] is False
    assert settings["model.layers.0.self_attn.q_proj"] is False
    widths = {settings["bits"], 3, 8}
    assert widths == {3, 8}


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_in_8_bits(tied: bool, tiny: Make, tmp_path: Path) -> None:
    source = tiny("qwen3_moe", tie_word_embeddings=tied, dtype="bfloat16")
    model = quantize_ends(open_quantized(source), W8)
    folder = written(model, tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization"]
    assert settings["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    assert ("lm_head" in settings) != tied
    source = tiny("qwen3_moe", tie_word_embeddings=tied)
    compare(quantize_ends(open_quantized(source), W8), tmp_path / "float32")


def test_layout(tiny: Make, tmp_path: Path) -> None:
    model = open_quantized(tiny("mixtral", dtype="bfloat16"))
    folder = written(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    parts = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(f"{stem}.")}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == {
        "weight": (torch.uint32, (6, 64, 4)),  # [experts, out, in / 8]
        "scales": (torch.bfloat16, (6, 64, 1)),
        "biases": (torch.bfloat16, (6, 64, 1)),
    }
    assert torch.equal(parts["biases"], -8 * parts["scales"])
    # The bytes of the ONNX graph.
    weights = {name: weight for name, _, weight in model.tensors()}
    down = weights["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    assert torch.equal(parts["weight"][5].view(torch.uint8), pack_bytes(down.quantized().q, 4))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == model.config["rope_parameters"]["rope_theta"]
    assert (config["num_local_experts"], config["num_experts"]) == (6, 6)
    assert config["quantization"] == config["quantization_config"]
    with pytest.raises(Unsupported, match="is a folder for mlx-lm; run it with mlx-lm, or with"):
        load(folder)


def test_float16_in_place_of_bfloat16_where_activations_are_small(
    tiny: Make, tmp_path: Path
) -> None:
    bf16 = quantize_ends(open_quantized(tiny("mixtral", dtype="bfloat16")), W8)
    assert TARGET.settle(bf16, 100.0) == make_target("mlx", {"dtype": "float16"})
    assert TARGET.settle(bf16, 1e4) == make_target("mlx", {"dtype": "source"})
    assert TARGET.settle(open_quantized(tiny("mixtral")), 1.0).find_dtype(bf16) == "bfloat16"
    given = make_target("mlx", {"dtype": "float16"})
    assert given.settle(bf16, 1e4) is given
    with pytest.raises(Unsupported, match=r"activation .* is 70000, .*choose mlx:dtype=source"):
        given.settle(bf16, 7e4)
    folder = tmp_path / "out"
    folder.mkdir()
    given.accepts(bf16)
    given.write(bf16, folder)
    assert verify.audit(given, folder, given.stored(bf16)) > 20
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {
        torch.uint32, torch.float16
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert given.find_dtype(bf16) == "float16"
    found = dict(given.tensors(folder))
    for name, _, weight in bf16.tensors():
        if weight.scheme is not None:
            numbers: Any = found[name]
            assert torch.equal(numbers.q, weight.quantized().q)
            assert torch.equal(numbers.scales, weight.quantized().scales)


def test_damage_is_found(tiny: Make, tmp_path: Path) -> None:
    folder = written(open_quantized(tiny("olmoe")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    changed = tensors[f"{name}.biases"].clone()
    changed[1, 0, 0] *= 2
    for wrong, message in (
        ({f"{name}.biases": changed}, "biases are not -8 times the scales"),
        ({f"{name}.weight": tensors[f"{name}.weight"][:5].clone()}, "has shape and dtype"),
        ({"more": torch.zeros(2, 2)}, "has unexpected 1 tensors, such as more"),
    ):
        save_file({**tensors, **wrong}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(VerificationFailed, match=message):
            dict(TARGET.tensors(folder))


# ---- what is refused -----------------------------------------------------------------------------


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
IGNORED = [
    ("qwen3_moe", {"rope_parameters": ROPE}, "the kind of the rotary embedding, 'linear'"),
    ("mixtral", {"rope_parameters": ROPE}, "the kind of the rotary embedding, 'linear'"),
    ("mixtral", {"sliding_window": 8}, "the sliding window of 8 tokens"),
    ("mixtral", {"head_dim": 32}, "head_dim 32"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob true"),
    ("olmoe", {"clip_qkv": 4.0}, "clip_qkv 4.0"),
    (
        "olmoe",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "truncate": False}},
        "truncate False of the rotary embedding",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), IGNORED)
def test_settings_that_mlx_lm_ignores(
    family: str, changes: dict[str, Any], message: str, tiny: Make
) -> None:
    model = open_checkpoint(str(tiny(family, **changes))).model
    with pytest.raises(Unsupported, match=f"ignores {message}") as caught:
        TARGET.accepts(model)
    assert str(caught.value).endswith("export to hf or gptq")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_moe", {"mlp_only_layers": [1]}, "block 1 has a dense MLP"),
        ("qwen3_moe", {"attention_bias": True}, "attention has a bias"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "the embedding is the head"),
        ("olmoe", {"dtype": "float64"}, "does not compute in float64; convert the source"),
    ],
)
def test_parts_that_mlx_lm_does_not_know(
    family: str, changes: dict[str, Any], message: str, tiny: Make
) -> None:
    with pytest.raises(Unsupported, match=message):
        TARGET.accepts(open_checkpoint(str(tiny(family, **changes))).model)


def test_schemes_that_it_does_not_hold(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    for scheme, message in (
        (Scheme(4, 32, symmetric=False), "would round their zero points"),
        (Scheme(4, 16), "takes groups of 32, 64, 128; .*or export to hf:dequantize=true"),
        (Scheme(4, -1), "takes groups of 32, 64, 128; .*or export to gptq"),
    ):
        with pytest.raises(Unsupported, match=message):
            TARGET.accepts(quantize(model, scheme))
    mixed = quantize(quantize(model, W4), W8, lambda role: role == "experts.1.down")
    with pytest.raises(Unsupported, match="experts of several schemes"):
        TARGET.accepts(mixed)
    kept = change_weights(
        quantize(model, W4),
        lambda _, w: replace(w, kept=True, scale_dtype="F16", dtype="BF16") if w.scheme else None,
    )
    TARGET.accepts(kept)  # float32 holds both
    rest = {name: replace(w, dtype="BF16") for name, w in kept.rest.items()}
    with pytest.raises(Unsupported, match="one dtype; choose mlx:dtype=float16, quantize it anew"):
        TARGET.accepts(replace(kept, rest=rest))
    make_target("mlx", {"dtype": "float16"}).accepts(replace(kept, rest=rest))


def test_layers_and_families_that_it_does_not_hold(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    uneven = model.replace_block(model.blocks[1].keep_experts([0, 1, 2]))
    with pytest.raises(Unsupported, match=r"one size .* 3 experts top-2 \(block 1\); prune all"):
        TARGET.accepts(uneven)
    make_folder(tmp_path / "jamba", "jamba", num_hidden_layers=2)
    other = open_checkpoint(str(tmp_path / "jamba")).model
    with pytest.raises(Unsupported, match="target mlx does not support jamba yet; targets "):
        fit_for_targets(other, [TARGET], materialize=False)
    make_folder(tmp_path / "latent", "deepseek_v3", num_hidden_layers=2, kv_lora_rank=32)
    inside = open_checkpoint(str(tmp_path / "latent")).model
    inside = replace(inside, given={"model_type": "kimi_k25"})
    with pytest.raises(Unsupported, match="is the deepseek_v3 inside of kimi_k25"):
        TARGET.accepts(inside)
    latent = open_checkpoint(str(tmp_path / "latent")).model
    latent = quantize(latent, W4, lambda role: "kv_b_proj" in role)
    with pytest.raises(Unsupported, match=r"rounds .*kv_b_proj\.weight once more"):
        TARGET.accepts(latent)


def test_what_mlx_lm_refuses_is_found_before_any_work(tmp_path: Path) -> None:
    """A planned model has no numbers; mlx-lm asks for each tensor of its class."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    make_folder(tmp_path / "source", "lfm2_moe", tie_word_embeddings=True)
    model = open_quantized(tmp_path / "source")
    planned = change_weights(model, lambda _, weight: plan_weight(weight))
    TARGET.check_runtime(planned)
    less = {name: w for name, w in planned.rest.items() if len(w.shape) > 1}  # no norm
    with pytest.raises(Unsupported, match=r"mlx-lm refuses this model, .*ValueError: Missing 1"):
        TARGET.check_runtime(replace(planned, rest=less))


def test_a_missing_runtime_is_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Make) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    model = open_checkpoint(str(tiny("olmoe"))).model
    with pytest.raises(Unsupported, match="which are not installed: pip install ") as caught:
        TARGET.check_runtime(model)
    assert "mlx-lm" in str(caught.value)
