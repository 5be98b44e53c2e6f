"""``quantization_config`` of a GPTQ checkpoint as auto-round writes it, and what it asks for.

Transformers with auto-round installed then runs the experts packed, which it loads as random
numbers by the config of GPTQ itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.storage.output import AUTO_ROUND, AUTO_ROUND_PACKING
from moe2edge.storage.source_formats.aliases import list_aliases
from moe2edge.targets._layouts import describe_layers
from moe2edge.targets._module_patterns import find_main_scheme, list_plain_patterns

# The same settings as in config.json, for programs that look here.
AUTO_ROUND_SETTINGS_FILE = "quantization_config.json"
# Version of the library whose config this is.
AUTO_ROUND_VERSION = "0.16.1"
# Both sizes of a matrix are multiples of it, or no backend of the library takes the matrix.
MULTIPLE = 32
# Families whose logits in transformers with the library were compared
# (benchmarks/readers/read_auto_round.py).
READ_BY_AUTO_ROUND = frozenset(
    {
        "afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo",
        "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kolibri1",
        "laguna", "lfm2_moe", "mellum", "minimax", "minimax_m2", "minimax_m3_vl_text",
        "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
        "qwen3_moe", "qwen3_next", "solar_open",
    }
)  # fmt: skip


def check_auto_round(stored: Model) -> None:
    """Refuse what transformers with auto-round would not read, or would read as something else.

    Raises:
        Unsupported: so, with what to choose instead.
    """
    family, remedy = stored.family.model_type, "choose config=gptq, for moe2edge.load"
    if family not in READ_BY_AUTO_ROUND:
        raise Unsupported(
            f"gptq:config=auto-round: {family} was not seen to be read right by transformers with "
            f"auto-round; {remedy}, or export to compressed-tensors or hf"
        )
    if not stored.is_uniform:
        raise Unsupported(
            "gptq:config=auto-round is for stock transformers, which takes layers of one form, but "
            f"the model has {describe_layers(stored)}; {remedy}"
        )
    for name, role, weight in stored.tensors():
        scheme = weight.scheme
        if scheme is None and role.startswith("experts.") and is_quantizable(role):
            raise Unsupported(
                f"{name} is not quantized; with gptq:config=auto-round transformers has single "
                f"experts, and reads only quantized ones as such: quantize it, or {remedy}"
            )
        if scheme is None:
            continue
        if not scheme.symmetric or scheme.ordered or scheme.group_size == WHOLE_ROW:
            raise Unsupported(
                f"{name} is {scheme}; auto-round runs symmetric integers in groups of neighbouring "
                f"inputs on a CPU: set symmetric: true and a group_size, or {remedy}"
            )
        if any(size % MULTIPLE for size in weight.shape):
            raise Unsupported(
                f"{name} has shape {list(weight.shape)}; auto-round takes matrices whose sizes "
                f"are multiples of {MULTIPLE}: leave it in 16 bits with a rule with bits: 16, or "
                f"{remedy}"
            )


def build_auto_round_config(model: Model) -> dict[str, Any]:
    """Build the ``quantization_config`` of a model that `check_auto_round` lets pass."""
    main = find_main_scheme(model)
    assert main is not None, "nothing is quantized"
    extra = dict(_list_others(model, main))
    return {
        **encode_auto_round(main),
        "data_type": "int",
        "iters": 0,
        "autoround_version": AUTO_ROUND_VERSION,
        "quant_method": AUTO_ROUND,
        "packing_format": AUTO_ROUND_PACKING,
        **({"extra_config": extra} if extra else {}),
    }


def encode_auto_round(scheme: Scheme) -> dict[str, Any]:
    """Return a scheme with the keys of a ``quantization_config``."""
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _list_others(model: Model, main: Scheme) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield other modules than those in the main scheme: names, and patterns of what has none.

    A module is named as transformers' class calls it, which for some families is not its name in
    files.
    """
    unquantized = {"bits": 16, "act_bits": 16}
    for pattern in list_plain_patterns(model):
        for name in list_aliases(pattern.replace(r"\.", ".")):
            yield name.replace(".", r"\."), unquantized
    for name, role, weight in model.tensors():
        if len(weight.shape) == 2 and is_quantizable(role) and weight.scheme != main:
            *_, module = list_aliases(name.removesuffix(".weight"))
            yield module, encode_auto_round(weight.scheme) if weight.scheme else unquantized
