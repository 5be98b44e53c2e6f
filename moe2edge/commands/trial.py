"""Trial of each target's runtime on a model without weights, before an export computes anything.

A runtime may refuse shapes, dtypes or attributes that its documentation allows. Whatever it refuses
is refused before hours of work, on one block of each kind of the planned model, filled with zeros.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.errors import DiskFailed, DoesNotFit, Moe2EdgeError, Unsupported, join_lines
from moe2edge.model.block import Block
from moe2edge.model.edits import change_weights
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import DTYPES, Weight
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import give_back
from moe2edge.storage.companions import Companions
from moe2edge.storage.written_files import blame_disk

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Entries of the vocabulary of the trial; its size decides nothing that a runtime could refuse.
VOCABULARY = 8
PROMPT = (1, 2, 3, 4, 5)
# Models that were tried in this process, as they are printed: a sweep exports many of one shape.
_tried: set[str] = set()


def try_targets(targets: Sequence[Target], planned: Model) -> None:
    """Write, reopen and run one block of each kind of ``planned``, with zeros, in each target.

    Families of which only the numbers of experts are known are not tried: which blocks a smaller
    config would have is not known, and the runtime of the target that holds them is transformers.

    Raises:
        Unsupported: the runtime of a target refuses it, or is not installed; nothing was computed
            yet.
    """
    for target in targets:
        target.check_runtime(planned)
    if planned.family.generic:
        return
    small = reduce_model(planned)
    for target in targets:
        key = f"{target} {small.blocks} {small.config}"
        if key not in _tried:
            _try_target(target, small)
        _tried.add(key)
    give_back()


def try_outputs(
    targets: Sequence[Target], planned: Model, companions: Companions, reporter: Reporter
) -> dict[str, tuple[str, ...]]:
    """Try each target as `try_targets` does, and with the files beside the weights.

    Returns:
        What a user should know of the outputs, by target; it is reported as well.

    Raises:
        Unsupported: a runtime refuses the model, or a target cannot hold one of these files.
    """
    try_targets(targets, planned)
    found = {target.name: target.remarks(planned) for target in targets}
    holding = [target for target in targets if target.holds_tokenizer]
    if holding:
        with tempfile.TemporaryDirectory(prefix="moe2edge-") as name:
            companions.write(Path(name))
            for target in holding:
                found[target.name] += target.check_companions(Path(name), planned)
    for name, lines in found.items():
        for line in lines:
            reporter.log(f"{name}: {line}")
    return {name: lines for name, lines in found.items() if lines}


def _try_target(target: Target, small: Model) -> None:
    """Write, reopen and run a model in one target.

    Raises:
        DiskFailed: the disk gives back something else than was written.
        Unsupported: the runtime refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="moe2edge-") as name:
        folder = Path(name)
        try:
            with blame_disk(folder, target.write(small, folder)):
                runtime = target.reopen(folder)
                runtime.start(PROMPT)
                runtime.step(PROMPT[0])
        except (MemoryError, OSError, DiskFailed, DoesNotFit):
            raise
        except Exception as error:
            what = "" if isinstance(error, Moe2EdgeError) else f"{type(error).__name__}: "
            raise Unsupported(
                f"the runtime of target {target.name} refuses blocks of this model, tried with "
                f"zeros before any work: {what}{join_lines(error)}; choose another target or recipe"
            ) from error


def reduce_model(model: Model) -> Model:
    """Return a model with one block of each kind of ``model``, few tokens, and zeros.

    Layers of plain experts keep no more of them than one token needs, and one.
    """
    kinds: dict[str, Block] = {}
    for block in model.blocks:
        kinds.setdefault(_describe_kind(block), block)
    model = model.keep_blocks([block.index for block in kinds.values()])
    for block in model.blocks:
        if isinstance(block.mlp, MoELayer) and block.mlp.is_plain:
            count = min(block.mlp.router_rows, block.mlp.router.top_k + 1)
            model = model.replace_block(replace(block, mlp=block.mlp.keep(range(count))))
    model = change_weights(model, lambda _, weight: make_zero_weight(weight))
    vocabulary = model.vocabulary
    rest = {
        name: make_zero_weight(
            replace(w, shape=(VOCABULARY, *w.shape[1:])) if w.shape[0] == vocabulary else w
        )
        for name, w in model.rest.items()
    }
    # Special tokens would point outside of the small vocabulary.
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = {**model.config, **special, "vocab_size": VOCABULARY}
    return replace(model, rest=rest, config=config)


def _describe_kind(block: Block) -> str:
    """Describe all of a block that a runtime could refuse: shapes, dtypes, schemes, rows."""
    weights = [(role, w.shape, w.dtype, w.scheme) for role, w in block.weights()]
    routing: tuple[object, ...] = ()
    if isinstance(block.mlp, MoELayer):
        rows = [type(row).__name__ for row in block.mlp.rows]
        routing = (rows, block.mlp.router.top_k, bool(block.mlp.router.skip_below))
    return f"{weights} {routing} {block.window}"


def make_zero_weight(weight: Weight) -> Weight:
    """Return a handle on zeros of the shape, dtype and scheme of ``weight``."""

    def load() -> Tensor:
        import torch

        return torch.zeros(weight.shape, dtype=getattr(torch, DTYPES[weight.dtype]))

    def load_quantized() -> Quantized:
        import torch

        from moe2edge.numerics.grid import Quantized

        assert weight.scheme is not None
        outs, ins = weight.shape
        groups, middle = weight.scheme.groups(ins), weight.scheme.zero_point
        points = torch.full((outs, groups), middle, dtype=torch.uint8)
        return Quantized(
            torch.full(weight.shape, middle, dtype=torch.uint8),
            torch.ones(outs, groups),
            weight.scheme,
            None if weight.scheme.symmetric else points,
            torch.arange(ins) // weight.scheme.width(ins) if weight.scheme.ordered else None,
        )

    quantized = None if weight.scheme is None else load_quantized
    return replace(weight, load=load, load_quantized=quantized)
