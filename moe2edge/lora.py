"""Low-rank adapters, by peft: put on, trained like other parameters, and merged."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import nn

# What the names of adapters have in them.
ADAPTER = ".lora_"


def check_installed() -> None:
    """Refuse to go on without peft.

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
    """A model with adapters, and what is to be trained of it, by name.

    Args:
        model: a transformers model.
        adapted: names of the parameters that get one.
        whole: names of parameters that are trained as they are.
        rank: of the adapters, which are scaled by 2.
        seed: of their first numbers.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    fused = [name for name in adapted if not name.endswith(".weight")]
    linear = [name.removesuffix(".weight") for name in adapted if name.endswith(".weight")]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=linear,
        target_parameters=fused or None,
        task_type="CAUSAL_LM",
    )
    kept = {name: parameter for name, parameter in model.named_parameters() if name in set(whole)}
    # peft draws from torch's own generator, and asks transformers by a name that is going away.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    found = {name: p for name, p in wrapped.named_parameters() if ADAPTER in name}
    return wrapped, {**found, **kept}


def merge(wrapped: Any) -> nn.Module:
    """The model with its adapters added to what they adapt."""
    merged: nn.Module = wrapped.merge_and_unload()
    return merged
