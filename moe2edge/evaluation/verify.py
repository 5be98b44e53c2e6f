"""Verify that an output holds what was exported: every tensor, and logits in its runtime.

Hashes of files only prove that nothing changed since the manifest was written. `verify` reads
every tensor back, runs the folder in its runtime, and compares both with a reference that was
recorded at export from the model in memory: logits of a PyTorch run on the same packed numbers,
and a digest of the numbers of each tensor. Given the source model, it also repeats the comparison
of the output with the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe2edge.calibration import walk
from moe2edge.calibration.observation import Resumable
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.model.weights import Weight
from moe2edge.numerics import metrics
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline.target import Target
from moe2edge.runtime.memory import fits, give_back
from moe2edge.runtime.protocol import Runtime

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Not named *.safetensors, because loaders of checkpoints read every such file of a folder.
REFERENCE = "moe2edge.reference"
# Recorded samples; tokens of the prefill, and tokens that are decoded after it.
SAMPLES = 2
PREFILL = 32
PARITY_STEPS = 32
# Largest absolute error of logits with float32 activations, for logits of up to 10; see
# `measure_exact`.
EXACT_TOLERANCE = 1e-4
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
    """

    exact: float
    shipped: float | None = None
    top1: float | None = None
    positions: int = 0


@dataclass(frozen=True)
class Reference:
    """Tokens, logits and digests that an output is compared with.

    Attributes:
        ids: the recorded tokens, int64 [samples, length].
        prefill: number of tokens of the prefill; the others follow one by one.
        logits: float32 [samples, length - prefill + 1, vocabulary], after the prefill and after
            each later token.
        digests: SHA-256 of the numbers of each tensor, by its name on disk.
        source_kl: KL to the source on ``ids``, in nats per token; None if it was not measured.
    """

    ids: Tensor
    prefill: int
    logits: Tensor
    digests: dict[str, str]
    source_kl: float | None

    def save(self, folder: Path) -> None:
        """Write the reference into an output folder.

        The file has no time stamps, so equal references are equal files.
        """
        notes = {"prefill": self.prefill, "digests": self.digests, "source_kl": self.source_kl}
        metadata = {"reference": json.dumps(notes, sort_keys=True)}
        data = save({"ids": self.ids.contiguous(), "logits": self.logits.contiguous()}, metadata)
        (folder / REFERENCE).write_bytes(data)

    def for_stored(self, model: Model, stored: Model) -> Reference:
        """Return the reference of an output that stores ``model`` as the tensors of ``stored``.

        Only tensors that ``model`` does not have are read. Where quantized numbers are written
        dequantized, in a dtype that rounds them, the logits become those of the rounded numbers.

        Args:
            model: the model that this reference was recorded from.
            stored: the same model, with the tensors that the target writes.
        """
        known = {id(weight): self.digests[name] for name, _, weight in model.tensors()}
        digests = {
            name: known.get(id(weight)) or compute_digest(load_numbers(weight))
            for name, _, weight in stored.tensors()
        }
        logits = self.logits
        if model.scheme is not None and stored.scheme is None:
            hidden = walk.observe(stored, self.ids, (), lambda *_: None, "reference")
            logits = torch.stack(list(walk.compute_logits(stored, hidden)))
            logits = logits[:, self.prefill - 1 :].clone()
        return replace(self, digests=digests, logits=logits)

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read the reference of an output folder, as `save` wrote it.

        Raises:
            VerificationFailed: the file is missing or damaged.
        """
        path = folder / REFERENCE
        if not path.exists():
            raise VerificationFailed(
                f"{folder} has no {REFERENCE}; it cannot be verified: export it again"
            )
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["reference"])
                ids, logits = file.get_tensor("ids"), file.get_tensor("logits")
            return cls(ids, notes["prefill"], logits, notes["digests"], notes["source_kl"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise VerificationFailed(
                f"{path.name} cannot be read: {error}; export {folder} again"
            ) from error


class MarginObserver(Resumable):
    """Finds the smallest routing margin of each sample, over its first tokens.

    A margin is the gap between the logits of the last expert that is chosen and the first that is
    not; with dynamic skipping, also the distance of a ratio of gate weights to its threshold. Two
    runtimes that differ only by rounding may choose different experts at a near tie, which says
    nothing about either. So samples without a near tie make the better reference.
    """

    def __init__(self, length: int) -> None:
        """Look at the first ``length`` tokens of each sample."""
        self._length = length
        self._least: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            return
        top_k, below = layer.router.top_k, layer.router.skip_below
        first = routing.logits.view(*trace.inputs.shape[:2], -1)[:, : self._length]
        best = first.topk(min(top_k + 1, layer.router_rows)).values
        margins = best[..., top_k - 1 : top_k] - best[..., top_k:]  # empty where all are chosen
        if below:
            ratios = (best[..., 1:top_k] - best[..., :1]).exp()
            margins = torch.cat([margins, (ratios - torch.tensor(below)).abs()], dim=-1)
        if margins.shape[-1]:
            least = margins.flatten(1).min(1).values
            self._least.setdefault(trace.block.index, []).append(least)

    def save(self, block: Block) -> Any:
        """Return the margins in a block."""
        return self._least.get(block.index)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the margins in a block."""
        if saved is not None:
            self._least[block.index] = saved

    def result(self) -> Tensor | None:
        """Return the smallest margin of each sample, float32 [samples].

        Returns None if no router has a choice, because every expert runs on every token.
        """
        blocks = [torch.cat(parts) for parts in self._least.values()]
        return torch.stack(blocks).min(0).values if blocks else None


def choose_reference_rows(margins: Tensor | None, samples: int) -> list[int]:
    """Choose the samples of the reference: those with the largest margins, in order."""
    count = min(SAMPLES, samples)
    if margins is None:
        return list(range(count))
    return sorted(margins.argsort(descending=True, stable=True)[:count].tolist())


def record(
    model: Model, ids: Tensor, source_logits: Sequence[Tensor] | None, hidden: Tensor
) -> Reference:
    """Record the reference of a model in memory.

    Args:
        model: the model as it will be written.
        ids: the tokens, int64 [samples, length]; see `choose_reference_rows`.
        source_logits: logits of the source [length, vocabulary] on each row of ``ids``; None does
            not compare with the source.
        hidden: hidden states of ``model`` after its last block on ``ids``, float32
            [samples, length, hidden].
    """
    logits = torch.stack(list(walk.compute_logits(model, hidden)))
    prefill = min(PREFILL, ids.shape[1] - 1)
    digests = {name: compute_digest(load_numbers(weight)) for name, _, weight in model.tensors()}
    kl = None
    if source_logits is not None:
        kl = metrics.measure(ids, logits, source_logits).kl or 0.0
    return Reference(ids, prefill, logits[:, prefill - 1 :].clone(), digests, kl)


def load_numbers(weight: Weight) -> Tensor | Quantized:
    """Load the numbers of a weight: integers and scales if it is quantized."""
    return weight.quantized() if weight.scheme else weight.load()


def compute_digest(value: Tensor | Quantized) -> str:
    """Compute the SHA-256 of dtype, shape and numbers; of integers and scales if quantized."""
    digest = hashlib.sha256()
    if isinstance(value, Quantized):
        digest.update(f"{value.scheme.name} {value.scheme.group_size}\n".encode())
    for part in _list_parts(value):
        digest.update(f"{part.dtype} {list(part.shape)}\n".encode())
        digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _list_parts(value: Tensor | Quantized) -> Iterator[Tensor]:
    """Yield the tensors that make up a value."""
    if not isinstance(value, Quantized):
        yield value
        return
    yield from (value.q, value.scales)
    if value.zeros is not None:
        yield value.zeros


def audit(target: Target, folder: Path, model: Model) -> int:
    """Compare every tensor that was written with the model in memory.

    Args:
        target: the target that wrote the folder.
        folder: the output.
        model: the model with the tensors that the target stores.

    Returns:
        The number of tensors.

    Raises:
        VerificationFailed: a tensor is missing, unknown, written twice, not quantized as it
            should be, or has other numbers.
    """
    expected = {name: weight for name, _, weight in model.tensors()}
    seen: set[str] = set()
    for name, value in target.tensors(folder):
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
        if not _are_equal(value, load_numbers(weight)):
            raise VerificationFailed(f"{name} was written with other values than the model has")
    if missing := set(expected) - seen:
        raise VerificationFailed(f"{len(missing)} tensors were not written: {min(missing)}")
    return len(seen)


def _are_equal(a: Tensor | Quantized, b: Tensor | Quantized) -> bool:
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same = (torch.equal(*pair) for pair in zip(_list_parts(a), _list_parts(b), strict=True))
        return a.scheme == b.scheme and all(same)
    if isinstance(a, Quantized) or isinstance(b, Quantized):
        return False
    return a.dtype == b.dtype and torch.equal(a, b)


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
) -> float:
    """Measure the largest difference of logits with float32 activations.

    The output runs in its runtime. If that would take more than 1 / `RUNS_EXACT` of the memory and
    the output can be read as a model, it runs block by block in PyTorch instead.

    Args:
        reference: the record to compare with.
        target: the target that wrote the folder.
        folder: the output.
        within: memory of the whole process in bytes; None: see
            `moe2edge.runtime.memory.find_limit`.

    Returns:
        The largest absolute difference.

    Raises:
        VerificationFailed: the difference is larger than `EXACT_TOLERANCE`, which is scaled up
            for logits larger than 10.
    """
    model = target.streamed(folder)
    if model is None or fits(RUNS_EXACT * 4 * model.parameters, within):
        logits = run_recorded_tokens(reference, target.reopen(folder, exact=True))
    else:
        hidden = walk.observe(model, reference.ids, (), lambda *_: None, "verify")
        logits = torch.stack(list(walk.compute_logits(model, hidden)))[:, reference.prefill - 1 :]
    difference = float((logits - reference.logits).abs().max())
    tolerance = EXACT_TOLERANCE * max(1.0, float(reference.logits.abs().max()) / 10)
    if not difference <= tolerance:
        raise VerificationFailed(
            f"logits of the output differ from the reference by {difference:.2e}; expected at most "
            f"{tolerance:.1e} with float32 activations"
        )
    return difference


def measure_shipped(reference: Reference, runtime: Runtime, difference: float) -> Parity:
    """Run the recorded tokens as shipped, and measure the error of logits.

    Args:
        reference: the record to compare with.
        runtime: the folder, opened as it is used.
        difference: the result of `measure_exact`, for `Parity.exact`.

    Raises:
        VerificationFailed: the median relative error is larger than `SHIPPED_TOLERANCE`.
    """
    logits = run_recorded_tokens(reference, runtime)
    # The median, because rounded activations may flip a near tie in a router, which changes that
    # position by far more than rounding does.
    errors = (logits - reference.logits).norm(dim=-1) / reference.logits.norm(dim=-1)
    relative = float(errors.median())
    if not relative <= SHIPPED_TOLERANCE:
        raise VerificationFailed(
            f"logits as shipped differ from the reference by {relative:.1%} (median); expected at "
            f"most {SHIPPED_TOLERANCE:.0%}"
        )
    top1 = float((logits.argmax(-1) == reference.logits.argmax(-1)).double().mean())
    return Parity(difference, relative, top1, logits.shape[0] * logits.shape[1])


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
    difference = measure_exact(reference, target, folder, within)
    if model is not None and not fits(target.estimate(model).memory, within):
        return Parity(difference), None
    give_back()
    runtime = target.reopen(folder)
    return measure_shipped(reference, runtime, difference), runtime


def check_folder(
    target: Target, folder: Path, reference: Reference
) -> tuple[int, Parity, Runtime | None]:
    """Run all checks that need only the folder.

    An output that needs more memory than the machine has is read block by block, and not run.

    Returns:
        The number of tensors, the agreement, and the opened runtime; None for a runtime that was
        not run.

    Raises:
        VerificationFailed: the folder cannot be read, or does not hold what was exported.
    """
    try:
        return check_tensors(reference, target.tensors(folder)), *check_parity(
            reference, target, folder
        )
    except InputError as error:
        raise VerificationFailed(f"{folder} cannot be read: {error}") from error


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
