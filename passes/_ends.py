"""Head and embedding in quantizing passes: the matrices outside of blocks.

They are many rows that do not depend on each other, so they are rounded a part of the rows at a
time. The embedding is known before the first block, so the walk sees it as rounded. So is a tensor
that is both embedding and head, since every block reads what is looked up in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.solver import Batches, EndSolver, Solved

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.numerics.rounding import Range

EndBits = Literal[8, 16]
# What runtimes hold: Q8_0 of llama.cpp has these groups.
END_SCHEME = Scheme(bits=8, group_size=32)
# Numbers of a matrix that are rounded at once, and bytes that each takes meanwhile.
PART_NUMBERS, PART_BYTES = 1 << 25, 24


def choose_end_bits(
    model: Model, head: EndBits | None, embedding: EndBits | None
) -> tuple[EndBits, EndBits]:
    """Return the bits of head and embedding, where None means not to quantize.

    One tensor that is both takes what is given for either.

    Raises:
        InputError: it is given two different numbers.
    """
    if is_tied(model):
        if None not in (head, embedding) and head != embedding:
            raise InputError(
                f"head: {head} and embedding: {embedding} differ, but {_get_name(model)} is both "
                "in this model; give one of them, or both the same"
            )
        head = embedding = head or embedding
    return head or 16, embedding or 16


def is_tied(model: Model) -> bool:
    """Return whether one tensor is embedding and head."""
    return model.head == model.architecture.embedding


def list_ends(
    model: Model, head: EndBits | None, embedding: EndBits | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """List the tensors to quantize by their names in ``rest``.

    Returns:
        The embedding, or what is both; and the head if it is a tensor of its own.

    Raises:
        InputError: see `choose_end_bits`.
        Unsupported: no head was found.
    """
    bits = choose_end_bits(model, head, embedding)
    if bits[0] != 16 and model.head is None:
        raise Unsupported(
            f"head: {bits[0]} does not work on {model.family.model_type}: its class in "
            "transformers names no head; leave head out"
        )
    early = (model.architecture.embedding,) if bits[1] != 16 else ()
    if bits[0] == 16 or model.head is None or model.head in early:
        return early, ()
    return early, (model.head,)


def describe_ends(model: Model, early: Sequence[str], late: Sequence[str]) -> list[str]:
    """Describe what `list_ends` returned."""
    both = "head and embedding, one tensor" if is_tied(model) else "embedding"
    names = [*(both for _ in early), *("head" for _ in late)]
    return [f"{END_SCHEME}: {name}" for name in names]


def advise_on_ends(model: Model, pattern: Any) -> str:
    """Return what to give for head or embedding where a rule names them; empty: it does not."""
    options = [(model.architecture.embedding, "embedding"), (model.head, "head")]
    named = [
        f"{option}: {END_SCHEME.bits}"
        for name, option in options
        if name is not None and pattern.search(model.names.get_rest_name(name))
    ]
    return f"; for what is outside of blocks, give {' and '.join(named)}" if named else ""


def check_ends(model: Model, names: Sequence[str]) -> None:
    """Refuse matrices that groups do not fit.

    Raises:
        InputError: names the matrix.
    """
    for name in names:
        if not fits_end(model, name):
            shape = model.rest[name].shape
            raise InputError(
                f"head and embedding are quantized in groups of {END_SCHEME.group_size}, which do "
                f"not divide the {shape[-1]} inputs of {name}; leave head and embedding out"
            )


def fits_end(model: Model, name: str) -> bool:
    """Return whether a tensor outside of blocks is a matrix that groups fit."""
    shape = model.rest[name].shape
    return len(shape) == 2 and shape[1] % END_SCHEME.group_size == 0


def _get_name(model: Model) -> str:
    return model.names.get_rest_name(model.architecture.embedding)


@dataclass(frozen=True)
class RoundedEnds(EndSolver):
    """Rounds matrices outside of blocks to nearest.

    Attributes:
        how: choice of scales.
    """

    how: Range = "absmax"

    def nbytes(self, weight: Weight) -> int:
        """Estimate the bytes of memory that solving one matrix takes."""
        return 2 * weight.count + PART_BYTES * min(weight.count, PART_NUMBERS)

    def solve(self, name: str, weight: Weight, inputs: Batches | None) -> Solved:
        """Round a matrix to nearest; inputs do not count."""
        from moe2edge.numerics.rounding import round_to_nearest

        def round_rows(rows: Tensor) -> tuple[Quantized, float]:
            found = round_to_nearest(rows, END_SCHEME, self.how)
            return found, float((found.dequantize() - rows).square_().sum())

        return solve_by_rows(name, weight, round_rows, lambda rows: float(rows.square().sum()))


def solve_by_rows(
    name: str,
    weight: Weight,
    solve: Callable[[Tensor], tuple[Quantized, float]],
    measure: Callable[[Tensor], float],
) -> Solved:
    """Solve a matrix a part of its rows at a time.

    Args:
        name: its name.
        weight: the matrix.
        solve: returns integers and loss of rows, float32 [n, in].
        measure: returns the size that the loss of rows is relative to.
    """
    import torch

    from moe2edge.numerics.grid import Quantized
    from moe2edge.runtime.decoder_blocks import check_finite

    lost = size = 0.0
    q, scales = [], []
    for rows in _split_rows(weight.load()):
        rows = check_finite(weight.name, rows.float())
        size += measure(rows)
        found, loss = solve(rows)
        lost += loss
        q.append(found.q)
        scales.append(found.scales)
    return Solved({name: Quantized(torch.cat(q), torch.cat(scales), END_SCHEME)}, loss=(lost, size))


def _split_rows(matrix: Tensor) -> Iterator[Tensor]:
    """Yield parts of the rows of a matrix."""
    import torch

    yield from torch.split(matrix, max(1, PART_NUMBERS // matrix.shape[1]))
