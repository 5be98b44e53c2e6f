"""A run of transformers' model of a config on a few tokens, without numbers.

What its code raises there, it would raise in the middle of the work: a value that no model can
have, such as a size of chunks of 0, is the fault of the config, and is found when it is opened.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from moe2edge.errors import InputError, Unsupported, join_lines
from moe2edge.model.anatomy import is_experts
from moe2edge.model.architecture import Architecture, describe_layer, find_layers, pass_by
from moe2edge.model.transformers_config import silence_transformers

TRIAL_TOKENS = 8
# Some families have a number of its own in each layer.
MOST_KINDS = 6
# Entries of one tensor, besides those that are stored: more for a few tokens is no model's.
LARGEST_TENSOR = 1 << 34


@lru_cache(maxsize=4)
def try_config(architecture: Architecture) -> None:
    """Run one layer of each kind of a model, and what is around them, on a few tokens.

    Experts hand on what they get: which tokens they get depends on numbers.

    Raises:
        InputError: transformers' code fails, or asks for tensors of absurd sizes.
        Unsupported: a layer does not run once.
    """
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    )

    undecided = (
        DataDependentOutputException, DynamicOutputShapeException, NotImplementedError,
        UnsupportedFakeTensorException, UnsupportedOperatorException, MemoryError,
    )  # fmt: skip
    path, layers = find_layers(architecture.model)
    copies = list(_copy_layers(layers))
    runs = [0] * len(copies)
    for n, layer in enumerate(copies):
        _count_runs(layer, runs, n)
    model = copy_way(architecture.model, path, copies)
    try:
        with silence(), torch.no_grad(), FakeTensorMode():
            forget_numbers(model)
            with _make_meter():
                model(torch.zeros(1, TRIAL_TOKENS, dtype=torch.int64), use_cache=False)
    except InputError:
        raise
    except undecided:  # it depends on numbers
        return
    except Exception as error:  # a foreign class: any error of its own is one of the config
        raise InputError(
            f"config.json: transformers' {architecture.config.model_type} cannot run with it: "
            f"{type(error).__name__}: {join_lines(error)}"
        ) from error
    odd = next((n for n, times in enumerate(runs) if times != 1), None)
    if odd is not None:
        raise Unsupported(
            f"{architecture.config.model_type} is not supported: it runs layer {odd} "
            f"{runs[odd]} times for one text"
        )


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers and torch from printing what is raised anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with silence_transformers():
            yield
    finally:
        log.disabled = before


def _make_meter() -> Any:
    """Return a context in which tensors of absurd sizes are refused."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, operator: Any, _: Any, given: tuple[Any, ...] = (), more: Any = None
        ) -> Any:
            found = operator(*given, **(more or {}))
            for one in found if isinstance(found, tuple | list) else (found,):
                if isinstance(one, torch.Tensor) and one.numel() > LARGEST_TENSOR:
                    raise InputError(
                        "config.json: transformers' model of it computes a tensor of shape "
                        f"{list(one.shape)} for {TRIAL_TOKENS} tokens; correct the size that is "
                        "too large"
                    )
            return found

    return Meter()  # type: ignore[no-untyped-call]


def _count_runs(layer: Any, runs: list[int], index: int) -> None:
    """Let a layer count its runs."""

    def count(*_: Any) -> None:
        runs[index] += 1

    # A copy of a layer shares those of the other.
    layer._forward_pre_hooks = OrderedDict()
    layer._forward_pre_hooks_with_kwargs = OrderedDict()
    layer.register_forward_pre_hook(count)


def _copy_layers(layers: Any) -> Iterator[Any]:
    """Yield copies of layers, with experts that hand on what they get; one of each kind runs."""
    kinds: list[tuple[Any, Any]] = []
    for layer in layers:
        kind = describe_layer(layer)
        like = next((first for other, first in kinds if other == kind), None)
        if like is None and len(kinds) == MOST_KINDS:
            like = kinds[-1][1]
        if like is not None:
            yield pass_by(copy.copy(like))
            continue
        found = copy.deepcopy(layer)
        for module in found.modules():
            if is_experts(module):
                pass_by(module)
        kinds.append((kind, found))
        yield found


def copy_way(module: Any, path: str, layers: list[Any]) -> Any:
    """Return a copy of a module with other layers at ``path``."""
    from torch import nn

    name, _, rest = path.partition(".")
    found = copy.copy(module)
    found.__dict__["_modules"] = {
        key: None if key == name else copy.deepcopy(child) for key, child in module.named_children()
    }
    inner = copy_way(getattr(module, name), rest, layers) if rest else nn.ModuleList(layers)
    found._modules[name] = inner
    return found


def forget_numbers(model: Any) -> None:
    """Put tensors of the current mode in the place of all parameters and buffers."""
    import torch

    for module in model.modules():
        for place in ("_parameters", "_buffers"):
            tensors = module.__dict__[place]
            module.__dict__[place] = {
                name: None if one is None else torch.empty(one.shape, dtype=one.dtype)
                for name, one in tensors.items()
            }
