"""Readers of quantized checkpoints against slow formulas, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.packing import pack_gptq
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.safetensors_files import read_tensor
from moe2edge.storage.source_formats.recognition import drop_settings, find_source_format
from moe2edge.storage.source_formats.source_format import SourceFormat
from moe2edge.storage.source_formats.stored_tensors import StoredTensors
from source_files import mix_columns, stream

X = "model.layers.0.mlp.experts.3.up_proj"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
F8 = torch.float8_e4m3fn


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., SourceFormat]:
    """Return a function that writes tensors and opens them with settings."""

    def open_tensors(
        tensors: Mapping[str, Tensor], settings: Any, dtype: str = "float32", **config: Any
    ) -> SourceFormat:
        path = tmp_path / "model.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        files = StoredTensors(dict.fromkeys(tensors, path))
        config = {"quantization_config": settings, "dtype": dtype, **config}
        found = find_source_format(config, files)
        assert found is not None
        return found

    return open_tensors


def at(stem: str, **parts: Tensor) -> dict[str, Tensor]:
    """Name the parts of a module."""
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


def draw(*shape: int, high: int = 256, dtype: torch.dtype = torch.uint8, low: int = 0) -> Tensor:
    """Draw integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def spell(q: Tensor, scales: Tensor, zeros: Tensor, groups: list[int]) -> Tensor:
    """Dequantize one number after the other."""
    out = torch.empty(q.shape)
    for n, row in enumerate(q.tolist()):
        for i, number in enumerate(row):
            group = groups[i]
            out[n, i] = (number - int(zeros[n, group])) * float(scales[n, group])
    return out


def take(found: SourceFormat, name: str, *shape: int) -> Weight:
    """Return the handle on a quantized tensor."""
    weight = found.weight(name, shape)
    assert weight is not None
    assert weight.shape == shape
    return weight


def take_expert(found: SourceFormat, name: str, shape: tuple[int, ...], index: int) -> Weight:
    """Return the handle on one expert of a fused tensor."""
    weight = found.expert(name, shape, index)
    assert weight is not None
    return weight


def load(found: SourceFormat, name: str, *shape: int) -> Tensor:
    """Load a tensor."""
    loaded = take(found, name, *shape).load()
    assert loaded.shape == shape
    return loaded


# ---- MXFP4 ---------------------------------------------------------------------------------------


def test_mxfp4_equals_transformers_and_reads_one_expert(
    opened: Callable[..., SourceFormat],
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = draw(3, 12, 2, 16), draw(3, 12, 2, low=110, high=140)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for dtype in ("float32", "bfloat16"):
        found = opened(tensors, {"quant_method": "mxfp4"}, dtype)
        kind = getattr(torch, dtype)
        stock = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=kind)
        whole = load(found, name, 3, 64, 12)
        assert whole.dtype == kind
        assert torch.equal(whole, stock)
        one = take_expert(found, name, (3, 64, 12), 1)
        assert (one.shape, one.load().dtype) == ((64, 12), kind)
        assert torch.equal(one.load(), stock[1])
    assert float(whole[1, 2, 5]) == E2M1[int(blocks[1, 5, 0, 1]) & 15] * 2.0 ** (
        int(scales[1, 5, 0]) - 127
    )
    assert set(found.list_parts(name)) == set(tensors)
    assert found.count_bytes(name) == 3 * 12 * 2 * 17
    assert found.weight("model.layers.0.mlp.router.weight", (3, 64)) is None


def test_an_expert_of_a_fused_tensor_is_read_alone(
    opened: Callable[..., SourceFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe2edge.storage.source_formats.stored_tensors as stored

    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": draw(5, 8, 1, 16), f"{name}_scales": draw(5, 8, 1, high=140)}
    found = opened(tensors, {"quant_method": "mxfp4"})
    weight = take_expert(found, name, (5, 32, 8), 4)
    seen = []

    def watch(path: Path, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        seen.append(rows)
        return read_tensor(path, name, rows)

    monkeypatch.setattr(stored, "read_tensor", watch)
    weight.load()
    assert seen == [(4, 5), (4, 5)]


# ---- FP8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("part", ["weight_scale_inv", "scale"])
def test_fp8_blocks_at_the_edges_are_short(
    opened: Callable[..., SourceFormat], scale: str, part: str
) -> None:
    weight, shape, block = torch.randn(20, 11).to(F8), (20, 11), (8, 4)
    scales = draw(3, 3, low=120, high=130)
    values = torch.exp2(scales.float() - 127)
    stored = scales if scale == "uint8" else values.to(getattr(torch, scale))
    tensors = at(X, weight=weight, **{part: stored})
    found = opened(tensors, {"quant_method": "fp8", "weight_block_size": list(block)})
    expected = torch.empty(shape)
    for n in range(shape[0]):
        for i in range(shape[1]):
            expected[n, i] = float(weight[n, i]) * float(values[n // block[0], i // block[1]])
    assert torch.equal(load(found, f"{X}.weight", *shape), expected)
    assert "8 x 4" in found.name


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_fp8_equals_transformers_where_128_divides(
    opened: Callable[..., SourceFormat], shape: tuple[int, int]
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(shape).to(F8)
    scales = torch.rand(shape[0] // 128, shape[1] // 128) + 0.01
    tensors = at(X, weight=weight, weight_scale_inv=scales)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for dtype in (torch.float32, torch.bfloat16):
        found = opened(tensors, settings, str(dtype).removeprefix("torch."))
        stock = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
        assert torch.equal(load(found, f"{X}.weight", *shape), stock)


def test_fp8_pairs_of_four_bits_have_scales_of_32(opened: Callable[..., SourceFormat]) -> None:
    packed, scales = draw(4, 32, dtype=torch.int8, low=-128, high=128), draw(4, 2, high=140)
    tensors = at(X, weight=packed, scale=scales.view(torch.float8_e8m0fnu))
    tensors |= at("model.layers.0.mlp.gate", weight=torch.ones(2, 2).to(F8), scale=torch.ones(1))
    found = opened(tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = load(found, f"{X}.weight", 4, 64)
    for n, i in ((0, 0), (3, 63), (2, 33)):
        byte = int(packed[n, i // 2]) & 255
        value = E2M1[byte >> 4 if i % 2 else byte & 15]
        assert float(loaded[n, i]) == value * 2.0 ** (int(scales[n, i // 32]) - 127)


@pytest.mark.parametrize("form", [(), (1,), (6,), (6, 1)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "modelopt", "compressed-tensors"])
def test_fp8_scales_of_rows_and_of_the_whole(
    opened: Callable[..., SourceFormat], form: tuple[int, ...], method: str
) -> None:
    weight, scale = torch.randn(6, 10).to(F8), torch.rand(form) + 0.5
    tensors = at(X, weight=weight, weight_scale=scale, input_scale=torch.ones(1))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
    settings: dict[str, Any] = {
        "quant_method": method,
        "quant_algo": "FP8",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }
    found = opened(tensors, settings)
    expected = weight.float() * scale.reshape(-1, 1)
    assert torch.equal(load(found, f"{X}.weight", 6, 10), expected)
    assert set(found.list_parts(f"{X}.weight")) == set(tensors)
    assert take(found, f"{X}.weight", 6, 10).scheme is None


def test_fp8_fused_experts_are_read_one_by_one(opened: Callable[..., SourceFormat]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scales = torch.randn(3, 6, 10).to(F8), torch.rand(3, 2, 3)
    tensors = {name: weight, f"{name}_scale_inv": scales}
    found = opened(tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]})
    spread = scales.repeat_interleave(4, 1)[:, :6].repeat_interleave(4, 2)[:, :, :10]
    assert torch.equal(load(found, name, 3, 6, 10), weight.float() * spread)
    one = take_expert(found, name, (3, 6, 10), 2)
    assert torch.equal(one.load(), (weight.float() * spread)[2])


# ---- 4-bit floats with scales of 16 --------------------------------------------------------------


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("form", [(), (1,)])
def test_nvfp4_divides_or_multiplies_by_the_scale_of_the_whole(
    opened: Callable[..., SourceFormat], method: str, form: tuple[int, ...]
) -> None:
    packed, scales = draw(4, 16), (torch.rand(4, 2) * 400 + 1).to(F8)
    whole = torch.full(form, 2048.0)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    if method == "modelopt":
        tensors = at(X, weight=packed, weight_scale=scales, weight_scale_2=1 / whole)
        settings: dict[str, Any] = {"quant_method": method, "quant_algo": "NVFP4"}
    else:
        tensors = at(X, weight_packed=packed, weight_scale=scales, weight_global_scale=whole)
        settings = {
            "quant_method": method,
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": group},
        }
    loaded = load(opened(tensors, settings), f"{X}.weight", 4, 32)
    for n in range(4):
        for i in range(32):
            byte = int(packed[n, i // 2])
            value = E2M1[byte >> 4 if i % 2 else byte & 15]
            assert float(loaded[n, i]) == value * float(scales[n, i // 16]) / 2048


def test_mxfp4_of_compressed_tensors(opened: Callable[..., SourceFormat]) -> None:
    packed, scales = draw(4, 32), draw(4, 2, low=100, high=140)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}
    settings = {"format": "mxfp4-pack-quantized", "config_groups": {"a": group}}
    loaded = load(
        opened(at(X, weight_packed=packed, weight_scale=scales), settings), f"{X}.weight", 4, 64
    )
    values = torch.tensor(E2M1)[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
    assert torch.equal(loaded, values * torch.exp2(scales.float() - 127).repeat_interleave(32, 1))


# ---- integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_keeps_integers(
    opened: Callable[..., SourceFormat], bits: int, group: int, layout: str
) -> None:
    groups = 2 if group == 32 else 1
    q, scales = draw(32, 64, high=1 << bits), torch.rand(32, groups).half()
    zeros = draw(32, groups, high=1 << bits)
    zeros[0], zeros[1] = 0, (1 << bits) - 1  # stored as the largest integer in version 1
    stored = (zeros.int() - int(layout == "gptq")) & ((1 << bits) - 1)
    order = torch.arange(64, dtype=torch.int32) // (64 if group == -1 else group)
    tensors = at(
        X,
        qweight=stream(q, bits).T,
        qzeros=stream(stored.T, bits),
        scales=scales.T,
        g_idx=order,
        bias=torch.zeros(32).half(),
    )
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False}
    settings |= {"desc_act": False, "checkpoint_format": layout}
    found = opened(tensors, settings)
    weight = take(found, f"{X}.weight", 32, 64)
    assert weight.scheme == Scheme(bits, group, symmetric=False)
    kept = weight.quantized()
    assert torch.equal(kept.q, q)
    assert kept.zeros is not None
    assert torch.equal(kept.zeros, zeros)
    assert torch.equal(kept.scales, scales.float())
    assert torch.equal(weight.load(), spell(q, scales, zeros, order.tolist()))
    assert found.explains(f"{X}.bias")
    assert set(found.list_parts(f"{X}.weight")) == set(tensors) - {f"{X}.bias"}


def test_gptq_symmetric_integers_are_written_as_they_were(
    opened: Callable[..., SourceFormat],
) -> None:
    q, scales = draw(32, 64, high=16), torch.rand(32, 2).bfloat16().float()
    tensors = {f"{X}.{k}": v for k, v in pack_gptq(Quantized(q, scales, Scheme(4, 32))).items()}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    weight = take(opened(tensors, settings), f"{X}.weight", 32, 64)
    again = pack_gptq(weight.quantized())
    assert all(torch.equal(again[part], tensors[f"{X}.{part}"]) for part in again)


def test_gptq_in_the_order_of_activations(opened: Callable[..., SourceFormat]) -> None:
    q, scales, zeros = draw(32, 64, high=16), torch.rand(32, 2).half(), torch.full((32, 2), 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).int() // 32
    tensors = at(
        X,
        qweight=stream(q, 4).T,
        qzeros=stream((zeros - 1).T, 4),
        scales=scales.T,
        g_idx=order,
    )
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    found = opened(tensors, settings)
    weight = take(found, f"{X}.weight", 32, 64)
    assert weight.scheme == Scheme(4, 32, ordered=True)
    assert torch.equal(weight.load(), spell(q, scales, zeros, order.tolist()))
    again = pack_gptq(weight.quantized())
    assert all(torch.equal(again[part], tensors[f"{X}.{part}"]) for part in again)
    wrong = {**tensors, f"{X}.g_idx": order + 1}
    with pytest.raises(InputError, match="names groups 1 to 2, but there are 2"):
        load(opened(wrong, settings), f"{X}.weight", 32, 64)


def test_gptq_settings_of_single_modules(opened: Callable[..., SourceFormat]) -> None:
    tensors: dict[str, Tensor] = {}
    for stem, bits, group in ((X, 4, 32), (X.replace("up", "down"), 8, 64)):
        q = draw(32, 64, high=1 << bits)
        middle = torch.full((64 // group, 32), (1 << bits - 1) - 1)
        tensors |= at(
            stem,
            qweight=stream(q, bits).T,
            qzeros=stream(middle, bits),
            scales=torch.ones(64 // group, 32).half(),
        )
    tensors |= at("model.layers.0.mlp.gate", weight=torch.ones(2, 2))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    own = {r"+:.*down_proj": {"bits": 8, "group_size": 128}, "-:.*gate$": {}}
    found = opened(tensors, {**settings, "dynamic": own})
    schemes = [
        take(found, f"{X.replace('up', part)}.weight", 32, 64).scheme for part in ("up", "down")
    ]
    # A group that is wider than the row is the whole row.
    assert schemes == [Scheme(4, 32), Scheme(8, -1)]
    assert found.weight("model.layers.0.mlp.gate.weight", (2, 2)) is None
    with pytest.raises(InputError, match="stored in 8 bits, but quantization_config says 4"):
        opened(tensors, settings).weight(f"{X.replace('up', 'down')}.weight", (32, 64))
    found = opened(tensors, {**settings, "dynamic": {"-:.*up_proj": {}}})
    with pytest.raises(InputError, match="is not quantized, but it has integers"):
        found.weight(f"{X}.weight", (32, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_awq_keeps_integers(opened: Callable[..., SourceFormat], bits: int) -> None:
    q, scales = draw(32, 64, high=1 << bits), torch.rand(32, 2).half()
    zeros = draw(32, 2, high=1 << bits)

    def pack(rows: Tensor) -> Tensor:
        if bits == 8:
            return stream(rows, 8)
        return stream(mix_columns(rows), 4)

    tensors = at(X, qweight=pack(q.T), qzeros=pack(zeros.T), scales=scales.T)
    settings = {"quant_method": "awq", "bits": bits, "group_size": 32, "version": "gemm"}
    found = opened(tensors, settings)
    weight = take(found, f"{X}.weight", 32, 64)
    assert weight.scheme == Scheme(bits, 32, symmetric=False)
    kept = weight.quantized()
    assert kept.zeros is not None
    assert torch.equal(kept.q, q)
    assert torch.equal(kept.zeros, zeros)
    assert torch.equal(weight.load(), spell(q, scales, zeros, [i // 32 for i in range(64)]))
    with pytest.raises(InputError, match="as AWQ does it"):
        opened(tensors, {**settings, "quant_method": "gptq"}).weight(f"{X}.weight", (32, 64))


def pack_signed(signed: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack signed integers as compressed-tensors does."""
    rows = (signed if dim else signed.T).int() + (1 << bits - 1)
    words = stream(rows, bits)
    return words if dim else words.T


def make_group(
    bits: int, *, symmetric: bool = True, targets: Any = ("Linear",), **more: Any
) -> Any:
    """Make a group of modules."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **more}
    return {"targets": list(targets), "weights": weights}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_of_compressed_tensors(
    opened: Callable[..., SourceFormat], bits: int, symmetric: bool
) -> None:
    half = 1 << bits - 1
    q = draw(16, 64, low=-half, high=half, dtype=torch.int8)
    zeros = draw(16, 2, low=-half, high=half, dtype=torch.int8)
    scales = torch.rand(16, 2).bfloat16()
    tensors = at(
        X,
        weight_packed=pack_signed(q, bits),
        weight_scale=scales,
        weight_shape=torch.tensor([16, 64]),
    )
    if not symmetric:
        tensors[f"{X}.weight_zero_point"] = pack_signed(zeros, bits, dim=0)
    group = make_group(bits, symmetric=symmetric, group_size=32, strategy="group")
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
    }
    found = opened(tensors, settings)
    weight = take(found, f"{X}.weight", 16, 64)
    assert weight.scheme == Scheme(bits, 32, symmetric=symmetric)
    assert torch.equal(weight.quantized().q.int(), q.int() + half)
    spelled = zeros if not symmetric else torch.zeros_like(zeros)
    assert torch.equal(weight.load(), spell(q, scales, spelled, [i // 32 for i in range(64)]))
    assert set(found.list_parts(f"{X}.weight")) == set(tensors)
    tensors[f"{X}.weight_shape"] = torch.tensor([16, 63])
    with pytest.raises(InputError, match=r"holds \[16, 63\] numbers"):
        load(opened(tensors, settings), f"{X}.weight", 16, 64)


def test_targets_decide_bits_names_before_patterns_before_classes(
    opened: Callable[..., SourceFormat],
) -> None:
    tensors: dict[str, Tensor] = {}
    parts = {"up_proj": 4, "down_proj": 8, "gate_proj": 4}
    for part, bits in parts.items():
        stem = X.replace("up_proj", part)
        half = 1 << bits - 1
        q = draw(16, 64, low=-half, high=half, dtype=torch.int8)
        scale = torch.ones(16, 64 // (32 if bits == 4 else 64)).half()
        tensors |= at(stem, weight_packed=pack_signed(q, bits), weight_scale=scale)
    down = X.replace("up", "down")
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": make_group(4, group_size=32),
            "group_1": make_group(8, targets=["re:.*(down|gate)_proj$"], strategy="channel"),
            "group_2": make_group(4, targets=[X.replace("up", "gate")], group_size=32),
        },
    }
    found = opened(tensors, settings)
    schemes = [take(found, f"{X.replace('up_proj', p)}.weight", 16, 64).scheme for p in parts]
    assert schemes == [Scheme(4, 32), Scheme(8, -1), Scheme(4, 32)]
    for change, message in (
        ({"ignore": [down]}, "quantization_config ignores it"),
        ({"config_groups": {"a": make_group(4, targets=["re:.*up_proj"])}}, "no target of"),
        ({"config_groups": {"a": make_group(4, group_size=32)}}, "holds"),
    ):
        with pytest.raises(InputError, match=message):
            opened(tensors, {**settings, **change}).weight(f"{down}.weight", (16, 64))


def test_integers_of_8_bits_and_their_activations(opened: Callable[..., SourceFormat]) -> None:
    q, scales = draw(6, 10, low=-128, high=128, dtype=torch.int8), torch.rand(6, 1).bfloat16()
    group = make_group(8, strategy="channel")
    group["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    found = opened(at(X, weight=q, weight_scale=scales), settings | {"config_groups": {"a": group}})
    weight = take(found, f"{X}.weight", 6, 10)
    assert weight.scheme == Scheme(8, -1)
    assert torch.equal(weight.load(), q.float() * scales.float())
    assert found.notes == (
        "programs that run it as it is round activations to 8-bit integers; here they are not "
        "rounded",
    )


# ---- names, and what is refused ------------------------------------------------------------------


MX = {"a.experts.down_proj_blocks": draw(1, 2, 1, 16), "a.experts.down_proj_scales": draw(1, 2, 1)}
PLAIN = at(X, weight=torch.ones(2, 2))
FP8 = at(X, weight=torch.ones(2, 2).to(F8), weight_scale_inv=torch.ones(1, 1))
INT = at(X, qweight=draw(8, 32, dtype=torch.int32))


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "message"),
    [
        (
            PLAIN,
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            InputError,
            "not quantized; t",
        ),
        (
            FP8,
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            InputError,
            "tensors are 8-bit",
        ),
        (FP8, None, InputError, "has no quantization_config; put it there"),
        (INT, {}, InputError, "has no quantization_config; put it there"),
        ({**FP8, **INT}, {"quant_method": "fp8"}, InputError, "mixes two checkpoints"),
        (PLAIN, {"quant_method": "bitsandbytes"}, Unsupported, r"model.dequantize\(\)"),
        (PLAIN, {"quant_method": "hqq"}, Unsupported, "quant_method 'hqq' is not read"),
        (PLAIN, {"load_in_4bit": True}, Unsupported, "bitsandbytes is not read"),
        (INT, {"quant_method": "gptq", "bits": 4}, Unsupported, "group_size is None"),
        (INT, {"quant_method": "gptq", "bits": 9, "group_size": 32}, Unsupported, "bits is 9"),
        (
            INT,
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            Unsupported,
            "'marlin'",
        ),
        (
            INT,
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
            Unsupported,
            "'gemv' is not read",
        ),
        (FP8, {"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, InputError, "are fp8"),
        (
            FP8,
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            InputError,
            "some tensors are fp8",
        ),
    ],
)
def test_contradictions_and_unread_formats_are_refused(
    opened: Callable[..., SourceFormat],
    tensors: dict[str, Tensor],
    settings: Any,
    error: type[Moe2EdgeError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        opened(tensors, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "marlin-24"}, "'marlin-24' is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotates hidden states"),
    ],
)
def test_compressed_tensors_that_are_not_read(
    opened: Callable[..., SourceFormat], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        opened(at(X, weight_packed=draw(2, 2)), {"quant_method": "compressed-tensors", **settings})


@pytest.mark.parametrize(
    ("tensors", "settings", "shape", "message"),
    [
        (FP8, {"quant_method": "fp8"}, (2, 3), r"holds \[2, 2\] numbers, .* \[2, 3\]; some tools"),
        (
            at(X, weight=torch.ones(2, 3).to(F8), weight_scale_inv=torch.ones(1, 1)),
            {"quant_method": "fp8"},
            (3, 2),
            "rows and columns are exchanged",
        ),
        (
            at(X, weight=torch.ones(4, 8).to(F8), weight_scale_inv=torch.ones(2, 3)),
            {"quant_method": "fp8", "weight_block_size": [2, 2]},
            (4, 8),
            r"\[2, 3\] for a matrix of \[4, 8\]",
        ),
        (
            at(X, weight=torch.ones(4, 8).to(F8), weight_scale_inv=torch.ones(2, 3)),
            {"quant_method": "fp8"},
            (4, 8),
            "it needs a block size",
        ),
        (at(X, weight=torch.ones(2, 2).to(F8)), {"quant_method": "fp8"}, (2, 2), "has 0 scales"),
        (
            {**INT, f"{X}.scales": torch.ones(2, 32).half()},
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            (32, 64),
            "but no qzeros",
        ),
        (
            {
                **INT,
                f"{X}.scales": torch.ones(1, 32).half(),
                f"{X}.qzeros": draw(2, 4, dtype=torch.int32),
            },
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            (32, 64),
            r"scales is F16 \[1, 32\], expected F16 or BF16 or F32 \[2, 32\]",
        ),
    ],
)
def test_parts_of_another_shape_are_refused(
    opened: Callable[..., SourceFormat],
    tensors: dict[str, Tensor],
    settings: Any,
    shape: tuple[int, int],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        opened(tensors, settings).weight(f"{X}.weight", shape)


def test_settings_inside_of_a_text_config_are_found_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(MX, path)
    config = {"text_config": {"a": 1, "quantization_config": {"quant_method": "mxfp4"}}}
    found = find_source_format(config, StoredTensors(dict.fromkeys(MX, path)))
    assert found is not None
    assert (found.name, found.dtype) == ("MXFP4", "BF16")
    assert drop_settings(config) == {"text_config": {"a": 1}}
    config["compression_config"] = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="2 entries"):
        find_source_format(config, StoredTensors(dict.fromkeys(MX, path)))


def test_numbers_are_rounded_once_to_the_dtype_of_the_model(
    opened: Callable[..., SourceFormat],
) -> None:
    weight, scale = torch.randn(6, 10).to(F8), torch.rand(1, 1)
    tensors = at(X, weight=weight, weight_scale_inv=scale)
    found = opened(tensors, {"quant_method": "fp8"}, "bfloat16")
    loaded = load(found, f"{X}.weight", 6, 10)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, (weight.double() * scale.double()).float().bfloat16())
    assert math.isclose(found.count_bytes(f"{X}.weight"), 64)
