"""Folders in the layouts of checkpoints that people have, with tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from every_family import keep_six, make_model, run_stock, walk_over
from helpers import run
from moe2edge.errors import VerificationFailed
from moe2edge.evaluation.verify import audit
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import make_tokenizer

SMALL = (
    "--set", "calibration.samples=4", "--set", "calibration.length=32",
    "--set", "evaluation.samples=2", "--set", "evaluation.length=32",
)  # fmt: skip


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)


def export_half(folder: Path, tmp_path: Path, keep: int = 4) -> Path:
    """Drop half of the experts, write hf and verify it."""
    recipe, text, out = (tmp_path / name for name in ("recipe.yaml", "text.txt", "out"))
    recipe.write_text(f"passes:\n  - expert_drop: {{keep: {keep}}}\n")
    text.write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(6000)))
    given = ("--calib", str(text), "--eval", str(text), *SMALL)
    found = run("export", str(folder), "-t", "hf", "-o", str(out), "-r", str(recipe), *given)
    assert found.exit_code == 0, found.output
    found = run("verify", str(out))
    assert found.exit_code == 0, found.output
    return out


# ---- Qwen3.5-35B-A3B: a text model in a model of several parts -----------------------------------


def make_wrapped(folder: Path) -> Any:
    """Write the text model of a wrapper: prefixes, fused experts, a vision tower, prediction."""
    from transformers import CONFIG_MAPPING

    model = make_model("qwen3_5_moe_text")
    tensors = {
        name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1): t
        for name, t in model.state_dict().items()
    }
    tensors["model.visual.patch_embed.proj.weight"] = torch.randn(4, 4, dtype=torch.bfloat16)
    tensors["mtp.fc.weight"] = torch.zeros(4, 4)
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(4, 4)
    config = CONFIG_MAPPING["qwen3_5_moe"](text_config=model.config.to_dict()).to_dict()
    config |= {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    write_folder(folder, tensors, config)
    return model


def test_a_text_model_inside_of_another_one(tmp_path: Path) -> None:
    stock = make_wrapped(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert (walk_over(checkpoint.model) - run_stock(stock)).abs().max() <= 1e-6
    assert [note.partition(" tensors")[0] for note in checkpoint.notes] == ["1", "2"]
    out = export_half(tmp_path / "model", tmp_path)
    source, written = (load_file(f / "model.safetensors") for f in (tmp_path / "model", out))
    # Names, fused experts and the vision tower as before; prediction has the old experts.
    assert written.keys() == {name for name in source if not name.startswith("mtp.")}
    fused = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert (source[fused].shape, written[fused].shape) == ((8, 64, 64), (4, 64, 64))
    tower = "model.visual.patch_embed.proj.weight"
    assert torch.equal(written[tower], source[tower])
    before, after = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "model", out))
    assert after["text_config"].pop("num_experts") == 4
    assert before["text_config"].pop("num_experts") == 8
    assert after == add_older_spellings(before)


# As files name what the text model calls "model." and "lm_head.".
PLACES = (
    ("model.language_model.", "lm_head."),
    ("language_model.model.", "language_model.lm_head."),
)


@pytest.mark.parametrize(("body", "head"), PLACES)
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("gemma4", "gemma4_text"),
        ("kimi_k25", "deepseek_v3"),
        ("mistral3", "mistral4"),
        ("internvl", "gpt_oss"),
        ("internvl", "qwen3_moe"),
    ],
)
def test_a_text_model_is_found_in_its_place(
    kind: str, family: str, body: str, head: str, tmp_path: Path
) -> None:
    """Transformers renames tensors of the whole model, and not for its text model alone."""
    from moe2edge.targets.hf import Hf

    stock = make_model(family)
    tensors = {
        name.replace("model.", body, 1) if name.startswith("model.") else head + name[8:]: tensor
        for name, tensor in stock.state_dict().items()
    }
    tensors["vision_tower.layers.0.weight"] = torch.randn(4, 4)
    config = {"model_type": kind, "text_config": stock.config.to_dict()}
    write_folder(tmp_path / "model", tensors, config)
    model = open_checkpoint(tmp_path / "model").model
    assert (walk_over(model) - run_stock(stock)).abs().max() <= 1e-6
    out = tmp_path / "out"
    out.mkdir()
    trimmed = keep_six(model)
    Hf().write(trimmed, out)
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
    assert torch.equal(walk_over(open_checkpoint(out).model), walk_over(trimmed))


def test_all_that_stands_beside_the_text_model_is_kept_with_the_experts(tmp_path: Path) -> None:
    from moe2edge.targets.hf import Hf

    make_wrapped(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    model = open_checkpoint(tmp_path / "model").model
    Hf().write(model, out)
    source, written = (load_file(f / "model.safetensors") for f in (tmp_path / "model", out))
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], source[name]) for name in source)
    assert audit(Hf(), out, model) == len(list(model.tensors())) + 3
    tensors = load_file(out / "model.safetensors")
    tensors["model.visual.patch_embed.proj.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"visual\.patch_embed.* was not written as is"):
        audit(Hf(), out, model)


# ---- gpt-oss: MXFP4 experts ----------------------------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Slow reference: bytes [experts, out, groups, 16] to numbers [experts, in, out]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
    numbers = pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
    return numbers.flatten(-2).transpose(1, 2)


def make_gpt_oss(folder: Path) -> Any:
    model = make_model("gpt_oss", moe_intermediate_size=64, intermediate_size=64)
    draw = torch.Generator().manual_seed(1)
    state = model.state_dict()
    tensors = {n: t for n, t in state.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    for name in state.keys() - tensors.keys():
        experts, ins, outs = state[name].shape
        shape = (experts, outs, ins // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        scales = torch.randint(121, 125, shape[:3], dtype=torch.uint8, generator=draw)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        state[name].copy_(decode_mxfp4(blocks, scales))
    model.load_state_dict(state)
    config = model.config.to_dict() | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}
    }
    write_folder(folder, tensors, config)
    return model


# ---- DeepSeek-V3: FP8 in blocks; Kimi-K2: packed integers ----------------------------------------


def make_fp8(folder: Path) -> Any:
    """Write FP8 blocks of 48, which divide no matrix here."""
    model = make_model("deepseek_v3", num_key_value_heads=4, head_dim=8)
    state, size = model.state_dict(), 48
    tensors: dict[str, Tensor] = {}
    for name, weight in list_disk_tensors(model).items():
        if not name.endswith("_proj.weight") and "_proj_with_mqa" not in name:
            tensors[name] = weight
            continue
        outs, ins = weight.shape
        scales = torch.rand(-(-outs // size), -(-ins // size)) * 0.01 + 0.001
        wide = scales.repeat_interleave(size, 0)[:outs].repeat_interleave(size, 1)[:, :ins]
        small = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {name: small, f"{name}_scale_inv": scales}
        put_disk_tensor(state, name, small.float() * wide)
    model.load_state_dict(state)
    config = model.config.to_dict() | {
        "quantization_config": {
            "quant_method": "fp8", "weight_block_size": [size, size], "fmt": "e4m3",
            "activation_scheme": "dynamic",
        },
    }  # fmt: skip
    write_folder(folder, tensors, config)
    return model


def make_kimi(folder: Path) -> Any:
    """Write experts as packed integers in groups of 32, under a name that transformers lacks."""
    model = make_model("deepseek_v3", num_key_value_heads=4, head_dim=8)
    state, tensors = model.state_dict(), dict[str, Tensor]()
    for name, weight in list_disk_tensors(model).items():
        if ".experts." not in name:
            tensors[name] = weight
            continue
        outs, ins = weight.shape
        scales = (weight.reshape(outs, ins // 32, 32).abs().amax(-1) / 7).to(torch.bfloat16)
        wide = scales.float().repeat_interleave(32, 1)
        numbers = (weight / wide).round().clamp(-8, 7).int()
        words = torch.zeros(outs, ins // 8, dtype=torch.int64)
        for place in range(8):
            words |= (numbers[:, place::8] + 8).long() << (4 * place)
        words = torch.where(words >= 2**31, words - 2**32, words).int()
        stem = name.removesuffix(".weight")
        tensors |= {
            f"{stem}.weight_packed": words,
            f"{stem}.weight_scale": scales,
            f"{stem}.weight_shape": torch.tensor([outs, ins]),
        }
        put_disk_tensor(state, name, numbers * wide)
    model.load_state_dict(state)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }
    config = model.config.to_dict() | {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "ignore": ["re:.*self_attn.*", "lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }  # fmt: skip
    write_folder(folder, tensors, config)
    return model


def list_disk_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors of a model with one for each expert, by their names in files."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        for n in range(len(tensor)) if ".experts." in name else ():
            if last == "down_proj":
                found[f"{stem}.{n}.down_proj.weight"] = tensor[n].clone()
            else:
                gate, up = tensor[n].chunk(2)
                found |= {f"{stem}.{n}.gate_proj.weight": gate, f"{stem}.{n}.up_proj.weight": up}
        if ".experts." not in name:
            found[name] = tensor.clone()
    return found


def put_disk_tensor(state: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Put a tensor in its place of a state dict."""
    if ".experts." not in name:
        state[name].copy_(tensor)
        return
    stem, n, part, _ = name.rsplit(".", 3)
    whole = state[f"{stem}.down_proj" if part == "down_proj" else f"{stem}.gate_up_proj"][int(n)]
    half = len(whole) // 2
    place = {"gate_proj": whole[:half], "up_proj": whole[half:], "down_proj": whole}[part]
    place.copy_(tensor)


@pytest.mark.parametrize("make", [make_gpt_oss, make_fp8, make_kimi])
def test_quantized_sources_of_other_families(make: Any, tmp_path: Path) -> None:
    stock = make(tmp_path / "model")
    model = open_checkpoint(tmp_path / "model").model
    assert (walk_over(model) - run_stock(stock)).abs().max() <= 1e-5
    out = export_half(tmp_path / "model", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] in ("gpt_oss", "deepseek_v3")
    assert "auto_map" not in config


# ---- state-space and linear attention: other formulas for a step than for a text -----------------


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_steps_may_differ_from_texts_as_they_do_in_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are held against the reference as ever, steps against the same text in the runtime."""
    model = make_model(family)
    source = tmp_path / "source"
    write_folder(source, model.state_dict(), model.config.to_dict())
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(6000)))
    given = ("--eval", str(text), "--set", "evaluation.samples=2", "--set", "evaluation.length=64")
    found = run("export", str(source), "-t", "hf", "-o", str(out), "-r", "as-is", *given)
    assert found.exit_code == 0, found.output
    step = TorchRuntime.step
    monkeypatch.setattr(TorchRuntime, "step", lambda self, token: step(self, (token + 1) % 96))
    found = run("verify", str(out))
    assert found.exit_code == 7
    assert "when it runs token by token" in found.output
