"""Forms of a file that are compared: recipes of ours, and calls of ``llama-quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The group size of Q4_0; all else that is not named is a default.
GROUP: dict[str, Any] = {"group_size": 32}
BEST: dict[str, Any] = {**GROUP, "scales": "signed", "refit": 1}
ATTENTION = {"match": "self_attn", "bits": 8}
ALL_BUT_QUERIES = {"match": "[kvo]_proj", "bits": 8}
KEYS_AND_VALUES = {"match": "[kv]_proj", "bits": 8}


@dataclass(frozen=True)
class Form:
    """A form of a file.

    Attributes:
        title: its name in the report.
        passes: of a recipe of ours; none: ``llama-quantize`` makes the file.
        kind: type that it is asked for.
        options: options that it gets.
        importance: whether it gets an importance matrix.
    """

    title: str
    passes: tuple[Mapping[str, Any], ...] = ()
    kind: str = ""
    options: tuple[str, ...] = ()
    importance: bool = False


def _quantize(title: str, options: Mapping[str, Any], *rules: Mapping[str, Any]) -> Form:
    """Return a form of ours."""
    return Form(title, ({"gptq": {**options, "rules": list(rules)}},))


OURS, OURS_BEST = "ours, GPTQ", "ours, GPTQ, signed, refit"
FORMS = (
    Form("ours, rounding", ({"rtn": GROUP},)),
    _quantize(OURS, GROUP),
    _quantize(OURS_BEST, BEST),
    _quantize("ours, the same, k v in 8 bits", BEST, KEYS_AND_VALUES),
    _quantize("ours, the same, k v o in 8 bits", BEST, ALL_BUT_QUERIES),
    _quantize("ours, the same, attention in 8 bits", BEST, ATTENTION),
    _quantize("ours, GPTQ, attention in 8 bits", GROUP, ATTENTION),
    Form("Q4_0 --pure", (), "Q4_0", ("--pure",)),
    Form("Q4_0 --pure, imatrix", (), "Q4_0", ("--pure",), importance=True),
    Form("Q4_0", (), "Q4_0"),
    Form("Q4_0, imatrix", (), "Q4_0", importance=True),
    Form("Q4_K_M", (), "Q4_K_M"),
    Form("Q4_K_M, imatrix", (), "Q4_K_M", importance=True),
)
# Ours, theirs, and the largest part of its KL that was aimed at, if any.
GOALS: tuple[tuple[str, str, float | None], ...] = (
    (OURS, "Q4_0 --pure", 0.35),
    (OURS_BEST, "Q4_0 --pure", 0.35),
    (OURS_BEST, "Q4_0 --pure, imatrix", None),
    ("ours, the same, k v in 8 bits", "Q4_0", 0.35),
    (OURS_BEST, "Q4_K_M, imatrix", 0.8),
    ("ours, the same, k v o in 8 bits", "Q4_K_M, imatrix", 0.8),
    ("ours, the same, attention in 8 bits", "Q4_K_M, imatrix", 0.8),
    ("ours, GPTQ, attention in 8 bits", "Q4_K_M, imatrix", 0.8),
)
# Measured by ``llama-perplexity``, too.
CHECKED = (OURS_BEST, "Q4_0 --pure")
