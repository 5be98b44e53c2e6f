"""Calibration text that the model writes itself, for who has none.

Sequences are sampled from the source, and of several times as many as are wanted those are taken
that together use the experts most evenly (expert-balanced self-sampling: MoEQuant, 2025,
https://arxiv.org/abs/2505.03804, section 3.2, whose temperature and width are used here; there,
candidates compete at every token, here as whole sequences).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration import walk
from moe2edge.calibration.tokens import check_length, wrap_tokens
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.runtime import memory
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.calibration.sources import TextSource
    from moe2edge.calibration.tokens import Tokens
    from moe2edge.progress import Reporter

TEMPERATURE = 1.2
# Candidates for each sequence.
WIDTH = 4
# Sequences that are sampled side by side.
BATCH = 64


def sample_tokens(checkpoint: Checkpoint, source: TextSource, reporter: Reporter) -> Tokens:
    """Calibration that the model writes; texts begin with the token that begins or ends them.

    Args:
        checkpoint: the model.
        source: how many samples, of what length, by which seed.
        watcher: told about progress.

    Raises:
        InputError: samples are too long for the model, or no token begins texts.
        DoesNotFit: its parameters in bfloat16 are more than the memory, as it has to run.
    """
    model, remedy = checkpoint.model, "give a text with --calib"
    memory.check_memory(2 * model.parameters, "calibration.text self runs the source", remedy)
    tokenizer = load_tokenizer(checkpoint.folder)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise InputError(
            f"calibration.text self: the tokenizer has no token to begin a text with; {remedy}"
        )
    check_length(source, "calibration", model.family.geometry(checkpoint.config).max_positions)
    runtime = open_source(checkpoint.folder)
    shape = source.samples, source.length
    ids = write_text(runtime.model, model, start, shape, source.seed, reporter)
    return wrap_tokens(ids, source.text)


def write_text(
    runtime: Any, model: Model, start: int, shape: tuple[int, int], seed: int, reporter: Reporter
) -> Tensor:
    """Tokens int64 ``shape`` [samples, length] that the model wrote, balanced over experts.

    Args:
        runtime: the source as a transformers model.
        model: the source.
        start: token that all sequences begin with.
        shape: samples and length.
        seed: decides what is sampled.
        watcher: told about progress.
    """
    samples, length = shape
    generator = torch.Generator().manual_seed(seed)
    found = []
    total = WIDTH * samples
    for at in range(0, total, BATCH):
        count = min(BATCH, total - at)
        reporter.advance("calibration: writing", at, total, "sequences")
        found.append(sample_batch(runtime, start, (count, length), generator, reporter))
    candidates = torch.cat(found)
    use = _Use()
    walk.observe(model, candidates, [use], reporter.advance, "calibration: balancing")
    counts = use.result()
    return candidates[:samples] if counts is None else candidates[choose_balanced(counts, samples)]


@torch.inference_mode()
def sample_batch(
    runtime: Any, start: int, shape: tuple[int, int], generator: torch.Generator, reporter: Reporter
) -> Tensor:
    """Sequences int64 ``shape`` [count, length], token by token with a cache."""
    from transformers import DynamicCache

    count, length = shape
    ids = torch.full((count, length), start)
    cache = DynamicCache(config=runtime.config)
    for n in range(1, length):
        reporter.advance("calibration: writing", n, length, "tokens of a batch")
        logits = runtime(ids[:, n - 1 : n], past_key_values=cache).logits[:, -1].float()
        chances = (logits / TEMPERATURE).softmax(-1)
        ids[:, n] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return ids


class _Use:
    """How often each sequence uses each expert of each layer."""

    def __init__(self) -> None:
        self._counts: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch."""
        if not isinstance(trace.block.mlp, MoELayer) or trace.routing is None:
            return
        experts = len(trace.block.mlp.experts)
        ids = trace.routing.ids.view(len(trace.inputs), -1)
        counts = torch.zeros(len(ids), experts + 1)  # the last stands for skipped places
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
        self._counts.setdefault(trace.block.index, []).append(counts[:, :experts])

    def result(self) -> Tensor | None:
        """Counts [sequences, all experts], each layer's as parts of one; None without experts."""
        layers = [torch.cat(parts) for parts in self._counts.values()]
        if not layers:
            return None
        return torch.cat([counts / counts.sum(1, keepdim=True) for counts in layers], dim=1)


def choose_balanced(use: Tensor, count: int) -> Tensor:
    """Positions of ``count`` rows of ``use`` [candidates, experts] with the evenest sum, in order.

    One after the other the row is taken with which the sum of squares grows least; of equal ones
    the first.
    """
    total = torch.zeros(use.shape[1])
    left = torch.ones(len(use), dtype=torch.bool)
    squares = use.square().sum(1)
    chosen = []
    for _ in range(count):
        cost = (2 * use @ total + squares).masked_fill(~left, torch.inf)
        best = int(cost.argmin())
        chosen.append(best)
        left[best] = False
        total += use[best]
    return torch.tensor(sorted(chosen))
