"""Rounding and packing: properties that hold for any numbers."""

from __future__ import annotations

import pytest
import torch

from moe2edge.errors import Unsupported
from moe2edge.numerics import grid, packing, rounding
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.scheme import Scheme, find_largest_group_size


def weights(outs: int = 24, ins: int = 256, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_scales_are_exact_in_both_half_formats(magnitude: float) -> None:
    scales = grid.round_scales(weights().abs() * magnitude)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    assert torch.equal(scales, scales.to(torch.float16).float())
    assert (scales > 0).all()


SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, 128, -1)
    for symmetric in (True, False)
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


@schemes
def test_rounding_errs_by_half_a_step_inside_the_grid(scheme: Scheme) -> None:
    weight = weights()
    found = rounding.round_to_nearest(weight, scheme)
    step = found.scales.repeat_interleave(scheme.width(256), dim=1)
    middle = torch.full_like(found.scales, scheme.zero_point)
    zero = middle if found.zeros is None else found.zeros.float()
    zero = zero.repeat_interleave(scheme.width(256), dim=1)
    below, above = -zero - 0.5, scheme.largest - zero + 0.5
    inside = (weight / step > below) & (weight / step < above)
    error = (found.dequantize() - weight).abs()
    assert (error[inside] <= step[inside] * 0.5001).all()
    # The ends of the grid are the only exceptions, and little more than rounding of scales.
    assert inside.double().mean() > 0.93
    assert (error <= step * (0.51 + scheme.largest / 256)).all()


@schemes
def test_rounding_equals_a_loop_over_numbers(scheme: Scheme) -> None:
    weight = weights(outs=3, ins=128)
    found = rounding.round_to_nearest(weight, scheme)
    width = scheme.width(128)
    for row in range(3):
        for column in range(128):
            at = column // width
            group = weight[row, at * width : (at + 1) * width]
            if found.zeros is None:
                zero = 1 << (scheme.bits - 1)
                scale = portable(group.abs().max() / (zero - 0.5))
                assert found.scales[row, at] == scale
            else:
                scale, zero = float(found.scales[row, at]), int(found.zeros[row, at])
            q = min(max(round(float(weight[row, column]) / scale), -zero), scheme.largest - zero)
            assert found.q[row, column] == q + zero
            assert found.dequantize()[row, column] == q * scale


def portable(scale: torch.Tensor) -> float:
    return float(scale.to(torch.float16).to(torch.bfloat16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_span_the_range_together_with_zero(bits: int) -> None:
    scheme = Scheme(bits, 32, symmetric=False)
    around = weights(outs=64)
    for shift in (-5.0, -1.0, 0.0, 0.3, 4.0):
        found = rounding.round_to_nearest(around + shift, scheme)
        assert found.zeros is not None
        assert found.zeros.dtype == torch.uint8
        assert found.zeros.min() >= 1
        assert found.zeros.max() <= scheme.largest
        groups = (around + shift).reshape(64, -1, 32)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        reach = found.zeros * found.scales, (scheme.largest - found.zeros) * found.scales
        # Half a step beyond the ends rounds to them.
        slack = found.scales * (0.51 + scheme.largest / 256)
        assert (-low <= reach[0] + slack).all()
        assert (high <= reach[1] + slack).all()


def squared_error(weight: torch.Tensor, found: Quantized, importance: torch.Tensor) -> torch.Tensor:
    """Of each group."""
    error = (found.dequantize() - weight).double().square() * importance.double()
    groups = found.scales.shape[1]
    return error.reshape(len(weight), groups, -1).sum(-1)


@schemes
@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
def test_the_search_errs_no_more_than_the_whole_range(scheme: Scheme, weighed: bool) -> None:
    weight = weights() ** 3  # far ends, which are worth cutting off
    importance = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.1
    of_all = importance if weighed else torch.ones(256)
    given = importance if weighed else None
    whole = rounding.round_to_nearest(weight, scheme, "absmax", given)
    searched = rounding.round_to_nearest(weight, scheme, "mse", given)
    before, after = (squared_error(weight, found, of_all) for found in (whole, searched))
    assert (after <= before * 1.00001).all()
    assert scheme.bits == 8 or after.sum() < before.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_finds_what_a_loop_finds(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 32, symmetric)
    weight = weights(outs=2, ins=64) ** 3
    found = rounding.round_to_nearest(weight, scheme, "mse")
    for row in range(2):
        for at in range(2):
            group = weight[row, at * 32 : at * 32 + 32].tolist()
            best = min(loop_error(group, part, bits, symmetric) for part in rounding.SHRINK)
            own = Quantized(
                found.q[row : row + 1, at * 32 : at * 32 + 32],
                found.scales[row : row + 1, at : at + 1],
                scheme,
                None if found.zeros is None else found.zeros[row : row + 1, at : at + 1],
            )
            error = squared_error(torch.tensor([group]), own, torch.ones(32))
            assert float(error) == pytest.approx(best, rel=1e-4)


def loop_error(group: list[float], part: float, bits: int, symmetric: bool) -> float:
    """Squared error of rounding to a grid over ``part`` of the range, one number at a time."""
    largest = 2**bits - 1
    low, high = part * min(0.0, *group), part * max(0.0, *group)
    if symmetric:
        zero = 2 ** (bits - 1)
        scale = max(-low, high) / (zero - 0.5)
    else:
        scale = (high - low) / largest
        zero = min(max(round(-low / scale), 1), largest - 1)
        scale = max(scale, -low / (zero + 0.5), high / (largest - zero + 0.5))
    scale = portable(torch.tensor(scale))
    error = 0.0
    for number in group:
        q = min(max(round(number / scale), -zero), largest - zero)
        error += (number - q * scale) ** 2
    return error


@schemes
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    found = rounding.round_to_nearest(torch.zeros(8, 128), scheme)
    assert (found.dequantize() == 0).all()


@schemes
def test_rows_of_a_matrix_split(scheme: Scheme) -> None:
    found = rounding.round_to_nearest(weights(), scheme)
    parts = found.split([5, 19])
    assert [len(part.q) for part in parts] == [5, 19]
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), found.dequantize())


# ---- layouts -----------------------------------------------------------------------------------


def integers(outs: int, ins: int, bits: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 2**bits, (outs, ins), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("bits", "per_byte"), [(2, 4), (3, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_bytes_round_trip_and_put_the_lower_index_low(bits: int, per_byte: int, count: int) -> None:
    q = integers(5, count, bits)
    packed = packing.pack_bytes(q, bits)
    assert packed.shape == (5, -(-count // per_byte))
    width = 8 // per_byte
    for n in range(packed.shape[1] * per_byte):
        value = int(packed[3, n // per_byte]) >> n % per_byte * width & (1 << width) - 1
        assert value == (q[3, n] if n < count else 0)
    assert torch.equal(packing.unpack_bytes(packed, bits, count), q)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_round_trip_and_put_the_lower_index_low(bits: int, dim: int) -> None:
    q, per_word = integers(32, 48, bits), 32 // bits
    packed = packing.pack_int32(q, dim, bits)
    assert packed.dtype == torch.int32
    assert packed.shape[dim] == q.shape[dim] // per_word
    last = int(packed[-1, -1]) & 0xFFFFFFFF
    want = q[-per_word:, -1] if dim == 0 else q[-1, -per_word:]
    assert [last >> bits * n & (1 << bits) - 1 for n in range(per_word)] == want.tolist()
    assert torch.equal(packing.unpack_int32(packed, dim, bits), q)
    one = packing.pack_int32(q[:1] if dim == 1 else q[:, :1], dim, bits)  # a dimension of one
    assert torch.equal(packing.unpack_int32(one, dim, bits), q[:1] if dim == 1 else q[:, :1])


MIDDLES = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}  # stored minus one


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_tensors_round_trip_and_hold_the_format(
    bits: int, symmetric: bool, group: int
) -> None:
    scheme, per_word = Scheme(bits, group, symmetric), 32 // bits
    groups = scheme.groups(64)
    scales = grid.round_scales(torch.rand(16, groups))
    zeros = None if symmetric else integers(16, groups, bits).clamp(min=1)
    numbers = Quantized(integers(16, 64, bits), scales, scheme, zeros)
    tensors = packing.pack_gptq(numbers)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        "qweight": (torch.int32, (64 // per_word, 16)),
        "qzeros": (torch.int32, (groups, 16 // per_word)),
        "scales": (torch.float16, (groups, 16)),
        "g_idx": (torch.int32, (64,)),
    }
    if symmetric:
        assert (tensors["qzeros"] == MIDDLES[bits]).all()
    assert tensors["g_idx"].tolist() == [n // scheme.width(64) for n in range(64)]
    q, same_scales, points = packing.unpack_gptq(tensors, bits)
    assert torch.equal(q, numbers.q)
    assert torch.equal(same_scales, scales)
    middle = torch.full((16, groups), scheme.zero_point)
    assert torch.equal(points, middle if zeros is None else zeros)


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
        find_largest_group_size([256, 48])
