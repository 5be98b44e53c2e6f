"""Ways to hold layers that differ: what each layout refuses, and that its readers read it right.

What ``uniform`` and ``mlp-only`` write is opened by stock transformers, what ``natural`` writes by
``moe2edge.load``; both are held against transformers' modules that are operated on here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import SCHEME, each_family, run, run_module, slow_except
from moe2edge.commands import export as exporting
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.block import SECOND_NORM
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.runtime.load import load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make, assert_cache_changes_nothing, quantize

IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(3))
EXPERT = 4


@dataclass(frozen=True)
class Cut:
    """What happens to a model of three blocks.

    Attributes:
        experts: which stay, by block; one becomes a plain MLP, none means that the layer goes.
        blocks: which stay, after that.
    """

    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    blocks: Sequence[int] = (0, 1, 2)


def ours(model: Model, cut: Cut) -> Model:
    for index, ids in cut.experts.items():
        block = model.blocks[index]
        changed = block.keep_experts(ids, clamp_top_k=True) if ids else block.without_mlp()
        model = model.replace_block(changed)
    model = model.keep_blocks(cut.blocks)
    model.verify()
    return model


def theirs(folder: Path, cut: Cut, *, int4: bool = False) -> Any:
    """Stock transformers with modules cut, and with ``int4`` numbers rounded, in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if int4:
        for name, parameter in model.model.layers.named_parameters():
            if name.endswith("_proj.weight") or ".experts." in name:
                for matrix in parameter.data.reshape(-1, *parameter.shape[-2:]):
                    matrix.copy_(round_to_nearest(matrix, SCHEME).dequantize())
    for index, ids in cut.experts.items():
        mlp = model.model.layers[index].mlp
        if not ids:
            mlp.forward = torch.zeros_like
            continue
        mlp.gate.weight.data = mlp.gate.weight.data[list(ids)]
        mlp.gate.top_k = min(mlp.gate.top_k, len(ids))
        mlp.gate.num_experts = mlp.experts.num_experts = len(ids)
        for name in ("gate_up_proj", "down_proj"):
            getattr(mlp.experts, name).data = getattr(mlp.experts, name).data[list(ids)]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in cut.blocks)
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return run_module(model, ids)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5, relative to the largest."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def written(target: Hf | Gptq, model: Model, folder: Path) -> Path:
    """Do what the pipeline does with a target, its checks included."""
    folder.mkdir(exist_ok=True)
    target.accepts(model)
    target.write(model, folder)
    assert verify.audit(target, folder, target.stored(model)) > 10
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert target.estimate(model).disk == pytest.approx(size, rel=0.02)
    return folder


# ---- who reads what ----------------------------------------------------------------------------

EVEN = {n: (5, 0, 3) for n in range(3)}
UNIFORM = {
    "whole": Cut(),
    "experts": Cut(EVEN),
    "top-k clamped": Cut({n: (1, 2) for n in range(3)}),
    "blocks": Cut(blocks=(1, 2)),
    "both": Cut(EVEN, blocks=(0, 2)),
}
DROPPED = {
    "first and last": Cut({0: (), 2: ()}),
    "every layer": Cut({0: (), 1: (), 2: ()}),
    "and experts": Cut({0: (5, 0, 3), 1: (), 2: (1, 2, 4)}),
    "and a block": Cut({1: ()}, blocks=(1, 2)),
}
ALONE = {
    "alone": Cut({1: (EXPERT,)}),
    "all alone": Cut({0: (EXPERT,), 1: (2,), 2: (0,)}),
    "alone and dropped": Cut({0: (EXPERT,), 2: ()}),
    "alone among experts": Cut({0: (1, 2, 3), 1: (EXPERT,), 2: (0, 3, 5)}),
}
# Sources without and with dense layers; in the last one these are narrower than an expert.
SOURCES: dict[str, dict[str, Any]] = {
    "no dense layers": {},
    "one of width 64": {"mlp_only_layers": [1]},
    "one of width 16": {"mlp_only_layers": [1], "intermediate_size": 16},
}
MLP_ONLY = [
    (family, f"{name}, {source}", cut, SOURCES[source])
    for family in ("mixtral", "qwen2_moe", "qwen3_moe")
    for name, cut in (DROPPED | (ALONE if family != "qwen2_moe" else {})).items()
    for source in SOURCES
    if source == "no dense layers" or (1 not in cut.experts and family != "mixtral")
]
FEW = [
    (family, cut, changes)
    for family, name, cut, changes in MLP_ONLY
    if name in ("first and last, no dense layers", "alone, no dense layers")
]
# Mixtral has no dense layers of its own; it is written as Qwen2-MoE.
HOMES = {"mixtral": "qwen2_moe"}


def assert_stock_reads(folder: Path, want: Any) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_close(logits(loaded), logits(want))
    assert_cache_changes_nothing(loaded, IDS)
    assert_close(logits(load(folder, dtype=torch.float32)), logits(want))
    runtime = Hf().reopen(folder, exact=True)
    steps = [runtime.start(IDS[1, :9].tolist())]
    steps += [runtime.step(token) for token in IDS[1, 9:].tolist()]
    assert_close(torch.stack(steps), logits(want)[1, 8:])


@pytest.mark.parametrize("cut", UNIFORM)
@pytest.mark.parametrize("family", each_family("mixtral"))
def test_stock_transformers_reads_uniform(
    family: str, cut: str, tiny: Make, tmp_path: Path
) -> None:
    source = tiny(family, num_experts_per_tok=3)
    model = ours(open_checkpoint(str(source)).model, UNIFORM[cut])
    written(Hf(layout="uniform"), model, tmp_path)
    assert_stock_reads(tmp_path, theirs(source, UNIFORM[cut]))
    for layout in ("natural", "mlp-only"):  # the same, where all layers are alike
        again = written(Hf(layout=layout), model, tmp_path / layout)
        for path in again.iterdir():
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize(
    ("family", "cut", "changes"),
    slow_except([(f, c, s) for f, _, c, s in MLP_ONLY], *FEW),
    ids=[f"{f}: {n}" for f, n, _, _ in MLP_ONLY],
)
def test_stock_transformers_reads_mlp_only(
    family: str, cut: Cut, changes: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    source = tiny(family, **changes)
    model = ours(open_checkpoint(str(source)).model, cut)
    written(Hf(layout="mlp-only"), model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" not in config
    plain = [b.index for b in model.blocks if not isinstance(b.mlp, MoELayer)]
    assert config["mlp_only_layers"] == plain
    assert config["model_type"] == HOMES.get(family, family)
    widths = [b.mlp.gate.shape[0] for b in model.blocks if isinstance(b.mlp, Dense)]
    own = changes.get("intermediate_size", 64) if changes else 0
    if family == "mixtral" and widths:
        own = 32  # an expert's
    # That of the source's dense layers where they are wide enough, or else whole tiles.
    assert config["intermediate_size"] == (own if own >= max(widths, default=1) else 128)
    assert_stock_reads(tmp_path, theirs(source, cut))


@pytest.mark.parametrize(
    ("family", "cut", "changes"),
    slow_except([(f, c, s) for f, _, c, s in MLP_ONLY], *FEW),
    ids=[f"{f}: {n}" for f, n, _, _ in MLP_ONLY],
)
def test_gptq_mlp_only(
    family: str, cut: Cut, changes: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    changes = {**changes, **({"intermediate_size": 32} if "intermediate_size" in changes else {})}
    source = tiny(family, **changes)
    model = quantize(ours(open_checkpoint(str(source)).model, cut), SCHEME)
    written(Gptq(layout="mlp-only"), model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" not in config
    want = theirs(source, cut, int4=True)
    loaded = load(tmp_path, dtype=torch.float32)
    assert_close(logits(loaded), logits(want))
    assert_cache_changes_nothing(loaded, IDS)


MIXTRALS: list[dict[str, Any]] = [
    {"sliding_window": 6},
    {"head_dim": 32},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", MIXTRALS, ids=str)
def test_switches_of_mixtral_as_qwen2_moe(
    changes: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    source, cut = tiny("mixtral", **changes), Cut({0: (), 1: (0, 2, 5), 2: (5, 1, 3)})
    written(Hf(layout="mlp-only"), ours(open_checkpoint(str(source)).model, cut), tmp_path)
    assert_stock_reads(tmp_path, theirs(source, cut))


def test_a_silent_mixtral_config_as_qwen2_moe(tiny: Make, tmp_path: Path) -> None:
    """What transformers takes where a config says nothing is not the same in both classes."""
    source, cut = tmp_path / "source", Cut({1: ()})
    shutil.copytree(tiny("mixtral", num_attention_heads=8, num_key_value_heads=8), source)
    config = json.loads((source / "config.json").read_text())
    for key in (
        "rope_parameters",
        "rms_norm_eps",
        "num_key_value_heads",
        "head_dim",
        "eos_token_id",
    ):
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    model = ours(open_checkpoint(str(source)).model, cut)
    folder = written(Hf(layout="mlp-only"), model, tmp_path / "out")
    assert_stock_reads(folder, theirs(source, cut))
    assert AutoConfig.from_pretrained(folder).eos_token_id == 2


@pytest.mark.parametrize("target", [Hf(layout="natural"), Gptq()], ids=["hf", "gptq"])
@pytest.mark.parametrize("cut", [*DROPPED, *ALONE])
@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.slow
def test_moe2edge_reads_natural(
    family: str, cut: str, target: Hf | Gptq, tiny: Make, tmp_path: Path
) -> None:
    int4, source = isinstance(target, Gptq), tiny(family)
    changes = (DROPPED | ALONE)[cut]
    model = ours(open_checkpoint(str(source)).model, changes)
    written(target, quantize(model, SCHEME) if int4 else model, tmp_path)
    want = theirs(source, changes, int4=int4)
    loaded = load(tmp_path, dtype=torch.float32)
    assert_close(logits(loaded), logits(want))
    assert_cache_changes_nothing(loaded, IDS)


# ---- what is written for a layer that is gone --------------------------------------------------


def test_widths_and_numbers_of_plain_layers(tiny: Make) -> None:
    source = tiny("qwen3_moe", mlp_only_layers=[1], moe_intermediate_size=160, dtype="bfloat16")
    model = ours(open_checkpoint(str(source)).model, Cut({0: (EXPERT,), 2: ()}))
    stored = Hf(layout="mlp-only").stored(model)
    stored.verify()
    assert [type(b.mlp).__base__ in (Dense, object) for b in stored.blocks] == [True] * 3
    for before, after in zip(model.blocks, stored.blocks, strict=True):
        assert isinstance(after.mlp, Dense)
        for part in ("gate", "up", "down"):
            weight: Weight = getattr(after.mlp, part)
            assert weight.shape == ((64, 256) if part == "down" else (256, 64))  # 160 in tiles
            whole = weight.load()
            assert (tuple(whole.shape), whole.dtype) == (weight.shape, torch.bfloat16)
            if isinstance(before.mlp, Dense):
                old = getattr(before.mlp, part).load()
                outs, ins = old.shape
                assert torch.equal(whole[:outs, :ins], old)
                assert whole.count_nonzero() == old.count_nonzero()
            else:
                assert not whole.any()
    assert stored.blocks[2].norms[SECOND_NORM].load().eq(1).all()
    # What did not change is the same handle, so that nothing is read twice.
    assert stored.blocks[2].attention is model.blocks[2].attention


def test_integers_of_padded_layers(tiny: Make) -> None:
    source = tiny("qwen3_moe")
    model = ours(open_checkpoint(str(source)).model, Cut({0: (EXPERT,), 2: ()}))
    model = quantize(model, SCHEME)
    stored = Gptq(layout="mlp-only").stored(model)
    for index in (0, 2):
        for role, weight in stored.blocks[index].weights():
            if not role.startswith("dense"):
                continue
            numbers = weight.quantized()
            assert isinstance(numbers, Quantized)
            assert numbers.q.shape == weight.shape
            assert numbers.scales.shape == (weight.shape[0], weight.shape[1] // 32)
            assert torch.equal(numbers.dequantize(), weight.load())
            before = dict(model.blocks[index].weights()).get(role)
            old = before.load() if before else torch.zeros(0, 0)
            assert torch.equal(numbers.dequantize()[: len(old), : old.shape[1]], old)
            assert numbers.dequantize().count_nonzero() == old.count_nonzero()


# ---- refusals ----------------------------------------------------------------------------------


def skipping(model: Model) -> Model:
    block, layer = model.moe_blocks[1]
    router = replace(layer.router, skip_below=(0.5,))
    return model.replace_block(replace(block, mlp=replace(layer, router=router)))


def norm_only(model: Model) -> Model:
    return model.replace_block(model.blocks[1].without_mlp(keep_norm=True))


def shared_only(model: Model) -> Model:
    return model.replace_block(model.blocks[1].keep_experts([]))


def cutting(experts: Mapping[int, Sequence[int]]) -> Callable[[Model], Model]:
    return lambda model: ours(model, Cut(experts))


NATURAL = r"natural \(for moe2edge\.load\), or target onnx, or prune all layers to the same size"
REFUSED: list[tuple[str, str, Callable[[Model], Model], str]] = [
    ("uniform", "olmoe", cutting({1: (0, 1, 2)}), "3 experts top-2 \\(block 1\\); choose layout "),
    ("uniform", "mixtral", skipping, "6 experts top-2 with skipping \\(block 1\\)"),
    ("uniform", "mixtral", norm_only, "only a norm \\(block 1\\)"),
    ("uniform", "mixtral", cutting({0: (), 1: ()}), "no MLP \\(blocks 0-1\\)"),
    ("uniform", "mixtral", cutting({0: (3,), 2: (4,)}), "MLP of width 32 \\(blocks 0, 2\\)"),
    ("uniform", "qwen2_moe", shared_only, "a shared expert \\(block 1\\)"),
    ("uniform", "qwen2_moe", cutting({1: (2,)}), "a shared expert and a plain MLP \\(block 1\\)"),
    ("uniform", "qwen3_moe", cutting({1: ()}), "no MLP .*; choose layout mlp-only or "),
    ("uniform", "qwen3_moe", cutting({1: (4,)}), "plain MLP .*; choose layout mlp-only or "),
    ("mlp-only", "olmoe", cutting({1: ()}), "no difference for olmoe.*no MLP"),
    (
        "mlp-only",
        "mixtral",
        cutting({0: (), 1: (0, 1, 2)}),
        "holds only MoE layers of one size, dropped.*3 exp",
    ),
    ("mlp-only", "mixtral", skipping, "skipping"),
    (
        "mlp-only",
        "qwen3_moe",
        cutting({0: (), 1: (0, 1, 2)}),
        "holds only MoE layers of one size, dropped.*3 exp",
    ),
    ("mlp-only", "qwen3_moe", skipping, "skipping"),
    ("mlp-only", "qwen3_moe", norm_only, "only a norm"),
    ("mlp-only", "qwen2_moe", shared_only, "a shared expert"),
    ("mlp-only", "qwen2_moe", cutting({1: (2,)}), "a shared expert and a plain MLP"),
]


@pytest.mark.parametrize(("layout", "family", "change", "message"), REFUSED)
def test_models_that_a_layout_cannot_hold_are_refused(
    layout: Any,
    family: str,
    change: Callable[[Model], Model],
    message: str,
    tiny: Make,
    tmp_path: Path,
) -> None:
    model = change(open_checkpoint(str(tiny(family))).model)
    for target, held in ((Hf(layout), model), (Gptq(layout), quantize(model, SCHEME))):
        with pytest.raises(Unsupported, match=f"{message}.*{NATURAL}") as caught:
            target.accepts(held)
        assert f"layout {layout}" in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(Unsupported):
            target.write(held, tmp_path)
    assert not list(tmp_path.iterdir())
    Hf("natural").accepts(model)
    Gptq("natural").accepts(quantize(model, SCHEME))


@pytest.mark.parametrize("target", [Hf, Gptq])
def test_an_unknown_layout(target: Any) -> None:
    with pytest.raises(InputError, match="unknown layout 'mlp_only': did you mean 'mlp-only'"):
        target(layout="mlp_only")


@pytest.mark.parametrize(
    ("entry", "steps"),
    [
        ("hf", "{layer_drop: {drop: 1}}"),
        ("hf:layout=mlp-only", "{expert_drop: {keep: [6, 4, 6]}}"),
        ("gptq:layout=uniform", "{layer_drop: {drop: 1}}, rtn"),
        ("gptq:layout=mlp-only", "expert_skip, rtn"),
    ],
)
def test_refusals_come_before_calibration(
    entry: str, steps: str, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("passes were run")

    monkeypatch.setattr(exporting, "run_passes", never)
    (tmp_path / "recipe.yaml").write_text(f"passes: [{steps}]")
    result = run(
        "export", str(tiny("qwen3_moe")), "-t", entry, "-r", str(tmp_path / "recipe.yaml"),
        "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 6, result.output
    assert re.search(r"layout (uniform|mlp-only) .*choose layout", result.output)
    assert not (tmp_path / "out").exists()


# ---- through the pipeline ----------------------------------------------------------------------

SMALL = [
    "--set", "calibration.samples=2", "--set", "calibration.length=48",
    "--set", "evaluation.samples=2", "--set", "evaluation.length=64",
]  # fmt: skip
PIPELINES = [
    ("qwen3_moe", "hf:layout=mlp-only", "{layer_drop: {drop: 1}}", True),
    (
        "qwen2_moe",
        "hf:layout=mlp-only",
        "{layer_drop: {drop: 2}}, {expert_drop: {keep: 3}}",
        True,
    ),
    ("qwen3_moe", "gptq:layout=mlp-only", "{layer_drop: {drop: 1}}, rtn", False),
    (
        "mixtral",
        "hf:layout=mlp-only",
        "{layer_drop: {drop: 1}}, {expert_drop: {keep: 4}}",
        True,
    ),
    ("mixtral", "gptq:layout=mlp-only", "{layer_drop: {drop: 1}}, rtn", False),
    ("mixtral", "hf:layout=natural", "{expert_drop: {keep: [3, 6, 2]}}", False),
    ("olmoe", "hf:layout=natural", "expert_skip, {layer_drop: {drop: 1, norm: false}}", False),
    ("mixtral", "gptq", "{layer_drop: {drop: 1}}, expert_skip, rtn", False),
    ("mixtral", "hf", "{block_drop: {drop: 1}}, {expert_drop: {keep: 3}}", True),
]


@pytest.mark.parametrize(
    ("family", "entry", "steps", "readable"), slow_except(PIPELINES, PIPELINES[2], PIPELINES[-1])
)
@pytest.mark.slow
def test_export_verify_and_generate(
    family: str, entry: str, steps: str, readable: bool, tiny: Make, tmp_path: Path
) -> None:
    def succeed(*arguments: str) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"passes: [{steps}]")
    source = str(tiny(family))
    succeed("export", source, "-t", entry, "-r", str(recipe), "-o", str(out), *SMALL)
    succeed("verify", str(out))
    succeed("verify", str(out), "--reference", source)
    succeed("generate", str(out), "Once upon", "--max-tokens", "4")
    if readable:
        _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())


# ---- programs ----------------------------------------------------------------------------------

PROGRAMS = ("transformers", "moe2edge", "transformers 4", "vLLM", "SGLang", "llama.cpp")
VERDICTS: list[tuple[str, Any, Callable[[Model], Model], tuple[str, ...]]] = [
    ("mixtral", "uniform", cutting(EVEN), ("yes", "yes", "yes", "as read", "as read", "as read")),
    ("olmoe", "uniform", cutting(EVEN), ("yes", "yes", "yes", "as read", "as read", "no")),
    ("qwen2_moe", "mlp-only", cutting({1: ()}), ("yes", "yes", "yes", "as read", "no", "no")),
    ("qwen3_moe", "mlp-only", cutting({1: (4,)}), ("yes", "yes", "yes", "as read", "no", "no")),
    ("mixtral", "mlp-only", cutting({1: ()}), ("yes", "yes", "yes", "as read", "no", "no")),
    ("qwen3_moe", "natural", cutting({1: ()}), ("no", "yes", "no", "no", "no", "no")),
    ("mixtral", "natural", cutting({1: (0, 1, 2)}), ("no", "yes", "no", "no", "no", "no")),
    ("mixtral", "natural", skipping, ("no", "yes", "no", "no", "no", "no")),
    ("mixtral", "natural", cutting(EVEN), ("yes", "yes", "yes", "as read", "as read", "as read")),
]


@pytest.mark.parametrize(("family", "layout", "change", "verdicts"), VERDICTS)
def test_programs_that_load_it(
    family: str,
    layout: Any,
    change: Callable[[Model], Model],
    verdicts: tuple[str, ...],
    tiny: Make,
) -> None:
    model = change(open_checkpoint(str(tiny(family))).model)
    found = {loader.program: loader for loader in Hf(layout).loaders(model)}
    assert {name: loader.verdict for name, loader in found.items()} == dict(
        zip(PROGRAMS, verdicts, strict=True)
    )
    packed = {loader.program: loader for loader in Gptq(layout).loaders(quantize(model, SCHEME))}
    for name in ("vLLM", "SGLang"):
        assert packed[name].verdict == found[name].verdict
    assert packed["transformers"].verdict == "no"
    assert packed["moe2edge"].verdict == "yes"
    if model.skips:
        assert all("skipping" in found[name].note for name in PROGRAMS[2:])
