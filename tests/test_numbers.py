"""Rounding and packing: properties that hold for any numbers."""

from __future__ import annotations

import pytest
import torch

from moe2edge import packing, rounding
from moe2edge.errors import Unsupported
from moe2edge.scheme import Scheme, largest_group_size


def weights(outs: int = 24, ins: int = 256, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_scales_are_exact_in_both_half_formats(magnitude: float) -> None:
    scales = rounding.portable_scales(weights().abs() * magnitude)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    assert torch.equal(scales, scales.to(torch.float16).float())
    assert (scales > 0).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_errs_by_half_a_step_inside_the_grid(group: int) -> None:
    scheme = Scheme(group_size=group)
    weight = weights()
    found = rounding.round_to_nearest(weight, scheme)
    step = found.scales.repeat_interleave(group, dim=1)
    inside = (weight / step > -8.5) & (weight / step < 7.5)
    error = (found.dequantize() - weight).abs()
    assert (error[inside] <= step[inside] * 0.5001).all()
    assert inside.double().mean() > 0.97  # the two ends of the grid are the only exceptions
    assert (error <= step * 0.56).all()


def test_rounding_equals_a_loop_over_numbers() -> None:
    scheme = Scheme(group_size=32)
    weight = weights(outs=3, ins=64)
    found = rounding.round_to_nearest(weight, scheme)
    for row in range(3):
        for column in range(64):
            group = weight[row, column // 32 * 32 : column // 32 * 32 + 32]
            scale = float((group.abs().max() / 7.5).to(torch.float16).to(torch.bfloat16))
            q = min(max(round(float(weight[row, column]) / scale), -8), 7) + 8
            assert found.scales[row, column // 32] == scale
            assert found.q[row, column] == q


def test_zeros_stay_zeros() -> None:
    found = rounding.round_to_nearest(torch.zeros(8, 32), Scheme(group_size=32))
    assert (found.dequantize() == 0).all()


def integers(outs: int, ins: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 16, (outs, ins), generator=generator, dtype=torch.uint8)


def test_nibbles_round_trip_and_put_the_lower_index_low() -> None:
    q = integers(5, 32)
    packed = packing.pack_nibbles(q)
    assert packed.shape == (5, 16)
    assert packed[0, 0] == q[0, 0] + 16 * q[0, 1]
    assert torch.equal(packing.unpack_nibbles(packed), q)


def test_gptq_tensors_round_trip_and_hold_the_format() -> None:
    q, scales = integers(16, 64), rounding.portable_scales(torch.rand(16, 2))
    tensors = packing.pack_gptq(q, scales, 32)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        "qweight": (torch.int32, (8, 16)),
        "qzeros": (torch.int32, (2, 2)),
        "scales": (torch.float16, (2, 16)),
        "g_idx": (torch.int32, (64,)),
    }
    assert (tensors["qzeros"] == 0x77777777).all()
    word = int(tensors["qweight"][0, 0]) & 0xFFFFFFFF
    assert [word >> 4 * n & 15 for n in range(8)] == q[0, :8].tolist()
    again, same_scales, zeros = packing.unpack_gptq(tensors)
    assert torch.equal(again, q)
    assert torch.equal(same_scales, scales)
    assert (zeros == 8).all()


def test_interleaved_rows_round_trip() -> None:
    gate, up = integers(4, 8), integers(4, 8) // 2
    rows = packing.interleave(gate, up)
    assert torch.equal(rows[0], gate[0])
    assert torch.equal(rows[1], up[0])
    again = packing.deinterleave(rows)
    assert torch.equal(again[0], gate)
    assert torch.equal(again[1], up)


def test_no_group_size_fits() -> None:
    with pytest.raises(Unsupported, match="no group size of 128, 64, 32 divides"):
        largest_group_size([256, 48])
