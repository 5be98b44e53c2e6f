"""Mutations of JSON, YAML and binary files, as a damaged download or a newer tool makes them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values that take the place of another: other types, ends of ranges, and what is no number.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.0, 0.5, -0.5, 1e-30, 1e30, 2**31, 2**63, -(2**63),
    10**30, float("nan"), float("inf"), "", "x", "0", "1", "null", "\u0000", "\ud83d\ude00",
    "a" * 5000, [], {}, [[]], [None], [0], [1, 2], {"a": 1}, {"": None}, [True], ["x"], "../x",
    "/etc/hostname", "silu", "gelu", "full_attention", "sliding_attention", "linear", "yarn",
    "float16", "eager", "flex_attention",
)  # fmt: skip

Path = tuple[Any, ...]


def list_places(tree: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the place of every value in a tree of mappings and lists."""
    yield at
    if isinstance(tree, dict):
        for key in tree:
            yield from list_places(tree[key], (*at, key))
    elif isinstance(tree, list):
        for n, value in enumerate(tree[:50]):
            yield from list_places(value, (*at, n))


def find(tree: Any, place: Path) -> Any:
    """Return the value at a place."""
    for key in place:
        tree = tree[key]
    return tree


def mutate_tree(tree: Any, draw: random.Random, keys: tuple[str, ...] = ()) -> Any:
    """Return a copy with one to three changes; ``keys`` are names that may be added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        tree = _mutate_once(tree, draw, keys)
    return tree


def _mutate_once(tree: Any, draw: random.Random, keys: tuple[str, ...]) -> Any:
    places = list(list_places(tree))
    place = draw.choice(places)
    if not place:
        return _add_key(tree, draw, keys) if draw.random() < 0.95 else draw.choice(VALUES)
    holder, last = find(tree, place[:-1]), place[-1]
    how = draw.random()
    if how < 0.15:
        del holder[last]
    elif how < 0.25:
        return _add_key(tree, draw, keys)
    elif how < 0.35 and isinstance(holder[last], int | float):
        holder[last] = draw.choice(
            (holder[last] + 1, holder[last] - 1, 2 * holder[last], -holder[last])
        )
    elif how < 0.45 and isinstance(holder[last], str):
        holder[last] = mutate_text(holder[last], draw)
    elif how < 0.55:
        holder[last] = copy.deepcopy(find(tree, draw.choice(places)))
    elif how < 0.6:
        holder[last] = [holder[last]] if draw.random() < 0.5 else {"x": holder[last]}
    else:
        holder[last] = copy.deepcopy(draw.choice(VALUES))
    return tree


def _add_key(tree: Any, draw: random.Random, keys: tuple[str, ...]) -> Any:
    if isinstance(tree, dict):
        name = draw.choice(keys) if keys and draw.random() < 0.8 else draw.choice(("x", "", "a.b"))
        tree[name] = copy.deepcopy(draw.choice(VALUES))
    return tree


def mutate_text(text: str, draw: random.Random) -> str:
    """Return a text with a character changed, removed or repeated."""
    at = draw.randrange(len(text) + 1)
    piece = draw.choice(("", "x", "\n", "\u0000", ":", "{", '"', "\\", "é", text[at : at + 5] * 3))
    return text[:at] + piece + text[at + draw.choice((0, 1)) :]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some flipped, cut, repeated, or replaced as a whole."""
    how = draw.random()
    at = draw.randrange(len(data) or 1)
    if how < 0.4 and data:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if how < 0.6:
        return data[:at]
    if how < 0.7:
        return data[:at] + data[at : at + 64] * 3 + data[at:]
    if how < 0.8:
        return data[:at] + draw.randbytes(draw.choice((1, 8, 64))) + data[at + 8 :]
    whole = (
        b"",
        b"\n",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"\x00" * 64,
    )
    return draw.choice(whole)


def mutate_json(data: bytes, draw: random.Random, keys: tuple[str, ...] = ()) -> bytes:
    """Return JSON with a changed tree, or damaged as text."""
    if draw.random() < 0.15:
        return mutate_bytes(data, draw)
    return json.dumps(
        mutate_tree(json.loads(data), draw, keys), ensure_ascii=draw.random() < 0.5
    ).encode("utf-8", "surrogatepass")
