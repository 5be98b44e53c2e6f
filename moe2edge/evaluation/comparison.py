"""Compare the source and the compressed model on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2edge.model.model import Model
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import Observer
    from moe2edge.calibration.router_observers import SkipRates
    from moe2edge.evaluation.reference import Reference
    from moe2edge.evaluation.skip_times import SkipTimes
    from moe2edge.evaluation.verify import Parity
    from moe2edge.numerics.metrics import Quality
    from moe2edge.storage.kept_walk import KeptWalk


@dataclass(frozen=True)
class Comparison:
    """Hidden states of the source and the result on the same tokens, and the output reference.

    Attributes:
        source: the model before compression.
        model: the result, as it will be written.
        ids: the tokens, int64 [samples, length].
        source_hidden: hidden states of the source after its last block, float32
            [samples, length, hidden]; None if quality is not measured.
        hidden: hidden states of the result after its last block, same shape.
        reference: the record that written outputs are compared with.
        skip_rates: how often dynamic skipping left out an expert.
        largest: the largest absolute activation of the result on the tokens.
        memory: memory budget.
    """

    source: Model
    model: Model
    ids: Tensor
    source_hidden: Tensor | None
    hidden: Tensor
    reference: Reference
    skip_rates: SkipRates
    largest: float
    memory: Memory

    @classmethod
    def measure(
        cls,
        source: Model,
        model: Model,
        ids: Tensor,
        reporter: Reporter,
        memory: Memory,
        *,
        figures: bool = True,
        keep_walk: Callable[[str], KeptWalk | None] = lambda _: None,
    ) -> Comparison:
        """Run the tokens through both models, block by block.

        Args:
            source: the model that the result is compared with.
            model: the result.
            ids: the tokens, int64 [samples, length].
            reporter: receives progress.
            memory: memory budget.
            figures: measure perplexity, KL and top-1 agreement. If False, the tokens only make the
                reference, and the source is not run.
            keep_walk: returns the folder of a walk by a name for it; see `KeptWalk`.
        """
        from moe2edge.calibration import walk
        from moe2edge.calibration.router_observers import SkipObserver
        from moe2edge.evaluation import far_end
        from moe2edge.evaluation.margins import MarginObserver, choose_reference_rows
        from moe2edge.evaluation.ranges import RangeObserver
        from moe2edge.evaluation.reference import PARITY_STEPS, PREFILL, record

        length = min(ids.shape[1], PREFILL + PARITY_STEPS)
        skipped, margins, ranges = SkipObserver(), MarginObserver(length), RangeObserver()
        observers: list[Observer[Any]] = [skipped, margins, ranges]
        far = None
        positions = far_end.choose_positions(model, length)
        if positions is not None:
            texts = ids[: far_end.CANDIDATES].repeat(1, -(-len(positions) // ids.shape[1]))
            far = far_end.FarEndObserver(model, texts[:, : len(positions)], positions)
            observers.append(far)
        before = None
        if figures and model is not source:
            label = "evaluation: source"
            reporter.begin(label)
            kept = keep_walk("source")
            before = walk.observe(source, ids, (), reporter.advance, label, memory, kept)
        label, kept = "evaluation: result", keep_walk("result")
        reporter.begin(label)
        after = walk.observe(model, ids, observers, reporter.advance, label, memory, kept)
        if figures and before is None:
            before = after
        reporter.begin("recording the reference")
        reporter.log("recording the reference for verify")
        rows = choose_reference_rows(margins.result(), len(ids))
        reference = record(
            model,
            ids[rows, :length],
            None if before is None else list(walk.compute_logits(source, before[rows, :length])),
            after[rows, :length],
            None if far is None else far.result(),
        )
        found = skipped.result(), ranges.result()
        return cls(source, model, ids, before, after, reference, *found, memory)

    def measure_source(self) -> ResultRow:
        """Return the table row of the source."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        quality = None
        if self.source_hidden is not None:
            logits = walk.compute_logits(self.source, self.source_hidden)
            quality = metrics.measure(self.ids, logits, None)
        return ResultRow.from_model("source", self.source, quality)

    def measure_result(self) -> ResultRow:
        """Return the table row of the result in memory."""
        from moe2edge.calibration import walk

        quality = self.measure_quality(walk.compute_logits(self.model, self.hidden))
        return ResultRow.from_model("result, float32 activations", self.model, quality)

    def measure_quality(self, logits: Iterable[Tensor]) -> Quality | None:
        """Compare logits [length, vocabulary] of each sample with the source.

        Returns None if quality is not measured.
        """
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        if self.source_hidden is None:
            return None
        source = walk.compute_logits(self.source, self.source_hidden)
        return metrics.measure(self.ids, logits, source)


@dataclass(frozen=True)
class ResultRow:
    """A row of the result table: one form of the model.

    Attributes:
        form: name of the form: the source, the result in PyTorch, or the result in a runtime.
        nbytes: bytes of the weights; for a written output, bytes of its folder.
        parameters: number of parameters.
        active: number of parameters that one token uses.
        quality: figures on the evaluation text; None if they were not measured.
        parity: agreement of the runtime with PyTorch on the same packed numbers.
        skip_times: time that dynamic skipping saves in the runtime.
    """

    form: str
    nbytes: int
    parameters: int
    active: int
    quality: Quality | None = None
    parity: Parity | None = None
    skip_times: SkipTimes | None = None

    @classmethod
    def from_model(
        cls,
        form: str,
        model: Model,
        quality: Quality | None,
        nbytes: int | None = None,
        parity: Parity | None = None,
        skip_times: SkipTimes | None = None,
    ) -> ResultRow:
        """Make the row of a model; ``nbytes`` None counts the bytes of its weights."""
        size = model.nbytes if nbytes is None else nbytes
        counts = model.parameters, model.active_parameters
        return cls(form, size, *counts, quality, parity, skip_times)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResultRow:
        """Make the row that `dataclasses.asdict` gave."""
        from moe2edge.evaluation.skip_times import SkipTimes
        from moe2edge.evaluation.verify import Parity
        from moe2edge.numerics.metrics import Quality

        kinds = {"quality": Quality, "parity": Parity, "skip_times": SkipTimes}
        parts = {key: kind(**data[key]) if data[key] else None for key, kind in kinds.items()}
        return cls(**{**data, **parts})

    def cells(self) -> tuple[str, ...]:
        """Return the text of each column, in the order of `RESULT_HEADINGS`."""
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
