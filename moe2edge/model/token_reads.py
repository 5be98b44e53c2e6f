"""Bytes of weights that a runtime reads for one token: the bound of decoding by memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model

# Kinds of weights, by the first part of their roles.
_KINDS: Mapping[str, str] = {
    "attention": "attention", "linear": "attention", "norms": "norm", "router": "router",
    "dense": "mlp", "shared": "mlp", "other": "other",
}  # fmt: skip
# Roles of what a token chooses from.
_CHOSEN = ("experts", "members", "substitutes")


def count_token_reads(model: Model) -> dict[str, int]:
    """Count the bytes that decoding one token reads, by kind, as the weights are stored.

    Every matrix counts once, the head included; of the experts those that the router chooses (the
    largest, where they differ), of an embedding one row. Numbers are not read.

    Returns:
        Bytes of ``attention`` (or what stands in its place), ``experts``, ``router``, ``mlp``
        (dense and shared), ``norm``, ``head``, ``embedding`` and ``other``.
    """
    found = Counter(
        dict.fromkeys(
            ("attention", "experts", "router", "mlp", "norm", "head", "embedding", "other"), 0
        )
    )
    for block in model.blocks:
        for role, nbytes in _list_always_read(block):
            found[_KINDS[role.partition(".")[0]]] += nbytes
        if isinstance(block.mlp, MoELayer):
            found["experts"] += count_chosen_bytes(block.mlp)
    table = model.architecture.embedding
    for name, weight in model.rest.items():
        if name == model.head:
            found["head"] += weight.nbytes
        # Families may have further tables that are looked up, such as one of each layer.
        if name == table or ("embed" in name and weight.shape[:1] == (model.vocabulary,)):
            found["embedding"] += weight.nbytes // max(1, weight.shape[0])
        elif name != model.head:
            found["norm" if "norm" in name else "other"] += weight.nbytes
    return dict(found)


def count_chosen_bytes(layer: MoELayer) -> int:
    """Count the bytes of the experts and rows of a layer that one token chooses, the largest."""
    experts = [
        sum(w.nbytes for w in (e.gate, e.up, e.down, *e.biases.values())) for e in layer.experts
    ]
    sizes = [
        sum(weight.nbytes for _, weight in row.weights()) + (0 if base is None else experts[base])
        for base, row in zip(layer.bases, layer.rows, strict=True)
    ]
    return sum(sorted(sizes, reverse=True)[: layer.router.top_k])


def _list_always_read(block: Block) -> Iterator[tuple[str, int]]:
    for role, weight in block.weights():
        if role.partition(".")[0] not in _CHOSEN:
            yield role, weight.nbytes
