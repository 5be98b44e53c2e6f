"""Names under which programs write the experts of families that have other names on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Parts of an expert on the hub and in transformers' classes.
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(
    r"(?P<at>.*\.)block_sparse_moe\.experts\.(?P<n>\d+)\.(?P<part>w[123])(?P<end>\..*)?"
)


def list_aliases(name: str) -> Iterator[str]:
    """List the names that programs give a tensor or module, its own first.

    llm-compressor gives the parts of an expert those of transformers' classes, GPTQModel and
    auto-round also the module of the experts.

    >>> list(list_aliases("model.layers.0.block_sparse_moe.experts.1.w1.weight"))[1:]
    ['model.layers.0.block_sparse_moe.experts.1.gate_proj.weight', \
'model.layers.0.mlp.experts.1.w1.weight', 'model.layers.0.mlp.experts.1.gate_proj.weight']
    >>> list(list_aliases("model.layers.0.block_sparse_moe.gate.weight"))[1:]
    ['model.layers.0.mlp.gate.weight']
    """
    yield name
    if ".block_sparse_moe." not in name:
        return
    moved = name.replace(".block_sparse_moe.", ".mlp.")
    if found := _EXPERT.fullmatch(name):
        part = f".{found['part']}"
        end = f"{part}{found['end'] or ''}"
        other = f".{_PARTS[found['part']]}{found['end'] or ''}"
        yield name.removesuffix(end) + other
        yield moved
        yield moved.removesuffix(end) + other
        return
    yield moved
