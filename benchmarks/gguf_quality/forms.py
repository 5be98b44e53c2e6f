"""Forms of a file that are compared: recipes of ours, and calls of ``llama-quantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# One option of a pass is the group size of Q4_0, the others are defaults.
GROUP = {"group_size": 32}
ATTENTION = {"match": "self_attn", "bits": 8}
KEYS_AND_VALUES = {"match": r"[kv]_proj", "bits": 8}


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


OURS_Q4_0 = "ours, GPTQ"
FORMS = (
    Form("ours, rounding", ({"rtn": GROUP},)),
    Form(OURS_Q4_0, ({"gptq": GROUP},)),
    Form(
        "ours, GPTQ, keys and values in 8 bits", ({"gptq": GROUP | {"rules": [KEYS_AND_VALUES]}},)
    ),
    Form("ours, GPTQ, attention in 8 bits", ({"gptq": GROUP | {"rules": [ATTENTION]}},)),
    Form("Q4_0 --pure", (), "Q4_0", ("--pure",)),
    Form("Q4_0 --pure, imatrix", (), "Q4_0", ("--pure",), importance=True),
    Form("Q4_0", (), "Q4_0"),
    Form("Q4_0, imatrix", (), "Q4_0", importance=True),
    Form("Q4_K_M", (), "Q4_K_M"),
    Form("Q4_K_M, imatrix", (), "Q4_K_M", importance=True),
)
# Ours, theirs, and the largest part of its KL that was aimed at.
GOALS = (
    (OURS_Q4_0, "Q4_0 --pure", 0.35),
    (OURS_Q4_0, "Q4_0 --pure, imatrix", 0.35),
    (OURS_Q4_0, "Q4_K_M, imatrix", 0.8),
    ("ours, GPTQ, attention in 8 bits", "Q4_K_M, imatrix", 0.8),
)
# Measured by ``llama-perplexity``, too.
CHECKED = (OURS_Q4_0, "Q4_0 --pure")
