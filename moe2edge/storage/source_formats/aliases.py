"""Names under which programs write the experts of families that have other names on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Parts of an expert on the hub and in transformers' classes.
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_NUMBERS = {part: number for number, part in _PARTS.items()}
_EXPERT = re.compile(r"(?P<at>.*\.experts\.\d+\.)(?P<part>w[123])(?P<end>\..*)?")
_BY_CLASS = re.compile(r"(?P<at>.*\.experts\.\d+\.)(?P<part>(?:gate|up|down)_proj)(?P<end>\..*)?")
# Families whose experts have parts with numbers on the hub.
NUMBERED = frozenset({"kimi_linear", "lfm2_moe", "minimax", "minimax_m2", "mixtral", "phimoe"})


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
    by_class = name_by_class(name)
    for each in dict.fromkeys((by_class, _move(name), _move(by_class))):
        if each != name:
            yield each


def name_by_class(name: str) -> str:
    """Give the parts of an expert the names that they have in transformers' classes.

    >>> name_by_class("model.layers.0.block_sparse_moe.experts.1.w1.qweight")
    'model.layers.0.block_sparse_moe.experts.1.gate_proj.qweight'
    """
    found = _EXPERT.fullmatch(name)
    return name if found is None else f"{found['at']}{_PARTS[found['part']]}{found['end'] or ''}"


def name_on_hub(name: str) -> str:
    """Undo `name_by_class`, for families that have parts with numbers on the hub.

    >>> name_on_hub("model.layers.0.block_sparse_moe.experts.1.gate_proj.qweight")
    'model.layers.0.block_sparse_moe.experts.1.w1.qweight'
    """
    found = _BY_CLASS.fullmatch(name)
    return name if found is None else f"{found['at']}{_NUMBERS[found['part']]}{found['end'] or ''}"


def _move(name: str) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")
