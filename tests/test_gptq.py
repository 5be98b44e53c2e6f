"""The GPTQ solver against a plain loop over columns with an explicit inverse."""

from __future__ import annotations

import pytest
import torch

from moe2edge.passes import gptq
from moe2edge.rounding import dequantize, group_scales, round_to_nearest
from moe2edge.scheme import Scheme


def problem(outs: int = 12, ins: int = 192, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(ins, ins, generator=generator) / ins**0.5
    inputs = torch.randn(tokens, ins, generator=generator) @ (mix + 0.3 * torch.eye(ins))
    return torch.randn(outs, ins, generator=generator), inputs


def slow(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float, scheme: Scheme
) -> torch.Tensor:
    """GPTQ as in the paper's derivation: after each column, eliminate it from the inverse."""
    weight = weight.double().clone()
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(h)
    out = torch.empty_like(weight)
    for c in range(weight.shape[1]):
        if c % scheme.group_size == 0:
            scale = group_scales(weight[:, c : c + scheme.group_size].float(), scheme).double()[
                :, 0
            ]
        q = ((weight[:, c] / scale).round()).clamp(-8, 7)
        out[:, c] = q * scale
        error = (weight[:, c] - out[:, c]) / inverse[c, c]
        weight -= error[:, None] * inverse[c][None, :]
        inverse = inverse - inverse[:, c, None] @ inverse[None, c] / inverse[c, c]
    return out


@pytest.mark.parametrize("group", [32, 64])
def test_solver_equals_elimination_column_by_column(group: int) -> None:
    weight, inputs = problem()
    scheme = Scheme(group_size=group)
    hessian = 2 * inputs.T @ inputs
    factor = gptq.inverse_factor(hessian, 0.01)
    assert factor is not None
    q, scales = gptq.solve(weight[None], factor[None], scheme)
    found = dequantize(q[0], scales[0], scheme).double()
    expected = slow(weight, hessian, 0.01, scheme)
    # Near ties may fall to the other side in float32; nearly all numbers are equal.
    assert (found - expected).abs().gt(1e-6).double().mean() < 0.02
    losses = [
        float(((weight.double() - w) @ inputs.T.double()).square().sum()) for w in (found, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_gptq_loses_less_than_rounding() -> None:
    weight, inputs = problem()
    scheme = Scheme(group_size=64)
    factor = gptq.inverse_factor(2 * inputs.T @ inputs, 0.01)
    assert factor is not None
    q, scales = gptq.solve(weight[None], factor[None], scheme)

    def loss(w: torch.Tensor) -> float:
        return float(((weight - w) @ inputs.T).square().sum())

    rounded = loss(round_to_nearest(weight, scheme).dequantize())
    assert loss(dequantize(q[0], scales[0], scheme)) < 0.7 * rounded


def test_a_batch_is_solved_as_its_members_are() -> None:
    weight, inputs = problem()
    scheme = Scheme(group_size=32)
    factors = [gptq.inverse_factor(2 * x.T @ x, 0.01) for x in (inputs, inputs[:250])]
    stacked = torch.stack([f for f in factors if f is not None])
    both, _ = gptq.solve(torch.stack([weight, weight * 2]), stacked, scheme)
    alone, _ = gptq.solve(weight[None] * 2, stacked[1:], scheme)
    assert (both[1] != alone[0]).double().mean() < 0.01


def test_inputs_that_never_occur_are_rounded() -> None:
    weight, inputs = problem()
    inputs[:, 5] = 0
    scheme = Scheme(group_size=64)
    factor = gptq.inverse_factor(2 * inputs.T @ inputs, 0.01)
    assert factor is not None
    q, scales = gptq.solve(weight[None], factor[None], scheme)
    error = (dequantize(q[0], scales[0], scheme) - weight)[:, 5].abs()
    assert (error <= scales[0][:, 0] * 0.56).all()


def test_a_hopeless_hessian_has_no_factor() -> None:
    assert gptq.inverse_factor(torch.full((8, 8), torch.nan), 0.01) is None
