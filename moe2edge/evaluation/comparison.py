"""Source and result on held-out text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe2edge.model.model import Model
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.router_observers import SkipRates
    from moe2edge.evaluation.skip_times import SkipTimes
    from moe2edge.evaluation.verify import Parity, Reference
    from moe2edge.numerics.metrics import Quality


@dataclass(frozen=True)
class Comparison:
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
        reporter: Reporter,
        memory: Memory,
        *,
        figures: bool = True,
    ) -> Comparison:
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
        from moe2edge.calibration import walk
        from moe2edge.calibration.router_observers import SkipObserver
        from moe2edge.evaluation import verify

        length = min(ids.shape[1], verify.PREFILL + verify.PARITY_STEPS)
        skipped, margins = SkipObserver(), verify.MarginObserver(length)
        seeing = (skipped, margins)
        before = None
        if figures and model is not source:
            label = "evaluation: source"
            before = walk.observe(source, ids, (), reporter.advance, label, memory)
        after = walk.observe(model, ids, seeing, reporter.advance, "evaluation: result", memory)
        if figures and before is None:
            before = after
        reporter.log("recording what verify compares with")
        rows = verify.choose_reference_rows(margins.result(), len(ids))
        reference = verify.record(
            model,
            ids[rows, :length],
            None if before is None else list(walk.compute_logits(source, before[rows, :length])),
            after[rows, :length],
        )
        skip_rates = skipped.result()
        return cls(source, model, ids, before, after, reference, skip_rates, memory)

    def before(self) -> ResultRow:
        """The line of the source."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        found = None
        if self.source_hidden is not None:
            logits = walk.compute_logits(self.source, self.source_hidden)
            found = metrics.measure(self.ids, logits, None)
        return ResultRow.of("source", self.source, found)

    def after(self) -> ResultRow:
        """The line of the result in memory."""
        from moe2edge.calibration import walk

        found = self.quality(walk.compute_logits(self.model, self.hidden))
        return ResultRow.of("result, float32 activations", self.model, found)

    def quality(self, logits: Iterable[Tensor]) -> Quality | None:
        """Figures of logits [length, vocabulary] of each sample; None if they are not wanted."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        if self.source_hidden is None:
            return None
        source = walk.compute_logits(self.source, self.source_hidden)
        return metrics.measure(self.ids, logits, source)


@dataclass(frozen=True)
class ResultRow:
    """A line of the table: one form of the model.

    Attributes:
        form: what it is: the source, the result in PyTorch, the result in a target's runtime.
        nbytes: bytes of the weights, or of the whole folder where it is one.
        parameters, active: all parameters, and those that one token uses.
        quality: figures on the evaluation text; None if they were not asked for or not had.
        parity: agreement of the runtime with PyTorch on the same packed numbers.
        skip_times: what dynamic skipping saves in the runtime.
    """

    form: str
    nbytes: int
    parameters: int
    active: int
    quality: Quality | None = None
    parity: Parity | None = None
    skip_times: SkipTimes | None = None

    @classmethod
    def of(
        cls,
        form: str,
        model: Model,
        quality: Quality | None,
        nbytes: int | None = None,
        parity: Parity | None = None,
        skip_times: SkipTimes | None = None,
    ) -> ResultRow:
        """The line of a model."""
        size = model.nbytes if nbytes is None else nbytes
        counts = model.parameters, model.active_parameters
        return cls(form, size, *counts, quality, parity, skip_times)

    def cells(self) -> tuple[str, ...]:
        """Text of each column."""
        quality, parity = self.quality, self.parity
        kl = None if quality is None else quality.kl
        top1 = None if quality is None else quality.top1
        shipped = None if parity is None else parity.shipped
        return (
            self.form,
            f"{self.nbytes / 1e6:.2f} MB",
            f"{self.parameters / 1e6:.2f} M",
            f"{self.active / 1e6:.2f} M",
            "-" if quality is None else f"{quality.perplexity:.3f}",
            "-" if kl is None else f"{kl:.5f}",
            "-" if top1 is None else f"{top1:.1%}",
            "-" if parity is None else f"{parity.exact:.1e}",
            "-" if shipped is None else f"{shipped:.2%}",
        )


RESULT_HEADINGS = (
    "form", "size", "parameters", "active", "perplexity", "KL", "top-1", "logit error",
    "as shipped",
)  # fmt: skip
