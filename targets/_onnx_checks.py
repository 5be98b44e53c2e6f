"""Checks of what a graph derives from ``config.json``: rotary tables, attention, other configs.

A text of a few tokens runs the same with wrong tables behind its end, or with windows that are
longer than it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from onnx import helper

from moe2edge.errors import VerificationFailed
from moe2edge.model.family import Family, find_family
from moe2edge.storage.text_files import read_json
from moe2edge.storage.tokenizer import read_stop_ids
from moe2edge.targets._onnx_block import INT8_CACHE
from moe2edge.targets._onnx_cache import check_cache_scales
from moe2edge.targets._onnx_decoder import compute_rotary_tables
from moe2edge.targets._onnx_genai import GENAI_CONFIG, build_genai_config
from moe2edge.targets._onnx_storage import (
    DATA_FILE,
    GRAPH_FILE,
    POSITIONS_KEY,
    ROTARY_TABLES,
    load_graph,
    read_values,
)

# Largest error of a rotary table: at its beginning, and further error for each position. Versions
# of torch and kinds of processors differ in the last bit of a frequency, which a position
# multiplies; the next larger fault is a wrong frequency or row.
TABLE_ERROR, ERROR_PER_POSITION = 1e-6, 5e-7
AGAIN = "export it again"


def check_graph(folder: Path, place: Path, *, int8_cache: bool = False) -> None:
    """Compare rotary tables and attention operators of a graph with ``config.json``.

    Args:
        folder: holds the config.
        place: holds the graph.
        int8_cache: whether attention is to cache keys and values in int8.

    Raises:
        VerificationFailed: names the table or the operator.
    """
    config = read_json(folder / "config.json")
    family, graph = find_family(config), load_graph(place)
    positions = family.geometry(config).max_positions
    recorded = {entry.key: entry.value for entry in graph.metadata_props}.get(POSITIONS_KEY)
    if recorded != str(positions):
        raise VerificationFailed(
            f"{GRAPH_FILE} records {recorded} positions as {POSITIONS_KEY}, config.json has "
            f"{positions}; {AGAIN}"
        )
    config.pop("per_layer_config", None)  # of which transformers would ask more than it needs
    expected = compute_rotary_tables(family, config, positions)
    for name, table in zip(ROTARY_TABLES, expected, strict=True):
        _check_table(name, read_values(place, graph, name), table)
    _check_attention(graph.graph.node, family, config, int8_cache=int8_cache)
    if int8_cache:
        initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
        check_cache_scales(initializers, config["num_hidden_layers"])


def _check_table(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape:
        raise VerificationFailed(
            f"table {name} of {GRAPH_FILE} has shape {list(found.shape)}, config.json asks for "
            f"{list(expected.shape)}; {AGAIN}"
        )
    allowed = TABLE_ERROR + ERROR_PER_POSITION * torch.arange(len(expected))[:, None]
    wrong = ~((found - expected).abs() <= allowed * expected.abs().max()).all(1)
    if wrong.any():
        rows = wrong.nonzero()[:, 0].tolist()
        raise VerificationFailed(
            f"table {name} in {DATA_FILE} does not hold the rotary embeddings of config.json at "
            f"{len(rows)} positions, from {rows[0]} to {rows[-1]}; {AGAIN}"
        )


def _check_attention(
    nodes: Collection[Any], family: Family, config: Mapping[str, Any], *, int8_cache: bool
) -> None:
    """Compare the attributes of all attention operators with the config."""
    geometry, count = family.geometry(config), config["num_hidden_layers"]
    found = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    if len(found) != count:
        raise VerificationFailed(
            f"{GRAPH_FILE} has {len(found)} attention operators, config.json has {count} blocks; "
            f"{AGAIN}"
        )
    for index, node in enumerate(found):
        window = family.window_of(config, index)
        expected = {
            "num_heads": geometry.heads,
            "kv_num_heads": geometry.kv_heads,
            "do_rotary": 1,
            "scale": float(torch.tensor(geometry.head_dim**-0.5)),
            "local_window_size": window,
            **(INT8_CACHE if int8_cache else dict.fromkeys(INT8_CACHE)),
        }
        attributes = {a.name: _get_value(a) for a in node.attribute}
        values = {key: attributes.get(key) for key in expected}
        if values != expected:
            raise VerificationFailed(
                f"{node.name} in {GRAPH_FILE} has {values}, config.json asks for {expected}; "
                f"{AGAIN}"
            )


def _get_value(attribute: Any) -> Any:
    """Return the value of an attribute, a text decoded."""
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def check_genai_config(folder: Path) -> None:
    """Compare ``genai_config.json`` with the configs that it derives from.

    Only keys that both have are compared: another version may write more or fewer of them.

    Raises:
        VerificationFailed: names the key.
    """
    config = read_json(folder / "config.json")
    expected = build_genai_config(config, read_stop_ids(folder, config))
    found = read_json(folder / GENAI_CONFIG)
    for key, value in _flatten(expected):
        other = dict(_flatten(found)).get(key, value)
        if other != value:
            raise VerificationFailed(
                f"{GENAI_CONFIG}: {key} is {other!r}, config.json and generation_config.json give "
                f"{value!r}; {AGAIN}"
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested mappings with its path."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
