"""Numbers that a model remembers of a text: keys and values, and states that do not grow."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from moe2edge.model.block import Block
from moe2edge.model.model import Model

SLIDING = "sliding_attention"
# Names of one matrix for queries, keys and values.
_FUSED = ("qkv_proj", "query_key_value", "Wqkv")
# Kinds of parts of a block of which no token is remembered in attention.
_BESIDE = ("experts", "shared", "router", "dense", "norms")


@dataclass(frozen=True)
class CachedNumbers:
    """Numbers that are remembered of each token, in one block.

    Attributes:
        each: for one token, of keys and values as transformers caches them.
        latent: the same where a program caches what both are made of (multi-head latent
            attention); ``each`` elsewhere.
        window: tokens that are remembered at most; None: all.
        state: numbers that are remembered in any case, in float32, of all tokens together.
    """

    each: int
    latent: int
    window: int | None = None
    state: int = 0

    def count(self, tokens: int, *, latent: bool = False, windows: bool = True) -> int:
        """Return the numbers of a text, without the state.

        Args:
            tokens: its length.
            latent: what a program caches that knows latent attention.
            windows: whether tokens that no window sees any more are forgotten.
        """
        if windows and self.window is not None:
            tokens = min(tokens, self.window)
        return tokens * (self.latent if latent else self.each)


def list_cached(model: Model) -> list[CachedNumbers]:
    """List what each block of a model remembers, from the shapes of its matrices."""
    return [_look_at(model, block) for block in model.blocks]


def _look_at(model: Model, block: Block) -> CachedNumbers:
    """Return what a block remembers."""
    shapes = {
        role.split(".")[-2]: weight.shape
        for role, weight in block.weights()
        if role.endswith(".weight") and not role.startswith(_BESIDE)
    }
    config = model.config
    window = block.window
    kinds = config.get("layer_types")
    if window is None and isinstance(kinds, list) and kinds[block.origin] == SLIDING:
        window = config.get("sliding_window")
    if "k_proj" in shapes and "v_proj" in shapes:
        each = shapes["k_proj"][0] + shapes["v_proj"][0]
        return CachedNumbers(each, each, window)
    if "kv_b_proj" in shapes and "kv_a_proj_with_mqa" in shapes:
        latent = shapes["kv_a_proj_with_mqa"][0]
        turned = latent - shapes["kv_b_proj"][1]
        each = shapes["kv_b_proj"][0] + turned * int(config.get("num_attention_heads") or 1)
        return CachedNumbers(each, latent, window)
    if fused := next((shapes[name] for name in _FUSED if name in shapes), ()):
        heads = int(config.get("num_attention_heads") or 1)
        groups = int(config.get("num_key_value_heads") or heads)
        each = fused[0] * 2 * groups // (heads + 2 * groups)
        return CachedNumbers(each, each, window)
    keys = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    sizes = [config.get(key) for key in keys]
    state = prod(int(size) for size in sizes if size) if all(sizes) and shapes else 0
    return CachedNumbers(0, 0, None, state)
