"""What passes refuse alike: models that others have changed in a way that they know nothing of."""

from __future__ import annotations

from moe2edge.errors import InputError
from moe2edge.model import Model


def refuse_replaced(name: str, model: Model, remedy: str = "") -> None:
    """Refuse a model some of whose experts were replaced; for passes that weigh experts alone.

    Args:
        name: of the pass.
        model: what it gets.
        remedy: what to do instead; none: to put the pass before those that replace.

    Raises:
        InputError: it is one.
    """
    if replaced := model.substitutes + model.members:
        raise InputError(
            f"{name}: {replaced} experts were replaced or merged, and it knows nothing of what "
            f"answers for them; {remedy or f'put expert_replace or expert_merge after {name}'}"
        )


def refuse_slimmed(name: str, model: Model) -> None:
    """Refuse a model whose experts are quantized or sparse, for passes that compute new ones.

    Raises:
        InputError: some are.
    """
    for block, layer in model.moe_blocks:
        weights = [w for e in layer.experts for w in (e.gate, e.up, e.down)]
        if any(w.scheme or w.pattern for w in weights):
            raise InputError(
                f"{name}: experts of block {block.index} are quantized or sparse, and what it "
                f"computes of them is not; move {name} before the pass that does it"
            )
