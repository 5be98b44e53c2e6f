"""Verify that an output holds what was exported: every file, every tensor, logits in its runtime.

Hashes of files only prove that nothing changed since the manifest was written. `verify_output`
compares the manifest with the reference that was recorded at export from the model in memory,
reads every tensor back, compares files with those that they derive from, and runs the folder in
its runtime. Given the source model, it also repeats the comparison of the output with the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe2edge.calibration import walk
from moe2edge.errors import InputError, Moe2EdgeError, VerificationFailed
from moe2edge.evaluation.far_end import PlacedRuntime, observe_far_end
from moe2edge.evaluation.folder_record import REFERENCE
from moe2edge.evaluation.reference import Reference
from moe2edge.evaluation.tensor_digests import are_equal, compute_digest, load_numbers
from moe2edge.model.model import Model
from moe2edge.model.stored_layout import is_carried
from moe2edge.numerics import metrics
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline import registry
from moe2edge.pipeline.target import Target
from moe2edge.runtime.memory import fits, give_back
from moe2edge.runtime.protocol import Runtime
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.manifest import (
    MANIFEST,
    Artifact,
    check_manifest_files,
    list_harmless_changes,
    open_artifact,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.progress import Advance

# Largest absolute error of logits with float32 activations, for logits of up to 10; see
# `measure_exact`.
EXACT_TOLERANCE = 1e-4
# The same between steps and a run of the whole text, both in the runtime, in the median of tokens,
# for families whose blocks are not all known: state-space and linear attention take other formulas
# for a step than for a text. In transformers' nemotron_h and qwen3_next that makes 4e-4, and more
# where a router comes to a near tie.
STEPS_TOLERANCE = 1e-3
# This share of the steps may be no further apart than ten times that.
STEPS_WITHOUT_TIES = 0.8
# Median relative error with the activations as shipped (int8 or bfloat16). Rounding changes the
# choices of routers at near ties, so a correct model may come close to the first; a wrong kernel
# or layout is beyond the second.
SHIPPED_USUAL = 0.05
SHIPPED_TOLERANCE = 0.25
# A run with float32 weights may take 1 / RUNS_EXACT of the memory.
RUNS_EXACT = 8


@dataclass(frozen=True)
class Parity:
    """Agreement of a runtime with the reference on the recorded tokens.

    Attributes:
        exact: largest absolute difference of logits with float32 activations.
        shipped: relative error of logits as shipped, ``||a - b|| / ||b||``, median over positions;
            None if the machine has too little memory to run the output.
        top1: fraction of positions with the same most likely token, as shipped; None as above.
        positions: number of compared positions: the end of the prefill, then every cached step.
        far: as ``exact``, at the far end of the context; None if it was not run there.
        whole_cache: as ``shipped``, but with keys and values cached without rounding; None if they
            are as shipped, or it was not run.
    """

    exact: float
    shipped: float | None = None
    top1: float | None = None
    positions: int = 0
    far: float | None = None
    whole_cache: float | None = None


def audit(target: Target, folder: Path, model: Model, advance: Advance = lambda *_: None) -> int:
    """Compare every tensor that was written with the model in memory.

    Args:
        target: the target that wrote the folder.
        folder: the output.
        model: the model with the tensors that the target stores.
        advance: receives progress.

    Returns:
        The number of tensors.

    Raises:
        VerificationFailed: a tensor is missing, unknown, written twice, not quantized as it
            should be, or has other numbers, in the model or in other parts of it.
    """
    expected = {name: weight for name, _, weight in model.tensors()}
    seen: set[str] = set()
    for name, value in target.tensors(folder):
        advance(f"checking {target.name}", len(seen), len(expected))
        if name not in expected or name in seen:
            raise VerificationFailed(
                f"{name} was written, but is not a tensor of the model, or was written twice"
            )
        seen.add(name)
        weight = expected[name]
        if isinstance(value, Quantized) != (weight.scheme is not None):
            forms = ("unquantized", "quantized")
            found, planned = forms if weight.scheme else forms[::-1]
            raise VerificationFailed(f"{name} was written {found}, expected {planned}")
        if not are_equal(value, load_numbers(weight)):
            raise VerificationFailed(f"{name} was written with other values than the model has")
    if missing := set(expected) - seen:
        raise VerificationFailed(f"{len(missing)} tensors were not written: {min(missing)}")
    advance(f"checking {target.name}", len(seen), len(expected))
    return len(seen) + _audit_carried(target, folder, model)


def _audit_carried(target: Target, folder: Path, model: Model) -> int:
    """Compare the tensors of other parts of a model that are written as they are, byte by byte."""
    carried = {name: w for name, w in model.carried.items() if is_carried(model, name)}
    written = target.streamed(folder) if carried else None
    if written is None:
        return 0
    for name, weight in carried.items():
        again = written.carried.get(name)
        if again is None or not are_equal(again.load(), weight.load()):
            raise VerificationFailed(f"{name}, of another part of the model, was not written as is")
    return len(carried)


def check_tensors(reference: Reference, tensors: Iterable[tuple[str, Tensor | Quantized]]) -> int:
    """Compare the tensors of a folder with the recorded digests.

    Returns:
        The number of tensors.

    Raises:
        VerificationFailed: a tensor is missing or unknown, or its numbers changed.
    """
    missing = dict(reference.digests)
    for name, value in tensors:
        if name not in missing:
            raise VerificationFailed(
                f"{name} is in the folder, but was not exported; export it again"
            )
        if compute_digest(value) != missing.pop(name):
            raise VerificationFailed(
                f"{name} does not hold the values that were exported; export it again"
            )
    if missing:
        raise VerificationFailed(
            f"{len(missing)} tensors are missing, such as {min(missing)}; export it again"
        )
    return len(reference.digests)


def measure_exact(
    reference: Reference, target: Target, folder: Path, within: int | None = None
) -> Parity:
    """Measure the largest differences of logits with float32 activations.

    The output runs in its runtime. If that would take more than 1 / `RUNS_EXACT` of the memory and
    the output can be read as a model, it runs block by block in PyTorch instead.

    Args:
        reference: the record to compare with.
        target: the target that wrote the folder.
        folder: the output.
        within: memory of the whole process in bytes; None: see
            `moe2edge.runtime.memory.find_limit`.

    Returns:
        The agreement so far: nothing was run as shipped.

    Raises:
        VerificationFailed: a difference is larger than `EXACT_TOLERANCE`, which is scaled up
            for logits larger than 10, and by drift; or steps differ by more than `STEPS_TOLERANCE`.
    """
    model, far, there, drift = target.streamed(folder), reference.far, None, 0.0
    if model is None or fits(RUNS_EXACT * 4 * model.parameters, within):
        runtime = target.reopen(folder, exact=True)
        logits = run_recorded_tokens(reference, runtime)
        if model is not None and model.family.generic:
            steps, logits = logits, runtime.logits(reference.ids)[:, reference.prefill - 1 :]
            apart = (steps - logits).abs().amax(-1).flatten()
            usual, most = apart.median(), apart.quantile(STEPS_WITHOUT_TIES)
            for found, tolerance in ((usual, 1), (most, 10)):
                place = " when it runs token by token"
                _check_difference(float(found), logits, place, tolerance * STEPS_TOLERANCE)
        if far is not None and isinstance(runtime, PlacedRuntime):
            there, drift = runtime.logits_at(far.ids, far.positions), runtime.drift
    else:
        logits, there = observe_far_end(model, reference.ids, far, "verify")
        logits = logits[:, reference.prefill - 1 :]
    if logits.shape != reference.logits.shape:
        raise VerificationFailed(
            f"logits of the output have shape {list(logits.shape)}, the reference has "
            f"{list(reference.logits.shape)}; export it again"
        )
    difference = float((logits - reference.logits).abs().max())
    _check_difference(difference, reference.logits, "")
    if far is None or there is None:
        return Parity(difference)
    distance = far.measure(there)
    last = int(far.positions[-1])
    _check_difference(distance, far.logits, f" at position {last}", EXACT_TOLERANCE + last * drift)
    return Parity(difference, far=distance)


def _check_difference(
    difference: float, expected: Tensor, place: str, most: float = EXACT_TOLERANCE
) -> None:
    """Hold a difference of logits against ``most``, for logits of up to 10.

    Raises:
        VerificationFailed: it is larger, or no number.
    """
    tolerance = most * max(1.0, float(expected.abs().max()) / 10)
    if not difference <= tolerance:
        raise VerificationFailed(
            f"logits of the output differ from the reference by {difference:.2e}{place}; expected "
            f"at most {tolerance:.1e} with float32 activations"
        )


def measure_shipped(reference: Reference, runtime: Runtime, parity: Parity) -> Parity:
    """Run the recorded tokens as shipped, and measure the error of logits.

    Args:
        reference: the record to compare with.
        runtime: the folder, opened as it is used.
        parity: the result of `measure_exact`.

    Raises:
        VerificationFailed: the median relative error is larger than `SHIPPED_TOLERANCE`.
    """
    logits = run_recorded_tokens(reference, runtime)
    relative = _measure_median_error(logits, reference.logits)
    if not logits.isfinite().all():
        raise VerificationFailed(explain_overflow(runtime, reference.ids))
    if not relative <= SHIPPED_TOLERANCE:
        raise VerificationFailed(
            f"logits as shipped differ from the reference by {relative:.1%} (median); expected at "
            f"most {SHIPPED_TOLERANCE:.0%}"
        )
    top1 = float((logits.argmax(-1) == reference.logits.argmax(-1)).double().mean())
    count = logits.shape[0] * logits.shape[1]
    return replace(parity, shipped=relative, top1=top1, positions=count)


def _measure_median_error(logits: Tensor, expected: Tensor) -> float:
    """Measure the relative error of logits at each position, and return the median.

    The median, because rounded activations may flip a near tie in a router, which changes that
    position by far more than rounding does.
    """
    # The bound counts where all logits are zero, as those behind a norm of zeros.
    sizes = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((logits - expected).norm(dim=-1) / sizes).median())


def measure_whole_cache(
    reference: Reference, target: Target, folder: Path, parity: Parity
) -> Parity:
    """Measure the error without rounding of cached keys and values, if there is some."""
    runtime = target.with_whole_cache(folder)
    if runtime is None:
        return parity
    error = _measure_median_error(run_recorded_tokens(reference, runtime), reference.logits)
    return replace(parity, whole_cache=error)


def explain_overflow(runtime: Runtime, ids: Tensor) -> str:
    """Say where logits became infinite or NaN, although those of the reference are finite."""
    dtype, place = "", "the logits"
    if isinstance(runtime, TorchRuntime):
        dtype, place = runtime.dtype, runtime.find_overflow(ids) or place
    if dtype != "float16":
        return f"{place} as shipped are not finite, although the reference is; please report it"
    return (
        f"{place} overflow in float16, whose largest number is {torch.finfo(torch.float16).max:.0f}"
        "; convert the source to bfloat16 (dtype=torch.bfloat16 in from_pretrained, then "
        "save_pretrained), and export that"
    )


def check_parity(
    reference: Reference, target: Target, folder: Path, within: int | None = None
) -> tuple[Parity, Runtime | None]:
    """Compare a folder with the reference: with float32 activations, then as shipped.

    If the output needs more than ``within`` bytes to run and can be read as a model, it is not
    run as shipped.

    Returns:
        The agreement, and the opened runtime; None for a runtime that was not run.

    Raises:
        VerificationFailed: logits differ by more than the tolerances.
    """
    model = target.streamed(folder)
    parity = measure_exact(reference, target, folder, within)
    if model is not None and not fits(target.estimate(model).memory, within):
        return parity, None
    give_back()
    runtime = target.reopen(folder)
    parity = measure_shipped(reference, runtime, parity)
    return measure_whole_cache(reference, target, folder, parity), runtime


@dataclass(frozen=True)
class Verification:
    """Result of `verify_output`.

    Attributes:
        artifact: the folder.
        reference: what was recorded at export.
        tensors: number of tensors, all of which are equal to what was exported.
        parity: agreement of the runtime with the reference.
        runtime: the opened runtime; None if it was not run.
        notes: changes of the folder that do not change the model.
        unchecked: what could not be looked at, with the reason.
    """

    artifact: Artifact
    reference: Reference
    tensors: int
    parity: Parity
    runtime: Runtime | None
    notes: tuple[str, ...]
    unchecked: tuple[str, ...]


def verify_output(folder: Path) -> Verification:
    """Run all checks that need only the folder.

    An output that needs more memory than the machine has is read block by block, and not run.

    Raises:
        InputError: it is not an output folder.
        VerificationFailed: the folder cannot be read, or does not hold what was exported.
    """
    artifact = open_output(folder)
    if differences := check_manifest_files(artifact):
        unlisted = all(difference.endswith("move it away") for difference in differences)
        remedy = "" if unlisted else "; export or download it again"
        raise VerificationFailed(f"{folder}: {'; '.join(differences)}{remedy}")
    reference = Reference.read(folder)
    check_record(artifact, reference)
    target = registry.make_target(artifact.target, artifact.options)
    count, parity, runtime = check_folder(target, folder, reference)
    notes = tuple(list_harmless_changes(artifact))
    unchecked = tuple(_list_unchecked(target, reference, parity))
    return Verification(artifact, reference, count, parity, runtime, notes, unchecked)


def check_folder(
    target: Target, folder: Path, reference: Reference
) -> tuple[int, Parity, Runtime | None]:
    """Compare tensors, derived files, tokenizer and logits of a folder with a reference.

    Returns:
        The number of tensors, the agreement, and the opened runtime; None for a runtime that was
        not run.

    Raises:
        VerificationFailed: the folder cannot be read, or does not hold what was exported.
    """
    try:
        count = check_tensors(reference, target.tensors(folder))
        target.check_derived(folder)
        if reference.record is not None:
            reference.record.check_tokenizer(folder)
        return count, *check_parity(reference, target, folder)
    except InputError as error:
        raise VerificationFailed(f"{folder} cannot be read: {error}") from error


def open_output(folder: Path) -> Artifact:
    """Open a folder as `open_artifact` does, where damage is the folder's fault.

    Raises:
        InputError: it is not an output folder.
        VerificationFailed: it is one, but its manifest is damaged.
    """
    try:
        return open_artifact(folder)
    except InputError as error:
        if (folder / REFERENCE).is_file() and (folder / MANIFEST).is_file():
            raise VerificationFailed(str(error)) from error
        raise


def check_record(artifact: Artifact, reference: Reference) -> None:
    """Compare the manifest with what was recorded of the folder at export, if that was done.

    Raises:
        VerificationFailed: names the files and sections that differ, and where it can be told,
            the tensor or table.
    """
    if reference.record is None:
        return
    found = reference.record.list_differences(artifact)
    if not found:
        return
    remedy = "; export or download it again"
    # With a changed config the tensors cannot be told apart.
    if not any(name.endswith(".json") for name in found):
        remedy = _describe_damage(artifact, reference) or remedy
    raise VerificationFailed(f"{artifact.folder}: {'; '.join(found.values())}{remedy}")


def _describe_damage(artifact: Artifact, reference: Reference) -> str:
    """Describe the first tensor or table that differs; empty if none does."""
    folder = artifact.folder
    try:
        target = registry.make_target(artifact.target, artifact.options)
        check_tensors(reference, target.tensors(folder))
        target.check_derived(folder)
    except Moe2EdgeError as error:
        return f": {error}"
    # Changed bytes may make any library that reads them fail in any way; the verdict stands.
    except Exception:
        return ""
    return ""


def _list_unchecked(target: Target, reference: Reference, parity: Parity) -> Iterator[str]:
    """Yield what could not be looked at, with the reason."""
    record = reference.record
    if record is None:
        yield (
            "configs, tokenizer, graph and sections of the manifest were compared with the "
            "manifest and with each other only: the version that wrote this output recorded nothing"
        )
        yield "the far end of the context was not run: nothing was recorded there"
    elif record.tokens is None:
        yield "the tokenizer was not run: at export it could not encode the text for that"
    if reference.far is not None and parity.far is None:
        yield f"the far end of the context was not run: target {target.name} cannot do that here"
    if parity.shipped is None:
        yield "the output was not run as shipped: this machine has too little memory"


def run_recorded_tokens(reference: Reference, runtime: Runtime) -> Tensor:
    """Run the recorded tokens in a runtime: prefill, then cached steps.

    Returns:
        Logits in the shape of ``reference.logits``.
    """
    rows = []
    for row in reference.ids.tolist():
        steps = [runtime.start(row[: reference.prefill])]
        steps += [runtime.step(token) for token in row[reference.prefill :]]
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def check_source(reference: Reference, runtime: Runtime, source: Model) -> float:
    """Measure the KL of the runtime to the source on the recorded tokens.

    Returns:
        KL in nats per token.

    Raises:
        InputError: the source has another vocabulary.
        VerificationFailed: the KL is clearly larger than at export, if it was measured then.
    """
    check_vocabulary(source, reference.logits.shape[-1])
    ids = reference.ids
    hidden = walk.observe(source, ids, (), lambda *_: None, "source")
    logits = walk.compute_logits(source, hidden)
    kl = metrics.measure(ids, (runtime.logits(row[None])[0] for row in ids), logits).kl or 0.0
    if reference.source_kl is not None and kl > reference.source_kl * 1.2 + 1e-3:
        raise VerificationFailed(
            f"KL to the source is {kl:.5f} nats per token; it was {reference.source_kl:.5f} at "
            "export. Check that --reference names the model that the folder was made from"
        )
    return kl


def check_vocabulary(source: Model, size: int) -> None:
    """Check that a source has a vocabulary of ``size`` entries, so that logits compare.

    Raises:
        InputError: it has not.
    """
    if source.vocabulary != size:
        raise InputError(
            f"the reference model has {source.vocabulary} entries in its vocabulary, the folder "
            f"has {size}; name the model that the folder was made from"
        )
