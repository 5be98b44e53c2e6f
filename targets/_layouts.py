"""Layouts for layers that differ, for the targets that write safetensors.

Stock readers take one number of experts and one top-k for the whole model: layout ``uniform``.
Layout ``natural`` writes each layer as it is, with a ``per_layer_config``, for ``moe2edge.load``.
Layout ``mlp-only`` relies on families that may have a dense MLP in any layer: a dropped layer
becomes an MLP of zeros, a single remaining expert an MLP that is padded with zeros to the common
width. A Mixtral model that needs this is written as Qwen2-MoE.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from moe2edge.errors import InputError, Unsupported, suggest
from moe2edge.model import hf_config
from moe2edge.model import model as model_
from moe2edge.model.block import SECOND_NORM, Block
from moe2edge.model.edits import sort_rows
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.targets._rehomed import convert_to_qwen2_moe
from moe2edge.targets._tensors import TILE, fit_scheme, make_zeros, pad

Layout = Literal["natural", "uniform", "mlp-only"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# This family has no dense layers, but can be written as one that has.
REHOMED = "mixtral"


def check_layout(layout: str) -> None:
    """Check that a layout exists.

    Raises:
        InputError: it does not; suggests the nearest name.
    """
    if layout not in LAYOUTS:
        raise InputError(suggest("layout", layout, LAYOUTS))


def convert_layout(model: Model, layout: Layout, target: str) -> Model:
    """Return a model that computes the same as ``model``, in the form that the layout writes.

    Args:
        model: the model to write.
        layout: how to store layers that differ.
        target: name of the target, for the message.

    Raises:
        Unsupported: the layout cannot hold the model; names layouts and targets that can.
    """
    model = sort_rows(model)
    converted = _convert(model, layout)
    if converted is not None:
        if not converted.is_uniform:
            hf_config.build_config(converted)  # refuses layers that the config cannot hold
        return converted
    fitting = "natural (for moe2edge.load)"
    others = "" if model.family.generic else ", or target onnx"
    if not (model.replaced_count or model.tied_count):
        others += ", or prune all layers to the same size"
    if _convert(model, "mlp-only") is not None:
        fitting = f"mlp-only or {fitting}"
    raise Unsupported(
        f"target {target} with layout {layout} {_describe_limits(model, layout)}, but the model "
        f"has {describe_layers(model)}; choose layout {fitting}{others}"
    )


def _convert(model: Model, layout: Layout) -> Model | None:
    """Return the model in the form that the layout writes, None if there is none."""
    if layout == "mlp-only":
        model = _use_plain_mlps(model)
    return model if layout == "natural" or model.is_uniform else None


def _describe_limits(model: Model, layout: Layout) -> str:
    """Return which layers a layout can hold, as the predicate of a sentence."""
    if layout == "uniform":
        return (
            "holds only MoE layers of one size without dynamic skipping, tied or replaced experts, "
            "as stock transformers does"
        )
    if not (model.family.dense_layers or model.family.model_type == REHOMED):
        return f"makes no difference for {model.family.model_type}, which has no mlp_only_layers"
    return "holds only MoE layers of one size, dropped MoE layers, and layers with a single expert"


# ---- description of the layers -----------------------------------------------------------------


def describe_layers(model: Model) -> str:
    """Return the kinds of layers of a model, with the blocks that have them."""
    kinds: dict[str, list[int]] = {}
    for block in model.blocks:
        # What a layer without a router of a family without a row consists of is not known.
        if isinstance(block.mlp, MoELayer) or not model.family.generic:
            kinds.setdefault(_describe_layer(block), []).append(block.index)
    return ", ".join(
        f"{kind} (block{'s' * (len(indices) > 1)} {_format_ranges(indices)})"
        for kind, indices in kinds.items()
    )


def _describe_layer(block: Block) -> str:
    """Return the kind of the MoE layer or MLP of a block, in words."""
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        skips = " with skipping" if mlp.router.skip_below else ""
        gone = f" and {len(mlp.replaced)} replacements" if mlp.replaced else ""
        tied = f" tied to {len(mlp.experts)} stored ones" if mlp.is_tied else ""
        count = len(mlp.routed) if mlp.is_tied else len(mlp.experts)
        return f"{count} experts{tied}{gone} top-{mlp.router.top_k}{skips}"
    if isinstance(mlp, UnroutedMLP):
        return "a shared expert" if mlp.expert is None else "a shared expert and a plain MLP"
    if mlp is None:
        return "only a norm" if block.passes_norm else "no MLP"
    return f"a plain MLP of width {mlp.gate.shape[0]}"


def _format_ranges(numbers: Iterable[int]) -> str:
    """Format ascending numbers, with runs of them as ranges.

    >>> _format_ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


# ---- layers that became plain MLPs -------------------------------------------------------------


def _use_plain_mlps(model: Model) -> Model:
    """Return ``model`` with dropped layers and single experts as the family's dense MLPs.

    In the class of the family, all of these have the width ``intermediate_size`` of the config.
    Layers that cannot be stored in this form are left as they are.
    """
    plain = [b.index for b in model.blocks if isinstance(b.mlp, Dense) or _is_dropped(b)]
    if all(model_.is_stock_form(model, model.blocks[index]) for index in plain):
        return model
    if model.family.model_type == REHOMED:
        model = convert_to_qwen2_moe(model)
    if not model.family.dense_layers:
        return model
    blocks = [model.blocks[index] for index in plain]
    widths = [b.mlp.gate.shape[0] for b in blocks if isinstance(b.mlp, Dense)]
    width = max(widths, default=1)
    downs = [b.mlp.down for b in blocks if isinstance(b.mlp, Dense)]
    fits = all(w.scheme is None or width % w.scheme.width(width) == 0 for w in downs)
    if width != model.config.get("intermediate_size") or not fits:
        width = -(-width // TILE) * TILE
    config = {**model.config, "intermediate_size": width}
    for block in blocks:
        model = model.replace_block(_set_width(block, width))
    return replace(model, config=config)


def _is_dropped(block: Block) -> bool:
    return block.mlp is None and not block.passes_norm


def _set_width(block: Block, width: int) -> Block:
    """Return a block that computes the same, with a dense MLP of ``width``.

    In place of a dropped layer the MLP has zeros, in the scheme of the block's attention.
    """
    if isinstance(block.mlp, Dense):
        mlp = block.mlp
        hidden = mlp.gate.shape[1]
        mlp = replace(
            mlp,
            gate=pad(mlp.gate, (width, hidden)),
            up=pad(mlp.up, (width, hidden)),
            down=pad(mlp.down, (hidden, width)),
        )
        return replace(block, mlp=mlp)
    before, like = block.norms["input_layernorm.weight"], block.attention["q_proj.weight"]
    hidden = before.shape[0]
    # The norm may have any weights, because an MLP of zeros ignores its input.
    norm = replace(before, load=lambda: before.load().new_ones(before.shape))
    scheme = fit_scheme(like.scheme, hidden, width)
    inner = make_zeros((width, hidden), like.dtype, scheme)
    mlp = Dense(inner, inner, make_zeros((hidden, width), like.dtype, scheme))
    return replace(block, norms={**block.norms, SECOND_NORM: norm}, mlp=mlp)
