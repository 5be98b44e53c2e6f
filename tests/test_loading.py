"""Folders of the targets ``hf`` and ``gptq``, loaded, against transformers models cut by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import SCHEME, each_family, run_module, slow_except
from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.load import load
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.storage import safetensors_files
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make, assert_cache_changes_nothing, make_checkpoint, quantize

IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Cut:
    """Which blocks stay, and which experts stay in a block of the source."""

    blocks: Sequence[int] = (0, 1, 2)
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)


WHOLE = Cut()
EXPERTS = Cut(experts={n: (5, 0, 2, 3) for n in range(3)})
BLOCK = Cut(blocks=(0, 2))
UNEVEN = Cut(experts={1: (4, 1, 5), 2: (3,)})  # top-2, top-2, top-1
NATURAL = {"hf": Hf(layout="natural"), "gptq": Gptq(layout="natural")}
CUTS = {"whole": WHOLE, "experts": EXPERTS, "block": BLOCK, "uneven": UNEVEN}
# One switch of a config at a time; each is an own path through families, targets or loader.
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": 6}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("qwen2_moe", {"mlp_only_layers": [1]}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    ("qwen3_moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    ("olmoe", {"attention_bias": True, "clip_qkv": 0.7}),
    ("olmoe", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
]


def cut_model(model: Model, cut: Cut) -> Model:
    """Compute logits as the product does."""
    for index, ids in cut.experts.items():
        block = model.blocks[index]
        if isinstance(block.mlp, MoELayer):
            kept = block.mlp.keep(ids, clamp_top_k=True)
            model = model.replace_block(replace(block, mlp=kept))
    return model.keep_blocks(cut.blocks)


def reference(folder: Path, cut: Cut, quantized: bool) -> Any:
    """Return the source in transformers' classes, modules cut and numbers rounded in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, ids in cut.experts.items():
        mlp = model.model.layers[index].mlp
        if hasattr(mlp, "experts"):
            mlp.gate.weight.data = mlp.gate.weight.data[list(ids)]
            mlp.gate.top_k = min(mlp.gate.top_k, len(ids))
            mlp.gate.num_experts = mlp.experts.num_experts = len(ids)
            for name in ("gate_up_proj", "down_proj"):
                getattr(mlp.experts, name).data = getattr(mlp.experts, name).data[list(ids)]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in cut.blocks)
    model.config.num_hidden_layers = len(cut.blocks)
    if quantized:
        for name, parameter in model.model.layers.named_parameters():
            if name.endswith("_proj.weight") or ".experts." in name:
                for matrix in parameter.data.reshape(-1, *parameter.shape[-2:]):
                    matrix.copy_(round_to_nearest(matrix, SCHEME).dequantize())
    return model


def export(name: str, model: Model, folder: Path) -> Path:
    """Do what the pipeline does with a target; its default reopens whatever the layout is."""
    folder.mkdir()
    natural = NATURAL[name]
    natural.accepts(model)
    natural.write(model, folder)
    return folder


def export_cut(name: str, source: Path, cut: Cut, folder: Path) -> Path:
    model = cut_model(open_checkpoint(str(source)).model, cut)
    return export(name, quantize(model, SCHEME) if name == "gptq" else model, folder)


def logits(model: Any) -> torch.Tensor:
    return run_module(model, IDS)


def assert_same_model(folder: Path, name: str, want: Any) -> None:
    """Parameters equal to the bit, logits within 1e-4 in one go and step by step."""
    loaded = load(folder, dtype=torch.float32)
    expected = want.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert not [key for key, value in found.items() if not torch.equal(value, expected[key])]
    wanted = logits(want)
    assert (logits(loaded) - wanted).abs().max() < 1e-4
    runtime = find_target(name).reopen(folder, exact=True)
    assert (runtime.logits(IDS) - wanted).abs().max() < 1e-4
    steps = [runtime.start(IDS[1, :9].tolist())]
    steps += [runtime.step(token) for token in IDS[1, 9:].tolist()]
    assert (torch.stack(steps) - wanted[1, 8:]).abs().max() < 1e-4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["hf", "gptq"])
@pytest.mark.parametrize("family", each_family("mixtral"))
def test_logits_equal_transformers(
    family: str, name: str, cut: str, tiny: Make, tmp_path: Path
) -> None:
    source = tiny(family)
    folder = export_cut(name, source, CUTS[cut], tmp_path / "out")
    assert_same_model(folder, name, reference(source, CUTS[cut], name == "gptq"))


@pytest.mark.parametrize("name", slow_except(["hf", "gptq"], "gptq"))
@pytest.mark.parametrize(("family", "switches"), SWITCHES, ids=str)
@pytest.mark.slow
def test_switches_of_configs(
    family: str, switches: dict[str, Any], name: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", family, **switches)
    folder = export_cut(name, source, EXPERTS, tmp_path / "out")
    assert_same_model(folder, name, reference(source, EXPERTS, name == "gptq"))


@pytest.mark.parametrize("name", ["hf", "gptq"])
def test_window_follows_its_block(name: str, tmp_path: Path) -> None:
    windows: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    }
    source = make_checkpoint(tmp_path / "source", "qwen2_moe", **windows)
    cut = Cut(blocks=(1, 2))
    want = reference(source, cut, name == "gptq")
    types = want.config.layer_types
    assert len(set(types)) == 2
    want.config.layer_types = [types[i] for i in cut.blocks]
    assert_same_model(export_cut(name, source, cut, tmp_path / "out"), name, want)


@pytest.mark.parametrize("logits_too", [False, True])
@pytest.mark.parametrize("family", each_family("qwen3_moe"))
def test_uneven_model_generates_with_a_cache(
    family: str, logits_too: bool, tiny: Make, tmp_path: Path
) -> None:
    source = tiny(family, output_router_logits=logits_too)
    model = load(export_cut("gptq", source, UNEVEN, tmp_path / "out"))
    assert_cache_changes_nothing(model, IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_about_running_change_no_logits(family: str, tiny: Make, tmp_path: Path) -> None:
    """A loss of router logits takes no mask as the far end of a context needs one."""
    folder, ids = Path(shutil.copytree(tiny(family), tmp_path / "model")), IDS[0]
    found, positions = [], torch.arange(len(ids)) + 60
    for asked in (False, True):
        config = json.loads((folder / "config.json").read_text())
        keys = ("output_attentions", "output_hidden_states", "output_router_logits", "use_cache")
        (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, asked)))
        runtime = open_source(folder, dtype="float32")
        begun = runtime.start(ids[:-1].tolist())
        after = [begun, runtime.step(int(ids[-1]))]
        found.append([runtime.logits(IDS), runtime.logits_at(ids, positions), *after])
    for without, with_keys in zip(*found, strict=True):
        assert torch.equal(without, with_keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_model_is_one_model(family: str, tiny: Make, tmp_path: Path) -> None:
    model = load(export_cut("gptq", tiny(family), UNEVEN, tmp_path / "out"))
    before = logits(model)
    model.set_attn_implementation("eager")  # reaches the layers through the config they share
    model.set_experts_implementation("eager")
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
    assert (logits(model) - before).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert (logits(again) - before).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_raises_on_uneven_layers(
    family: str, tiny: Make, tmp_path: Path
) -> None:
    folder = export_cut("gptq", tiny(family), UNEVEN, tmp_path / "out")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_raises_on_uneven_top_k_alone(
    family: str, tiny: Make, tmp_path: Path
) -> None:
    model = quantize(open_checkpoint(str(tiny(family))).model, SCHEME)
    block, layer = model.moe_blocks[1]
    one = replace(layer, router=replace(layer.router, top_k=1))
    model = model.replace_block(replace(block, mlp=one))
    folder = export("gptq", model, tmp_path / "out")
    with pytest.raises(RuntimeError, match="'num_experts_per_tok' is a per-layer attribute"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    want = reference(tiny(family), WHOLE, True)
    want.model.layers[1].mlp.gate.top_k = 1
    assert_same_model(folder, "gptq", want)


def test_transformers_is_left_as_it_was(tiny: Make, tmp_path: Path) -> None:
    from transformers.models.olmoe import modeling_olmoe
    from transformers.quantizers import auto

    def state() -> list[dict[str, Any]]:
        classes = (v for v in vars(modeling_olmoe).values() if isinstance(v, type))
        kept = [dict(vars(c)) for c in classes if c.__module__ == modeling_olmoe.__name__]
        return [*kept, dict(auto.AUTO_QUANTIZER_MAPPING)]

    folder = export_cut("gptq", tiny("olmoe"), UNEVEN, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tiny("olmoe"))  # what transformers adds at first use
    before = state()
    load(folder)
    assert state() == before


def test_dtype_is_that_of_the_folder_unless_given(tiny: Make, tmp_path: Path) -> None:
    source = tiny("olmoe", dtype="bfloat16")
    folder = export_cut("gptq", source, WHOLE, tmp_path / "out")
    assert load(folder).dtype == torch.bfloat16
    exact = load(folder, dtype=torch.float32)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    rounded = {k: v.to(torch.bfloat16) for k, v in exact.state_dict().items()}
    assert all(torch.equal(v, rounded[k]) for k, v in load(folder).state_dict().items())


def test_loaded_model_is_complete(tiny: Make, tmp_path: Path) -> None:
    folder = export_cut("gptq", tiny("mixtral"), EXPERTS, tmp_path / "out")
    settings = {"max_new_tokens": 3, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load(str(folder))
    assert not model.training
    assert model.generation_config.max_new_tokens == 3
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))


def test_parameters_do_not_alias_the_file(tiny: Make, tmp_path: Path) -> None:
    folder = export_cut("hf", tiny("mixtral"), WHOLE, tmp_path / "out")
    model = load(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 4)
        opened.write(bytes(file.stat().st_size // 2))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny("mixtral"))))


def test_shards(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 40_000)
    folder = export_cut("gptq", tiny("olmoe"), WHOLE, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same_model(folder, "gptq", reference(tiny("olmoe"), WHOLE, True))
    next(folder.glob("*2-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match="shard"):
        load(folder)


Tensors = dict[str, torch.Tensor]
MATRIX = "model.layers.1.mlp.experts.2.up_proj"


def lose(tensors: Tensors) -> None:
    del tensors[f"{MATRIX}.scales"]


def lose_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def add(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.6.up_proj.qweight"] = torch.zeros(1, dtype=torch.int32)


def add_plain_twin(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.weight"] = torch.zeros(32, 64)


def quantize_router(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.gate.qweight"] = tensors.pop("model.layers.1.mlp.gate.weight")


def shorten(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.qweight"] = tensors[f"{MATRIX}.qweight"][:4].clone()


def retype(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.scales"] = tensors[f"{MATRIX}.scales"].float()


def shift_zero(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.qzeros"][1, 2] ^= 1 << 8


def reorder(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.g_idx"] = tensors[f"{MATRIX}.g_idx"].flip(0).contiguous()


def spoil_scale(tensors: Tensors) -> None:
    tensors[f"{MATRIX}.scales"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, f"lacks 1 tensors, such as {MATRIX}.scales"),
        (lose_norm, "lacks 1 tensors, such as model.norm.weight"),
        (add, "unexpected 1 tensors, such as .*experts.6"),
        (add_plain_twin, f"unexpected 1 tensors, such as {MATRIX}.weight"),
        (quantize_router, "lacks 1 tensors, such as model.layers.1.mlp.gate.weight"),
        (shorten, f"{MATRIX}.qweight has shape and dtype "),
        (retype, f"{MATRIX}.scales has shape and dtype "),
        (shift_zero, f"{MATRIX}.qzeros holds zero points from 7 to 8|from 8 to 9"),
        (reorder, f"{MATRIX}.g_idx reorders"),
        (spoil_scale, f"{MATRIX}.scales are not finite"),
    ],
)
def test_a_changed_folder_is_refused(
    change: Callable[[Tensors], None], message: str, tiny: Make, tmp_path: Path
) -> None:
    folder = export_cut("gptq", tiny("olmoe"), WHOLE, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=message) as caught:
        load(folder)
    assert caught.value.exit_code == 7
    with pytest.raises(VerificationFailed, match=message):
        list(find_target("gptq").tensors(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq"},
        {"bits": 3},
        {"bits": None},
        {"sym": None},
        {"pack_dtype": "int64"},
        {"dynamic": ["-:lm_head"]},
        {"dynamic": {"+:model": {"bits": 3}}},
        {"dynamic": {"+:model": {"desc_act": 1}}},
        {"dynamic": {"model": 4}},
        {"dynamic": {"-:mod(": {}}},
        {"desc_act": None},
        {"lm_head": True},
        {"group_size": 16},
        {"checkpoint_format": "gptq_v2"},
    ],
    ids=str,
)
def test_other_quantization_is_refused(
    settings: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    folder = export_cut("gptq", tiny("olmoe"), WHOLE, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="can be loaded") as caught:
        load(folder)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, r"qweight has shape .* asks for"),
        ({"group_size": -1}, r"qzeros has shape .* asks for"),
        ({"dynamic": {r"-:model\.layers\.1\.self_attn\.o_proj": {}}}, "lacks 1 tensors.*o_proj"),
        ({"dynamic": {r".*layers\.1\..*down": {"bits": 8}}}, r"down_proj\.q.* asks for"),
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_files_are_refused(
    settings: dict[str, Any], message: str, tiny: Make, tmp_path: Path
) -> None:
    folder = export_cut("gptq", tiny("olmoe"), WHOLE, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match=message):
        load(folder)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_stored_zero_point_is_zero(bits: int, tiny: Make, tmp_path: Path) -> None:
    model = quantize(open_checkpoint(str(tiny("olmoe"))).model, Scheme(bits, 32, symmetric=False))
    folder = export("gptq", model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MATRIX}.qzeros"][0, 0] |= (1 << bits) - 1  # plus one, within the bits
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    opened = {name: w for name, _, w in open_stored_model(open_checkpoint(folder)).tensors()}
    zeros = opened[f"{MATRIX}.weight"].quantized().zeros
    assert zeros is not None
    assert int(zeros[0, 0]) == 0


@pytest.mark.parametrize(
    ("uneven", "error"),
    [
        ({"1": {"num_experts": 9}}, Unsupported),
        ({"1": {"num_experts": 1}}, Unsupported),  # fewer than its top-k
        ({"1": {"skip": ["mlp"]}}, Unsupported),
        ({"7": {"num_experts": 3}}, Unsupported),
        ({"1": {"num_experts": 5}}, VerificationFailed),  # there are three
    ],
    ids=str,
)
def test_wrong_per_layer_config_is_refused(
    uneven: dict[str, Any], error: type[Exception], tiny: Make, tmp_path: Path
) -> None:
    folder = export_cut("gptq", tiny("olmoe"), UNEVEN, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"] |= uneven
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        load(folder)


def test_no_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
