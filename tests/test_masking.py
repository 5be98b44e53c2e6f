"""Dropping experts by slicing is masking them with minus infinity: strictly, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import run_module
from moe2edge.model.family import FAMILIES
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> Tensor:
    return run_module(model, IDS)


def in_float64(folder: Path, gone: Sequence[Sequence[int]], routed: list[Tensor]) -> Any:
    """Stock transformers in float64; logits of the experts ``gone`` are minus infinity.

    Only the router is not its own, because that one computes in float32 in any case.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    for layer, ids in zip(model.model.layers, gone, strict=True):
        gate = layer.mlp.gate
        renormalize = getattr(gate, "norm_topk_prob", True)  # Mixtral has no such switch

        def forward(x: Tensor, gate: Any = gate, ids: Any = ids, r: Any = renormalize) -> Any:
            scores = x.reshape(-1, gate.hidden_dim) @ gate.weight.T
            scores[:, list(ids)] = -torch.inf
            weights, chosen = scores.softmax(-1).topk(gate.top_k)
            routed.append(chosen)
            return scores, weights / weights.sum(-1, keepdim=True) if r else weights, chosen

        gate.forward = forward
    return model


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_equals_masking_with_minus_infinity(
    family: str, top_k: int, tiny: Make, tmp_path: Path
) -> None:
    """What was written, against all experts with a mask; in float64, where nothing is a near tie.

    In float32 the two are off by up to 1e-5, as sums depend on the number of experts.
    """
    kept = ((5, 0, 3, 2), (1, 3, 4, 5), (4, 2, 1, 0))
    source = tiny(family, num_experts_per_tok=top_k)
    model = open_checkpoint(str(source)).model
    for index, ids in enumerate(kept):
        model = model.replace_block(model.blocks[index].keep_experts(ids))
    Hf().accepts(model)
    Hf().write(model, tmp_path)
    mine: list[Tensor] = []
    found = logits(in_float64(tmp_path, ((), (), ()), mine))
    wanted: list[Tensor] = []
    gone = [[j for j in range(6) if j not in ids] for ids in kept]
    expected = logits(in_float64(source, gone, wanted))
    assert (found - expected).abs().max() < 1e-6
    assert len(mine) == len(wanted) == 3
    for ids, chosen, other in zip(kept, mine, wanted, strict=True):
        assert torch.equal(torch.tensor(ids)[chosen], other)
