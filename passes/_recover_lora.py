"""Low-rank adapters, by peft: put on, trained like other parameters, and merged."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import nn

# Part of the names of adapters.
ADAPTER = ".lora_"
# Matrices of MLPs without experts. As modules peft takes these names for those of experts, in some
# families, and puts adapters on experts instead; as parameters it leaves them alone (peft 0.21).
MLP_MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def check_installed() -> None:
    """Refuse to continue without peft.

    Raises:
        InputError: it is not there.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "recover: train: lora needs peft, which is not installed; install moe2edge[train]"
        )


def adapt(
    model: nn.Module, adapted: Sequence[str], whole: Sequence[str], rank: int, seed: int
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Add adapters to a model; return it with the parameters to train, by name.

    Args:
        model: a transformers model.
        adapted: names of the parameters that get one.
        whole: names of parameters that are trained as they are.
        rank: of the adapters, which are scaled by 2.
        seed: of their first numbers.

    Raises:
        AssertionError: peft has put adapters elsewhere.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    modules = {n for n in adapted if n.endswith(".weight") and not n.endswith(MLP_MATRICES)}
    fused = [name for name in adapted if name not in modules]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[n.removesuffix(".weight") for n in adapted if n in modules],
        target_parameters=fused or None,
        task_type="CAUSAL_LM",
    )
    without_adapter = set(whole)
    kept = {name: p for name, p in model.named_parameters() if name in without_adapter}
    # peft draws from torch's own generator, and asks transformers by a name that is going away.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    found = {name: p for name, p in wrapped.named_parameters() if ADAPTER in name}
    _check(adapted, list(found))
    return wrapped, {**found, **kept}


def _check(adapted: Sequence[str], found: Sequence[str]) -> None:
    """Check that every matrix has its adapter, and nothing else has one."""
    wanted = Counter(name.rpartition(".")[0] for name in adapted)
    # Where a module has several parameters with adapters, these are wrapped in one another.
    there = Counter(
        name.removeprefix("base_model.model.").partition(ADAPTER)[0].replace(".base_layer", "")
        for name in found
        if f"{ADAPTER}A" in name
    )
    if wanted != there:
        odd = next(iter((wanted - there) + (there - wanted)))
        raise AssertionError(f"{odd} has {there[odd]} adapters, expected {wanted[odd]}")


def merge(wrapped: Any) -> nn.Module:
    """Merge the adapters into the parameters that they adapt."""
    merged: nn.Module = wrapped.merge_and_unload()
    return merged
