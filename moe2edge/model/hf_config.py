"""Settings of single layers: written into ``config.json``, and read back.

Transformers knows the key ``per_layer_config``. Its classes carry out none of it for the families
here, but they raise an error where a layer has another number than the common config, from which
they read it, so that a stock reader refuses what it would misread. The config itself can be read,
and so can the tokenizer beside it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.model import model as model_
from moe2edge.model.architecture import (
    Architecture,
    describe_layer,
    find_layers,
    make_architecture,
)
from moe2edge.model.block import Block, get_form
from moe2edge.model.edits import drop_mlp
from moe2edge.model.experts import (
    PARTS,
    Constant,
    Dense,
    Factors,
    Full,
    Linear,
    Replacement,
    Row,
    Tied,
    list_full_rows,
)
from moe2edge.model.family import COUNT_KEYS, TOP_K_KEYS, Family
from moe2edge.model.layers import MoELayer, Router, UnroutedMLP
from moe2edge.model.model import Model, is_stock_form
from moe2edge.model.transformers_config import ALIASES, is_pad_token, make_transformers_config
from moe2edge.model.weights import Weight

# Key of all settings but numbers of experts; transformers accepts it if every layer has it.
OWN = "moe2edge"
# Keys of outputs that the config of a source does not have.
OUTPUT_KEYS = ("per_layer_config", "quantization_config")
# Stands in the place of the base of a tied expert that has none.
NO_BASE = -1

SIZE_KEYS = frozenset((*COUNT_KEYS, *TOP_K_KEYS, OWN))

Take = Callable[[str, tuple[int, ...] | None], Weight]
Layers = dict[str, dict[str, Any]]


# ---- writing -----------------------------------------------------------------------------------


def build_transformers_dict(model: Model) -> dict[str, Any]:
    """Return `build_config`, with a number that stock readers refuse if any layer differs.

    Where layers differ only in settings that transformers does not know (dynamic skipping), a
    common number, which each layer overrides, is set to another one: the top-k, or in families
    without a row, some of which read it late, that of experts.
    """
    config, family = build_config(model), model.family
    keys = (family.experts_key[0], family.top_k_key)
    layers = () if model.is_uniform else config["per_layer_config"].values()
    numbers = [(config[key], own.get(key, config[key])) for own in layers for key in keys]
    if numbers and all(common == own for common, own in numbers):
        if family.generic:
            config[keys[0]] *= 2
        else:
            config[keys[1]] = config[keys[1]] - 1 or 2  # 0 is no top-k
    return _change_given_config(model, config) if family.generic else config


def encode_layers(model: Model) -> dict[str, dict[str, Any]]:
    """Return ``per_layer_config`` of a model that is not uniform, by the indices of its blocks."""
    key, top_k_key = model.family.experts_key[0], model.family.top_k_key
    found: dict[str, dict[str, Any]] = {}
    for block in model.blocks:
        form = {} if is_stock_form(model, block) else _encode_form(block)
        sizes = {}
        if isinstance(block.mlp, MoELayer):
            sizes = {key: block.mlp.router_rows, top_k_key: block.mlp.router.top_k}
        elif form:
            sizes = {key: 0, top_k_key: 0}
        found[str(block.index)] = {**sizes, OWN: form}
    # Transformers has such settings of its own in some families without a row.
    if model.family.generic or any(own[OWN] for own in found.values()):
        return found
    return {index: sizes for index, own in found.items() if (sizes := _drop_form(own))}


def _drop_form(own: Mapping[str, Any]) -> dict[str, int]:
    return {key: value for key, value in own.items() if key != OWN}


def encode_sizes(model: Model) -> dict[str, dict[str, int]]:
    """Return `encode_layers` without the settings that transformers does not know."""
    found = {index: _drop_form(own) for index, own in encode_layers(model).items()}
    return {index: sizes for index, sizes in found.items() if sizes}


def _encode_form(block: Block) -> dict[str, Any]:
    """Return the settings of a block that transformers' class does not know."""
    if isinstance(block.mlp, MoELayer):
        form: dict[str, Any] = {}
        layer, bases = block.mlp, block.mlp.bases
        if layer.router.skip_below:
            form["skip_below"] = list(layer.router.skip_below)
        if layer.replaced:
            form["substitutes"] = [layer.rows[n].rank for n in layer.replaced]
            if layer.replaced[0] != len(layer.routed):  # they do not stand behind the others
                form["places"] = list(layer.replaced)
        if layer.is_tied:
            found = ((bases[n], layer.rows[n].rank) for n in layer.routed)
            form["members"] = [[NO_BASE if base is None else base, rank] for base, rank in found]
        return form
    return {"mlp": get_form(block)}


# ---- reading -----------------------------------------------------------------------------------


def split_layers(layers: Mapping[Any, Mapping[str, Any]]) -> tuple[Layers, Layers]:
    """Split a ``per_layer_config`` into what transformers' class carries out, and what it does not.

    Transformers has such settings of its own in some families without a row.
    """
    theirs, ours = Layers(), Layers()
    for index, own in layers.items():
        name = str(int(index))  # transformers writes 01
        theirs[name] = {key: value for key, value in own.items() if key not in SIZE_KEYS}
        ours[name] = {key: value for key, value in own.items() if key in SIZE_KEYS}
    return {name: own for name, own in theirs.items() if own}, ours


def restore_common_count(
    config: dict[str, Any], family: Family, layers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Undo what `build_transformers_dict` changes to keep stock readers away.

    Args:
        config: of a family without a row.
        family: the family.
        layers: the settings of layers, in which every layer with experts has their number.
    """
    part, keys = find_text_part(config), family.experts_key
    counts = [own.get(keys[0]) for own in layers.values()]
    if most := max((count for count in counts if type(count) is int), default=0):
        part |= {key: most for key in keys if type(part.get(key)) is int}


def decode_layers(model: Model, overrides: Mapping[str, Mapping[str, Any]], take: Take) -> Model:
    """Return ``model``, built from the common config, with the settings of each layer.

    Args:
        model: all of whose layers are alike.
        overrides: a ``per_layer_config``.
        take: gives the handle of a tensor by its name on disk and its shape.

    Raises:
        Unsupported: a setting that `encode_layers` does not write.
    """
    left = {str(index).lstrip("0") or "0": dict(own) for index, own in overrides.items()}
    for block, layer in model.moe_blocks:
        own = left.pop(str(block.index), {})
        form = own.pop(OWN, {})
        if isinstance(form, Mapping) and set(form) == {"mlp"}:
            changed = _read_unrouted(model, block, layer, form["mlp"], take)
        else:
            changed = replace(block, mlp=_read_layer(model, block, layer, own, form, take))
        model = model.replace_block(changed)
    if wrong := sorted(index for index, own in left.items() if own != {OWN: {}}):
        raise Unsupported(f"per_layer_config names layers {wrong}, which are not MoE layers")
    return model


def _read_unrouted(model: Model, block: Block, layer: MoELayer, form: str, take: Take) -> Block:
    """Return a block without a router; an expert that stayed has a plain MLP's names on disk."""
    if form in ("none", "norm"):
        return drop_mlp(model, block, keep_norm=form == "norm")
    old, plain = layer.experts[0], None
    if form in ("dense", "dense+shared"):
        gate, up, down = (
            take(model.disk_name(block, f"dense.{part}"), weight.shape)
            for part, weight in (("gate", old.gate), ("up", old.up), ("down", old.down))
        )
        plain = Dense(gate, up, down)
    if form == "dense" and layer.shared is None:
        return replace(block, mlp=plain)
    if form in ("shared", "dense+shared") and layer.shared is not None:
        return replace(block, mlp=UnroutedMLP(layer.shared, plain))
    raise Unsupported(
        f"layer {block.index}: per_layer_config has {form!r} in place of the MoE layer, which is "
        "not supported"
    )


def _read_layer(
    model: Model, block: Block, layer: MoELayer, own: Any, form: Any, take: Take
) -> MoELayer:
    """Return a layer with experts, rows and a router of its own size."""
    top_k_key = model.family.top_k_key
    found = _parse_settings(own, form, (*model.family.experts_key, top_k_key))
    if found is not None:
        keys = model.family.experts_key
        count = next((own[key] for key in keys if key in own), len(layer.experts))
        top_k = own.get(top_k_key, layer.router.top_k)
        routed = count - len(found.replaced)
        bases = [base for base, _ in found.tied] or list(range(routed))
        experts = max(bases, default=-1) + 1
        places = found.places or list(range(routed, count))
        fits = 1 <= top_k <= count <= len(layer.experts) and len(bases) == routed > 0
        fits = fits and len(places) == len(found.replaced) and all(n < count for n in places)
        if fits and experts and len(found.skip) in (0, top_k - 1):
            router = _resize_router(layer.router, count)
            router = replace(router, top_k=top_k, skip_below=tuple(found.skip))
            stored = layer.experts[:experts]
            ran = [
                _read_routed(model, block, n, pair, stored[0], take)
                for n, pair in enumerate(found.tied)
            ] or list_full_rows(stored)
            rows: list[Row] = list(ran)
            for n, (place, rank) in enumerate(zip(places, found.replaced, strict=True)):
                rows.insert(place, _read_replacement(model, block, layer, (n, place), rank, take))
            return replace(layer, router=router, experts=stored, rows=tuple(rows))
    shown = {**own, **({OWN: form} if form else {})}
    raise Unsupported(
        f"layer {block.index}: per_layer_config {shown} is not supported; supported are fewer "
        f"experts than the {len(layer.experts)} of config.json, a top-k of at most their number, "
        "tied experts, replacements, and a threshold for each expert of top-k but the first"
    )


def _resize_router(router: Router, count: int) -> Router:
    """Return a router with handles of the shapes that they have for ``count`` rows."""

    def resize(suffix: str, weight: Weight) -> Weight:
        axis = router.axes.get(suffix, 0)
        shape = (*weight.shape[:axis], count, *weight.shape[axis + 1 :])
        return replace(weight, shape=shape)

    per_expert = {suffix: resize(suffix, weight) for suffix, weight in router.per_expert.items()}
    weight = resize("weight", router.weight)
    return replace(router, weight=weight, per_expert=per_expert)


@dataclass(frozen=True)
class _LayerSettings:
    """Settings that `_encode_form` writes of a layer with experts.

    Attributes:
        skip: thresholds of dynamic skipping.
        replaced: rank of each replacement, 0 for a constant.
        places: number of the row of each replacement; empty: they stand behind the others.
        tied: stored expert (or `NO_BASE`) and rank of each full or tied expert.
    """

    skip: list[float]
    replaced: list[int]
    places: list[int]
    tied: list[tuple[int, int]]


def _parse_settings(own: Any, form: Any, known: tuple[str, ...]) -> _LayerSettings | None:
    """Return the settings of a layer; None where they are not as `encode_layers` writes them."""
    if not set(own) <= set(known) or not all(type(value) is int for value in own.values()):
        return None
    known_forms = ("skip_below", "substitutes", "places", "members")
    if not isinstance(form, Mapping) or not set(form) <= set(known_forms):
        return None
    given = [form.get(key, []) for key in known_forms]
    if not all(isinstance(value, list) for value in given):
        return None
    skip, ranks, places, pairs = given
    sound = (
        all(type(below) is float and below >= 0 for below in skip)
        and all(type(rank) is int and rank >= 0 for rank in ranks)
        and all(type(place) is int and place >= 0 for place in places)
        and places == sorted(set(places))
        and all(_is_routed(pair) for pair in pairs)
    )
    tied = [(base, rank) for base, rank in pairs] if sound else []
    return _LayerSettings(skip, ranks, places, tied) if sound else None


def _is_routed(pair: Any) -> bool:
    """Return whether it is a stored expert and a rank, or no expert and a rank above 0."""
    if not isinstance(pair, list) or [type(n) for n in pair] != [int, int]:
        return False
    base, rank = int(pair[0]), int(pair[1])
    return base >= NO_BASE and rank >= (1 if base == NO_BASE else 0)


def _read_routed(
    model: Model, block: Block, n: int, form: tuple[int, int], like: Dense, take: Take
) -> Full | Tied:
    """Return a row that runs a full or tied expert, by its place among those of the layer."""
    base, rank = form
    if not rank:
        return Full(n, base)
    factors = {}
    for part in PARTS:
        outs, ins = getattr(like, part).shape
        first, second = (
            take(model.disk_name(block, f"members.{n}.{part}.{name}"), shape)
            for name, shape in (("first", (rank, ins)), ("second", (outs, rank)))
        )
        factors[part] = Factors(first, second)
    return Tied(n, None if base == NO_BASE else base, factors)


def _read_replacement(
    model: Model, block: Block, layer: MoELayer, place: tuple[int, int], rank: int, take: Take
) -> Replacement:
    """Return a replacement by its place among those of the layer, and among all rows."""
    n, origin = place
    hidden = layer.hidden

    def weight(part: str, *shape: int) -> Weight:
        return take(model.disk_name(block, f"substitutes.{n}.{part}"), shape)

    constant = weight("constant", hidden)
    if not rank:
        return Constant(origin, constant)
    first, second = weight("first", rank, hidden), weight("second", hidden, rank)
    return Linear(origin, constant, first, second)


def build_config(model: Model) -> dict[str, Any]:
    """Return ``config.json`` of ``model``: the source's, with everything that passes changed.

    Blocks that differ from the common config are written as ``per_layer_config``, where
    stock transformers raises an error instead of misreading them.
    """
    if model.family.generic:
        return _build_generic_config(model)
    config = dict(model.config)
    config.pop("per_layer_config", None)
    if not is_pad_token(config.get("pad_token_id"), model.family.geometry(config).vocab):
        config["pad_token_id"] = None
    config["num_hidden_layers"] = len(model.blocks)
    if model.family.dense_layers:
        dense = [
            b.index
            for b in model.blocks
            if not isinstance(b.mlp, MoELayer) and model_.is_stock_form(model, b)
        ]
        config |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if model.family.window == "layer_types" and config.get("use_sliding_window"):
        config["layer_types"] = [
            "sliding_attention" if b.window else "full_attention" for b in model.blocks
        ]
    else:
        config.pop("layer_types", None)
    shapes = {(m.router_rows, m.router.top_k) for _, m in model.moe_blocks}
    if shapes:
        count, top_k = max(shapes)
        for key in model.family.experts_key:
            if key in config:
                config[key] = count
        config[model.family.top_k_key] = top_k
    if not model.is_uniform:
        config["per_layer_config"] = encode_layers(model)
    return config


def _build_generic_config(model: Model) -> dict[str, Any]:
    """Return the settings of the text model, with numbers of experts and blocks, and their lists.

    Raises:
        Unsupported: layers have settings of their own in the source, and now differ in size.
    """
    config = _cut_blocks(model)
    shapes = {(m.router_rows, m.router.top_k) for _, m in model.moe_blocks}
    if shapes:
        rows, top_k = max(shapes)
        for key, value in ((model.family.experts_key[0], rows), (model.family.top_k_key, top_k)):
            if isinstance(old := config[key], list):
                found = {b.index: (m.router_rows, m.router.top_k) for b, m in model.moe_blocks}
                place = 0 if key == model.family.experts_key[0] else 1
                config[key] = [found[n][place] if n in found else own for n, own in enumerate(old)]
            else:
                config[key] = value
    if not model.is_uniform:
        theirs, sizes = split_layers(config.get("per_layer_config") or {})
        if any(sizes.values()):
            raise Unsupported(
                f"{model.family.model_type} has numbers of experts of single layers, which cannot "
                "be changed; keep the same number in all layers"
            )
        layers = encode_layers(model)
        config["per_layer_config"] = {n: theirs.get(n, {}) | own for n, own in layers.items()}
    return config


def _cut_blocks(model: Model) -> dict[str, Any]:
    """Return the settings of the text model with the blocks that are left, and their lists."""
    config = dict(model.config)
    origins = [block.origin for block in model.blocks]
    count = len(model.architecture.anatomy)
    if len(origins) != count:
        config["num_hidden_layers"] = len(origins)
        for key, value in model.config.items():
            if isinstance(value, list) and len(value) == count:
                config[key] = [value[n] for n in origins]
        if layers := config.get("per_layer_config"):
            own = {int(n): settings for n, settings in layers.items()}  # transformers writes 01
            kept = {str(n): own[o] for n, o in enumerate(origins) if o in own}
            config["per_layer_config"] = kept
    return config


def find_changed_layer(model: Model) -> int | None:
    """Find a block for which transformers would build another layer, now that others are gone.

    Configs of some families place kinds of layers by their number: the first ones are dense, or
    each fourth one has attention. Returns its origin; None: all are as in the source.
    """
    origins = tuple(block.origin for block in model.blocks)
    cut = json.dumps(_cut_blocks(model), sort_keys=True)
    return _find_changed_layer(model.family, model.architecture, cut, origins)


# A pass asks for every block, when it is checked and when it has chosen.
@lru_cache(maxsize=1024)
def _find_changed_layer(
    family: Family, source: Architecture, cut: str, origins: tuple[int, ...]
) -> int | None:
    layers = find_layers(make_architecture(family, json.loads(cut)).model)[1]
    before = _describe_layers(source)
    for origin, layer in zip(origins, layers, strict=True):
        if describe_layer(layer) != before[origin]:
            return origin
    return None


@lru_cache(maxsize=2)
def _describe_layers(source: Architecture) -> list[dict[tuple[str, str], Any]]:
    return [describe_layer(layer) for layer in find_layers(source.model)[1]]


def _change_given_config(model: Model, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` of the source, with what differs in a new config at its place."""
    given: dict[str, Any] = copy.deepcopy(dict(model.given))
    if given["model_type"] in ALIASES:  # so that transformers opens it without code of the source
        given |= {
            "architectures": [model.family.architecture],
            "model_type": ALIASES[given["model_type"]],
        }
        given.pop("auto_map", None)
    part = find_text_part(given)
    names = {name: name for name in new} | {
        alias: model.family.experts_key[0] for alias in model.family.experts_key
    }
    # Where a key has two names, transformers reads the one that the source has.
    aliases = model.architecture.config.attribute_map
    names |= {alias: name for alias, name in aliases.items() if name in new}
    for key, name in names.items():
        if new[name] != model.config.get(name) and (key == name or key in part):
            part[key] = new[name]
    return given


def find_text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of ``config.json`` on the text model: all of it, or ``text_config``."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def build_transformers_config(model: Model, **changes: Any) -> Any:
    """Return transformers' config of ``model``, with dense numbers and ``changes``, to run it.

    Raises:
        InputError: transformers refuses a value, such as one of a key that no row reads.
    """
    settings = build_config(model) | changes
    if not model.family.generic:
        settings.pop("per_layer_config", None)
    elif not model.is_uniform:
        settings["per_layer_config"] = split_layers(settings["per_layer_config"])[0]
    return make_transformers_config(model.family.model_type, settings)
