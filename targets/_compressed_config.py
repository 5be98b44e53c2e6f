"""``quantization_config`` of a checkpoint in compressed-tensors: groups of modules by scheme.

A module has the scheme of the group that names it, else of a pattern that matches it, else of its
class. Transformers takes for all experts of a model the scheme of the first group with a pattern in
which the word experts is, shared ones included, and only without one that of the class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe2edge.model.model import HEAD, Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.compressed_form import COMPRESSED, PACKED, encode_compressed_scheme
from moe2edge.targets._module_patterns import (
    find_main_scheme,
    list_experts_patterns,
    list_overrides,
    list_plain_patterns,
)

# Class of the modules that the main scheme is for.
LINEAR = "Linear"
# Word in a pattern by which transformers knows the group of experts.
EXPERTS_WORD = "experts"
# Version of the library whose config and layout this is.
WRITTEN_AS = "0.20.1"
# Families of which stock transformers with the library reads such folders: its logits were compared
# (benchmarks/readers). In others it has one tensor of all experts in files, and none of single
# ones, which it would leave out with no more than a printed report; or it fails.
READ_BY_TRANSFORMERS = frozenset(
    {
        "afmoe", "axk1", "axk2", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo",
        "flint", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "hy_v3", "jamba", "kolibri1",
        "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral",
        "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
        "qwen3_next", "solar_open",
    }
)  # fmt: skip


def build_compressed_config(model: Model) -> dict[str, Any]:
    """Build the ``quantization_config`` of a model with quantized weights, as the library does."""
    main = find_main_scheme(model)
    assert main is not None, "nothing is quantized"
    targets: dict[Scheme, list[str]] = {main: [LINEAR]}
    ignored = [HEAD.removesuffix(".weight")]
    named = {f"re:{pattern}": scheme for pattern, scheme in list_overrides(model).items()}
    named |= {f"re:{pattern}": None for pattern in list_plain_patterns(model)}
    for target, scheme in (named | dict(_list_class_names(model))).items():
        if scheme is None:
            ignored.append(target)
        elif scheme != main or target in named:
            targets.setdefault(scheme, []).append(target)
    # The library warns of patterns behind a class that matches all.
    targets[main] = targets.pop(main)
    groups = list(targets.items())
    schemes = list_experts_schemes(model)
    if len(schemes) == 1 and (routed := schemes.pop()) is not None:
        others = [target for scheme, found in groups if scheme != routed for target in found]
        if routed != main:
            groups.sort(key=lambda group: group[0] != routed)
        elif any(EXPERTS_WORD in target for target in others):
            groups.insert(0, (main, [f"re:{p}" for p in list_experts_patterns(model)]))
    return {
        "config_groups": {
            f"group_{n}": {
                "targets": found,
                "weights": encode_compressed_scheme(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": PACKED,
            }
            for n, (scheme, found) in enumerate(groups)
        },
        "quant_method": COMPRESSED,
        "kv_cache_scheme": None,
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ignored,
        "version": WRITTEN_AS,
    }


def list_experts_schemes(model: Model) -> set[Scheme | None]:
    """List the schemes of all routed experts; None stands for no scheme."""
    return {
        weight.scheme
        for block, _ in model.moe_blocks
        for role, weight in block.weights()
        if role.startswith("experts.") and len(weight.shape) == 2
    }


def _list_class_names(model: Model) -> Iterator[tuple[str, Scheme | None]]:
    """Yield modules that transformers' class calls otherwise than files do, with their schemes.

    The library matches the names of the class.
    """
    path = model.architecture.layers_path
    for block in model.blocks:
        roles = model.architecture.anatomy[block.origin].roles
        for role, weight in block.weights():
            if role in roles and len(weight.shape) == 2:
                name = f"{path}.{block.index}.{roles[role]}"
                if name != model.disk_name(block, role):
                    yield name.removesuffix(".weight"), weight.scheme
