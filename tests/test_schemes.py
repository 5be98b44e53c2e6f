"""Every scheme in every target: refused in one line, or written, read back and run as it should.

Runtimes are held against the model in memory, run by the project's own walk on the dequantized
numbers; what a GPTQ checkpoint holds, against a reader of this file that goes bit by bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file
from torch import Tensor

from helpers import compute_logits, each_family, slow_except
from moe2edge.calibration import walk
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.evaluation.reference import record
from moe2edge.evaluation.tensor_digests import compute_digest
from moe2edge.model.block import is_quantizable
from moe2edge.model.edits import change_weights
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._quantize import Rule
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.registry import make_target
from moe2edge.pipeline.target import Target
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.targets import _onnx_exact, _onnx_runtime, _onnx_storage
from moe2edge.targets._tensors import pad
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

TARGETS: dict[str, Target] = {
    "gptq": make_target("gptq", {}),
    "compressed-tensors": make_target("compressed-tensors", {}),
    "onnx": make_target("onnx", {}),
    "hf": make_target("hf", {"dequantize": True}),
}
SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, -1)
    for symmetric in (True, False)
]
# What is refused, as (bits, group size), whether symmetric or not; nothing else is.
REFUSED = {
    "gptq": {(3, 32), (3, -1)},
    "compressed-tensors": set[tuple[int, int]](),
    "onnx": {(3, 32), (3, -1), (2, -1), (4, -1), (8, -1)},
    "hf": set[tuple[int, int]](),
}
IDS = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(7))
TOLERANCE = 1e-4


def opened(folder: Path) -> Model:
    return open_checkpoint(str(folder)).model


def rounded(source: Model, choose: Callable[[int, str], Scheme | None]) -> Model:
    """Every tensor that slimming selects, in the scheme that is chosen by block and role."""
    chosen = {
        (block.index, role): scheme
        for block in source.blocks
        for role, _ in block.weights()
        if (scheme := choose(block.index, role)) is not None
    }
    model = source
    for scheme in set(chosen.values()):
        roles = {role for (_, role), found in chosen.items() if found == scheme}
        for block in quantize(source, scheme, roles.__contains__).blocks:
            new = {r: w for r, w in block.weights() if chosen.get((block.index, r)) == scheme}
            model = model.replace_block(model.blocks[block.index].with_weights(new))
    return model


def logits(model: Model) -> Tensor:
    return compute_logits(model, IDS)


def check(target: Target, model: Model, folder: Path) -> Path:
    """Write and read everything back, run it with float32 activations and as shipped."""
    folder.mkdir()
    target.accepts(model)
    target.write(model, folder)
    stored = target.stored(model)
    assert verify.audit(target, folder, stored) > 10
    expected = logits(stored)
    exact = target.reopen(folder, exact=True)
    assert (exact.logits(IDS) - expected).abs().max() < TOLERANCE
    steps = [exact.start(IDS[1, :30].tolist())]
    steps += [exact.step(token) for token in IDS[1, 30:].tolist()]
    assert (torch.stack(steps) - expected[1, 29:]).abs().max() < TOLERANCE
    shipped = target.reopen(folder).logits(IDS)
    errors = (shipped - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < verify.SHIPPED_USUAL
    return folder


# ---- one scheme --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("scheme", slow_except(SCHEMES, *SCHEMES[::5]), ids=str)
def test_one_scheme(scheme: Scheme, name: str, tiny: Make, tmp_path: Path) -> None:
    target = TARGETS[name]
    model = quantize(opened(tiny("qwen2_moe", initializer_range=0.1)), scheme)
    if (scheme.bits, scheme.group_size) not in REFUSED[name]:
        check(target, model, tmp_path / "out")
        return
    with pytest.raises(Unsupported) as caught:
        target.accepts(model)
    message = str(caught.value)
    assert "\n" not in message
    assert f"q_proj.weight is {scheme}" in message  # what was found
    assert "hf:dequantize=true" in message  # what to do


def test_plain_hf_names_the_option(tiny: Make) -> None:
    for scheme in SCHEMES:
        model = quantize(opened(tiny("qwen2_moe", initializer_range=0.1)), scheme)
        with pytest.raises(Unsupported, match=r"hf:dequantize=true, which takes as many bytes as"):
            Hf().accepts(model)


def test_plain_hf_names_every_target_that_holds_a_model(tiny: Make) -> None:
    model = quantize(opened(tiny("qwen3_moe", norm_topk_prob=True)), Scheme(4, 32))
    with pytest.raises(Unsupported, match="export to compressed-tensors, gguf, gptq, mlx, onnx or"):
        Hf().accepts(model)
    model = quantize(opened(tiny("qwen3_moe")), Scheme(3, 32))
    with pytest.raises(Unsupported, match=r"export to compressed-tensors, .*mlx or hf:dequantize"):
        Hf().accepts(model)


# ---- several schemes ---------------------------------------------------------------------------


def mixed(block: int, role: str) -> Scheme | None:
    """Attention in 8 bits, experts in 4, the first block in 8 throughout."""
    if not is_quantizable(role):
        return None
    return Scheme(8, 32) if block == 0 or role.startswith("attention") else Scheme(4, 32)


def odd(block: int, role: str) -> Scheme | None:
    """Something different at every turn, and the last block left alone."""
    if block == 2 or mixed(block, role) is None:
        return None
    if role.startswith("attention.o_proj"):
        return Scheme(8, 64, symmetric=False)
    if role.startswith("attention"):
        return Scheme(4, 32) if "q_proj" in role else Scheme(2, 32, symmetric=False)
    if role.startswith("experts"):
        return Scheme(2, 32, symmetric=False) if block else Scheme(8, 32, symmetric=False)
    return Scheme(4, 32, symmetric=False)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("family", each_family("qwen2_moe"))
def test_a_mixed_recipe(family: str, name: str, tiny: Make, tmp_path: Path) -> None:
    model = rounded(opened(tiny(family, initializer_range=0.1)), mixed)
    assert len({w.scheme for _, _, w in model.tensors()}) == 3
    folder = check(TARGETS[name], model, tmp_path / "out")
    if name != "gptq":
        return
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    experts = "block_sparse_moe" if family == "mixtral" else "mlp"
    eight = {"bits": 8, "group_size": 32, "sym": True}
    expected = {
        r"+:model\.layers\.\d+\.self_attn\.": eight,
        rf"+:model\.layers\.0\.{experts}\.experts": eight,
    }
    if FAMILIES[family].shared:
        expected[r"+:model\.layers\.0\.mlp\.shared_expert\."] = eight
    assert settings["dynamic"] == expected
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 32, True)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_many_schemes_and_none(family: str, name: str, tiny: Make, tmp_path: Path) -> None:
    model = rounded(opened(tiny(family, initializer_range=0.1)), odd)
    folder = check(TARGETS[name], model, tmp_path / "out")
    if name == "gptq":
        back = open_stored_model(open_checkpoint(str(folder)))
        assert [w.scheme for _, _, w in back.tensors()] == [w.scheme for _, _, w in model.tensors()]


def test_rules_of_a_recipe_reach_the_targets(tiny: Make) -> None:
    rules = (Rule(blocks=(0,), bits=8), Rule(match="self_attn", bits=8))
    model = opened(tiny("qwen2_moe", initializer_range=0.1))
    planned = Rtn(group_size=32, rules=rules).plan(model)
    for _, role, weight in planned.tensors():
        assert (weight.scheme is not None) is is_quantizable(role)
    assert len({weight.scheme for _, _, weight in planned.tensors()}) == 3
    for target in TARGETS.values():
        target.accepts(planned)
        assert target.estimate(planned).disk > 0


def test_words_must_be_filled(tmp_path: Path, tiny: Make) -> None:
    """Sixteen numbers of 2 bits, eight of 4, four of 8."""
    model = opened(tiny("mixtral", intermediate_size=40))
    for bits in (4, 8):
        Gptq().accepts(quantize(model, Scheme(bits, -1)))
    with pytest.raises(Unsupported, match=r"w1\.weight has shape \[40, 64\].*divisible by 16"):
        Gptq().accepts(quantize(model, Scheme(2, -1)))


# ---- GPTQ, bit by bit --------------------------------------------------------------------------


def read_slowly(tensors: dict[str, Tensor], stem: str, bits: int) -> Tensor:
    """Return a matrix [out, in] of a GPTQ version 1 checkpoint, one bit at a time."""
    words, points, scales, groups = (
        tensors[f"{stem}.{part}"].tolist() for part in ("qweight", "qzeros", "scales", "g_idx")
    )

    def number(word: int, place: int) -> int:
        return sum((word >> place * bits + bit & 1) << bit for bit in range(bits))

    per_word = 32 // bits
    rows = []
    for out in range(len(scales[0])):
        row = []
        for at, group in enumerate(groups):
            q = number(words[at // per_word][out], at % per_word)
            zero = number(points[group][out // per_word], out % per_word) + 1
            row.append((q - zero) * scales[group][out])
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_read_bit_by_bit(
    bits: int, symmetric: bool, group: int, tiny: Make, tmp_path: Path
) -> None:
    model = quantize(opened(tiny("olmoe")), Scheme(bits, group, symmetric))
    Gptq().write(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    middle = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    for stem in ("model.layers.1.mlp.experts.4.down_proj", "model.layers.2.self_attn.k_proj"):
        weight = next(w for name, _, w in model.tensors() if name == f"{stem}.weight")
        assert torch.equal(read_slowly(tensors, stem, bits), weight.load())
        assert (tensors[f"{stem}.qzeros"] == middle).all() == symmetric


# ---- experts whose width groups of 32 do not divide ---------------------------------------------


@pytest.mark.parametrize("width", [48, 176])
def test_remedies_for_odd_widths_work(width: int, tiny: Make, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", moe_intermediate_size=width, initializer_range=0.1)
    model = opened(folder)
    with pytest.raises(Unsupported, match="group_size: 16 for onnx, group_size: -1, one scale"):
        Rtn().plan(model)
    with pytest.raises(Unsupported, match="set group_size to 16, leave it in 16 bits with a rule"):
        TARGETS["onnx"].accepts(Rtn(group_size=-1).plan(model))
    for symmetric in (True, False):
        small = quantize(model, Scheme(4, 16, symmetric))
        check(TARGETS["onnx"], small, tmp_path / f"onnx-{symmetric}")
    check(TARGETS["gptq"], quantize(model, Scheme(4, -1)), tmp_path / "gptq")
    unquantized = Rtn(rules=(Rule(match="experts", bits=16),)).plan(model)
    TARGETS["onnx"].accepts(unquantized)


def test_a_width_that_no_group_divides_is_left_in_16_bits(tiny: Make) -> None:
    model = opened(tiny("qwen3_moe", moe_intermediate_size=40))
    with pytest.raises(Unsupported, match=r"\(40, 64, 128\); set group_size: -1, one scale"):
        Rtn().plan(model)
    with pytest.raises(Unsupported, match="slower; leave it in 16 bits with a rule"):
        TARGETS["onnx"].accepts(Rtn(group_size=-1).plan(model))


# ---- ONNX Runtime's own ways -------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_experts_that_round_activations_are_exact_when_that_is_asked(
    bits: int, symmetric: bool, group: int, tiny: Make, tmp_path: Path
) -> None:
    """In sizes that the kernels with tables and with int8 activations take."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    model = opened(tiny("olmoe", initializer_range=0.05, **sizes))
    check(Onnx(), quantize(model, Scheme(bits, group, symmetric)), tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 8])
def test_the_exact_way_is_needed(
    bits: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a newer ONNX Runtime computes in float32 when asked: drop our ways."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    model = quantize(opened(tiny("olmoe", initializer_range=0.05, **sizes)), Scheme(bits, 32))
    Onnx().write(model, tmp_path)
    monkeypatch.setattr(_onnx_exact, "_split_groups", lambda graph: None)
    monkeypatch.setattr(_onnx_runtime, "use_float_experts", nullcontext)
    found = Onnx().reopen(tmp_path, exact=True).logits(IDS)
    assert (found - logits(model)).abs().max() > TOLERANCE


def test_the_environment_is_left_as_it_was(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Onnx().write(quantize(opened(tiny("olmoe")), Scheme(8, 32)), tmp_path)
    name = _onnx_exact.EXPERT_KERNELS
    monkeypatch.delenv(name, raising=False)
    Onnx().reopen(tmp_path, exact=True)
    assert name not in os.environ
    monkeypatch.setenv(name, "int8")
    Onnx().reopen(tmp_path, exact=True)
    assert os.environ[name] == "int8"


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (8, False)])
def test_scales_of_experts_are_float16_and_folders_of_before_are_read(
    bits: int, symmetric: bool, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are equal to the bit, so nothing is lost with the other half of the bytes."""
    model = quantize(opened(tiny("olmoe", initializer_range=0.1)), Scheme(bits, 32, symmetric))
    folders = [tmp_path / name for name in ("float32", "float16")]
    for folder, half in zip(folders, (False, True), strict=True):
        folder.mkdir()
        with monkeypatch.context() as patch:
            if not half:
                patch.setattr(_onnx_storage, "_has_half_scales", lambda source: False)
            Onnx().write(model, folder)
        assert verify.audit(Onnx(), folder, model) > 10
    dtypes = [
        {p.data_type for p in protos if "experts" in p.name and p.name.endswith("scales")}
        for protos in (_onnx_storage.load_graph(folder).graph.initializer for folder in folders)
    ]
    assert dtypes == [{TensorProto.FLOAT}, {TensorProto.FLOAT16}]
    for exact in (False, True):
        before, now = (Onnx().reopen(folder, exact=exact).logits(IDS) for folder in folders)
        assert torch.equal(before, now)


def test_scales_of_a_source_that_float16_cannot_hold_stay_float32(
    tiny: Make, tmp_path: Path
) -> None:
    def small(weight: Weight) -> Weight:
        if weight.scheme is None:
            return weight
        numbers = weight.quantized()
        less = replace(numbers, scales=(numbers.scales * 2.0**-20).bfloat16().float())
        assert not torch.equal(less.scales.half().float(), less.scales)
        return replace(
            weight, load=less.dequantize, load_quantized=lambda: less, kept=True, scale_dtype="BF16"
        )

    model = quantize(opened(tiny("olmoe")), Scheme(4, 32))
    kept = change_weights(model, lambda _, weight: small(weight))
    Onnx().write(kept, tmp_path)
    assert verify.audit(Onnx(), tmp_path, kept) > 10
    # The same numbers from a pass would break its promise.
    broken = change_weights(kept, lambda _, weight: replace(weight, kept=False))
    with pytest.raises(VerificationFailed, match=r"scales that torch\.float16 cannot represent"):
        Onnx().write(broken, tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_skipping_with_zero_points(bits: int, tiny: Make, tmp_path: Path) -> None:
    """Weights of the router and zero points are inputs of one operator."""
    model = opened(tiny("qwen2_moe", initializer_range=0.1))
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.7,))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    check(Onnx(), quantize(model, Scheme(bits, 32, symmetric=False)), tmp_path / "out")


# ---- dequantized -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_that_the_dtype_rounds(dtype: str, tiny: Make, tmp_path: Path) -> None:
    """The reference is that of the rounded numbers, so that they verify as closely as any."""
    source = opened(tiny("olmoe", dtype=dtype, initializer_range=0.1))
    model, target = quantize(source, Scheme(8, 32, symmetric=False)), TARGETS["hf"]
    target.write(model, tmp_path)
    stored = target.stored(model)
    wanted = dict(target.tensors(tmp_path))
    for (name, _, weight), (_, _, before) in zip(stored.tensors(), model.tensors(), strict=True):
        tensor = wanted[name]
        assert isinstance(tensor, Tensor)
        assert weight.scheme is None
        assert torch.equal(tensor, before.load().to(getattr(torch, dtype)))
    of_source = list(
        walk.compute_logits(source, walk.observe(source, IDS, (), lambda *_: None, ""))
    )
    hidden = walk.observe(model, IDS, (), lambda *_: None, "")
    of_model = record(model, IDS, of_source, hidden)
    reference = of_model.for_stored(model, stored)
    assert verify.audit(target, tmp_path, stored) == len(reference.digests)
    _, parity, _ = verify.check_folder(target, tmp_path, reference)
    assert parity.exact < TOLERANCE
    assert (of_model.logits - reference.logits).abs().max() > TOLERANCE
    assert target.estimate(model).disk == Hf().estimate(source).disk


def test_loaders_of_dequantized_folders_say_what_they_are(tiny: Make) -> None:
    model = quantize(opened(tiny("olmoe")), Scheme(3, 32))
    for loader in TARGETS["hf"].loaders(model):
        assert "as large as if nothing was quantized" in loader.note
    plain = {loader.program: loader.verdict for loader in Hf().loaders(opened(tiny("olmoe")))}
    assert {k.program: k.verdict for k in TARGETS["hf"].loaders(model)} == plain


# ---- zero points are numbers like others -------------------------------------------------------


def test_a_changed_zero_point_is_found(tiny: Make, tmp_path: Path) -> None:
    model = quantize(opened(tiny("olmoe")), Scheme(4, 32, symmetric=False))
    weight = model.blocks[1].attention["q_proj.weight"]
    numbers = weight.quantized()
    assert numbers.zeros is not None
    zeros = numbers.zeros.clone()
    zeros[3, 1] = zeros[3, 1] % 14 + 1
    other = replace(numbers, zeros=zeros)
    changed = replace(weight, load=other.dequantize, load_quantized=lambda: other)
    block = model.blocks[1].with_weights({"attention.q_proj.weight": changed})
    for name in ("gptq", "onnx"):
        folder = tmp_path / name
        folder.mkdir()
        TARGETS[name].write(model, folder)
        with pytest.raises(VerificationFailed, match=r"1\.self_attn\.q_proj.*other values"):
            verify.audit(TARGETS[name], folder, model.replace_block(block))
    assert compute_digest(numbers) != compute_digest(other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (_onnx_storage.BITS_KEY, "5", "has 5 bits, expected 2, 3, 4 or 8"),
        (_onnx_storage.ZEROS_KEY, "nothing", "lacks nothing, which .* needs"),
        (_onnx_storage.SCALES_KEY, "nothing", "lacks nothing, which .* needs"),
    ],
)
def test_a_changed_graph_is_found(
    key: str, value: str, message: str, tiny: Make, tmp_path: Path
) -> None:
    Onnx().write(quantize(opened(tiny("olmoe")), Scheme(4, 32, symmetric=False)), tmp_path)
    graph = _onnx_storage.load_graph(tmp_path)
    known = [p for t in graph.graph.initializer for p in t.metadata_props if p.key == key]
    known[-1].value = value
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationFailed, match=message):
        list(Onnx().tensors(tmp_path))


# ---- zeros that stand for what is gone ---------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "hf"])
@pytest.mark.parametrize("family", slow_except(["mixtral", "qwen2_moe", "qwen3_moe"], "mixtral"))
@pytest.mark.parametrize("group", [32, -1])
def test_layers_in_place_of_dropped_ones(
    group: int, family: str, name: str, tiny: Make, tmp_path: Path
) -> None:
    model = opened(tiny(family, initializer_range=0.1))
    first = model.blocks[0]
    if isinstance(first.mlp, MoELayer) and first.mlp.shared is None:
        model = model.replace_block(first.keep_experts([2], clamp_top_k=True))
    model = model.replace_block(model.blocks[1].without_mlp())

    def scheme(block: int, role: str) -> Scheme | None:
        known = mixed(block, role)
        if known is None:
            return None
        symmetric = role.startswith("attention") and block != 1
        return replace(known, group_size=group, symmetric=symmetric)

    model = rounded(model, scheme)
    layout: dict[str, object] = {"layout": "mlp-only"}
    options = layout | {"dequantize": True} if name == "hf" else layout
    check(make_target(name, options), model, tmp_path / "out")
    stored = Gptq(layout="mlp-only").stored(model)
    dense = {role: w for role, w in stored.blocks[1].weights() if role.startswith("dense")}
    assert len(dense) == 3
    assert {w.scheme for w in dense.values()} == {Scheme(8, group, symmetric=False)}


def test_padding_keeps_numbers_of_every_scheme() -> None:
    matrix = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    for scheme in SCHEMES:
        numbers = round_to_nearest(matrix, scheme)
        weight = Weight("w", (24, 64), "F32", numbers.dequantize, scheme, partial(replace, numbers))
        whole = pad(weight, (32, 128)).quantized()
        assert torch.equal(whole.dequantize()[:24, :64], numbers.dequantize())
        assert whole.dequantize().count_nonzero() == numbers.dequantize().count_nonzero()
        assert torch.equal(pad(weight, (32, 128)).load(), whole.dequantize())
