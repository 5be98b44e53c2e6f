"""Rounding with feedback against a plain loop over columns with an explicit inverse."""

from __future__ import annotations

import pytest
import torch

from helpers import slow_except
from moe2edge.numerics import compiled, error_feedback
from moe2edge.numerics import compiled as native
from moe2edge.numerics.grid import Grid, dequantize
from moe2edge.numerics.rounding import Range, choose_grid, round_to_nearest
from moe2edge.numerics.scale_fitting import fit_scales, measure_rows
from moe2edge.numerics.scheme import Scheme


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return what runs over columns."""
    if request.param == "torch":
        monkeypatch.setattr(native, "is_built", lambda: False)
    elif not compiled.is_built():
        pytest.skip("there was no compiler when moe2edge was installed")


def problem(outs: int = 12, ins: int = 192, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [outs, ins] and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(ins, ins, generator=generator) / ins**0.5
    inputs = torch.randn(tokens, ins, generator=generator) @ (mix + 0.3 * torch.eye(ins))
    return torch.randn(outs, ins, generator=generator), inputs.T @ inputs


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    eye = torch.eye(len(hessian), dtype=torch.float64)
    return hessian.double() + damping * hessian.diagonal().double().mean() * eye


def eliminate(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, how: Range, grid: Grid | None
) -> torch.Tensor:
    """GPTQ as the paper derives it, over columns from the last to the first.

    After each column the others are set to where they are best, and it is eliminated from the
    inverse. The grid of a group is chosen when its first column is reached, unless it is given.
    """
    weight = weight.double().clone()
    inverse = torch.linalg.inv(damped(hessian))
    out = torch.empty_like(weight)
    width = scheme.width(weight.shape[1])
    for c in reversed(range(weight.shape[1])):
        if grid is None and (c + 1) % width == 0:
            # What is left of D for the columns of the group.
            part = slice(c + 1 - width, c + 1)
            pivots = torch.linalg.cholesky(damped(hessian)).diagonal()[part].square().float()
            one = Scheme(scheme.bits, -1, scheme.symmetric)
            chosen = choose_grid(weight[:, part].float(), one, how, pivots)
            scale, zero = chosen.scales[:, 0].double(), chosen.zeros[:, 0].double()
        elif grid is not None:
            scale, zero = (t[:, c // width].double() for t in (grid.scales, grid.zeros))
        q = (weight[:, c] / scale).round() + zero
        out[:, c] = (q.clamp(0, scheme.largest) - zero) * scale
        error = (weight[:, c] - out[:, c]) / inverse[c, c]
        weight -= error[:, None] * inverse[c][None, :]
        inverse = inverse - inverse[:, c, None] @ inverse[None, c] / inverse[c, c]
    return out


def solved(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, how: Range, *, fixed: bool
) -> tuple[torch.Tensor, float, Grid]:
    """Return the same by `feedback`: numbers, loss and grid."""
    ins = weight.shape[1]
    factors, fine = error_feedback.factorize(hessian[None].clone(), 0.01)
    assert fine == [True]
    grid = choose_grid(weight[None], scheme, how if fixed else "absmax")
    groups = (torch.arange(ins) // scheme.width(ins))[None]
    rounder = error_feedback.GridRounder(groups, grid, None if fixed else how)
    errors = error_feedback.transpose(weight[None])
    loss = error_feedback.round_columns(errors, factors, rounder)
    found = rounder.grid[0].to_quantized(rounder.integers()[0]).dequantize()
    assert torch.allclose(weight - errors[0].T, found, atol=1e-5)
    return found, float(loss), rounder.grid[0]


SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(3, 32), Scheme(2, 64), Scheme(8, 32)]


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 32, False), Scheme(2, 64, False)], ids=str)
@pytest.mark.parametrize("how", ["absmax", "mse"])
@pytest.mark.parametrize("fixed", [True, False])
def test_it_equals_elimination_column_by_column(scheme: Scheme, how: Range, fixed: bool) -> None:
    weight, hessian = problem()
    found, _, grid = solved(weight, hessian, scheme, how, fixed=fixed)
    expected = eliminate(weight, hessian, scheme, how, grid if fixed else None)
    # A number half-way between two grid points may fall to either in another precision.
    same = (found.double() - expected).abs() < 1e-4
    assert same.all(1).double().mean() > 0.7
    h = damped(hessian)

    def loss(q: torch.Tensor) -> float:
        error = weight.double() - q.double()
        return float((error @ h * error).sum())

    assert loss(found) == pytest.approx(loss(expected), rel=0.02)


@pytest.mark.parametrize("ins", slow_except([64, 192, 640, 1100], 64, 192))
def test_widths_that_do_not_fill_a_panel(ins: int) -> None:
    weight, hessian = problem(8, ins, 2 * ins)
    scheme = Scheme(4, -1)
    found, loss, grid = solved(weight, hessian, scheme, "absmax", fixed=True)
    h = damped(hessian)
    error = weight.double() - found.double()
    assert loss == pytest.approx(float((error @ h * error).sum()), rel=1e-3)
    expected = eliminate(weight, hessian, scheme, "absmax", grid)
    other = weight.double() - expected
    assert loss == pytest.approx(float((other @ h * other).sum()), rel=0.02)


def test_feedback_beats_rounding() -> None:
    weight, hessian = problem()
    scheme = Scheme(4, 64)
    found, _, _ = solved(weight, hessian, scheme, "absmax", fixed=False)
    rounded = round_to_nearest(weight, scheme).dequantize()
    losses = [float(((weight - q) @ hessian * (weight - q)).sum()) for q in (found, rounded)]
    assert losses[0] < 0.7 * losses[1]


def test_a_batch_equals_its_matrices_one_by_one() -> None:
    weight, hessian = problem()
    scheme = Scheme(4, 32)
    weights = torch.stack([weight, weight.flip(0), 2 * weight])
    hessians = torch.stack([hessian, hessian.flip(0, 1), hessian + torch.eye(len(hessian))])
    factors, fine = error_feedback.factorize(hessians.clone(), 0.01)
    assert all(fine)
    grid = choose_grid(weights, scheme)
    groups = (torch.arange(192) // 32).expand(3, -1)
    rounder = error_feedback.GridRounder(groups, grid, "mse")
    error_feedback.round_columns(error_feedback.transpose(weights), factors, rounder)
    for n in range(3):
        found, _, _ = solved(weights[n], hessians[n], scheme, "mse", fixed=False)
        whole = rounder.grid[n].to_quantized(rounder.integers()[n]).dequantize()
        assert ((found - whole).abs() > 1e-4).double().mean() < 0.02


def test_a_mask_keeps_zeros_and_the_rest_makes_up_for_it() -> None:
    weight, hessian = problem()
    scheme = Scheme(4, 32)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    sparse = weight * mask
    factors, _ = error_feedback.factorize(hessian[None].clone(), 0.01)
    groups = (torch.arange(192) // 32)[None]
    rounder = error_feedback.GridRounder(
        groups, choose_grid(sparse[None], scheme), None, mask[None]
    )
    error_feedback.round_columns(error_feedback.transpose(sparse[None]), factors, rounder)
    found = rounder.grid[0].to_quantized(rounder.integers()[0]).dequantize()
    assert (found[~mask] == 0).all()
    rounded = round_to_nearest(sparse, scheme).dequantize()
    losses = [float(((sparse - q) @ hessian * (sparse - q)).sum()) for q in (found, rounded)]
    assert losses[0] < 0.8 * losses[1]


def test_factors_multiply_to_the_damped_hessian() -> None:
    _, hessian = problem()
    factors, _ = error_feedback.factorize(hessian[None].clone(), 0.05)
    lower = factors.lower[0].tril()
    again = lower * factors.weight[0] @ lower.T
    assert torch.allclose(again.double(), damped(hessian, 0.05), rtol=1e-4, atol=1e-2)
    assert (lower.diagonal() == 1).all()


def test_damping_rises_until_it_works_and_then_rounds() -> None:
    ins = 64
    dead = torch.zeros(ins, ins)
    # Not positive with ten times the damping.
    wrong = torch.eye(ins)
    wrong[0, 1] = wrong[1, 0] = 1.5
    hopeless = torch.full((ins, ins), float("nan"))
    factors, fine = error_feedback.factorize(torch.stack([dead, wrong, hopeless]), 0.01)
    assert fine == [True, True, False]
    assert torch.equal(factors.lower[2], torch.eye(ins))
    # Inputs that never occur are rounded to nearest.
    weight = torch.randn(1, 8, ins, generator=torch.Generator().manual_seed(5))
    scheme = Scheme(4, 32)
    for n in (0, 2):
        own = error_feedback.HessianFactors(factors.lower[n][None], factors.weight[n][None])
        groups = (torch.arange(ins) // 32)[None]
        rounder = error_feedback.GridRounder(groups, choose_grid(weight, scheme))
        error_feedback.round_columns(error_feedback.transpose(weight), own, rounder)
        plain = round_to_nearest(weight[0], scheme)
        assert torch.equal(rounder.integers()[0], plain.q)
        assert torch.equal(dequantize(plain.q, plain.scales, scheme), plain.dequantize())


@pytest.mark.skipif(not compiled.is_built(), reason="there was no compiler")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outs", [1, 64, 200])
def test_the_compiled_loop_equals_that_in_torch(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, outs: int
) -> None:
    generator = torch.Generator().manual_seed(6)
    scheme, ins = Scheme(4, 32, symmetric), 160
    weights = torch.randn(3, outs, ins, generator=generator)
    mask = torch.rand(3, outs, ins, generator=generator) < 0.7
    inputs = torch.randn(3, 400, ins, generator=generator)
    factors, _ = error_feedback.factorize(inputs.mT @ inputs, 0.01)
    groups = torch.stack([torch.randperm(ins, generator=generator) // 32 for _ in range(3)])
    found = {}
    for name, threads in (("compiled", 1), ("shared", 3), ("torch", 1)):
        monkeypatch.setattr(native, "is_built", lambda name=name: name != "torch")
        monkeypatch.setattr(native, "MANY", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        rounder = error_feedback.GridRounder(groups, choose_grid(weights, scheme), None, mask)
        assert rounder.uses_compiled == (name != "torch")
        errors = error_feedback.transpose(weights * mask)
        loss = error_feedback.round_columns(errors, factors, rounder)
        found[name] = rounder.integers(), loss, errors
    for one, same in zip(found["compiled"], found["shared"], strict=True):
        assert torch.equal(one, same)
    # Sums in another order: numbers between two grid points may fall to the other.
    assert (found["compiled"][0] == found["torch"][0]).double().mean() > 0.999
    assert torch.allclose(found["compiled"][1], found["torch"][1], rtol=1e-3)


@pytest.mark.skipif(not compiled.is_built(), reason="there was no compiler")
@pytest.mark.parametrize("shape", [(40, 96), (3, 5, 64), (2, 700, 256), (6, 40)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_compiled_search_equals_that_in_torch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], symmetric: bool, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(shape, generator=generator)
    importance = torch.rand(*shape[:-2], shape[-1], generator=generator)
    importance[..., :32] = 0
    for group in (32, -1) if shape[-1] % 32 == 0 else (-1,):
        scheme, found = Scheme(3, group, symmetric), []
        for built in (True, False):
            monkeypatch.setattr(native, "is_built", lambda built=built: built)
            monkeypatch.setattr(native, "MANY", 0)
            found.append(choose_grid(weight, scheme, "mse", importance if weighted else None))
        assert found[0].scales.shape == (*shape[:-1], scheme.groups(shape[-1]))
        assert not torch.equal(found[0].scales, choose_grid(weight, scheme).scales)
        # Sums in another order.
        assert (found[0].scales == found[1].scales).double().mean() > 0.995
        assert (found[0].zeros == found[1].zeros).double().mean() > 0.995


def test_only_the_lower_triangle_is_factored() -> None:
    _, hessian = problem()
    whole, _ = error_feedback.factorize(hessian[None].clone(), 0.01)
    half = hessian.tril() + torch.full_like(hessian, float("nan")).triu(1)
    found, fine = error_feedback.factorize(half[None], 0.01)
    assert fine == [True]
    assert torch.equal(found.lower.tril(), whole.lower.tril())


def test_distant_feedback_in_bfloat16_loses_nothing_significant() -> None:
    weight, hessian = problem(32, 640, 900)
    factors, _ = error_feedback.factorize(hessian[None].clone(), 0.01)
    losses, found = [], []
    for dtype in (torch.float32, torch.bfloat16):
        groups = (torch.arange(640) // 64)[None]
        rounder = error_feedback.GridRounder(groups, choose_grid(weight[None], Scheme(4, 64)))
        errors = error_feedback.transpose(weight[None])
        losses.append(float(error_feedback.round_columns(errors, factors, rounder, dtype)))
        found.append(rounder.integers())
        error = errors[0].T.double()
        assert losses[-1] == pytest.approx(float((error @ damped(hessian) * error).sum()), rel=0.01)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert not torch.equal(*found)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, 64)], ids=str)
def test_signed_scales_round_better_than_positive_ones(scheme: Scheme) -> None:
    weight = problem()[0]
    errors = {
        how: float((round_to_nearest(weight, scheme, how).dequantize() - weight).square().sum())
        for how in ("mse", "signed")
    }
    grid = choose_grid(weight, scheme, "signed")
    assert (grid.scales < 0).any()
    assert (grid.scales > 0).any()
    assert errors["signed"] < 0.95 * errors["mse"]


def test_scales_that_are_fitted_are_those_of_least_squares() -> None:
    weight, hessian = problem(outs=5, ins=96)
    scheme = Scheme(4, 32)
    groups = (torch.arange(96) // 32)[None]
    rounded = round_to_nearest(weight, scheme)
    numbers = (rounded.q.float() - scheme.zero_point).T[None]
    factors, _ = error_feedback.factorize(hessian[None].clone(), 0.01)
    found = fit_scales(weight.T[None], numbers, rounded.scales[None], groups, factors)[0]
    root = torch.linalg.cholesky(damped(hessian))
    for row, own, scales in zip(weight, numbers[0].T, found, strict=True):
        parts = torch.zeros(96, 3)
        parts[torch.arange(96), groups[0]] = own
        best = torch.linalg.lstsq(root.T @ parts.double(), root.T @ row.double()).solution
        assert torch.allclose(scales.double(), best, rtol=2**-8)
    lost = [
        float(measure_rows((weight - rounded_to(own, s, groups[0])).T[None], factors).sum())
        for own, s in ((numbers[0].T, rounded.scales), (numbers[0].T, found))
    ]
    assert lost[1] < lost[0]


def rounded_to(numbers: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return numbers * scales[:, groups]
