"""Whether an output holds what it should: every tensor, and the numbers in the real runtime.

Hashes say only that files did not change since the manifest was written. `verify` reads every
tensor back and runs the folder, and holds both against a reference that was recorded at export
from the model in memory: logits of a PyTorch run on the same packed numbers, and a digest of the
numbers of each tensor. With the source model at hand it also repeats the comparison with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe2edge.calibration import walk
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics import metrics
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline.target import Target
from moe2edge.runtime.memory import fits, give_back
from moe2edge.runtime.protocol import Runtime

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Not called *.safetensors: loaders of checkpoints read every such file of a folder.
REFERENCE = "moe2edge.reference"
SAMPLES = 2
PREFILL = 32
PARITY_STEPS = 32
# Logits of the exact runtime may differ from the reference by this much, absolute.
EXACT_TOLERANCE = 1e-4
# With the activations of the shipped setting (int8 or bfloat16): median relative error. Rounding
# moves near ties in routers, so a sound model may come near the first; a wrong kernel or layout
# is beyond the second.
SHIPPED_USUAL = 0.05
SHIPPED_TOLERANCE = 0.25
# Part of the memory that a run with float32 weights may take: one in so many.
RUNS_EXACT = 8


@dataclass(frozen=True)
class Parity:
    """How a runtime agrees with the reference on the recorded tokens.

    Attributes:
        exact: largest absolute difference of logits with float32 activations.
        shipped: relative error of logits as shipped, ``||a - b|| / ||b||``, median of positions;
            None if the machine cannot run the output.
        top1: part of positions with the same most likely token, as shipped; None likewise.
        positions: compared positions: the end of the prefill, then every cached step.
    """

    exact: float
    shipped: float | None = None
    top1: float | None = None
    positions: int = 0


@dataclass(frozen=True)
class Reference:
    """What an output is held against.

    Attributes:
        ids: int64 [samples, length].
        prefill: tokens given at once; the others follow one by one.
        logits: float32 [samples, length - prefill + 1, vocabulary], after the prefill and after
            each later token.
        digests: SHA-256 of the numbers of each tensor, by its name on disk.
        source_kl: KL to the source on ``ids``, nats per token; None if it was not measured.
    """

    ids: Tensor
    prefill: int
    logits: Tensor
    digests: dict[str, str]
    source_kl: float | None

    def save(self, folder: Path) -> None:
        """Write it beside an output; no time stamps, so equal references are equal files."""
        notes = {"prefill": self.prefill, "digests": self.digests, "source_kl": self.source_kl}
        metadata = {"reference": json.dumps(notes, sort_keys=True)}
        data = save({"ids": self.ids.contiguous(), "logits": self.logits.contiguous()}, metadata)
        (folder / REFERENCE).write_bytes(data)

    def of_stored(self, model: Model, stored: Model) -> Reference:
        """The reference of an output that holds the tensors of ``stored`` for ``model``.

        Only tensors that ``model`` does not have are read. Where quantized numbers are written
        dequantized, in a dtype that rounds them, the logits become those of the rounded numbers.
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
        """Read what `save` wrote.

        Raises:
            VerificationFailed: it is missing or damaged.
        """
        path = folder / REFERENCE
        if not path.exists():
            raise VerificationFailed(f"{folder} has no {REFERENCE}; it cannot be verified")
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["reference"])
                ids, logits = file.get_tensor("ids"), file.get_tensor("logits")
            return cls(ids, notes["prefill"], logits, notes["digests"], notes["source_kl"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise VerificationFailed(f"{path.name} cannot be read: {error}") from error


class MarginObserver:
    """How far the routing of each sample is from another choice, over its first tokens.

    Two runtimes that agree but for rounding may choose differently at a near tie, which says
    nothing about either; samples without one are the better reference. A margin is the gap between
    the logits of the last expert that is chosen and the first that is not, and with dynamic
    skipping the distance of a ratio of weights to its threshold.
    """

    def __init__(self, length: int) -> None:
        """For the first ``length`` tokens of each sample."""
        self._length = length
        self._least: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch."""
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

    def result(self) -> Tensor | None:
        """Least margin of each sample, float32; None if nothing is ever chosen."""
        blocks = [torch.cat(parts) for parts in self._least.values()]
        return torch.stack(blocks).min(0).values if blocks else None


def choose_reference_rows(margins: Tensor | None, samples: int) -> list[int]:
    """The samples that the reference is made of: those with the largest margins, in order."""
    count = min(SAMPLES, samples)
    if margins is None:
        return list(range(count))
    return sorted(margins.argsort(descending=True, stable=True)[:count].tolist())


def record(
    model: Model, ids: Tensor, source_logits: Sequence[Tensor] | None, hidden: Tensor
) -> Reference:
    """The reference of a model in memory.

    Args:
        model: as it will be written.
        ids: int64 [samples, length], at least `SAMPLES` samples.
        source_logits: logits of the source on each row of ``ids``; None: it is not compared with.
        hidden: hidden states of ``model`` after its last block on ``ids``.
    """
    logits = torch.stack(list(walk.compute_logits(model, hidden)))
    prefill = min(PREFILL, ids.shape[1] - 1)
    digests = {name: compute_digest(load_numbers(weight)) for name, _, weight in model.tensors()}
    kl = None
    if source_logits is not None:
        kl = metrics.measure(ids, logits, source_logits).kl or 0.0
    return Reference(ids, prefill, logits[:, prefill - 1 :].clone(), digests, kl)


def load_numbers(weight: Weight) -> Tensor | Quantized:
    """Numbers of a weight: integers and scales if it is quantized."""
    return weight.quantized() if weight.scheme else weight.load()


def compute_digest(value: Tensor | Quantized) -> str:
    """SHA-256 over dtype, shape and numbers of a tensor; of integers and scales if quantized."""
    found = hashlib.sha256()
    if isinstance(value, Quantized):
        found.update(f"{value.scheme.name} {value.scheme.group_size}\n".encode())
    for part in _parts(value):
        found.update(f"{part.dtype} {list(part.shape)}\n".encode())
        found.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _parts(value: Tensor | Quantized) -> Iterator[Tensor]:
    """The tensors that make up a value."""
    if not isinstance(value, Quantized):
        yield value
        return
    yield from (value.q, value.scales)
    if value.zeros is not None:
        yield value.zeros


def audit(target: Target, folder: Path, model: Model) -> int:
    """Hold every tensor that was written against the model in memory; returns their number.

    Raises:
        VerificationFailed: a tensor is missing, unknown, written twice, not quantized as it
            should be, or has other numbers.
    """
    expected = {name: weight for name, _, weight in model.tensors()}
    seen: set[str] = set()
    for name, value in target.tensors(folder):
        if name not in expected or name in seen:
            raise VerificationFailed(f"{name} was written and should not have been")
        seen.add(name)
        weight = expected[name]
        if isinstance(value, Quantized) != (weight.scheme is not None):
            form = "unquantized" if weight.scheme else "quantized"
            raise VerificationFailed(f"{name} was written {form}")
        if not _equal(value, load_numbers(weight)):
            raise VerificationFailed(f"{name} was written with other numbers")
    if missing := set(expected) - seen:
        raise VerificationFailed(f"{len(missing)} tensors were not written: {min(missing)}")
    return len(seen)


def _equal(a: Tensor | Quantized, b: Tensor | Quantized) -> bool:
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same = (torch.equal(*pair) for pair in zip(_parts(a), _parts(b), strict=True))
        return a.scheme == b.scheme and all(same)
    if isinstance(a, Quantized) or isinstance(b, Quantized):
        return False
    return a.dtype == b.dtype and torch.equal(a, b)


def check_tensors(reference: Reference, tensors: Iterable[tuple[str, Tensor | Quantized]]) -> int:
    """Hold the tensors of a folder against the recorded digests; returns their number.

    Raises:
        VerificationFailed: a tensor is missing or unknown, or its numbers changed.
    """
    left = dict(reference.digests)
    for name, value in tensors:
        if name not in left:
            raise VerificationFailed(f"{name} is in the folder, but was not exported")
        if compute_digest(value) != left.pop(name):
            raise VerificationFailed(f"{name} does not hold the numbers that were exported")
    if left:
        raise VerificationFailed(f"{len(left)} tensors are missing, such as {min(left)}")
    return len(reference.digests)


def measure_exact(
    reference: Reference, target: Target, folder: Path, within: int | None = None
) -> float:
    """Largest difference of logits with float32 activations.

    The output is run in its runtime; where that would take more than a small part of the machine's
    memory and the output can be read as a model, it is walked over block by block instead.

    Args:
        reference: what was recorded.
        target: that wrote the folder.
        folder: the output.
        within: bytes for the whole process; None: see `moe2edge.runtime.memory.find_limit`.

    Raises:
        VerificationFailed: it is too large.
    """
    model = target.streamed(folder)
    if model is None or fits(RUNS_EXACT * 4 * model.parameters, within):
        found = verify_output(reference, target.reopen(folder, exact=True))
    else:
        hidden = walk.observe(model, reference.ids, (), lambda *_: None, "verify")
        found = torch.stack(list(walk.compute_logits(model, hidden)))[:, reference.prefill - 1 :]
    difference = float((found - reference.logits).abs().max())
    tolerance = EXACT_TOLERANCE * max(1.0, float(reference.logits.abs().max()) / 10)
    if not difference <= tolerance:
        raise VerificationFailed(
            f"logits of the output differ from the reference by {difference:.2e}; "
            f"at most {tolerance:.1e} with float32 activations"
        )
    return difference


def measure_shipped(reference: Reference, runtime: Runtime, difference: float) -> Parity:
    """Run the recorded tokens as shipped: prefill, then cached steps.

    Args:
        reference: what was recorded.
        runtime: the folder as it is used.
        difference: of `measure_exact`.

    Raises:
        VerificationFailed: logits differ by more than the tolerance.
    """
    found = verify_output(reference, runtime)
    # The median: with rounded activations a near tie in a router may fall to the other expert,
    # which changes that position by far more than rounding does.
    errors = (found - reference.logits).norm(dim=-1) / reference.logits.norm(dim=-1)
    relative = float(errors.median())
    if not relative <= SHIPPED_TOLERANCE:
        raise VerificationFailed(
            f"logits as shipped differ from the reference by {relative:.1%}; "
            f"at most {SHIPPED_TOLERANCE:.0%}"
        )
    top1 = float((found.argmax(-1) == reference.logits.argmax(-1)).double().mean())
    return Parity(difference, relative, top1, found.shape[0] * found.shape[1])


def check_parity(
    reference: Reference, target: Target, folder: Path, within: int | None = None
) -> tuple[Parity, Runtime | None]:
    """Hold a folder against the reference, exactly and as shipped; and its runtime.

    What ``within`` bytes cannot run, and can be read as a model, is not run; there is no runtime.

    Raises:
        VerificationFailed: logits differ by more than the tolerances.
    """
    model = target.streamed(folder)
    difference = measure_exact(reference, target, folder, within)
    if model is not None and not fits(target.runtime_nbytes(model), within):
        return Parity(difference), None
    give_back()
    runtime = target.reopen(folder)
    return measure_shipped(reference, runtime, difference), runtime


def check_folder(
    target: Target, folder: Path, reference: Reference
) -> tuple[int, Parity, Runtime | None]:
    """All checks that need nothing but the folder: number of tensors, parity, and the runtime.

    What the machine has no memory to run is read block by block only, and there is no runtime.

    Raises:
        VerificationFailed: the folder cannot be read, or does not hold what was exported.
    """
    try:
        return check_tensors(reference, target.tensors(folder)), *check_parity(
            reference, target, folder
        )
    except InputError as error:
        raise VerificationFailed(f"{folder} cannot be read: {error}") from error


def verify_output(reference: Reference, runtime: Runtime) -> Tensor:
    """Logits of the recorded tokens in a runtime, in the shape of ``reference.logits``."""
    rows = []
    for row in reference.ids.tolist():
        steps = [runtime.start(row[: reference.prefill])]
        steps += [runtime.step(token) for token in row[reference.prefill :]]
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def check_source(reference: Reference, runtime: Runtime, source: Model) -> float:
    """KL of the runtime to the source on the recorded tokens, nats per token.

    Raises:
        InputError: the source has another vocabulary.
        VerificationFailed: it is clearly larger than at export, if it was measured then.
    """
    check_vocabulary(source, reference.logits.shape[-1])
    ids = reference.ids
    hidden = walk.observe(source, ids, (), lambda *_: None, "source")
    logits = walk.compute_logits(source, hidden)
    found = metrics.measure(ids, (runtime.logits(row[None])[0] for row in ids), logits).kl or 0.0
    if reference.source_kl is not None and found > reference.source_kl * 1.2 + 1e-3:
        raise VerificationFailed(
            f"KL to the source is {found:.5f} nats per token; it was {reference.source_kl:.5f} "
            "at export"
        )
    return found


def check_vocabulary(source: Model, size: int) -> None:
    """Refuse to compare with a source whose logits have another size.

    Raises:
        InputError: they have.
    """
    if source.vocabulary != size:
        raise InputError(
            f"the reference model has {source.vocabulary} entries in its vocabulary, the folder "
            f"{size}; name the model that it was made from"
        )
