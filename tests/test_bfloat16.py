"""Compiled loops of GPTQ with products of bfloat16 numbers, against float64 and against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe2edge.numerics import bfloat16, compiled, error_feedback
from moe2edge.numerics.rounding import choose_grid
from moe2edge.numerics.scheme import Scheme

needs_processor = pytest.mark.skipif(
    not bfloat16.is_native(), reason="the loops were not built, or the processor has no AVX512-BF16"
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sum_exactly(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the Hessian of the rounded inputs, float64."""
    y = (x.float() * weights.sqrt()[:, None]).to(torch.bfloat16).double()
    return y.T @ y


@needs_processor
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 16), (2, 5), (3, 17), (129, 48), (255, 50), (1023, 100), (1025, 49), (2100, 161)],
)
def test_a_hessian_is_that_of_rounded_inputs(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    weights = draw(rows).square()
    weights[::7] = 0
    for threads, x in ((1, draw(rows, columns) + 0.5), (3, draw(rows, columns).bfloat16())):
        monkeypatch.setattr(compiled, "MANY", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        half = rows // 2
        parts = [(x[:half], weights[:half]), (x[half:], weights[half:])]
        found = torch.full((columns, columns), float("nan"))
        error_feedback.sum_hessian(found, parts, dtype=torch.bfloat16)
        expected = sum_exactly(x, weights)
        sizes = expected.diagonal().clamp(min=1e-30).sqrt()
        assert ((found - expected).abs() / (sizes[:, None] * sizes)).max() <= 1e-6
        assert torch.equal(found, found.T)
        plain = torch.empty_like(found)
        strided = torch.cat([x, x], dim=1)[:, :columns]
        error_feedback.sum_hessian(
            plain, [(strided, weights)], weighted=False, dtype=torch.bfloat16
        )
        assert (plain - sum_exactly(x, torch.ones(rows))).abs().max() <= 1e-6 * plain.max()


def test_a_hessian_without_rows_and_with_negative_weights() -> None:
    x, weights = draw(300, 40).bfloat16(), draw(300, seed=1)
    found, expected = torch.empty(40, 40), torch.empty(40, 40)
    error_feedback.sum_hessian(found, [(x[:0], weights[:0])], dtype=torch.bfloat16)
    assert not found.any()
    # The roots of such weights are not numbers: the batch that has them is summed in float32.
    parts = [(x[:100], weights[:100].abs()), (x[100:], weights[100:])]
    error_feedback.sum_hessian(found, parts, dtype=torch.bfloat16)
    error_feedback.sum_hessian(expected, parts)
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


@needs_processor
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("outs", "ins", "width"), [(1, 8, 8), (50, 200, 40), (100, 392, 56)])
def test_matrices_are_rounded_as_by_the_loop_over_columns(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, outs: int, ins: int, width: int
) -> None:
    inputs = draw(2, 2 * ins, ins) @ (draw(ins, ins, seed=1) / ins**0.5 + 0.3 * torch.eye(ins))
    hessians = inputs.mT @ inputs
    weights = draw(2, outs, ins, seed=2)
    weights[0, :, ::3] = 0
    orders = torch.stack([draw(ins, seed=n).argsort() for n in range(2)])
    sorted_ones = torch.stack([h[o][:, o] for h, o in zip(hessians, orders, strict=True)])
    factors, _ = error_feedback.factorize(sorted_ones, 0.01)
    grid = choose_grid(weights, Scheme(4, width, symmetric), "mse")
    for sparse in (False, True):
        mask = (weights != 0) if sparse else None
        rows = error_feedback.gather_rows(error_feedback.transpose(weights), orders)
        kept = None if mask is None else error_feedback.gather_rows(mask.mT, orders).mT
        groups = (torch.arange(ins) // width).expand(2, -1).gather(1, orders)
        rounder = error_feedback.GridRounder(groups, grid, None, kept)
        expected = error_feedback.round_columns(rows, factors, rounder)
        found = {}
        # In any layout of memory.
        for threads, order in ((1, orders), (3, orders.mT.contiguous().mT)):
            monkeypatch.setattr(compiled, "MANY", 0)
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found[threads] = bfloat16.round_matrices(
                weights, grid, order, factors.lower.mT, factors.weight, sparse=sparse
            )
        q, loss = found[1]
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[3], strict=True))
        # Errors that were rounded on the way lead to another number now and then.
        same = (q == rounder.integers(orders)).double().mean()
        assert same == 1 if ins <= 128 else same > 0.97
        assert torch.allclose(loss, expected, rtol=0.02)
        if mask is not None:
            whole = grid[0].to_quantized(q[0]).dequantize()
            assert not whole[~mask[0]].any()


@needs_processor
def test_tensors_that_the_loops_would_misread_are_refused() -> None:
    sums, space = torch.empty(16, 16), bfloat16.make_packing_space(16)
    for x in (torch.zeros(4, 16, dtype=torch.float16), torch.zeros(4, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"x: found torch\.float"):
            bfloat16.add_products(sums, x, None, space, started=False)
    with pytest.raises(ValueError, match="sums: found"):
        bfloat16.add_products(sums, torch.zeros(4, 17), None, space, started=False)
    with pytest.raises(ValueError, match="weights: found"):
        bfloat16.add_products(sums, torch.zeros(4, 16), torch.ones(3), space, started=False)
    wide, order = torch.empty(16, 32)[:, :16], torch.arange(16)
    calls: list[Callable[[], None]] = [
        lambda: bfloat16.add_products(wide, torch.zeros(4, 16), None, space, started=False),
        lambda: bfloat16.mirror(wide),
        lambda: bfloat16.order_both(wide, order, sums),
        lambda: bfloat16.order_both(sums, order, wide),
    ]
    for misread in calls:
        with pytest.raises(ValueError, match="rows must be contiguous"):
            misread()
    weights, costs = torch.zeros(1, 4, 16), torch.ones(1, 16)
    grid, upper = choose_grid(weights, Scheme(4, 16)), torch.eye(16)[None]
    assert not bfloat16.can_round(torch.zeros(1, 4, 12))
    for wrong in (torch.arange(16)[None] + 1, torch.arange(8)[None]):
        with pytest.raises(ValueError, match="orders: "):
            bfloat16.round_matrices(weights, grid, wrong, upper, costs, sparse=False)


@needs_processor
@pytest.mark.parametrize("columns", [1, 2, 33])
def test_a_symmetric_matrix_is_ordered_below_its_diagonal(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(compiled, "MANY", 0)
    half = draw(columns, columns)
    matrix, order = half + half.T, draw(columns, seed=1).argsort()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = torch.full_like(matrix, float("nan"))
        bfloat16.order_both(matrix, order, found)
        assert torch.equal(found.tril(), matrix[order][:, order].tril())
        assert found.triu(1).nan_to_num().eq(0).all()
