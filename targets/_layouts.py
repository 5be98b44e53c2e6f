"""Ways to hold layers that differ, for the targets that write safetensors.

Stock readers know one number of experts and one top-k for the whole model. ``uniform`` is what they
read; ``natural`` writes each layer as it is, with a ``per_layer_config``, for ``moe2edge.load``;
``mlp-only`` uses that some families may have a dense MLP in any layer: a layer that was dropped
becomes one of zeros, an expert that is left alone is padded with zeros to the common width. A
Mixtral model that needs it is written as Qwen2-MoE.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from moe2edge.errors import InputError, Unsupported, suggest
from moe2edge.model import model as model_
from moe2edge.model.edits import sort_rows
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import SECOND_NORM, Block, Model
from moe2edge.pipeline.target import Loader
from moe2edge.targets._rehomed import convert_to_qwen2_moe
from moe2edge.targets._tensors import TILE, fit_scheme, make_zeros, pad

Layout = Literal["natural", "uniform", "mlp-only"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Has no dense layers, but can be written as a family that has.
REHOMED = "mixtral"


def check_layout(layout: str) -> None:
    """Refuse a layout that is none.

    Raises:
        InputError: names the nearest.
    """
    if layout not in LAYOUTS:
        raise InputError(suggest("layout", layout, LAYOUTS))


def convert_layout(model: Model, layout: Layout, target: str) -> Model:
    """The model that is written for ``model``: it computes the same.

    Args:
        model: what was made.
        layout: how to hold layers that differ.
        target: name of the target, for the message.

    Raises:
        Unsupported: the layout cannot hold it; says what could.
    """
    model = sort_rows(model)
    found = _converted(model, layout)
    if found is not None:
        return found
    could = "natural (for moe2edge.load)"
    others = "" if model.replaced_count or model.tied_count else ", or trim all layers alike"
    if _converted(model, "mlp-only") is not None:
        could = f"mlp-only or {could}"
    raise Unsupported(
        f"target {target} with layout {layout} {_needs(model, layout)}, but there are "
        f"{_kinds(model)}; choose layout {could}, or target onnx{others}"
    )


def _converted(model: Model, layout: Layout) -> Model | None:
    if layout == "mlp-only":
        model = _with_plain_mlps(model)
    return model if layout == "natural" or model.is_uniform else None


def _needs(model: Model, layout: Layout) -> str:
    if layout == "uniform":
        return (
            "holds only MoE layers of one size that skip nothing and whose experts are all their "
            "own, as stock transformers does"
        )
    if not (model.family.dense_layers or model.family.model_type == REHOMED):
        return f"makes no difference for {model.family.model_type}, which has no mlp_only_layers"
    return "holds MoE layers of one size, layers that were dropped whole, and plain experts"


def list_refusing_loaders(model: Model, *programs: str) -> tuple[Loader, ...]:
    """What ``programs`` that know nothing of a ``per_layer_config`` do with one: nothing good."""
    if model.replaced_count:
        why = "it knows no replacements of experts"
    elif model.tied_count:
        why = "it knows no experts that share matrices"
    elif model.skips:
        why = "it knows no dynamic skipping"
    elif all(model_.is_stock_form(model, block) for block in model.blocks):
        why = "it takes MoE layers of one size only"
    else:
        why = "it has no form for layers without a router"
    notes = {
        "transformers": "stock classes raise an error on per_layer_config",
        # The converter falls back to the bare file where transformers refuses it.
        "llama.cpp": f"{why}; its converter, as read, looks at no per_layer_config",
    }
    return tuple(Loader(program, "no", notes.get(program, why)) for program in programs)


def judge_vllm(model: Model, held: Model) -> Loader:
    """What is known of vLLM, for ``model`` that is ``held`` in a layout."""
    if held.family is model.family:
        return Loader("vLLM", "as read", "0.33")
    geometry = held.family.geometry(held.config)
    if geometry.heads * geometry.head_dim != geometry.hidden:
        return Loader("vLLM", "no", "its Qwen2-MoE, as read, takes no head_dim")
    if held.blocks[0].window is not None:
        return Loader("vLLM", "not tried", "a sliding window in its Qwen2-MoE")
    return Loader("vLLM", "as read", f"0.33, as {held.family.architecture}")


# ---- what layers there are ---------------------------------------------------------------------


def _kinds(model: Model) -> str:
    """The kinds of layers of a model, with the blocks that have them."""
    found: dict[str, list[int]] = {}
    for block in model.blocks:
        found.setdefault(_kind(block), []).append(block.index)
    return ", ".join(
        f"{kind} (block{'s' * (len(where) > 1)} {_ranges(where)})" for kind, where in found.items()
    )


def _kind(block: Block) -> str:
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        skips = " with skipping" if mlp.router.skip_below else ""
        gone = f" and {len(mlp.replaced)} replacements" if mlp.replaced else ""
        shared = f" for {len(mlp.routed)} tied ones" if mlp.is_tied else ""
        return f"{len(mlp.experts)} experts{shared}{gone} top-{mlp.router.top_k}{skips}"
    if isinstance(mlp, UnroutedMLP):
        return "a shared expert" if mlp.expert is None else "a shared expert and a plain one"
    if mlp is None:
        return "a norm alone" if SECOND_NORM in block.norms else "no MLP"
    return f"a plain MLP of width {mlp.gate.shape[0]}"


def _ranges(numbers: Iterable[int]) -> str:
    """Rising numbers, runs of them from end to end.

    >>> _ranges([0, 1, 2, 5, 7, 8])
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


def _with_plain_mlps(model: Model) -> Model:
    """``model`` with dropped layers and lone experts as the family's own dense MLPs.

    The class of the family gives all of them the width ``intermediate_size`` of the config.
    Layers that cannot be had so are left as they are.
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
        model = model.replace_block(_of_width(block, width))
    return replace(model, config=config)


def _is_dropped(block: Block) -> bool:
    return block.mlp is None and SECOND_NORM not in block.norms


def _of_width(block: Block, width: int) -> Block:
    """A block with a dense MLP of ``width``; what it puts out is as before.

    Zeros in place of a dropped layer have the scheme of the attention before them.
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
    # Whatever is normed, zeros come out of the MLP.
    norm = replace(before, load=lambda: before.load().new_ones(before.shape))
    scheme = fit_scheme(like.scheme, hidden, width)
    inner = make_zeros((width, hidden), like.dtype, scheme)
    mlp = Dense(inner, inner, make_zeros((hidden, width), like.dtype, scheme))
    return replace(block, norms={**block.norms, SECOND_NORM: norm}, mlp=mlp)
