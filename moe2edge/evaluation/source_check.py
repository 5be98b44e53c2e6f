"""Compare what a walk computes for a source with stock transformers' own model of it.

The walk reads tensors and configs by the rules of this project, and everything that is checked
later is checked against the walk. So its own reading is proved once, at the start: transformers
opens the same folder by itself, with the full config, and each block has to give the same output
for the same input. Of a quantized source it gets our dequantized tensors, since its own readers of
some formats are wrong. Transformers' model is loaded whole where it fits into memory, and otherwise
a group of blocks at a time, by its own loading in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.evaluation.stock_blocks import (
    LOGITS,
    SHORTEST,
    BlockRun,
    StockValues,
    compute_rotary,
    list_positions,
    run_in_stock,
)
from moe2edge.evaluation.stock_memory import choose_stock_group
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.progress import Advance
from moe2edge.runtime.layer_stage import LayerStage
from moe2edge.runtime.memory import find_limit, give_back

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference of what a block adds to a token's vector, and of a token's logits, relative to
# the largest number of them.
TOLERANCE = 1e-4
# Rounding of float32 in the sum that a block adds to, relative to its largest number.
ROUNDING = 1e-6
# Gap of router logits, relative to the largest, below which two runs may choose other experts.
NEAR_TIE = 1e-4
# Length of the text: tokens per expert that one token chooses, within bounds.
TOKENS_PER_EXPERT = 8
LONGEST = 512
# A window of attention makes the text longer, up to this; attention takes its square.
WIDEST = 1024


@dataclass(frozen=True)
class Agreement:
    """Agreement of a walk over a source with stock transformers.

    Attributes:
        tokens: length of the text.
        difference: largest difference, relative to what `TOLERANCE` is relative to.
        excepted: tokens at near ties of routers that differed by more, of all blocks together.
        called: experts that no token reached, which were called directly.
        peaks: the largest absolute number of the hidden states of each block.
        window: tokens of a window of attention that the text was too short for; 0: there is none.
    """

    tokens: int
    difference: float
    excepted: int
    called: int
    peaks: tuple[float, ...]
    window: int


def compare_with_stock(
    model: Model,
    folder: Path,
    *,
    without: Sequence[int] = (),
    within: int | None = None,
    advance: Advance = lambda *_: None,
) -> Agreement:
    """Run one text through the walk and through stock transformers, block by block.

    Both get the same input for each block, which the walk computed, so that a difference is that
    of the block alone.

    Args:
        model: the source.
        folder: its folder, which transformers opens by itself.
        without: ids that the text must not have.
        within: bytes for the whole process; None: what the machine has.
        advance: receives progress.

    Raises:
        VerificationFailed: something differs; the message names the first block where it does.
        InputError: both give numbers that are not finite.
        StockFailed: transformers cannot run it, or not in this memory.
    """
    ids = _make_text(model, without)
    limit = find_limit() if within is None else within
    size, whole = choose_stock_group(model, limit)
    found = _Findings(model, folder)
    embedded = hidden = walk.embed(model, ids)
    count, label = len(model.blocks), "source check"
    for first in range(0, count, size):
        advance(label, first, count)
        group = []
        for block in model.blocks[first : first + size]:
            group.append(_run_block(model, block, hidden))
            hidden = group[-1].outputs
        give_back()
        ends = (ids, hidden) if whole else (None, None)
        stock = run_in_stock(model, folder, group, *ends)
        found.compare_blocks(stock, group)
    if not whole:
        stock = run_in_stock(model, folder, (), ids, hidden)
    found.compare_ends(stock, embedded, hidden)
    advance(label, count, count)
    return found.summarize(ids.shape[1])


def _make_text(model: Model, without: Sequence[int]) -> Tensor:
    """Draw the ids of the text, int64 [1, length], from a seeded generator."""
    layers = [layer for _, layer in model.moe_blocks]
    wanted = max((TOKENS_PER_EXPERT * m.router_rows // m.router.top_k for m in layers), default=0)
    longest = model.family.geometry(model.config).max_positions
    length = min(max(wanted, SHORTEST), LONGEST)
    # Whatever is read of the config here, the key is that of transformers as well.
    behind = (model.config.get("sliding_window") or 0) + SHORTEST
    length = min(max(length, behind if behind <= WIDEST else 0), longest)
    usable = torch.ones(model.vocabulary, dtype=torch.bool)
    usable[list(without)] = False
    ids = usable.nonzero().flatten()
    drawn = torch.randint(len(ids), (1, length), generator=torch.Generator().manual_seed(0))
    return ids[drawn]


# ---- the walk ------------------------------------------------------------------------------------


def _run_block(model: Model, block: Block, inputs: Tensor) -> BlockRun:
    """Run one block of the walk."""
    trace = BlockRunner(model, block).watch(inputs)
    vector = trace.mlp_inputs.flatten(0, -2)[:1].clone()
    near_ties = torch.zeros(inputs.shape[1], dtype=torch.bool)
    unreached: tuple[int, ...] = ()
    direct = torch.empty(0, vector.shape[1])
    if isinstance(block.mlp, MoELayer) and trace.routing is not None:
        near_ties = _find_near_ties(trace.routing.logits, block.mlp.router.top_k)
        reached = set(trace.routing.ids.flatten().tolist())
        unreached = tuple(n for n in range(len(block.mlp.experts)) if n not in reached)
        direct = torch.cat([direct, *(trace.expert_output(n, vector) for n in unreached)])
    seen = (trace.outputs, trace.attended, trace.mlp_outputs)
    peak = max(float(hidden.abs().max()) for hidden in seen)
    return BlockRun(block, inputs, trace.outputs, near_ties, unreached, vector, direct, peak)


def _find_near_ties(logits: Tensor, top_k: int) -> Tensor:
    """Find the tokens whose last chosen expert is hardly ahead of the next one, bool [tokens]."""
    best = logits.topk(min(top_k + 1, logits.shape[1])).values
    if best.shape[1] <= top_k:
        return torch.zeros(len(logits), dtype=torch.bool)
    return best[:, top_k - 1] - best[:, top_k] <= NEAR_TIE * logits.abs().amax(1)


# ---- comparison ----------------------------------------------------------------------------------


class _Findings:
    """Collects what was compared, and refuses what differs."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._where = f"source check: {folder}"
        self._model = model
        self._largest = 0.0
        self._excepted = 0
        self._called = 0
        self._peaks: list[float] = []
        self._windows = [block.window or 0 for block in model.blocks]

    def compare_blocks(self, stock: StockValues, group: Sequence[BlockRun]) -> None:
        """Compare blocks that were run.

        Raises:
            VerificationFailed: one differs; it is named.
        """
        self._windows.append(stock.window)
        if not self._model.family.generic:
            own = LayerStage(self._model, group[0].block).rotary
            rotary = compute_rotary(own, list_positions(self._model))
            self._compare("the rotary embedding", rotary, stock.rotary, rotary)
        for one in group:
            name = f"block {one.block.index}"
            other = stock.outputs[one.block.index]
            rounding = ROUNDING / TOLERANCE * one.inputs.abs().amax(-1)
            added = one.outputs - one.inputs
            self._compare(name, one.outputs, other, added, rounding, one.near_ties)
            theirs = stock.direct[one.block.index]
            for n, expert in enumerate(one.unreached):
                at = f"{name}, expert {expert}"
                self._compare(at, one.direct[n], theirs[n], one.direct[n])
            self._called += len(one.unreached)
            self._peaks.append(one.peak)

    def compare_ends(self, stock: StockValues, embedded: Tensor, last: Tensor) -> None:
        """Compare embedding, last norm and head.

        Raises:
            VerificationFailed: one differs.
        """
        self._compare("the embedding", embedded, stock.embedded, embedded)
        logits = torch.stack(list(walk.compute_logits(self._model, last[:, -LOGITS:])))
        self._compare("the last norm or the head", logits, stock.logits, logits)

    def _compare(
        self,
        name: str,
        own: Tensor,
        other: Tensor,
        scale: Tensor,
        more: Tensor | float = 0.0,
        excepted: Tensor | None = None,
    ) -> None:
        """Compare vectors [..., n], each relative to the largest number of ``scale``.

        Args:
            name: what they are.
            own: those of the walk.
            other: those of transformers.
            scale: same shape.
            more: added to the largest number of each vector of ``scale``.
            excepted: vectors that may differ.

        Raises:
            VerificationFailed: they differ.
            InputError: both hold numbers that are not finite.
        """
        if own.shape != other.shape:
            raise self._make_error(name, f"shape {list(own.shape)}, not {list(other.shape)}")
        if (~own.isfinite().all(-1) & ~other.isfinite().all(-1)).any():
            raise InputError(
                f"{self._where}: {name} gives numbers that are not finite, in transformers as "
                "well; weights are beyond what float32 can compute with: the checkpoint is "
                "damaged, get it again"
            )
        sizes = (scale.abs().amax(-1) + more).clamp_min(torch.finfo(torch.float32).tiny)
        differences = ((own - other).abs().amax(-1) / sizes).flatten()
        wrong = ~(differences <= TOLERANCE)  # NaN is wrong
        if excepted is not None:
            self._excepted += int((wrong & excepted).sum())
            differences, wrong = differences[~excepted], wrong[~excepted]
        if not differences.numel():
            return
        worst = float(differences.max())
        if wrong.any():
            count = int(wrong.sum())
            raise self._make_error(name, f"{worst:.1e} for {count} of {len(wrong)} vectors")
        self._largest = max(self._largest, worst)

    def _make_error(self, name: str, what: str) -> VerificationFailed:
        """Make the error for a difference."""
        import transformers

        return VerificationFailed(
            f"{self._where}: {name} does not give what transformers {transformers.__version__} "
            f"computes (relative difference {what}; expected at most {TOLERANCE:.0e}); moe2edge "
            "would build on wrong numbers: please report it"
        )

    def summarize(self, tokens: int) -> Agreement:
        """Return the agreement of all that was compared."""
        longest = self._model.family.geometry(self._model.config).max_positions
        window = max((w for w in self._windows if tokens <= w < longest), default=0)
        peaks = tuple(self._peaks)
        return Agreement(tokens, self._largest, self._excepted, self._called, peaks, window)
