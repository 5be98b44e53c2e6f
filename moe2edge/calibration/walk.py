"""The streaming walk: run text through a model one block at a time.

Each block is transformers' own decoder block, built for that block's actual shape, so that every
family's numerics are transformers'. A block is loaded, the hidden states of all samples pass
through it, visitors see its intermediate activations, and it is freed before the next one is
loaded. Everything runs in float32, in which bfloat16 weights are exact, so that the walk is the
reference that runtimes are compared with; a walk that only scores may multiply in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.observation import (
    BlockTrace,
    Facts,
    Observer,
    ObserverFactory,
    SeesOutputs,
)
from moe2edge.calibration.walk_keeper import make_keeper
from moe2edge.model.block import Block
from moe2edge.model.model import EMBEDDING, FINAL_NORM, HEAD, Model
from moe2edge.progress import Advance
from moe2edge.runtime.decoder_blocks import (
    check_finite,
    load_finite,
)
from moe2edge.runtime.ends import (
    compute_head_inputs_with_stock,
    compute_logits_with_stock,
    embed_with_stock,
)
from moe2edge.runtime.memory import UNLIMITED, Memory

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.storage.kept_walk import KeptWalk

# Tokens in a batch: enough for fast matrix products, few next to the hidden states of all samples.
BATCH_TOKENS = 8192


def embed(model: Model, tokens: Tensor, memory: Memory = UNLIMITED) -> Tensor:
    """Look ``tokens`` up in the embedding table: float32 [samples, length, hidden]."""
    if model.family.generic:
        return embed_with_stock(model, tokens, split_batches(tokens), memory.empty)
    handle = model.embedding
    table = handle.load()
    hidden = memory.empty((*tokens.shape, table.shape[1]))
    for part in split_batches(tokens):
        hidden[part] = check_finite(handle.name, table[tokens[part]].float())
    return hidden


def split_batches(tokens: Tensor) -> list[slice]:
    """Split samples [samples, length, ...] into ranges of about `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    return [slice(at, at + size) for at in range(0, len(tokens), size)]


# ---- the walk ------------------------------------------------------------------------------------


class BlockTransform(Protocol):
    """Changes a model block by block, each from its activations on the calibration text."""

    def observe(self, trace: BlockTrace, source: BlockTrace | None) -> None:
        """Take in one batch of the current block, and of its twin if a source is walked too."""
        ...

    def change(self, block: Block) -> Block:
        """Return the current block as changed, and discard what was gathered for it."""
        ...


def walk(
    model: Model,
    tokens: Tensor,
    visitors: Sequence[Observer[Any]] = (),
    *,
    transform: BlockTransform | None = None,
    source: Model | None = None,
    propagate: bool = True,
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
    kept: KeptWalk | None = None,
    needs_hidden: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Model, Tensor]:
    """Run ``tokens`` through ``model`` block by block, and change the blocks by ``transform``.

    Args:
        model: the model to walk over.
        tokens: int64 [samples, length].
        visitors: observers of every batch of every block.
        transform: observes every batch of a block too, and then changes the block.
        source: walked beside ``model`` to show ``transform`` the twin of each block, which has the
            same origin. ``model`` may lack some of its blocks.
        propagate: later blocks see the hidden states of the blocks as changed; otherwise those of
            the blocks as they were.
        advance: receives progress.
        label: name of the work in progress lines.
        memory: budget for the hidden states.
        kept: keeps what visitors and transform gather, block by block, if all are `Resumable`; the
            walk resumes behind what it has.
        needs_hidden: whether the hidden states that are returned are used, and kept at the end.
        dtype: of products in the blocks that are observed; see `BlockRunner`.

    Returns:
        The changed model, and hidden states float32 [samples, length, hidden] after the last
        block; if changes are propagated, before it, as no block follows that needs them.
    """
    blocks, changing = model.blocks, [] if transform is None else [transform]
    models = [model] if source is None else [model, source]
    keeper = make_keeper(kept, [*visitors, *changing], models, tokens, dtype)
    done, state = keeper.resume(blocks) if keeper else (0, {})
    hidden = _begin(model, tokens, memory, done, state.get("hidden"))
    source_walk = None
    if source is not None:
        start = _begin(source, tokens, memory, done, state.get("source"))
        source_walk = _SourceWalk(source, start, blocks[done - 1] if done else None)
    for block in blocks:
        last = block.index + 1 == len(blocks)
        if block.index >= done:
            advance(label, block.index, len(blocks))
            # Where it is changed, the block runs once more, and that is what is stored.
            store = transform is None or not propagate
            _observe_block(
                model, block, hidden, visitors, transform, source_walk, store=store, dtype=dtype
            )
        if transform is not None:
            model = model.replace_block(changed := transform.change(block))
            if propagate and not last and block.index >= done:
                _run_block(model, changed, hidden)
        if keeper is not None and block.index >= done:
            streams = {"hidden": hidden} if needs_hidden or not last else {}
            streams |= {"source": source_walk.hidden} if source_walk and not last else {}
            keeper.keep(block, streams, last=last)
    advance(label, len(blocks), len(blocks))
    return model, hidden


def _begin(model: Model, tokens: Tensor, memory: Memory, done: int, kept: Tensor | None) -> Tensor:
    """Return the hidden states in front of the first block that is not done."""
    if not done:
        return embed(model, tokens, memory)
    if kept is None:  # behind the last block, where nobody needs them
        return torch.empty(0)
    hidden = memory.empty(tuple(kept.shape))
    hidden.copy_(kept)
    return hidden


class _SourceWalk:
    """The source's hidden states, on their way beside those of a model with fewer blocks.

    Attributes:
        hidden: float32 [samples, length, hidden].
    """

    def __init__(self, source: Model, hidden: Tensor, last: Block | None) -> None:
        """Begin in front of the first block, or behind the twin of the ``last`` one walked."""
        self.hidden = hidden
        self._source = source
        passed = next((b.index + 1 for b in source.blocks if last and b.origin == last.origin), 0)
        self._upcoming = iter(source.blocks[passed:])
        self._runner: BlockRunner | None = None

    def load_twin(self, block: Block) -> None:
        """Load the block with the origin of ``block``, after running those before it."""
        for twin in self._upcoming:
            if twin.origin == block.origin:
                self._runner = BlockRunner(self._source, twin)
                return
            _run_block(self._source, twin, self.hidden)

    def free_twin(self) -> None:
        """Forget the loaded block."""
        self._runner = None

    def watch(self, part: slice) -> BlockTrace:
        """Run a batch through the loaded block; the caller stores its outputs."""
        assert self._runner is not None, "no twin is loaded"
        return self._runner.watch(self.hidden[part])


def _observe_block(
    model: Model,
    block: Block,
    hidden: Tensor,
    visitors: Sequence[Observer[Any]],
    transform: BlockTransform | None,
    source_walk: _SourceWalk | None,
    *,
    store: bool,
    dtype: torch.dtype,
) -> None:
    """Show visitors and transform each batch; ``store`` the outputs in ``hidden``."""
    if transform is None and not visitors:
        _run_block(model, block, hidden)
        return
    if source_walk is not None:
        source_walk.load_twin(block)
    runner = BlockRunner(model, block, dtype)
    see = [partial(v.visit, block) for v in visitors if isinstance(v, SeesOutputs)]
    for part in split_batches(hidden):
        twin = None if source_walk is None else source_walk.watch(part)
        trace = runner.watch(hidden[part], visitors=see)
        for visitor in visitors:
            visitor.observe(trace)
        if transform is not None:
            transform.observe(trace, twin)
        # Stored last, because the inputs of a trace are a view of the hidden states.
        if store:
            hidden[part] = trace.outputs
        if source_walk is not None and twin is not None:
            source_walk.hidden[part] = twin.outputs
        del trace, twin
    if source_walk is not None:
        source_walk.free_twin()


def _run_block(model: Model, block: Block, hidden: Tensor) -> None:
    """Replace ``hidden`` [samples, length, hidden] by the outputs of a block."""
    runner = BlockRunner(model, block)
    for part in split_batches(hidden):
        hidden[part] = runner.run(hidden[part])


def observe(
    model: Model,
    tokens: Tensor,
    observers: Sequence[Observer[Any]],
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
    kept: KeptWalk | None = None,
) -> Tensor:
    """Walk over ``tokens`` int64 [samples, length]; return hidden states after the last block."""
    return walk(model, tokens, observers, advance=advance, label=label, memory=memory, kept=kept)[1]


def gather(
    model: Model,
    tokens: Tensor,
    kinds: Sequence[ObserverFactory],
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
    kept: KeptWalk | None = None,
    dtype: torch.dtype = torch.float32,
) -> Facts:
    """Return the results of some kinds of observers after one walk; without any, run nothing."""
    observers = {kind: kind() for kind in kinds}
    if observers:
        walk(
            model,
            tokens,
            list(observers.values()),
            advance=advance,
            label=label,
            memory=memory,
            kept=kept,
            needs_hidden=False,
            dtype=dtype,
        )
    return Facts({kind: observer.result() for kind, observer in observers.items()})


@torch.no_grad()
def compute_logits(model: Model, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the logits float32 [length, vocabulary] of each sample [length, hidden].

    The families of the table end in an RMS norm and a linear head without bias.
    """
    if model.family.generic:
        yield from compute_logits_with_stock(model, hidden)
        return
    normalize = _load_last_norm(model)
    head_name = HEAD if HEAD in model.rest else EMBEDDING
    head = load_finite(model.rest[head_name])
    for sample in hidden:
        yield normalize(sample) @ head.T


def _load_last_norm(model: Model) -> Callable[[Tensor], Tensor]:
    """Load the norm behind the last block of a family of the table."""
    norm = load_finite(model.rest[FINAL_NORM])
    eps = model.family.geometry(model.config).eps
    return lambda x: nn.functional.rms_norm(x, norm.shape, norm.to(x.device), eps)


@torch.no_grad()
def list_head_inputs(model: Model, hidden: Tensor) -> Iterator[Tensor]:
    """Yield what the head gets, float32 [n, hidden], batch by batch.

    Args:
        model: the model.
        hidden: hidden states after the last block, [samples, length, hidden].
    """
    parts = (hidden[part] for part in split_batches(hidden))
    if model.family.generic:
        near = (part.cpu() for part in parts)
        yield from (x.flatten(0, -2) for x in compute_head_inputs_with_stock(model, near))
        return
    normalize = _load_last_norm(model)
    for part in parts:
        yield normalize(part).flatten(0, -2)
