"""Write one target, reopen it, and compare it with the model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.commands.export_stages import Extent
from moe2edge.errors import Unsupported
from moe2edge.evaluation.comparison import Comparison, ResultRow
from moe2edge.evaluation.folder_record import REFERENCE
from moe2edge.model import edits
from moe2edge.model.model import Model
from moe2edge.pipeline.holders import list_holders
from moe2edge.pipeline.registry import find_target, list_targets
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import give_back
from moe2edge.storage.companions import Companions
from moe2edge.storage.manifest import list_files
from moe2edge.storage.written_files import blame_disk

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.tokens import Tokens
    from moe2edge.evaluation.reference import Reference


@dataclass(frozen=True)
class WrittenTarget:
    """Folder of one target, complete but for what describes it.

    Attributes:
        row: the row of the table.
        reference: the reference of the output, without a record of the folder.
        digests: digests of what was to be written, by the names of files.
    """

    row: ResultRow
    reference: Reference
    digests: Mapping[str, str]


def write_target(
    target: Target,
    model: Model,
    folder: Path,
    companions: Companions,
    measured: Comparison,
    reporter: Reporter,
    calibration: Tokens | None,
    *,
    verify: Extent = "full",
) -> WrittenTarget:
    """Write one target, reopen it in its runtime, and compare it with the model in memory.

    Args:
        target: the target.
        model: what is written.
        folder: where.
        companions: files beside config and weights.
        measured: what it is compared with.
        reporter: receives progress.
        calibration: the calibration text; None: neither a pass nor a target needs it.
        verify: how much is compared.

    Raises:
        DiskFailed: the disk gives back something else than was written.
        VerificationFailed: the output differs from the model in memory.
    """
    reporter.begin(f"writing {target.name}")
    reporter.log(f"writing {target.name}")
    digests = companions.write(folder) | target.write(model, folder)
    if target.reads_calibration and calibration is not None:
        reporter.begin(f"calibrating {target.name}")
        digests |= target.calibrate(folder, _list_texts(target.name, calibration, reporter))
    reference = measured.reference.for_stored(model, target.stored(model))
    digests |= {REFERENCE: reference.save(folder)}
    with blame_disk(folder, digests):
        row = _check_target(target, model, folder, reference, measured, reporter, verify)
    return WrittenTarget(row, reference, digests)


def _list_texts(name: str, calibration: Tokens, reporter: Reporter) -> Iterator[list[int]]:
    """Yield the tokens of each sample, and report how far it is."""
    for n, row in enumerate(calibration.ids):
        reporter.advance(f"calibration: {name}", n, len(calibration.ids))
        yield row.tolist()
    reporter.advance(f"calibration: {name}", len(calibration.ids), len(calibration.ids))


def _check_target(
    target: Target,
    model: Model,
    folder: Path,
    reference: Reference,
    measured: Comparison,
    reporter: Reporter,
    extent: Extent,
) -> ResultRow:
    """Compare a folder with the model in memory; return its row of the table.

    A quick comparison reads no tensor back, and runs one prompt. All files are hashed later, for
    the manifest.
    """
    from moe2edge.evaluation import verify
    from moe2edge.evaluation.skip_times import measure_times

    name, whole = target.name, extent == "full"
    if whole:
        reporter.begin(f"checking {name}")
        reporter.log(f"checking the tensors of {name}")
        verify.audit(target, folder, target.stored(model), reporter.advance)
    target.check_derived(folder)
    give_back()
    size = sum(path.stat().st_size for path in list_files(folder).values())
    row = ResultRow.from_model(f"{name}, in its runtime", model, None, size)
    reporter.begin(f"running {name}")
    reporter.log(f"running {name} in its runtime")
    recorded = reference if whole else reference.keep_first()
    parity, shipped = verify.check_parity(recorded, target, folder, measured.memory.limit)
    if shipped is None:
        tensors = "its tensors were read back and checked" if whole else "a prompt was run"
        reporter.log(
            f"warning: {name} was not run, because that needs "
            f"{target.estimate(model).memory / 1e9:.1f} GB of memory; {tensors} block by block"
        )
        return replace(row, form=f"{name}, not run", parity=parity)
    if parity.shipped is not None and parity.shipped > verify.SHIPPED_USUAL:
        reporter.log(
            f"warning: logits of {name}, as shipped, differ from PyTorch by {parity.shipped:.1%} "
            f"(median), which is more than the usual {verify.SHIPPED_USUAL:.0%}; perplexity and KL "
            "show the cost"
        )

    if not whole:
        return replace(row, parity=parity)

    def logits() -> Iterator[Tensor]:
        for n, row in enumerate(measured.ids):
            reporter.advance(f"evaluation: {name}", n, len(measured.ids))
            yield shipped.logits(row[None])[0]
        reporter.advance(f"evaluation: {name}", len(measured.ids), len(measured.ids))

    quality = measured.measure_quality(logits())
    times = None
    if model.skips:
        reporter.log(f"timing {name} with and without skipping")
        text = measured.ids[0].tolist()
        times = measure_times(shipped, target.without_skipping(model, folder), text)
    return replace(row, quality=quality, parity=parity, skip_times=times)


def fit_for_targets(model: Model, targets: Sequence[Target], *, materialize: bool) -> Model:
    """Return ``model`` in a form that all targets hold: as it is, or materialized if requested.

    Raises:
        Unsupported: a target holds neither form, or no tied experts without ``materialize``.
    """
    for target in targets:
        _check_family(target, model)
    refusal = _find_refusal(model, targets)
    if refusal is None:
        return model
    if not model.tied_count:
        raise refusal
    whole = edits.materialize(model)
    other = _find_refusal(whole, targets)
    if other is not None and materialize:
        raise Unsupported(
            f"{refusal}; with tied experts materialized: {other}; if only some of the targets "
            "need that, export to each separately"
        ) from refusal
    if other is not None:
        raise refusal
    if not materialize:
        raise Unsupported(
            f"{refusal}; or materialize the tied experts with --materialize: "
            f"{describe_cost(model, whole)}"
        ) from refusal
    return whole


def _check_family(target: Target, model: Model) -> None:
    """Refuse a target that needs to know more of a family than is known.

    Raises:
        Unsupported: names the target and the family.
    """
    if not target.supports(model.family):
        every = (find_target(name) for name in list_targets())
        *others, last = [one.name for one in every if one.supports(model.family)]
        raise Unsupported(
            f"target {target.name} does not support {model.family.model_type} yet; targets "
            f"{', '.join(others)} and {last} write this model"
        )


def describe_cost(model: Model, whole: Model) -> str:
    """Describe the cost of materializing."""
    return f"{whole.nbytes / 1e6:.1f} MB in place of {model.nbytes / 1e6:.1f}"


def _find_refusal(model: Model, targets: Sequence[Target]) -> Unsupported | None:
    """Return why a target refuses a model, with the targets that hold it; None: none refuses."""
    for target in targets:
        try:
            target.accepts(model)
        except Unsupported as error:
            holders = list_holders(model, target.name)
            if all(holder in str(error) for holder in holders):
                return error
            return Unsupported(f"{error}; targets that hold it: {', '.join(holders)}")
    return None
