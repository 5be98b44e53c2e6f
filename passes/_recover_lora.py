"""Low-rank adapters (LoRA) by peft: add them, and merge them after training."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported, join_lines

if TYPE_CHECKING:
    from torch import nn

# Part of the names of all adapters.
ADAPTER = ".lora_"
# Matrices of MLPs without experts. Given as modules, peft mistakes these names for those of experts
# in some families and adapts experts instead; given as parameters, it does not (peft 0.21).
MLP_MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def check_installed() -> None:
    """Check that peft is installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "recover: train: lora needs peft, which is not installed: pip install 'peft>=0.17'"
        )


def check_adapts(model: Any, adapted: Sequence[str], rank: int) -> None:
    """Check that peft takes a model; ``model``, on the meta device, is of no use afterwards.

    Raises:
        Unsupported: it does not, as with modules of some state-space models.
    """
    try:
        adapt(model, adapted, (), rank, 0)
    except (AssertionError, ValueError) as error:
        raise Unsupported(
            f"recover: train: lora does not work on {model.config.model_type}, as peft says: "
            f"{join_lines(error)}; set train: experts, router or full"
        ) from error


def adapt(
    model: nn.Module, adapted: Sequence[str], whole: Sequence[str], rank: int, seed: int
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Add adapters to a model; return it with the parameters to train, by name.

    Args:
        model: a transformers model.
        adapted: names of the parameters that get an adapter.
        whole: names of parameters that are trained themselves.
        rank: rank of the adapters, which are scaled by 2.
        seed: seed of their initial values.

    Raises:
        AssertionError: peft has adapted other parameters.
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
    trained = {name: p for name, p in model.named_parameters() if name in without_adapter}
    # peft draws from torch's global generator, and uses a deprecated name of transformers.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    adapters = {name: p for name, p in wrapped.named_parameters() if ADAPTER in name}
    _check_adapters(adapted, list(adapters))
    return wrapped, {**adapters, **trained}


def _check_adapters(adapted: Sequence[str], adapters: Sequence[str]) -> None:
    """Check that every matrix to adapt has its adapter, and no other one has."""
    expected = Counter(name.rpartition(".")[0] for name in adapted)
    # Where a module has several parameters with adapters, peft nests their wrappers.
    present = Counter(
        name.removeprefix("base_model.model.").partition(ADAPTER)[0].replace(".base_layer", "")
        for name in adapters
        if f"{ADAPTER}A" in name
    )
    if expected != present:
        odd = next(iter((expected - present) + (present - expected)))
        raise AssertionError(f"{odd} has {present[odd]} adapters, expected {expected[odd]}")


def merge(wrapped: Any) -> nn.Module:
    """Merge the adapters into the matrices that they adapt; return the model."""
    merged: nn.Module = wrapped.merge_and_unload()
    return merged
