"""Quantized checkpoints of others, opened, trimmed and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import export, ignore, run
from moe2edge.calibration import walk
from moe2edge.commands.source_format import report_source_format
from moe2edge.errors import InputError
from moe2edge.evaluation.source_check import compare_with_stock
from moe2edge.model.edits import hide_source_integers, restore_source_integers
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.packing import unpack_int32
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.recipe import parse
from moe2edge.pipeline.stages import plan_passes
from moe2edge.progress import Reporter
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.gptq import Gptq
from moe2edge.testing import Make, make_tokenizer
from source_files import GROUP, encode_packed, quantize_folder

FORMS = ("gptq", "gptq, ordered", "awq", "compressed-tensors", "fp8")
SIZES = {"dtype": "bfloat16", "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Make) -> dict[tuple[str, str], Path]:
    """Return a folder of each family and format."""
    made = {}
    for family in ("mixtral", "qwen3_moe"):
        source = tiny(family, **SIZES)
        make_tokenizer(source)
        for form in FORMS:
            made[family, form] = tmp_path_factory.mktemp(family) / form
            quantize_folder(source, made[family, form], form)
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_quantized_source_is_what_transformers_computes_with_its_numbers(
    family: str, form: str, folders: dict[tuple[str, str], Path]
) -> None:
    checkpoint = open_checkpoint(folders[family, form])
    model = checkpoint.model
    assert "quantization_config" not in model.config
    kept = {w.scheme for _, _, w in model.tensors() if w.kept}
    schemes = {"fp8": set(), "awq": {Scheme(4, GROUP, symmetric=False)}}
    schemes["gptq, ordered"] = {Scheme(4, GROUP, ordered=True)}
    assert kept == schemes.get(form, {Scheme(4, GROUP)})
    found = compare_with_stock(model, checkpoint.folder)
    assert found.difference < 1e-5
    assert len(checkpoint.sha256) == 64


@pytest.mark.parametrize("form", FORMS)
def test_integers_of_kept_experts_are_written_as_they_were(
    form: str, folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = folders["mixtral", form]
    steps: list[object] = [{"expert_drop": {"keep": 4}}]
    if form == "fp8":
        steps.append({"rtn": {"group_size": GROUP}})
    code, said, report = export(source, tmp_path / "out", steps, "gptq")
    assert code == 0, said
    left, count = report["source_format"]["gptq"], 8 + 2 * 4 * 3
    assert left["matrices"] == 8 + 2 * 6 * 3
    assert (left["kept"], left["requantized"]) == ((0, count) if form == "fp8" else (count, 0))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["sym"] == (form != "awq")
    assert settings["desc_act"] == (form == "gptq, ordered")
    assert "dynamic" not in settings
    if form == "fp8":
        card = (tmp_path / "out" / "README.md").read_text()
        assert "32 are quantized anew, which is not lossless" in card
        return
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    numbers = {(w.shape, digest(w.quantized())) for _, _, w in before.model.tensors() if w.kept}
    written = [(w.shape, digest(w.quantized())) for _, _, w in after.model.tensors() if w.scheme]
    assert len(written) == count
    assert set(written) <= numbers


def test_gptq_parts_of_a_trimmed_folder_are_those_of_its_source(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = folders["qwen3_moe", "gptq"]
    code, said, _ = export(source, tmp_path / "out", [{"expert_drop": {"keep": 4}}], "gptq")
    assert code == 0, said
    old, new = (load_file(each / "model.safetensors") for each in (source, tmp_path / "out"))
    by_bytes = {value.numpy().tobytes() for name, value in old.items() if ".experts." in name}
    experts = {name: value for name, value in new.items() if ".experts." in name}
    assert len(experts) == 2 * 4 * 3 * 4
    assert all(value.contiguous().numpy().tobytes() in by_bytes for value in experts.values())
    for name, value in new.items():
        if "self_attn" in name:
            assert torch.equal(value, old[name])


def test_target_onnx_keeps_integers_but_not_those_in_another_order(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    steps = [{"expert_drop": {"keep": 4}}]
    code, said, report = export(folders["mixtral", "awq"], tmp_path / "a", steps, "onnx")
    assert code == 0, said
    assert report["source_format"]["onnx"]["kept"] == 8 + 2 * 4 * 3
    code, said, _ = export(folders["mixtral", "gptq, ordered"], tmp_path / "b", steps, "onnx")
    assert code == 6
    assert "quantize it anew in the recipe (rtn or gptq), or export to gptq, which keeps it" in said


@pytest.mark.parametrize("form", ["gptq", "fp8"])
def test_target_hf_writes_a_quantized_source_dequantized(
    form: str, folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = folders["qwen3_moe", form]
    code, said, report = export(source, tmp_path / "out", [{"expert_drop": {"keep": 4}}], "hf")
    assert code == 0, said
    assert report["source_format"]["hf"]["dequantized"] == 8 + 2 * 4 * 3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    weights = {name: weight for name, _, weight in open_checkpoint(source).model.tensors()}
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(written[name], weights[name].load().bfloat16())


def test_a_pass_that_quantizes_quantizes_integers_of_a_source_anew(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    rules = [{"match": "self_attn", "bits": 16}]
    steps = [{"rtn": {"bits": 8, "rules": rules, "group_size": GROUP}}]
    code, said, report = export(folders["mixtral", "gptq"], tmp_path / "out", steps, "gptq")
    assert code == 0, said
    left = report["source_format"]["gptq"]
    assert (left["kept"], left["requantized"], left["dequantized"]) == (8, 2 * 6 * 3, 0)


def test_a_recipe_that_quantizes_integers_anew_is_warned_of(
    folders: dict[tuple[str, str], Path],
) -> None:
    said: list[str] = []
    checkpoint = open_checkpoint(folders["mixtral", "gptq"])
    recipe = parse(json.dumps({"passes": [{"rtn": {"group_size": GROUP}}]}))
    result = plan_passes(recipe.passes, checkpoint.model).result
    report_source_format(checkpoint, result, [Gptq()], Reporter(said.append, ignore))
    assert said[0] == (
        "gptq: of the 44 matrices of the source in GPTQ, 4 bits in groups of 32 (0.07 MB), 44 are "
        "quantized anew, which is not lossless"
    )
    assert "a recipe without a quantizing pass keeps them" in said[1]


def test_a_quantized_router_is_dequantized(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source, folder = folders["qwen3_moe", "compressed-tensors"], tmp_path / "router"
    shutil.copytree(source, folder)
    tensors, name = load_file(source / "model.safetensors"), "model.layers.0.mlp.gate"
    parts = encode_packed(tensors.pop(f"{name}.weight").float())
    tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} is quantized, but quantization_config ignores"):
        _ = open_checkpoint(folder).model
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    _, layer = open_checkpoint(folder).model.moe_blocks[0]
    assert layer.router.weight.scheme is None
    q = unpack_int32(parts["weight_packed"], 1, 4).float() - 8
    scales = parts["weight_scale"].float().repeat_interleave(GROUP, 1)
    assert torch.equal(layer.router.weight.load(), (q * scales).bfloat16())


def test_transformers_runs_a_quantized_source_with_its_dequantized_tensors(
    folders: dict[tuple[str, str], Path],
) -> None:
    folder = folders["mixtral", "fp8"]
    ids, model = torch.arange(1, 20)[None], open_checkpoint(folder).model
    stock = open_source(folder, dtype="float32").logits(ids)
    hidden = walk.observe(model, ids, (), lambda *_: None, "source")
    assert torch.allclose(stock[0], next(iter(walk.compute_logits(model, hidden))), atol=1e-4)


def test_inspect_names_the_format(folders: dict[tuple[str, str], Path]) -> None:
    found = json.loads(run("inspect", folders["mixtral", "awq"], "--json").stdout)
    assert found["quantization"] == "AWQ, 4 bits in groups of 32"
    assert "quantized: FP8 in blocks" in run("inspect", folders["mixtral", "fp8"]).stdout


def test_spare_parts_are_refused_and_scales_of_activations_are_not(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source, folder = folders["qwen3_moe", "fp8"], tmp_path / "more"
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    more = {"model.layers.0.mlp.experts.0.up_proj.input_scale": torch.ones(1)}
    more["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors | more, folder / "model.safetensors")
    assert open_checkpoint(folder).model == open_checkpoint(source).model
    beyond = {"model.layers.0.mlp.experts.6.up_proj.weight_scale_inv": torch.ones(1, 1)}
    save_file(tensors | beyond, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 tensors that .* does not know, such as .*experts\.6"):
        _ = open_checkpoint(folder).model


def test_broken_scales_are_found_before_the_first_block(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders["mixtral", "awq"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.gate_proj.scales"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
        _ = open_checkpoint(folder).sha256


def test_passes_see_plain_numbers_and_unchanged_integers_come_back(
    folders: dict[tuple[str, str], Path],
) -> None:
    source = open_checkpoint(folders["mixtral", "awq"]).model
    plain = hide_source_integers(source)
    assert plain.scheme is None
    assert not any(weight.kept for _, _, weight in plain.tensors())
    cut = plain.keep_blocks([1])
    back = restore_source_integers(cut, source)
    assert back == source.keep_blocks([1])


def digest(numbers: Quantized) -> bytes:
    """Return the bytes of integers, scales and zero points."""
    parts = (numbers.q, numbers.scales, numbers.zeros, numbers.order)
    return b"".join(p.contiguous().numpy().tobytes() for p in parts if p is not None)
