"""Metadata of a GGUF file beside its tensors, and models that llama.cpp can compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.model.architecture import find_architecture
from moe2edge.model.config_parser import parse_config
from moe2edge.model.disk_names import DiskNames
from moe2edge.model.edits import change_weights, sort_rows
from moe2edge.model.hf_config import build_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import EMBEDDING, HEAD, Model, is_stock_form
from moe2edge.model.weights import Weight, dequantize_weight, hide_integers
from moe2edge.pipeline.holders import name_holders
from moe2edge.targets._gguf_forms import (
    Forms,
    GgufForm,
    HeldTensor,
    plan_tensors,
    store_weight,
    strip_number,
)
from moe2edge.targets._gguf_layouts import (
    LAYOUTS_BY_FAMILY,
    GgufLayout,
    get_head_dim,
)
from moe2edge.targets._gguf_types import Q2_0, Q4_0, Q4_1
from moe2edge.targets._layouts import describe_layers

# Version of the types of blocks.
QUANTIZATION_VERSION = 2
# How keys begin that say where a model comes from.
ABOUT = ("general.name", "general.license", "general.base_model")


def find_layout(model: Model) -> GgufLayout:
    """Return how llama.cpp computes a model.

    Raises:
        Unsupported: its logits were not compared with this family's.
    """
    found = LAYOUTS_BY_FAMILY.get(model.family.model_type)
    if found is None:
        raise _refuse(
            model,
            f"target gguf does not support {model.family.model_type} yet: logits of llama.cpp were "
            f"compared for {', '.join(LAYOUTS_BY_FAMILY)}",
        )
    return found


def get_rest_forms(layout: GgufLayout, model: Model) -> Forms:
    """Return the forms of tensors outside of blocks; a tied head is written where it must be."""
    forms = dict(layout.rest)
    if HEAD not in model.rest and not layout.ties:
        forms[EMBEDDING] = GgufForm(
            ("token_embd.weight", "output.weight"), lambda v: (v, v), lambda parts: parts[0]
        )
    return forms


def store(model: Model, *, dequantized: bool) -> Model:
    """Return a model as a file holds it: every tensor in the scheme or dtype of its type.

    Args:
        model: the model.
        dequantized: hold no integers.

    Raises:
        Unsupported: llama.cpp does not compute such a model, or no type holds a tensor.
    """
    model = sort_rows(model)
    layout = find_layout(model)
    _check_layers(model)
    model = _renumber(model)
    if reason := find_uncomputed(model, layout):
        raise _refuse(model, f"llama.cpp does not compute {model.family.model_type} with {reason}")
    rest_forms = get_rest_forms(layout, model)

    def hold(name: str, weight: Weight, form: GgufForm | None) -> Weight:
        if dequantized and weight.scheme is not None:
            weight = dequantize_weight(weight)
        return weight if form is None else store_weight(weight, form, name)

    for block in model.blocks:
        forms = layout.forms(model.config, block)
        new = {
            role: hold(model.disk_name(block, role), weight, forms.get(strip_number(role)))
            for role, weight in block.weights()
        }
        model = model.replace_block(block.with_weights(new))
    rest = {name: hold(name, weight, rest_forms.get(name)) for name, weight in model.rest.items()}
    return replace(model, rest=rest)


def _renumber(model: Model) -> Model:
    """Return a model as it will be read from its folder: with a config and numbers of its own."""
    config = parse_config(model.family, build_config(model))
    blocks = tuple(replace(block, origin=block.index) for block in model.blocks)
    names = DiskNames(find_architecture(model.family, config), ())
    return replace(model, config=config, blocks=blocks, names=names, given=config, carried={})


def plan(model: Model) -> list[HeldTensor]:
    """Plan the tensors of the file of a stored model.

    Raises:
        Unsupported: see `plan_tensors`.
    """
    layout = find_layout(model)
    return plan_tensors(
        model, lambda block: layout.forms(model.config, block), get_rest_forms(layout, model)
    )


def widen(model: Model) -> Model:
    """Return a stored model with every number in float32."""

    def change(_: str, weight: Weight) -> Weight:
        load = weight.load
        return replace(hide_integers(weight), dtype="F32", load=lambda: load().float())

    rest = {name: change(name, weight) for name, weight in model.rest.items()}
    return replace(change_weights(model, change), rest=rest)


# ---- metadata ------------------------------------------------------------------------------------


def build_metadata(model: Model, held: list[HeldTensor]) -> dict[str, Any]:
    """Build the metadata that a config tells, without those of the tokenizer.

    Args:
        model: a stored model.
        held: its tensors.
    """
    layout, config = find_layout(model), model.config
    layer = model.moe_blocks[0][1]
    head_dim = get_head_dim(config)
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    found = {
        "block_count": len(model.blocks),
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size") or layer.experts[0].up.shape[0],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(
            config["rms_norm_eps"] if "rms_norm_eps" in config else config["norm_eps"]
        ),
        "rope.dimension_count": int(head_dim * part),
        **_describe_rope(config),
        "expert_count": layer.router_rows,
        "expert_used_count": layer.router.top_k,
        "vocab_size": model.vocabulary,
        **layout.describe(model),
    }
    size = Counter[int]()
    for one in held:
        size[one.kind.file_type] += sum(member.weight.nbytes for member in one.members)
    general = {
        "general.architecture": layout.name,
        "general.type": "model",
        "general.file_type": size.most_common(1)[0][0],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    about = _describe_origin(model.about)
    return general | about | {f"{layout.name}.{key}": value for key, value in found.items()}


def _describe_origin(about: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata on where a model comes from."""
    found: dict[str, Any] = {
        f"general.{key.replace('_', '.')}": about[key]
        for key in ("name", "license", "license_name", "license_link")
        if about.get(key)
    }
    if base := about.get("base_model"):
        owner, _, name = base.rpartition("/")
        found |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.organization": owner,
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    return found


def list_remarks(model: Model, stored: Model, held: list[HeldTensor]) -> Iterator[str]:
    """Yield what a user should know of the types of a file.

    Args:
        model: as it was given.
        stored: as the file holds it.
        held: its tensors.
    """
    kinds = {one.kind for one in held}
    coarse = {
        w.scheme.group_size
        for _, _, w in model.tensors()
        if w.scheme is not None and w.scheme.bits == 4 and w.scheme.group_size != Q4_0.block
    }
    if coarse and kinds & {Q4_0, Q4_1}:
        sizes = " and ".join(str(size) if size > 0 else "whole rows" for size in sorted(coarse))
        yield (
            f"groups of {sizes} take as many bytes in a GGUF file as groups of {Q4_0.block}, which "
            f"are closer to the source: for this target alone, use group_size: {Q4_0.block}"
        )
    if Q4_1 in kinds:
        yield "Q4_1 has the minimum of a block in float16, which rounds it by up to 0.01 of a step"
    if Q2_0 in kinds:
        yield "Q2_0 needs a llama.cpp of 2026 that knows it, as that of xllamacpp does"
    quantized = {name for name, _, w in model.tensors() if w.scheme is not None}
    plain = [name for name, _, w in stored.tensors() if name in quantized and w.scheme is None]
    if plain:
        yield (
            f"{len(plain)} quantized tensors are held in float32, because their layout in "
            f"llama.cpp cuts across groups: {plain[0]}, ..."
        )
    copied = sum(
        member.weight.nbytes for one in held for member in one.members if one.kind.repacked
    )
    if copied:
        yield (
            f"in memory llama.cpp keeps a copy of {copied / 1e6:.0f} MB of the file, in an order "
            "that suits the processor (llama-server --no-repack: none)"
        )
    if model.carried:
        yield f"{len(model.carried)} tensors of other parts of the model are left out"


def _describe_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of the rotary embedding."""
    rope = config.get("rope_parameters") or {}
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return found
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["rope.scaling.original_context_length"] = length
        if rope.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


# ---- what llama.cpp computes ---------------------------------------------------------------------


def _check_layers(model: Model) -> None:
    """Refuse what llama.cpp would refuse, or compute as something else.

    Raises:
        Unsupported: names it, and the targets that hold the model.
    """
    plain = [b.index for b in model.blocks if not isinstance(b.mlp, MoELayer)]
    leads = find_layout(model).leads
    leading = list(range(len(plain))) if leads else []
    sizes = {
        (layer.router_rows, layer.router.top_k, *(e.up.shape for e in layer.experts[:1]))
        for _, layer in model.moe_blocks
    }
    odd = not all(is_stock_form(model, block) for block in model.blocks)
    widths = {e.up.shape for _, layer in model.moe_blocks for e in layer.experts}
    if not sizes or odd or len(sizes) > 1 or len(widths) > 1 or plain != leading:
        first = ", behind the first blocks with plain MLPs" if leads else ""
        raise _refuse(
            model,
            "llama.cpp runs blocks that all have a router, with one number of experts of one width "
            f"and one top-k{first}, without dynamic skipping, tied or replaced experts; the model "
            f"has {describe_layers(model)}",
        )


def find_uncomputed(model: Model, layout: GgufLayout) -> str:
    """Return what llama.cpp computes as something else in a model; empty: nothing."""
    return layout.check(model) or _check_common(model, layout)


def _check_common(model: Model, layout: GgufLayout) -> str:
    """Return what llama.cpp does not compute of a config; empty: nothing."""
    config = model.config
    fixed, asked = layout.renormalizes, model.family.renormalizes(config)
    if model.family.generic:
        asked = bool(config.get("norm_topk_prob", fixed))
    if fixed is not None and fixed != asked:
        return f"norm_topk_prob {str(asked).lower()}: its code has it {str(fixed).lower()}"
    if reason := _check_rope(config.get("rope_parameters") or {}, layout):
        return reason
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']}"
    return ""


def rounds_ramp(model: Model) -> bool:
    """Return whether llama.cpp rounds the ends of the ramp between frequencies of yarn.

    gpt-oss has them as they are; its logits change by 0.1 %.
    """
    rope = model.config.get("rope_parameters") or {}
    return rope.get("rope_type") == "yarn" and rope.get("truncate") is False


def _check_rope(rope: Mapping[str, Any], layout: GgufLayout) -> str:
    """Return what llama.cpp does not compute of a rotary embedding; empty: nothing."""
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return ""
    if kind != "yarn" or not layout.yarn:
        return f"{kind} rope, or its logits were not compared with it"
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        return "beta_fast or beta_slow other than 32 and 1: it does not read them"
    if rope.get("attention_factor") is not None:
        return "attention_factor: it does not read it"
    if rope.get("truncate") is False and layout.name != "gpt-oss":
        return "truncate: false in yarn rope"
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if layout.yarn == "scaled":
        same = scales[0] and scales[0] == scales[1]
        return "" if same else "an mscale that is not mscale_all_dim"
    return "mscale" if any(scales) else ""


def _refuse(model: Model, reason: str) -> Unsupported:
    holders = name_holders(model, "gguf")
    remedy = f"export to {holders}" if holders else "no target holds it"
    return Unsupported(f"{reason}; {remedy}")
