"""Bytes of weights that a runtime reads for one token: the bound of decoding by memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight

# Kinds of weights, by the first part of their roles.
_KINDS: Mapping[str, str] = {
    "attention": "attention", "linear": "attention", "norms": "norm", "router": "router",
    "dense": "mlp", "shared": "mlp", "other": "other",
}  # fmt: skip
# Roles of what a token chooses from.
_CHOSEN = ("experts", "members", "substitutes")


# count(name in files, handle) -> bytes
CountBytes = Callable[[str, Weight], int]


def count_token_reads(model: Model, count: CountBytes | None = None) -> dict[str, int]:
    """Count the bytes that decoding one token reads, by kind, as the weights are stored.

    Every matrix counts once, the head included; of the experts those that the router chooses (the
    largest, where they differ), of an embedding one row. Numbers are not read.

    Args:
        model: the model.
        count: returns the bytes that are read of a tensor; None: those that it is stored in.

    Returns:
        Bytes of ``attention`` (or what stands in its place), ``experts``, ``router``, ``mlp``
        (dense and shared), ``norm``, ``head``, ``embedding`` and ``other``.
    """
    found = Counter(
        dict.fromkeys(
            ("attention", "experts", "router", "mlp", "norm", "head", "embedding", "other"), 0
        )
    )
    for block, tensors in zip(model.blocks, model.named_blocks, strict=True):
        sizes = {
            role: weight.nbytes if count is None else count(name, weight)
            for name, role, weight in tensors
        }
        for role, nbytes in sizes.items():
            kind = role.partition(".")[0]
            if kind not in _CHOSEN:
                found[_KINDS[kind]] += nbytes
        if isinstance(block.mlp, MoELayer):
            found["experts"] += _count_chosen_bytes(block.mlp, sizes)
    table = model.architecture.embedding
    for name, weight in model.rest.items():
        size = weight.nbytes if count is None else count(model.names.get_rest_name(name), weight)
        if name == model.head:
            found["head"] += size
        # Families may have further tables that are looked up, such as one of each layer.
        if name == table or ("embed" in name and weight.shape[:1] == (model.vocabulary,)):
            found["embedding"] += size // max(1, weight.shape[0])
        elif name != model.head:
            found["norm" if "norm" in name else "other"] += size
    return dict(found)


def _count_chosen_bytes(layer: MoELayer, sizes: Mapping[str, int]) -> int:
    """Count the bytes of the experts and rows of a layer that one token chooses, the largest.

    Args:
        layer: the layer.
        sizes: bytes of the tensors of its block, by role.
    """
    experts = [0] * len(layer.experts)
    rows: Counter[str] = Counter()
    for role, nbytes in sizes.items():
        kind, _, rest = role.partition(".")
        number = rest.partition(".")[0]
        if kind == "experts":
            experts[int(number)] += nbytes
        elif kind in _CHOSEN:
            rows[f"{kind}.{number}"] += nbytes
    chosen = [
        rows[role] + (0 if base is None else experts[base])
        for base, role in zip(layer.bases, layer.row_roles, strict=True)
    ]
    return sum(sorted(chosen, reverse=True)[: layer.router.top_k])
