"""Targets that hold a model which another one refuses."""

from __future__ import annotations

from contextvars import ContextVar

from moe2edge.errors import Unsupported
from moe2edge.model.model import Model
from moe2edge.pipeline.registry import list_choices, list_targets, make_target

# Whether targets are being asked: one that refuses asks no others, as nobody reads its message.
_asking: ContextVar[bool] = ContextVar("asking", default=False)


def list_holders(model: Model, but: str) -> list[str]:
    """List the targets that hold a model, with the option that each needs for it.

    Args:
        model: the model.
        but: name of the target that asks.
    """
    if _asking.get():
        return []
    token = _asking.set(True)
    try:
        return _list_holders(model, but)
    finally:
        _asking.reset(token)


def name_holders(model: Model, but: str, *others: str) -> str:
    """Name the targets that hold a model in a sentence, ``a, b or c``; empty: there is none.

    Args:
        model: the model.
        but: name of the target that asks.
        others: what to name behind them.
    """
    *first, last = [*list_holders(model, but), *others] or [""]
    return f"{', '.join(first)} or {last}" if first else last


def refuse_ends(model: Model, but: str) -> None:
    """Refuse a quantized head or embedding, for targets that hold none.

    Args:
        model: the model.
        but: name of the target.

    Raises:
        Unsupported: names the tensor, and the targets that hold it.
    """
    for name, weight in model.rest.items():
        if weight.scheme is not None:
            raise Unsupported(
                f"target {but} keeps {model.names.get_rest_name(name)} in the source's precision, "
                f"but it is {weight.scheme}; leave head and embedding out of the pass that "
                f"quantizes, or export to {name_holders(model, but)}"
            )


def _list_holders(model: Model, but: str) -> list[str]:
    return [found for name in list_targets() if name != but if (found := _find_form(name, model))]


def _find_form(name: str, model: Model) -> str:
    """Return a target with the first option with which it holds a model; empty: with none."""
    target = make_target(name, {})
    if not target.supports(model.family):
        return ""
    layouts: list[dict[str, object]] = [
        {"layout": value} for value in list_choices(target).get("layout", ())
    ]
    plain: list[dict[str, object]] = []
    if hasattr(target, "dequantize"):
        plain = [one | {"dequantize": True} for one in ({}, *layouts)]
    for options in ({}, *layouts, *plain):
        try:
            make_target(name, options).accepts(model)
        except Unsupported:
            continue
        said = (f"{key}={str(value).lower()}" for key, value in options.items())
        return ":".join((name, *said))
    return ""
