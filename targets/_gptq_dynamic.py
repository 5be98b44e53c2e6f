"""``dynamic`` of a GPTQ checkpoint: other schemes, or none, for some modules.

Of several patterns that match a module, the first holds.
"""

from __future__ import annotations

from typing import Any

from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.targets._module_patterns import (
    find_main_scheme,
    list_overrides,
    list_plain_patterns,
)


def encode_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return a scheme with the keys of a ``quantization_config``."""
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def build_dynamic(model: Model) -> dict[str, dict[str, Any]]:
    """Build entries for all matrices with another scheme than the main one, or with none.

    There are no entries if all matrices have one scheme.
    """
    main = find_main_scheme(model)
    entries: dict[str, dict[str, Any]] = {}
    for pattern, scheme in list_overrides(model).items():
        entries |= _make_entry(pattern, scheme, main)
    if model.family.generic:
        entries |= {f"-:{pattern}": {} for pattern in list_plain_patterns(model)}
    return entries


def _make_entry(
    pattern: str, scheme: Scheme | None, main: Scheme | None
) -> dict[str, dict[str, Any]]:
    """Make an entry; it names ``desc_act`` only where some matrices have it."""
    if scheme is None:
        return {f"-:{pattern}": {}}
    ordered = scheme.ordered or (main is not None and main.ordered)
    order = {"desc_act": scheme.ordered} if ordered else {}
    return {f"+:{pattern}": encode_scheme(scheme) | order}
