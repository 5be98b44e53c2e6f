"""Calibration text that the model writes itself, for users without a text.

Several times as many sequences as needed are sampled from the source. Of these, the ones are kept
that together use the experts most evenly. This is the expert-balanced self-sampling of MoEQuant
(2025, https://arxiv.org/abs/2505.03804, section 3.2), with its temperature and width. There,
candidates compete at every token; here, whole sequences compete.
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
from moe2edge.runtime.torch_runtime import name_cache, open_source
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.calibration.sources import TextSource
    from moe2edge.calibration.tokens import Tokens
    from moe2edge.progress import Reporter
    from moe2edge.storage.kept_results import KeptResults

TEMPERATURE = 1.2
# Candidates for each sequence that is kept.
WIDTH = 4
# Sequences that are sampled at the same time.
BATCH = 64
# Name of the text among results that are kept.
WRITTEN = "text that the model has written"


def sample_tokens(
    checkpoint: Checkpoint,
    source: TextSource,
    reporter: Reporter,
    kept: KeptResults | None = None,
) -> Tokens:
    """Sample calibration tokens from the model.

    Each sequence begins with the beginning-of-text token, or without one with the end token.

    Args:
        checkpoint: the source model.
        source: number of samples, their length and the seed.
        reporter: receives progress.
        kept: may hold the text that an earlier run has sampled, and gets it.

    Raises:
        InputError: samples are too long for the model, or the tokenizer has neither token.
        DoesNotFit: the parameters in bfloat16, with which the model runs, do not fit in memory.
    """
    model, remedy = checkpoint.model, "give a text with --calib"
    tokenizer = load_tokenizer(checkpoint.folder)
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise InputError(
            "calibration.text self: the tokenizer has neither a BOS nor an EOS token, so the model "
            f"cannot begin a text; {remedy}"
        )
    check_length(source, "calibration", model.family.geometry(model.config).max_positions)
    shape = source.samples, source.length
    basis = {"start": start, "shape": shape, "seed": source.seed}
    found = None if kept is None else kept.get(WRITTEN, basis)
    if found is not None:
        reporter.log("calibration: the text that the model has written for an earlier run")
        return wrap_tokens(torch.tensor(found), source.text)
    memory.check_memory(2 * model.parameters, "calibration.text self runs the source model", remedy)
    reporter.begin("writing the text")
    runtime = open_source(checkpoint.folder)
    ids = write_text(runtime.model, model, start, shape, source.seed, reporter)
    if kept is not None:
        kept.put(WRITTEN, basis, ids.tolist())
    return wrap_tokens(ids, source.text)


def write_text(
    runtime: Any, model: Model, start: int, shape: tuple[int, int], seed: int, reporter: Reporter
) -> Tensor:
    """Sample sequences from the model, and choose those that use the experts most evenly.

    Args:
        runtime: the source as a transformers model.
        model: the source.
        start: first token of every sequence.
        shape: number of samples and their length.
        seed: seed of the sampling.
        reporter: receives progress.

    Returns:
        Tokens int64 [samples, length].
    """
    samples, length = shape
    generator = torch.Generator().manual_seed(seed)
    batches = []
    total = WIDTH * samples
    for at in range(0, total, BATCH):
        count = min(BATCH, total - at)
        reporter.advance("calibration: writing", at, total, "sequences")
        batches.append(sample_batch(runtime, start, (count, length), generator, reporter))
    candidates = torch.cat(batches)
    use = _ExpertUseObserver()
    walk.observe(model, candidates, [use], reporter.advance, "calibration: balancing")
    counts = use.result()
    return candidates[:samples] if counts is None else candidates[choose_balanced(counts, samples)]


@torch.inference_mode()
def sample_batch(
    runtime: Any, start: int, shape: tuple[int, int], generator: torch.Generator, reporter: Reporter
) -> Tensor:
    """Sample a batch of sequences, token by token with a cache.

    Returns:
        Tokens int64 [count, length], for ``shape`` (count, length).
    """
    from transformers import DynamicCache

    count, length = shape
    ids = torch.full((count, length), start)
    cache, name = DynamicCache(config=runtime.config), name_cache(runtime)
    for n in range(1, length):
        reporter.advance("calibration: writing", n, length, "tokens of a batch")
        logits = runtime(ids[:, n - 1 : n], **{name: cache}).logits[:, -1].float()
        probabilities = (logits / TEMPERATURE).softmax(-1)
        ids[:, n] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return ids


class _ExpertUseObserver:
    """Counts how often each sequence uses each expert of each layer."""

    def __init__(self) -> None:
        self._counts: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        if not isinstance(trace.block.mlp, MoELayer) or trace.routing is None:
            return
        experts = len(trace.block.mlp.experts)
        ids = trace.routing.ids.view(len(trace.inputs), -1)
        counts = torch.zeros(len(ids), experts + 1)  # the last column counts skipped choices
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
        self._counts.setdefault(trace.block.index, []).append(counts[:, :experts])

    def result(self) -> Tensor | None:
        """Return the shares [sequences, experts of all layers]; those of a layer sum to 1.

        Returns None if the model has no experts.
        """
        layers = [torch.cat(parts) for parts in self._counts.values()]
        if not layers:
            return None
        return torch.cat([counts / counts.sum(1, keepdim=True) for counts in layers], dim=1)


def choose_balanced(use: Tensor, count: int) -> Tensor:
    """Choose rows of ``use`` [candidates, experts] whose sum is as even as possible.

    The choice is greedy: each step adds the row with which the sum of squares grows least, and of
    equal rows the first.

    Returns:
        Positions of ``count`` rows, int64, ascending.
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
