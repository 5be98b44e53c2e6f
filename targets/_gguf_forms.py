"""Forms in which GGUF files hold the tensors of a model: names, stacks, orders of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.weights import SourceBlocks, Weight, hide_integers
from moe2edge.targets._gguf_file import GgufFile, PlannedGguf
from moe2edge.targets._gguf_types import F32, MXFP4, BlockType, choose_type, decode, encode, hold

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Numbers that come back rounded are the same after a round or two.
_MOST_ROUNDS = 8
# Numbers of a tensor: Tensor or Quantized.
Value = Any


@dataclass(frozen=True)
class GgufForm:
    """GgufForm in which the tensors of one role are held.

    Attributes:
        names: names in the file, behind those of the block; several: it is cut into parts.
        split: returns its parts; None: it is held as it is.
        join: the inverse of it.
        precise: it is held in float32.
        whole: integers are held as plain numbers, as the form cuts across their groups.
        exact: `join` returns the very numbers that `split` was given.
    """

    names: tuple[str, ...]
    split: Callable[[Value], tuple[Value, ...]] | None = None
    join: Callable[[tuple[Value, ...]], Value] | None = None
    precise: bool = False
    whole: bool = False
    exact: bool = True

    def cut(self, value: Value) -> tuple[Value, ...]:
        """Return the parts of a tensor."""
        return (value,) if self.split is None else self.split(value)

    def restore(self, parts: tuple[Value, ...]) -> Value:
        """Return the tensor of which these are the parts."""
        return parts[0] if self.join is None else self.join(parts)


# Forms by role; roles of experts without their numbers, as in ``experts.gate``.
Forms = Mapping[str, GgufForm]


def reorder_rows(name: str, order: Callable[[int], Tensor], **more: Any) -> GgufForm:
    """Return a form that holds the rows of a tensor in another order, also those of integers.

    Args:
        name: its name in the file.
        order: returns the source's number of each row, for a number of rows.
        more: further attributes.
    """

    def split(value: Value) -> tuple[Value, ...]:
        return (select_rows(value, order(count_rows(value))),)

    def join(parts: tuple[Value, ...]) -> Value:
        return select_rows(parts[0], order(count_rows(parts[0])).argsort())

    return GgufForm((name,), split, join, **more)


def count_rows(value: Value) -> int:
    """Return the number of rows."""
    found: Any = value.scales if hasattr(value, "scales") else value
    return len(found)


def select_rows(value: Value, rows: Tensor) -> Value:
    """Return rows of a tensor or of integers."""
    from moe2edge.numerics.grid import Quantized

    if not isinstance(value, Quantized):
        return value[rows]
    zeros = None if value.zeros is None else value.zeros[rows]
    return Quantized(value.q[rows], value.scales[rows], value.scheme, zeros)


def concatenate_rows(parts: Iterable[Value]) -> Value:
    """Return the rows of several tensors, or of integers of one scheme, below each other."""
    import torch

    from moe2edge.numerics.grid import Quantized

    found = list(parts)
    if not isinstance(found[0], Quantized):
        return torch.cat(found)
    zeros = [one.zeros for one in found if one.zeros is not None]
    return Quantized(
        torch.cat([one.q for one in found]),
        torch.cat([one.scales for one in found]),
        found[0].scheme,
        torch.cat(zeros) if zeros else None,
    )


@dataclass(frozen=True)
class Member:
    """A tensor of the model that a tensor of the file holds, or holds a part of.

    Attributes:
        name: its name on disk.
        weight: the tensor.
        form: its form.
        part: number of the part.
    """

    name: str
    weight: Weight
    form: GgufForm
    part: int

    def load(self) -> Value:
        """Return the part."""
        value = self.weight.quantized() if self.weight.scheme else self.weight.load()
        return self.form.cut(value)[self.part]


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of the file.

    Attributes:
        name: its name there.
        kind: its type.
        members: what it holds: one tensor, or one of each expert.
        stacked: whether it is one of experts.
    """

    name: str
    kind: BlockType
    members: tuple[Member, ...]
    stacked: bool


# ---- from a model --------------------------------------------------------------------------------


def plan_tensors(model: Model, forms: Callable[[Block], Forms], rest: Forms) -> list[HeldTensor]:
    """Plan the tensors of a file.

    Args:
        model: the model as it is stored: every tensor in the scheme or dtype of its type.
        forms: returns the forms of a block.
        rest: forms of tensors outside of blocks, by their names in the model.

    Raises:
        Unsupported: a tensor has no form, or experts of a layer differ in type or shape.
    """
    found: dict[str, list[Member]] = {}
    for name, weight in model.rest.items():
        own = _get_form(rest, name, name)
        for part, held in enumerate(own.names):
            found[held] = [Member(model.names.get_rest_name(name), weight, own, part)]
    stacks = set()
    for block in model.blocks:
        table = forms(block)
        for role, weight in block.weights():
            kind, name = strip_number(role), model.disk_name(block, role)
            own = _get_form(table, kind, name)
            for part, held in enumerate(own.names):
                place = f"blk.{block.index}.{held}"
                found.setdefault(place, []).append(Member(name, weight, own, part))
                if kind != role:
                    stacks.add(place)
    return [_plan_tensor(name, tuple(own), name in stacks) for name, own in found.items()]


def strip_number(role: str) -> str:
    """Return a role without the number of the expert.

    >>> strip_number("experts.3.gate"), strip_number("shared.gate")
    ('experts.gate', 'shared.gate')
    """
    kind, _, rest = role.partition(".")
    return f"experts.{rest.partition('.')[2]}" if kind == "experts" else role


def _get_form(forms: Forms, role: str, name: str) -> GgufForm:
    form = forms.get(role)
    if form is None:
        raise Unsupported(
            f"llama.cpp has no tensor for {name} in models of this architecture, so target gguf "
            "cannot hold it"
        )
    return form


def _plan_tensor(name: str, members: tuple[Member, ...], stacked: bool) -> HeldTensor:
    kinds = [choose_type(one.name, one.weight) for one in members]
    shapes = [one.weight.shape for one in members]
    for one, kind, shape in zip(members, kinds, shapes, strict=True):
        if (kind, shape) != (kinds[0], shapes[0]):
            raise Unsupported(
                f"{one.name} has shape {list(shape)} and would be {kind.name}, "
                f"{members[0].name} has {list(shapes[0])} and {kinds[0].name}; a GGUF file holds "
                "all experts of a layer in one tensor: give them one width and one scheme"
            )
    if not stacked and len(members) > 1:
        raise AssertionError(f"{name} would hold several tensors")
    return HeldTensor(name, kinds[0], members, stacked)


def plan_file(held: Iterable[HeldTensor]) -> list[PlannedGguf]:
    """Plan how the tensors are written."""
    return [_plan_written(one) for one in held]


def _plan_written(held: HeldTensor) -> PlannedGguf:
    shape = _find_shape(held.members[0])

    def load() -> Iterator[Tensor]:
        for member in held.members:
            yield encode(member.name, member.load(), held.kind)

    stack = (len(held.members),) if held.stacked else ()
    return PlannedGguf(held.name, (*stack, *shape), held.kind, load)


def _find_shape(member: Member) -> tuple[int, ...]:
    """Return the shape of a part; numbers are not read."""
    import torch

    if member.form.split is None:
        return member.weight.shape
    blank = torch.empty(member.weight.shape, device="meta")
    shape: tuple[int, ...] = tuple(member.form.cut(blank)[member.part].shape)
    return shape


def store_weight(weight: Weight, form: GgufForm, name: str) -> Weight:
    """Return a weight in the scheme or dtype of the type that will hold it.

    Raises:
        Unsupported: no type does.
    """
    if weight.scheme is not None and form.whole:
        weight = replace(hide_integers(weight), dtype="F32")
    if weight.scheme is None and (form.precise or len(weight.shape) == 1):
        choose_type(name, weight)  # refuses what float32 would cut short
        weight = hold(weight, F32)
    weight = hold(weight, choose_type(name, weight))
    return weight if form.exact else replace(weight, load=_settle(weight.load, form))


def _settle(load: Callable[[], Tensor], form: GgufForm) -> Callable[[], Tensor]:
    """Return a reader of numbers that a file of this form gives back as they are."""

    def settled() -> Tensor:
        import torch

        value: Tensor = load()
        for _ in range(_MOST_ROUNDS):
            before, value = value, form.restore(form.cut(value))
            if torch.equal(before, value):
                break
        return value

    return settled


# ---- from a file ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The place in a file of a tensor of the model.

    Attributes:
        names: names there of its parts.
        form: its form.
        expert: its number, if it is one of an expert.
    """

    names: tuple[str, ...]
    form: GgufForm
    expert: int | None = None

    def make_weight(self, file: GgufFile, name: str, shape: tuple[int, ...]) -> Weight:
        """Return a handle on the tensor.

        Args:
            file: the file.
            name: of the tensor on disk.
            shape: its shape.

        Raises:
            VerificationFailed: the file has no such tensor, or one of another shape.
        """
        missing = [held for held in self.names if held not in file.tensors]
        if missing:
            raise VerificationFailed(f"{file.path} has no tensor {missing[0]}; export it again")
        kind = file.tensors[self.names[0]].kind
        if kind is MXFP4:
            return Weight(
                name, shape, "F32", SourceBlocks(lambda: self._read(file, shape), kind.name)
            )
        if kind.scheme is None:
            return Weight(name, shape, kind.name, lambda: self._read(file, shape))

        def load_quantized() -> Quantized:
            found: Quantized = self._read(file, shape)
            return found

        return Weight(
            name,
            shape,
            "F32",
            lambda: load_quantized().dequantize(),
            scheme=kind.scheme,
            load_quantized=load_quantized,
        )

    def _read(self, file: GgufFile, shape: tuple[int, ...]) -> Value:
        parts = []
        for n, name in enumerate(self.names):
            found = file.tensors[name]
            member = Member(name, make_blank(name, shape), self.form, n)
            expected = _find_shape(member)
            own = found.shape if self.expert is None else found.shape[1:]
            if own != expected or (self.expert is not None and self.expert >= found.shape[0]):
                raise VerificationFailed(
                    f"{name} in {file.path} has shape {list(found.shape)}, expected "
                    f"{list(expected)}{'' if self.expert is None else ' of each expert'}; export "
                    "it again"
                )
            data = file.read(name) if self.expert is None else file.read(name, self.expert, 1)
            parts.append(decode(data, expected, found.kind))
        return self.form.restore(tuple(parts))


def make_blank(name: str, shape: tuple[int, ...] | None) -> Weight:
    """Return a handle on a tensor of which only the shape counts."""

    def load() -> Tensor:
        raise AssertionError(f"{name} has no numbers")

    return Weight(name, shape or (), "F32", load)


def find_places(model: Model, forms: Callable[[Block], Forms], rest: Forms) -> dict[str, Place]:
    """Find where a file holds each tensor of a model, by its name on disk.

    Args:
        model: of the shape of what the file holds; numbers are not read.
        forms: as for `plan_tensors`.
        rest: as for `plan_tensors`.
    """
    found = {
        model.names.get_rest_name(name): Place(_get_form(rest, name, name).names, rest[name])
        for name in model.rest
    }
    for block in model.blocks:
        table = forms(block)
        for role, _ in block.weights():
            kind, name = strip_number(role), model.disk_name(block, role)
            own = _get_form(table, kind, name)
            held = tuple(f"blk.{block.index}.{one}" for one in own.names)
            number = int(role.split(".")[1]) if kind != role else None
            found[name] = Place(held, own, number)
    return found
