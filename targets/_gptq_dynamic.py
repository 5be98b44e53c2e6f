"""``dynamic`` of a GPTQ checkpoint: other schemes, or none, for some modules.

Programs match patterns from the start of a module's name, and the first that matches holds.
GPTQModel looks up names on disk; vLLM and SGLang those of their own modules, where queries, keys
and values are one (``qkv_proj``), gate and up are one (``gate_up_proj``), and so are the experts of
a layer (``mlp.experts``). Where these have one scheme, a pattern matches both kinds of names.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from moe2edge.model.model import Model, is_low_rank, is_quantizable
from moe2edge.numerics.scheme import Scheme

_BLOCK = re.compile(r"(.*\.layers)\.(\d+)\.(.+)\.([^.]+)")
# Experts, replacements, and factors of tied experts.
_EXPERT = re.compile(r"(.+)\.\d+(?:\.(?:gate|up|down))?")
# Of classes that `_pattern` knows.
LEVELS = 6
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "[qkv]+_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "(?:gate|up|gate_up)_proj"),
}


def find_main_scheme(model: Model) -> Scheme | None:
    """The scheme of most matrices, None if nothing is quantized.

    Factors and linear maps, which may be more, count only where they alone are quantized.
    """
    schemes = [(role, weight.scheme) for _, role, weight in model.tensors() if weight.scheme]
    found = Counter(s for role, s in schemes if is_quantizable(role)) or Counter(
        s for _, s in schemes
    )
    return found.most_common(1)[0][0] if found else None


def encode_scheme(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the words of a ``quantization_config``."""
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def build_dynamic(model: Model) -> dict[str, dict[str, Any]]:
    """Entries for all matrices that have another scheme than the main one, or none.

    Each matches nothing but matrices of its scheme: whole classes of modules where that is so,
    single modules otherwise. Empty if one scheme is that of all. Factors and linear maps have an
    entry if they are quantized, whatever their scheme.
    """
    main = find_main_scheme(model)
    schemes: dict[str, Scheme | None] = {}
    left: dict[str, None] = {}  # a set that keeps its order
    for name, role, weight in model.tensors():
        if len(weight.shape) == 2:
            module = name.removesuffix(".weight")
            schemes[module] = weight.scheme
            named = weight.scheme is not None if is_low_rank(role) else weight.scheme != main
            if named and (is_quantizable(role) or is_low_rank(role)):
                left[module] = None
    found: dict[str, dict[str, Any]] = {}
    for level in range(LEVELS):
        tried: set[str] = set()
        for module in list(left):
            pattern = _pattern(module, level)
            if module not in left or pattern in tried:
                continue
            tried.add(pattern)
            matched = {name for name in schemes if re.match(pattern, name)}
            scheme = schemes[module]
            if all(schemes[name] == scheme for name in matched):
                found |= _entry(pattern, scheme)
                left = {name: None for name in left if name not in matched}
    for module in left:
        found |= _entry(re.escape(module), schemes[module])
    return found


def _entry(pattern: str, scheme: Scheme | None) -> dict[str, dict[str, Any]]:
    return {f"-:{pattern}": {}} if scheme is None else {f"+:{pattern}": encode_scheme(scheme)}


def _pattern(module: str, level: int) -> str:
    """A pattern for a class that a module is in, from wide (0) to narrow.

    The classes are all matrices of its parent, those that programs keep as one, and those of its
    name; each in all blocks (even levels) and in its own (odd).
    """
    known = _BLOCK.fullmatch(module)
    assert known is not None, module
    stem, index, parent, name = known.groups()
    index = index if level % 2 else r"\d+"
    block = rf"{re.escape(stem)}\.{index}\."
    if expert := _EXPERT.fullmatch(parent):
        experts = block + re.escape(expert[1])
        return experts if level < 2 else rf"{experts}\.\d+\.{re.escape(name)}"
    inside = rf"{block}{re.escape(parent)}\."
    if level < 2:
        return inside
    return inside + (_FUSED.get(name, re.escape(name)) if level < 4 else re.escape(name))


# ---- what serving programs keep as one -----------------------------------------------------------


def find_split_fusion(model: Model) -> str | None:
    """The first module of serving programs whose matrices differ in scheme, None if none does."""
    found: dict[str, Scheme | None] = {}
    for name, role, weight in model.tensors():
        if not is_quantizable(role):
            continue
        known = _BLOCK.fullmatch(name.removesuffix(".weight"))
        assert known is not None, name
        stem, index, parent, leaf = known.groups()
        expert = _EXPERT.fullmatch(parent)
        fused = expert[1] if expert else f"{parent}.{_FUSED.get(leaf, leaf)}"
        if found.setdefault(f"{stem}.{index}.{fused}", weight.scheme) != weight.scheme:
            return f"{stem}.{index}.{expert[1] if expert else parent}"
    return None
