"""The source and the result on held-out text, and each target held against them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge import registry
from moe2edge.checkpoint import Checkpoint
from moe2edge.memory import Memory, give_back
from moe2edge.model import Model
from moe2edge.progress import Watcher
from moe2edge.report import ResultRow
from moe2edge.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.quality import Quality
    from moe2edge.skipping import SkipRates
    from moe2edge.verify import Reference


@dataclass(frozen=True)
class Measured:
    """Source and result on some tokens, and the reference for outputs.

    Attributes:
        source, model: the two.
        ids: the tokens, int64 [samples, length].
        source_hidden: the stream of the source after its last block; None if no figures are wanted.
        hidden: that of the result.
        reference: what outputs are held against.
        skip_rates: what dynamic skipping left out.
        memory: what it may take.
    """

    source: Model
    model: Model
    ids: Tensor
    source_hidden: Tensor | None
    hidden: Tensor
    reference: Reference
    skip_rates: SkipRates
    memory: Memory

    @classmethod
    def of(
        cls,
        source: Model,
        model: Model,
        ids: Tensor,
        watcher: Watcher,
        memory: Memory,
        *,
        figures: bool = True,
    ) -> Measured:
        """Walk over both models.

        Args:
            source: the model that the result is compared with.
            model: the result.
            ids: the tokens.
            watcher: told about progress.
            memory: what it may take.
            figures: whether perplexity and the like are wanted; otherwise the tokens serve for the
                reference alone, and the source is left out.
        """
        from moe2edge import verify, walk
        from moe2edge.skipping import SkipObserver

        length = min(ids.shape[1], verify.PREFILL + verify.STEPS)
        skipped, margins = SkipObserver(), verify.MarginObserver(length)
        seeing = (skipped, margins)
        before = None
        if figures and model is not source:
            label = "evaluation: source"
            before = walk.observe(source, ids, (), watcher.advance, label, memory)
        after = walk.observe(model, ids, seeing, watcher.advance, "evaluation: result", memory)
        if figures and before is None:
            before = after
        watcher.log("recording what verify compares with")
        rows = verify.reference_rows(margins.fact(), len(ids))
        reference = verify.record(
            model,
            ids[rows, :length],
            None if before is None else list(walk.head_logits(source, before[rows, :length])),
            after[rows, :length],
        )
        skip_rates = skipped.fact()
        return cls(source, model, ids, before, after, reference, skip_rates, memory)

    def before(self) -> ResultRow:
        """The line of the source."""
        from moe2edge import quality, walk

        found = None
        if self.source_hidden is not None:
            logits = walk.head_logits(self.source, self.source_hidden)
            found = quality.measure(self.ids, logits, None)
        return ResultRow.of("source", self.source, found)

    def after(self) -> ResultRow:
        """The line of the result in memory."""
        from moe2edge import walk

        found = self.quality(walk.head_logits(self.model, self.hidden))
        return ResultRow.of("result, float32 activations", self.model, found)

    def quality(self, logits: Iterable[Tensor]) -> Quality | None:
        """Figures of logits [length, vocabulary] of each sample; None if they are not wanted."""
        from moe2edge import quality, walk

        if self.source_hidden is None:
            return None
        source = walk.head_logits(self.source, self.source_hidden)
        return quality.measure(self.ids, logits, source)


def write_target(
    target: Target,
    model: Model,
    folder: Path,
    checkpoint: Checkpoint,
    measured: Measured,
    watcher: Watcher,
) -> ResultRow:
    """Write one target, reopen it in its runtime, and hold it against the model in memory."""
    from moe2edge import verify
    from moe2edge.skipping import measure_times

    name = registry.name_of(target)
    for companion in checkpoint.companions:
        shutil.copyfile(companion, folder / companion.name)
    target.write(model, folder)
    stored = target.stored(model)
    reference = measured.reference.of_stored(model, stored)
    reference.save(folder)
    watcher.log(f"reading {name} back")
    verify.audit(target, folder, stored)
    give_back()
    size = sum(path.stat().st_size for path in folder.iterdir())
    row = ResultRow.of(f"{name}, in its runtime", model, None, size)
    watcher.log(f"running {name}")
    parity, shipped = verify.parity(reference, target, folder, measured.memory.limit)
    if shipped is None:
        watcher.log(
            f"warning: {name} was not run, because that needs "
            f"{target.runtime_nbytes(model) / 1e9:.1f} GB of memory; it was read back block by "
            "block and computes what it should"
        )
        return replace(row, form=f"{name}, not run", parity=parity)
    if parity.shipped is not None and parity.shipped > verify.SHIPPED_USUAL:
        watcher.log(
            f"warning: {name} as shipped differs from PyTorch by {parity.shipped:.1%} (median); "
            f"{verify.SHIPPED_USUAL:.0%} is usual. Its perplexity and KL say what that costs"
        )

    def logits() -> Iterator[Tensor]:
        for n, row in enumerate(measured.ids):
            watcher.advance(f"evaluation: {name}", n, len(measured.ids))
            yield shipped.logits(row[None])[0]
        watcher.advance(f"evaluation: {name}", len(measured.ids), len(measured.ids))

    quality = measured.quality(logits())
    times = None
    if model.skips:
        watcher.log(f"timing {name} with and without skipping")
        text = measured.ids[0].tolist()
        times = measure_times(shipped, target.without_skipping(model, folder), text)
    return replace(row, quality=quality, parity=parity, skip_times=times)
