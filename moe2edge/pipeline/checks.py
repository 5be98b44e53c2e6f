"""Checks that several passes share: amounts in options, and models that are refused."""

from __future__ import annotations

from collections.abc import Sequence

from moe2edge.errors import InputError
from moe2edge.model.layers import FEWEST_IN_GROUP
from moe2edge.model.model import Model
from moe2edge.numerics.selection import count_kept, list_group_counts


def refuse_replaced(name: str, model: Model, remedy: str = "") -> None:
    """Refuse a model with replaced or tied experts; for passes that handle full experts only.

    Args:
        name: of the pass.
        model: what it gets.
        remedy: what to do instead; none: to put the pass before those that replace.

    Raises:
        InputError: it is one.
    """
    if any(not layer.is_plain for _, layer in model.moe_blocks):
        replaced = model.replaced_count + model.tied_count
        raise InputError(
            f"{name} cannot handle replaced or tied experts, and the model has {replaced}; "
            f"{remedy or f'put expert_replace or expert_merge after {name}'}"
        )


def refuse_slimmed(name: str, model: Model) -> None:
    """Refuse a model whose experts are quantized or sparse, for passes that compute new ones.

    Raises:
        InputError: some are.
    """
    for block, layer in model.moe_blocks:
        weights = [w for e in layer.experts for w in (e.gate, e.up, e.down)]
        if any(w.scheme or w.pattern for w in weights):
            raise InputError(
                f"{name}: experts of block {block.index} are already quantized or sparse; move "
                f"{name} before the pass that quantizes or sparsifies"
            )


def check_amount(value: object) -> object:
    """Refuse what is neither a count nor a fraction; for validators of options.

    Raises:
        ValueError: it is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a count (2) or a fraction (0.25)")
    if not value > 0:
        raise ValueError("a count of at least 1, or a fraction between 0 and 1")
    if isinstance(value, float) and value >= 1:
        raise ValueError("a fraction lies between 0 and 1; write a count without a point")
    return value


def check_keep(value: object) -> object:
    """Refuse what is neither an amount nor a list of counts; for validators of options.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, list):
        return check_amount(value)
    if not value or not all(type(count) is int and count >= 1 for count in value):
        raise ValueError("a list of counts of at least 1, one for each MoE layer")
    return value


def count_kept_per_layer(keep: float | list[int], sizes: Sequence[int], name: str) -> list[int]:
    """Count the experts that stay in each MoE layer.

    Args:
        keep: as `count_kept` takes it, or one count for each layer.
        sizes: experts of the layers.
        name: of the pass, for the message.

    Raises:
        InputError: it is a list of another length, or keeps more than there are.

    >>> count_kept_per_layer(0.5, [6, 4], "p"), count_kept_per_layer([5, 2], [6, 4], "p")
    ([3, 2], [5, 2])
    """
    if isinstance(keep, list) and len(keep) != len(sizes):
        raise InputError(f"{name}: keep has {len(keep)} counts for {len(sizes)} MoE layers")
    counts = keep if isinstance(keep, list) else [count_kept(keep, experts) for experts in sizes]
    refuse_too_many(name, keep, counts, sizes, [f"MoE layer {n}" for n in range(len(sizes))])
    return counts


def refuse_too_many(
    name: str,
    keep: float | list[int],
    counts: Sequence[int],
    sizes: Sequence[int],
    places: Sequence[str],
) -> None:
    """Refuse to keep more experts than a layer has; say how many would drop some.

    Args:
        name: of the pass.
        keep: its option.
        counts: the experts that stay, by MoE layer.
        sizes: the experts that there are, by MoE layer.
        places: the MoE layers as the message names them.

    Raises:
        InputError: a layer has fewer.
    """
    for n, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if count <= size:
            continue
        if isinstance(keep, list):
            others = [m for m in range(len(sizes)) if m != n]
            most = size if any(counts[m] < sizes[m] for m in others) else size - 1
        else:
            most = min(sizes) if max(sizes) > min(sizes) else size - 1
        raise InputError(
            f"{name}: keep is {count}, but {places[n]} has {size} experts; keep at most {most}"
        )


def refuse_uneven_groups(
    name: str, option: str, value: float | list[int], counts: Sequence[int], model: Model
) -> None:
    """Refuse numbers that leave groups of a router with different numbers of experts.

    Args:
        name: of the pass.
        option: its option.
        value: of the option.
        counts: the experts that stay, by MoE layer.
        model: what it gets.

    Raises:
        InputError: names the nearest numbers that are possible.
    """
    for (block, layer), count in zip(model.moe_blocks, counts, strict=True):
        groups = layer.router.groups
        possible = list_group_counts(len(layer.experts), groups, FEWEST_IN_GROUP)
        if groups == 1 or count in possible:
            continue
        smaller = [number for number in possible if number < len(layer.experts)]
        near = sorted(sorted(smaller, key=lambda n: abs(n - count))[:2])
        advice = f"the nearest are {' and '.join(map(str, near))}"
        if not smaller:
            advice = f"there is no such number below {len(layer.experts)}, so leave {name} out"
        raise InputError(
            f"{name}: {option} {value} is {count} experts in block {block.index}, but "
            f"each of the {groups} groups of its router has to keep the same number, "
            f"{FEWEST_IN_GROUP} at least; {advice}"
        )


def advise_top_k(top_k: int, experts: int, otherwise: str, option: str = "keep") -> str:
    """Say what to do where fewer experts would stay than the router chooses per token.

    Args:
        top_k: experts that it chooses.
        experts: experts that there are.
        otherwise: what to do instead.
        option: what is too small, as a verb.

    >>> advise_top_k(2, 8, "set clamp_top_k: true"), advise_top_k(8, 8, "set clamp_top_k: true")
    ('keep at least 2, or set clamp_top_k: true', 'set clamp_top_k: true')
    """
    return f"{option} at least {top_k}, or {otherwise}" if top_k < experts else otherwise
