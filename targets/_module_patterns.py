"""Patterns of modules with other schemes than most, or with none, for configs of checkpoints.

Programs match patterns from the start of a module's name. GPTQModel and compressed-tensors look up
the names on disk. vLLM and SGLang look up those of their fused modules: queries,
keys and values (``qkv_proj``), gate and up (``gate_up_proj``), all experts of a layer
(``mlp.experts``). Where the matrices of such a module have one scheme, a pattern matches both kinds
of names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.stored_layout import is_carried
from moe2edge.numerics.scheme import Scheme

# The list of blocks, the index of one, a module in it, and a child of that.
_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)\.([^.]+)")
# Experts, replacement modules, and matrices of tied experts.
_EXPERT = re.compile(r"(.+)\.\d+(?:\.(?:gate|up|down))?")
# Number of classes that `_make_pattern` distinguishes, from wide to narrow.
LEVELS = 6
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "[qkv]+_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "(?:gate|up|gate_up)_proj"),
}


def find_main_scheme(model: Model) -> Scheme | None:
    """Return the scheme of most matrices, None if nothing is quantized.

    Factors and linear maps may be more numerous, but count only if nothing else is quantized.
    """
    schemes = [(role, weight.scheme) for _, role, weight in model.tensors() if weight.scheme]
    counts = Counter(s for role, s in schemes if is_quantizable(role)) or Counter(
        s for _, s in schemes
    )
    return counts.most_common(1)[0][0] if counts else None


def list_overrides(model: Model) -> dict[str, Scheme | None]:
    """Return patterns of all matrices with another scheme than the main one, or with none.

    A pattern matches only matrices of its scheme: a whole class of modules if all of it has that
    scheme, a single module otherwise. There are none if all matrices have one scheme. Quantized
    factors and linear maps always have one, whatever their scheme.
    """
    main = find_main_scheme(model)
    schemes: dict[str, Scheme | None] = {}
    unmatched: dict[str, None] = {}  # an ordered set
    for name, role, weight in model.tensors():
        if len(weight.shape) == 2:
            module = name.removesuffix(".weight")
            schemes[module] = weight.scheme
            differs = weight.scheme is not None if is_low_rank(role) else weight.scheme != main
            if differs and (is_quantizable(role) or is_low_rank(role)):
                unmatched[module] = None
    found: dict[str, Scheme | None] = {}
    for level in range(LEVELS):
        tried: set[str] = set()
        for module in list(unmatched):
            pattern = _make_pattern(module, level)
            if module not in unmatched or pattern in tried:
                continue
            tried.add(pattern)
            matched = {name for name in schemes if re.match(pattern, name)}
            scheme = schemes[module]
            if all(schemes[name] == scheme for name in matched):
                found[pattern] = scheme
                unmatched = {name: None for name in unmatched if name not in matched}
    return found | {re.escape(module): schemes[module] for module in unmatched}


def list_experts_patterns(model: Model) -> list[str]:
    """List patterns that match the matrices of all experts, and nothing else."""
    found: dict[str, None] = {}  # an ordered set
    for block, _ in model.moe_blocks:
        name = model.disk_name(block, "experts.0.up").removesuffix(".weight")
        found[_make_pattern(name, 0)] = None
    return list(found)


def list_plain_patterns(model: Model) -> Iterator[str]:
    """Yield patterns for matrices that no pass quantizes: routers, small gates, other parts.

    Programs that know a family by its class know them as well; for others they are named.
    """
    quantized, plain = set(), {}
    for name, role, weight in model.tensors():
        if weight.scheme:
            quantized.add(name.removesuffix(".weight"))
        elif len(weight.shape) == 2 and not is_quantizable(role) and _BLOCK.fullmatch(name):
            plain[name.removesuffix(".weight")] = weight
    seen: set[str] = set()
    for module in plain:
        match = _BLOCK.fullmatch(f"{module}.weight")
        assert match is not None, module
        pattern = rf"{re.escape(match[1])}\.\d+\.{re.escape(match[3])}$"
        if any(re.match(pattern, name) for name in quantized):
            pattern = f"{re.escape(module)}$"
        if pattern not in seen:
            seen.add(pattern)
            yield pattern
    yield from _list_other_parts(model)


def _list_other_parts(model: Model) -> Iterator[str]:
    """Yield patterns for the parts of a model beside the text model that are written."""
    own = {part for name, _, _ in model.tensors() for part in _list_modules(name)}
    found: dict[str, None] = {}  # an ordered set
    for name in model.carried:
        if is_carried(model, name):
            apart = (part for part in _list_modules(name) if part not in own)
            found[re.escape(next(apart, name))] = None
    yield from found


def _list_modules(name: str) -> Iterator[str]:
    """Yield the names of all modules that a tensor is in, from the outermost, each with a point."""
    return (name[: at.end()] for at in re.finditer(r"\.", name))


def _make_pattern(module: str, level: int) -> str:
    """Make a pattern for a class that contains a module; levels go from wide (0) to narrow.

    The classes are: all matrices of its parent, those that programs fuse with it, and those of its
    name; each in all blocks (even levels) and in its block alone (odd levels).
    """
    match = _BLOCK.fullmatch(module)
    if match is None:  # a matrix of the block itself
        return f"{re.escape(module)}$"
    stem, index, parent, name = match.groups()
    index = index if level % 2 else r"\d+"
    block = rf"{re.escape(stem)}\.{index}\."
    if expert := _EXPERT.fullmatch(parent):
        experts = block + re.escape(expert[1])
        return experts if level < 2 else rf"{experts}\.\d+\.{re.escape(name)}"
    siblings = rf"{block}{re.escape(parent)}\."
    if level < 2:
        return siblings
    return siblings + (_FUSED.get(name, re.escape(name)) if level < 4 else re.escape(name))


# ---- modules that serving programs fuse ----------------------------------------------------------


def find_split_fusion(model: Model) -> str | None:
    """Find the first fused module of serving programs whose matrices differ in scheme."""
    if len({id(weight.scheme) for _, _, weight in model.matrices}) <= 1:
        return None
    schemes: dict[str, Scheme | None] = {}
    for name, _, weight in model.matrices:
        match = _BLOCK.fullmatch(name.removesuffix(".weight"))
        if match is None:  # a matrix of the block itself, which nothing is fused with
            continue
        stem, index, parent, leaf = match.groups()
        expert = _EXPERT.fullmatch(parent)
        fused = expert[1] if expert else f"{parent}.{_FUSED.get(leaf, leaf)}"
        if schemes.setdefault(f"{stem}.{index}.{fused}", weight.scheme) != weight.scheme:
            return f"{stem}.{index}.{expert[1] if expert else parent}"
    return None
