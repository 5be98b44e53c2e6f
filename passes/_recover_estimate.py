"""Resources for training, from shapes alone: the formulas of docs/recovery.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.passes._recover_selection import Selection, is_whole

# Bytes of a parameter in float32; in addition, for a trained one, its gradient and the two moments
# of AdamW, and the best weights so far.
NUMBER_BYTES, TRAINED_BYTES, BEST_BYTES = 4, 4 + 8, 4
# Bytes of a trained parameter in a checkpoint: the number and its moments, and the best one.
SAVED_BYTES = 4 + 8 + 4


@dataclass(frozen=True)
class TrainingSizes:
    """Sizes that the cost of a training depends on.

    Attributes:
        trained: parameters that are trained.
        adapters: bytes that adapters take in a forward pass in addition.
    """

    trained: int
    adapters: int

    @classmethod
    def measure(cls, model: Model, selection: Selection, rank: int) -> TrainingSizes:
        """Count them.

        Args:
            model: the model.
            selection: what is trained.
            rank: of adapters, if there are any.
        """
        found = list(_selected(model, selection))
        if selection.train != "lora":
            rest = sum(w.count for w in model.rest.values()) if selection.train == "full" else 0
            return cls(sum(weight.count for _, weight in found) + rest, 0)
        adapted = [(role, weight) for role, weight in found if not is_whole(role)]
        whole = sum(weight.count for role, weight in found if is_whole(role))
        # Gate and up of an expert are one parameter with one adapter, so this is a bound.
        adapters = sum(rank * sum(weight.shape) for _, weight in adapted)
        # Outside of attention peft makes the sums of matrices and adapters, and keeps them for the
        # gradient.
        fused = sum(w.count for role, w in adapted if not role.startswith("attention."))
        return cls(whole + adapters, 2 * NUMBER_BYTES * fused)


def _selected(model: Model, selection: Selection) -> Iterator[tuple[str, Weight]]:
    for block in model.blocks:
        for role, weight in block.weights():
            if selection.takes(block, role):
                yield role, weight


def estimate_originals(model: Model) -> int:
    """Count the bytes of the original experts of tied experts, which annealing keeps."""
    return sum(
        NUMBER_BYTES * layer.experts[0].count * len(layer.sharing) for _, layer in model.moe_blocks
    )


def estimate_activations(model: Model, tokens: int, logits: int) -> int:
    """Estimate the bytes that a forward pass keeps for the gradient, float32.

    Each block keeps a few copies of the hidden states and of the outputs of attention and experts.
    Copies of logits are added: themselves, their logarithms by each loss, and gradients.
    """
    geometry = model.family.geometry(model.config)
    heads = (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim
    numbers = logits * model.vocabulary
    for block in model.blocks:
        if model.family.generic:
            heads = sum(w.shape[0] for role, w in block.weights() if _is_alone(role, w))
        numbers += 12 * geometry.hidden + 4 * heads + _count_intermediate(block, geometry.hidden)
    return NUMBER_BYTES * tokens * numbers


def _is_alone(role: str, weight: Weight) -> bool:
    """Return whether a tensor is a matrix outside of experts and gated MLPs."""
    kind = role.partition(".")[0]
    return len(weight.shape) == 2 and kind in ("attention", "linear", "other")


def _count_intermediate(block: Block, hidden: int) -> int:
    """Count the numbers that the MLP or the chosen experts of a block keep for a token."""
    from moe2edge.model.roles import list_gated_mlps

    if isinstance(layer := block.mlp, MoELayer):
        width = layer.experts[0].up.shape[0]
        shared = layer.shared.mlp.up.shape[0] if layer.shared else 0
        return layer.router.top_k * (4 * width + 3 * hidden) + 4 * shared
    return sum(4 * mlp.up.shape[0] for _, mlp in list_gated_mlps(block))
