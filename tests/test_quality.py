"""Figures of quality equal a loop over positions."""

from __future__ import annotations

import math

import pytest
import torch

from moe2edge.errors import InputError
from moe2edge.evaluation import verify
from moe2edge.numerics import metrics
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make


@pytest.mark.parametrize("length", [2, 65, 66, 150])
def test_figures_equal_a_loop_over_positions(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 11, (3, length), generator=generator)
    mine, theirs = (2 * torch.randn(3, length, 11, generator=generator) for _ in range(2))
    nll = kl = agree = 0.0
    for row in range(3):
        for position in range(length - 1):
            q = mine[row, position].double().softmax(-1)
            p = theirs[row, position].double().softmax(-1)
            nll -= math.log(q[ids[row, position + 1]])
            kl += sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True))
            agree += int(p.argmax() == q.argmax())
    found = metrics.measure(ids, mine, theirs)
    count = 3 * (length - 1)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.top1 == agree / count
    single = metrics.measure(ids[:1], mine[:1], theirs[:1])
    assert (single.perplexity_error, single.kl_error, single.top1_error) == (None, None, None)
    alone = metrics.measure(ids, mine, None)
    assert (alone.perplexity_error, alone.kl_error) == (found.perplexity_error, None)
    assert (alone.perplexity, alone.kl, alone.top1) == (found.perplexity, None, None)


def test_a_model_is_no_distance_from_itself() -> None:
    logits = torch.randn(2, 70, 5, generator=torch.Generator().manual_seed(0))
    found = metrics.measure(torch.zeros(2, 70, dtype=torch.int64), logits, logits)
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_another_vocabulary_is_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    verify.check_vocabulary(model, 96)
    with pytest.raises(InputError, match="has 96 entries in its vocabulary, the folder has 95"):
        verify.check_vocabulary(model, 95)


def test_errors_are_those_of_repeated_draws() -> None:
    """Draw texts anew, many times: the error told is the spread of what is measured."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, length, many = 7, 17, 300
    found = []
    for _ in range(many):
        # Samples differ as wholes: some texts are harder than others.
        hard = 0.5 + 2 * torch.rand(12, 1, 1, generator=generator)
        mine = hard * torch.randn(12, length, vocabulary, generator=generator)
        theirs = mine + 0.5 * hard * torch.randn(12, length, vocabulary, generator=generator)
        ids = torch.randint(0, vocabulary, (12, length), generator=generator)
        found.append(metrics.measure(ids, mine, theirs))
    for name in ("perplexity", "kl", "top1"):
        values = torch.tensor([getattr(one, name) for one in found])
        told = torch.tensor([getattr(one, f"{name}_error") for one in found])
        assert float(told.mean()) == pytest.approx(float(values.std()), rel=0.15), name
