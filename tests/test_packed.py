"""Matrices that run in 4 bits, against the same model dequantized and against slow loops."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import SCHEME, each_family, run, run_module
from moe2edge.errors import Unsupported
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime import int4 as packed
from moe2edge.runtime.decoder_blocks import disable_skipping
from moe2edge.runtime.int4 import MANY_ROWS, PackedExperts, PackedLinear
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import write_manifest
from moe2edge.testing import Make, assert_cache_changes_nothing, quantize

IDS = torch.randint(1, 96, (2, 60), generator=torch.Generator().manual_seed(5))
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Numbers small enough for rounding to bfloat16 to stay below 2 % after three blocks.
CALM: dict[str, Any] = {"dtype": "bfloat16", "initializer_range": 0.06}


def source(tiny: Make, family: str, **changes: Any) -> Model:
    return open_checkpoint(str(tiny(family, **{**CALM, **changes}))).model


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    gptq = find_target("gptq")
    gptq.accepts(model)
    gptq.write(model, folder)
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest, tiny: Make, tmp_path: Path) -> Path:
    """Return a GPTQ folder of a family, olmoe unless another is asked for."""
    family = getattr(request, "param", "olmoe")
    return written(quantize(source(tiny, family), SCHEME), tmp_path / "out")


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return run_module(model, ids).float()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def numbers(outs: int, ins: int, scheme: Scheme, seed: int = 0) -> Quantized:
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight, scheme)


def modules(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


# ---- one matrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, MANY_ROWS, MANY_ROWS + 9])
@pytest.mark.parametrize(
    ("outs", "ins", "group"),
    [(16, 32, 32), (48, 128, 64), (64, 256, 128), (176, 96, 32), (32, 384, -1), (80, 512, -1)],
)
@torch.no_grad()
def test_linear(outs: int, ins: int, group: int, rows: int) -> None:
    q = numbers(outs, ins, Scheme(group_size=group))
    bias = torch.randn(outs).to(BFLOAT16)
    linear = PackedLinear([q], nn.Parameter(bias))
    assert torch.equal(linear.dequantize(FLOAT32).T, q.dequantize())
    x = torch.randn(3, rows, ins).to(BFLOAT16)[::2]
    wanted = nn.functional.linear(x.float(), q.dequantize(), bias.float())
    assert linear(x).dtype == BFLOAT16
    assert distance(linear(x).float(), wanted) < 5e-3
    assert distance(linear.float()(x.float()), wanted) < 1e-5


def test_matrices_below_one_another() -> None:
    gate, up = numbers(24, 64, SCHEME), numbers(8, 64, SCHEME, 1)
    both = PackedLinear([gate, up]).dequantize(FLOAT32).T
    assert torch.equal(both, torch.cat([gate.dequantize(), up.dequantize()]))


def test_without_knowing_the_layout_all_rows_take_the_matmul(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = PackedLinear([numbers(64, 64, SCHEME)]).float()
    x = torch.randn(MANY_ROWS, 64)
    wanted = linear(x).detach()
    monkeypatch.setattr(packed, "_find_layout", lambda: None)
    assert distance(linear(x), wanted) < 1e-5


# ---- experts -----------------------------------------------------------------------------------


def experts(plain: bool) -> tuple[PackedExperts, list[tuple[Tensor, Tensor]]]:
    """Five experts [width 32, hidden 64] and their matrices; if ``plain``, one is not packed."""
    gate_up, down = [], []
    matrices = []
    for n in range(5):
        one, two = numbers(64, 64, SCHEME, n), numbers(64, 32, SCHEME, n + 50)
        gate_up.append(PackedLinear([one]))
        linear = nn.Linear(32, 64, bias=False, dtype=BFLOAT16)
        linear.weight = nn.Parameter(two.dequantize().to(BFLOAT16))
        down.append(linear if plain else PackedLinear([two]))
        matrices.append((one.dequantize(), two.dequantize()))
    return PackedExperts(gate_up, down, nn.functional.silu), matrices


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 4 * MANY_ROWS])
@torch.no_grad()
def test_experts_against_a_slow_loop(tokens: int, plain: bool) -> None:
    moe, matrices = experts(plain)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator)
    ids = torch.rand(tokens, 6, generator=generator).argsort(-1)[:, :3]  # 5 stands for none
    weights = torch.rand(tokens, 3, generator=generator).masked_fill(ids == 5, 0)
    wanted = torch.zeros(tokens, 64)
    for token in range(tokens):
        for n, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if n < 5:
                gate, up = (matrices[n][0] @ x[token]).chunk(2)
                wanted[token] += weight * (matrices[n][1] @ (nn.functional.silu(gate) * up))
    assert (ids == 5).any() or tokens == 1
    found = moe(x.to(BFLOAT16), ids, weights.to(BFLOAT16))
    assert found.dtype == BFLOAT16
    assert distance(found.float(), wanted) < 0.02
    # The plain matrices were rounded to bfloat16.
    assert distance(moe.float()(x, ids, weights), wanted) < (5e-3 if plain else 1e-5)


@torch.no_grad()
def test_tokens_without_any_expert_get_nothing() -> None:
    moe, _ = experts(plain=False)
    for tokens in (1, 4):
        ids = torch.full((tokens, 2), 5)
        assert not moe(torch.randn(tokens, 64).to(BFLOAT16), ids, torch.zeros(tokens, 2)).any()


# ---- whole models ------------------------------------------------------------------------------


def check(folder: Path, ids: Tensor = IDS) -> Any:
    """Check a folder packed: numbers as dequantized, as close in bfloat16 as that allows.

    Where routing is close, rounding decides it, so bfloat16 is judged by the middle token.
    """
    model, wanted = load(folder), load(folder, packed=False)
    found, expected = logits(model, ids), logits(wanted, ids)
    of_tokens = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert of_tokens.median() < 0.02
    exact = logits(load(folder, dtype=FLOAT32), ids)
    assert distance(logits(copy.deepcopy(model).float(), ids), exact) < 1e-4
    return model


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
@pytest.mark.slow
def test_families(folder: Path) -> None:
    model = check(folder)
    how = model.moe2edge_packed
    assert (how.dequantized, how.dtype) == ({}, "bfloat16")
    names = {name for name, _, w in target_model(folder).tensors() if w.scheme}
    assert set(how.packed) == names
    assert modules(model.model.layers, PackedExperts) == {f"{n}.mlp.experts" for n in range(3)}
    assert not modules(model.model.layers, nn.Linear) - {
        f"{n}.mlp.shared_expert_gate" for n in range(3)
    }
    assert_cache_changes_nothing(model, IDS[:, :20])


def target_model(folder: Path) -> Model:
    from moe2edge.storage.output import open_stored_model

    return open_stored_model(open_checkpoint(str(folder)))


@pytest.mark.parametrize("ids", [IDS[:1, :1], IDS[:, :20], IDS.repeat(1, 2)], ids=len)
@pytest.mark.parametrize("family", each_family("mixtral"))
def test_without_close_routing_logits_stay_within_2_percent(
    family: str, ids: Tensor, tiny: Make, tmp_path: Path
) -> None:
    whole = source(tiny, family, num_experts_per_tok=6)
    folder = written(quantize(whole, SCHEME), tmp_path / "out")
    assert distance(logits(load(folder), ids), logits(load(folder, packed=False), ids)) < 0.02


def test_steps_equal_the_whole(folder: Path) -> None:
    runtime = TorchRuntime(load(folder))
    steps = [runtime.start(IDS[1, :9].tolist())]
    steps += [runtime.step(token) for token in IDS[1, 9:].tolist()]
    whole = runtime.logits(IDS[1:])[0, 8:]
    of_tokens = (torch.stack(steps) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert of_tokens.median() < 0.02


def test_dynamic_skipping(tiny: Make, tmp_path: Path) -> None:
    model = quantize(source(tiny, "mixtral"), SCHEME)
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.8,))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    folder = written(model, tmp_path / "out")
    loaded = check(folder)
    before, exact = logits(loaded), load(folder, dtype=FLOAT32)
    disable_skipping(loaded)
    disable_skipping(exact)
    assert distance(logits(loaded), before) > 0.02
    assert distance(logits(loaded.float()), logits(exact)) < 1e-4


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_unequal_layers_and_plain_ones(family: str, tiny: Make, tmp_path: Path) -> None:
    model = quantize(source(tiny, family), SCHEME)
    for index, ids in enumerate([(4, 1, 5), (3,), ()]):
        model = model.replace_block(model.blocks[index].keep_experts(ids, clamp_top_k=True))
    loaded = check(written(model, tmp_path / "out"))
    assert len(loaded.model.layers[0].mlp.experts.down) == 3
    assert isinstance(loaded.model.layers[1].mlp.up_proj, PackedLinear)
    shared = (
        {f"{n}.mlp.shared_expert.up_proj" for n in range(3)} if family == "qwen2_moe" else set()
    )
    assert shared <= modules(loaded.model.layers, PackedLinear)


def test_dense_layers(tiny: Make, tmp_path: Path) -> None:
    model = quantize(source(tiny, "qwen3_moe", mlp_only_layers=[1]), SCHEME)
    loaded = check(written(model, tmp_path / "out"))
    assert isinstance(loaded.model.layers[1].mlp.down_proj, PackedLinear)


@pytest.mark.parametrize("folder", ["qwen2_moe"], indirect=True)
def test_biases(folder: Path) -> None:
    loaded, wanted = load(folder), load(folder, packed=False)
    for ours, theirs in zip(loaded.model.layers, wanted.model.layers, strict=True):
        query: Any = ours.self_attn.q_proj
        assert isinstance(query, PackedLinear)
        assert query.bias is not None
        assert torch.equal(query.bias, theirs.self_attn.q_proj.bias)
        assert ours.self_attn.o_proj.bias is None


# ---- what does not run packed ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schemes", "text"),
    [
        ({"": Scheme(bits=8, group_size=32)}, "0 of 66 .*66 dequantized to bfloat16 .8 bits: 66"),
        ({"": Scheme(bits=2, group_size=32)}, "2 bits: 66"),
        ({"": Scheme(bits=4, group_size=32, symmetric=False)}, "asymmetric: 66"),
        ({"": Scheme(group_size=16)}, "groups of 16: 66"),
        ({"down": Scheme(bits=8, group_size=32), "": SCHEME}, "48 of 66 .*8 bits: 18"),
        ({"up": Scheme(group_size=64), "": SCHEME}, "30 of 66 .*not quantized alike: 36"),
        ({"gate": SCHEME}, "0 of 18 .*not quantized alike: 18"),
        ({"attention": SCHEME}, "^12 of 12 quantized matrices run in 4 bits$"),
    ],
    ids=str,
)
def test_other_schemes_are_dequantized(schemes: dict[str, Scheme], text: str, tiny: Make) -> None:
    model = source(tiny, "olmoe")
    for key, scheme in schemes.items():
        model = quantize(model, scheme, partial(first_part, key=key, keys=list(schemes)))
    loaded: Any = build_transformers_model(model, BFLOAT16)
    assert re.search(text, str(loaded.moe2edge_packed))
    plain: Any = build_transformers_model(model, BFLOAT16, packed=False)
    for name, parameter in loaded.named_parameters():
        if "experts" not in name:
            assert torch.equal(parameter, plain.get_parameter(name))
    of_tokens = (logits(loaded) - logits(plain)).norm(dim=-1) / logits(plain).norm(dim=-1)
    assert of_tokens.median() < 0.02


def first_part(role: str, key: str, keys: list[str]) -> bool:
    """Whether ``key`` is the first of the keys that is a part of a role."""
    return next((other for other in keys if other in role), None) == key


def test_outputs_that_do_not_fill_a_block_of_rows(tmp_path: Path, tiny: Make) -> None:
    narrow = source(tiny, "qwen2_moe", num_attention_heads=8, num_key_value_heads=1)
    model = build_transformers_model(quantize(narrow, SCHEME), BFLOAT16)
    assert "(8 outputs, not a multiple of 16: 6)" in str(model.moe2edge_packed)


def test_other_dtypes_and_refusals(folder: Path, tiny: Make, tmp_path: Path) -> None:
    exact = load(folder, dtype=FLOAT32)
    assert "dequantized to float32 (activations in float32: 66)" in str(exact.moe2edge_packed)
    assert TorchRuntime(load(folder, packed=True)).note.startswith("66 of 66")
    with pytest.raises(Unsupported, match=r"no matrix can run in 4 bits: 0 of 66 .* in float32"):
        load(folder, dtype=FLOAT32, packed=True)
    plain = tiny("olmoe", **CALM)
    assert str(load(plain).moe2edge_packed) == ""
    with pytest.raises(Unsupported, match="the model is not quantized"):
        load(plain, packed=True)


# ---- what is in memory, and where --------------------------------------------------------------


def test_no_copy_of_a_packed_matrix_stays(tiny: Make, tmp_path: Path) -> None:
    wide = source(tiny, "mixtral", hidden_size=128, intermediate_size=256)
    folder = written(quantize(wide, Scheme(group_size=128)), tmp_path / "out")
    loaded = load(folder)
    tensors = {name: t for name, t in (*loaded.named_parameters(), *loaded.named_buffers())}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size < 1.03 * (folder / "model.safetensors").stat().st_size
    for name, tensor in tensors.items():
        if tensor.numel() >= 128 * 64 and tensor.is_floating_point():
            assert name in ("model.embed_tokens.weight", "lm_head.weight")


def test_saving_it_with_transformers_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot write matrices that run in 4 bits"):
        load(folder).save_pretrained(tmp_path / "saved")


def test_moving_to_another_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder)
    with pytest.raises(Unsupported, match=r"cpu, and on cuda .* not on meta; .* packed=False"):
        loaded.to("meta")
    # Nothing runs there, but the operator that packs for CUDA says what it would give.
    monkeypatch.setattr(packed, "_check_device", lambda _: None)
    linear = PackedLinear([numbers(64, 256, SCHEME)]).to("meta")
    assert (tuple(linear.packed.shape), linear.packed.dtype) == ((8, 2, 32, 4), torch.int32)
    with pytest.raises(Unsupported, match="from meta to cpu; load the folder again"):
        linear.to_empty(device="cpu")


def test_the_commands_say_how_a_folder_runs(folder: Path, tiny: Make) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny("olmoe", **CALM) / name).read_bytes())
    write_manifest(folder, "gptq")
    result = run("generate", str(folder), "abc", "-n", "2")
    assert result.exit_code == 0, result.output
    assert "note: 66 of 66 quantized matrices run in 4 bits\n" in result.stderr
    assert "note" not in result.stdout
