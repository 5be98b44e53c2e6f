"""Every MoE family of transformers: rounded, written as GPTQ, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe2edge
from every_family import (
    KEPT,
    ROUNDING,
    keep_six,
    make_folder,
    make_model,
    run_stock,
    spread_families,
    walk_over,
)
from helpers import run
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.architecture import find_layers
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.numerics.grid import Quantized
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.stages import plan_passes
from moe2edge.pipeline.target import Target
from moe2edge.runtime.decoder_blocks import load_block_state
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.gptq import Gptq, build_quantization_config
from moe2edge.targets.hf import Hf
from moe2edge.testing import InMemory, make_tokenizer
from test_real_layouts import make_kimi, make_wrapped

# Each form once: fused, transposed, interleaved with biases, without gates, latent attention,
# linear attention, other names, groups of experts.
FAST = (
    "aria_text", "deepseek_v3", "gpt_oss", "granitemoe", "minimax_m2", "nemotron_h",
    "qwen3_5_moe_text", "qwen3_next",
)  # fmt: skip
MARKED = spread_families(FAST, 3)
# Matrices that 4 bits do not fill words of.
RULES: dict[str, list[dict[str, Any]]] = {"granitemoehybrid": [{"match": "in_proj", "bits": 8}]}


def quantize(model: Model, **options: Any) -> Model:
    """Round as the pass does; with one scale per row, as widths of tiny models differ."""
    step = Rtn(**{"group_size": -1, **options}).resolve(model)
    planned = plan_passes([step], model).steps[0]
    assert step.estimate(planned, None).memory > 0  # type: ignore[arg-type]
    found, changed, _ = solve_blocks(
        model, None, step.solver(model), InMemory(), lambda *_: None, "rtn"
    )
    step.check_result(model, found)
    assert len(changed) == len(step.schemes(model))
    return found


def write(model: Model, folder: Path, target: Target | None = None) -> Path:
    """Write a model and prove what was written."""
    folder.mkdir()
    target = target or Gptq()
    target.accepts(model)
    target.write(model, folder)
    verify.audit(target, folder, target.stored(model))
    target.check_derived(folder)
    return folder


def check_numbers(loaded: Any, model: Model) -> None:
    """Hold every number of a loaded model against the model, to the bit."""
    layers = find_layers(loaded)[1]
    for block in model.blocks:
        state = layers[block.index].state_dict()
        expected = load_block_state(model, block)
        assert state.keys() == expected.keys()
        for name, numbers in expected.items():
            assert torch.equal(state[name], numbers), name


@pytest.mark.parametrize("family", MARKED)
def test_a_family_is_rounded_written_and_loaded(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    source = open_checkpoint(tmp_path / "source").model
    model = quantize(source, rules=RULES.get(family, []))
    for block in model.blocks:
        for role, weight in block.weights():
            assert (weight.scheme is not None) == is_quantizable(role), role
    out = write(model, tmp_path / "out")
    loaded = moe2edge.load(out, dtype=torch.float32)
    check_numbers(loaded, model)
    logits = run_stock(loaded)
    assert (logits - walk_over(model)).abs().max() <= 1e-5
    assert not torch.allclose(logits, walk_over(source), atol=1e-3)  # it is a rounded one
    assert str(loaded.moe2edge_packed).startswith("0 of ")
    with pytest.raises(Unsupported, match=f"no matrix of {source.family.model_type} can run in 4"):
        moe2edge.load(out, packed=True)


@pytest.mark.parametrize("family", MARKED)
def test_an_unquantized_folder_is_loaded_as_transformers_does(family: str, tmp_path: Path) -> None:
    stock = make_folder(tmp_path / "source", family)
    model = keep_six(open_checkpoint(tmp_path / "source").model)
    out = write(model, tmp_path / "out", Hf())
    loaded = moe2edge.load(out)
    check_numbers(loaded, model)
    assert (run_stock(loaded) - walk_over(model)).abs().max() <= 1e-6
    # In few bits, the same tensors stay precise, and with the same numbers.
    for dtype in (torch.bfloat16, torch.float16):
        again = type(stock).from_pretrained(out, dtype=dtype, local_files_only=True)
        expected = again.state_dict() | dict(again.named_buffers())
        ours = moe2edge.load(out, dtype=dtype)
        found = ours.state_dict() | dict(ours.named_buffers())
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name].dtype == numbers.dtype, name
            assert torch.equal(found[name], numbers), name


# ---- names and numbers in files ------------------------------------------------------------------


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def test_experts_of_one_tensor_are_written_one_by_one(tmp_path: Path) -> None:
    """The names are those that GPTQModel, llm-compressor and vLLM give them."""
    make_folder(tmp_path / "source", "gpt_oss")
    model = quantize(open_checkpoint(tmp_path / "source").model)
    tensors, source = read(write(model, tmp_path / "out")), read(tmp_path / "source")
    layer = "model.layers.2.mlp.experts"
    own = {name.removeprefix(f"{layer}.5.") for name in tensors if name.startswith(f"{layer}.5.")}
    parts = [f"{part}_proj" for part in ("gate", "up", "down")]
    kinds = ("qweight", "qzeros", "scales", "g_idx", "bias")
    assert own == {f"{part}.{kind}" for part in parts for kind in kinds}
    biases = source[f"{layer}.gate_up_proj_bias"][5]
    assert torch.equal(tensors[f"{layer}.5.gate_proj.bias"], biases[0::2])
    assert torch.equal(tensors[f"{layer}.5.up_proj.bias"], biases[1::2])
    assert not [name for name in tensors if name.startswith(f"{layer}.gate_up")]
    # (nibble - 8) * scale is next to the number of the source: [in, out], up in odd columns.
    stem = f"{layer}.5.up_proj"
    number = int(tensors[f"{stem}.qweight"][1, 3]) >> 8 & 15
    scale = float(tensors[f"{stem}.scales"][0, 3])
    there = float(source[f"{layer}.gate_up_proj"][5, 8 + 2, 2 * 3 + 1])
    assert abs((number - 8) * scale - there) <= 0.51 * scale
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["dynamic"] == {r"-:model\.layers\.\d+\.mlp\.router$": {}}


def test_single_experts_have_the_names_that_transformers_reads(tmp_path: Path) -> None:
    """Also where a folder has them in one tensor, under the names of transformers' class."""
    model = make_model("minimax_m2")
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors"
    )
    model.config.save_pretrained(folder)
    found = open_checkpoint(folder).model
    assert (walk_over(found) - run_stock(model)).abs().max() <= 1e-6
    tensors = read(write(quantize(found), tmp_path / "out"))
    layer = "model.layers.1.block_sparse_moe.experts.7"
    names = {name for name in tensors if name.startswith("model.layers.1.") and ".7." in name}
    kinds = ("qweight", "qzeros", "scales", "g_idx")
    assert names == {f"{layer}.{part}.{kind}" for part in ("w1", "w2", "w3") for kind in kinds}


def test_all_beside_the_text_model_is_written(tmp_path: Path) -> None:
    make_wrapped(tmp_path / "model")
    model = quantize(open_checkpoint(tmp_path / "model").model)
    out = write(model, tmp_path / "out")
    source, tensors = read(tmp_path / "model"), read(out)
    beside = [name for name in source if "visual" in name or name.startswith("mtp.")]
    assert len(beside) == 3
    assert all(torch.equal(tensors[name], source[name]) for name in beside)
    assert "model.language_model.layers.0.mlp.experts.0.gate_proj.qweight" in tensors
    config = json.loads((out / "config.json").read_text())
    patterns = set(config.pop("quantization_config")["dynamic"])
    assert {r"-:model\.visual\.", r"-:mtp\."} < patterns
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config == add_older_spellings(before)
    loaded = moe2edge.load(out, dtype=torch.float32)
    assert (run_stock(loaded) - walk_over(model)).abs().max() <= 1e-5


def test_experts_that_stay_unquantized_stay_in_one_tensor(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", "gpt_oss")
    rules = [{"match": r"layers\.1\..*experts", "bits": 16}, {"match": "q_proj", "bits": 16}]
    model = quantize(open_checkpoint(tmp_path / "source").model, rules=rules)
    out = write(model, tmp_path / "out")
    source, tensors = read(tmp_path / "source"), read(out)
    kept = [name for name in source if ".1.mlp.experts." in name or "q_proj" in name]
    assert len(kept) == 4 + 8
    assert all(torch.equal(tensors[name], source[name]) for name in kept)
    settings = build_quantization_config(model)["dynamic"]
    assert set(settings) == {
        r"-:model\.layers\.1\.mlp\.experts",
        r"-:model\.layers\.\d+\.self_attn\.q_proj",
        r"-:model\.layers\.\d+\.mlp\.router$",
    }
    assert (
        run_stock(moe2edge.load(out, dtype=torch.float32)) - walk_over(model)
    ).abs().max() < 1e-5


def test_a_matrix_that_does_not_fill_words_is_left_out_by_a_rule(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", "granitemoehybrid")
    source = open_checkpoint(tmp_path / "source").model
    with pytest.raises(Unsupported, match=r"mamba.in_proj.weight has shape \[276, 64\].*bits: 16"):
        Gptq().accepts(quantize(source))
    model = quantize(source, rules=[{"match": "in_proj", "bits": 16}])
    loaded = moe2edge.load(write(model, tmp_path / "out"), dtype=torch.float32)
    check_numbers(loaded, model)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_quantized_folder_is_trimmed_with_its_integers(family: str, tmp_path: Path) -> None:
    """Integers of kept experts are those of the source; stock transformers reads ``hf``."""
    stock = make_folder(tmp_path / "source", family)
    first = write(quantize(open_checkpoint(tmp_path / "source").model), tmp_path / "gptq")
    model = open_checkpoint(first).model
    trimmed = keep_six(model)
    second = write(trimmed, tmp_path / "trimmed")
    before = dict(Gptq().tensors(first))
    name = "model.layers.3.mlp.experts.{}.down_proj.weight"
    for new, old in enumerate(KEPT):
        kept, there = dict(Gptq().tensors(second))[name.format(new)], before[name.format(old)]
        assert isinstance(kept, Quantized)
        assert isinstance(there, Quantized)
        assert torch.equal(kept.q, there.q)
        assert torch.equal(kept.scales, there.scales)
    plain = write(trimmed, tmp_path / "hf", Hf())
    again, found = type(stock).from_pretrained(
        plain, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    assert not any(found.values()), found
    assert (run_stock(again.eval()) - walk_over(trimmed)).abs().max() <= ROUNDING


@pytest.mark.parametrize("family", ["qwen3_5_moe", *MARKED])
def test_layers_of_several_sizes_are_loaded(family: str, tmp_path: Path) -> None:
    if family == "qwen3_5_moe":
        make_wrapped(tmp_path / "source")
    else:
        make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    block = model.moe_blocks[-1][0]
    model = model.replace_block(block.keep_experts(KEPT))
    rounded = quantize(model, rules=RULES.get(family, []))
    for n, (target, made) in enumerate([(Hf("natural"), model), (Gptq(), rounded)]):
        loaded = moe2edge.load(write(made, tmp_path / f"{n}", target), dtype=torch.float32)
        check_numbers(loaded, made)
        assert (run_stock(loaded) - walk_over(made)).abs().max() <= 1e-5
        with pytest.raises(Unsupported, match="save_pretrained loses numbers of experts"):
            loaded.save_pretrained(tmp_path / "saved")


def test_integers_of_kimi_k2_are_kept(tmp_path: Path) -> None:
    make_kimi(tmp_path / "source")
    model = open_checkpoint(tmp_path / "source").model
    loaded = moe2edge.load(write(model, tmp_path / "out"), dtype=torch.float32)
    check_numbers(loaded, model)
    assert {weight.scheme for _, _, weight in model.tensors()} == {None, model.scheme}


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("gpt_oss", {}), ("deepseek_v3", {"q_lora_rank": 32, "kv_lora_rank": 32})],
)
def test_export_verify_and_generate(family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    make_folder(tmp_path / "model", family, **sizes)
    make_tokenizer(tmp_path / "model")
    out = tmp_path / "out"
    found = run(
        "export", tmp_path / "model", "-t", "gptq", "-r", "w4-rtn", "-o", out, "--eval", "none"
    )
    assert found.exit_code == 0, found.output
    found = run("verify", out)
    assert found.exit_code == 0, found.output
    found = run("generate", out, "!abc", "--max-tokens", "4")
    assert found.exit_code == 0, found.output
    assert "4 bits" in found.output
