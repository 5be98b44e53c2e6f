"""Building a model from a config, the anatomy of its layers, and handles on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.anatomy import Anatomy
from moe2edge.model.architecture import Architecture, find_architecture
from moe2edge.model.block import Block
from moe2edge.model.config_parser import parse_config
from moe2edge.model.disk_names import DiskNames
from moe2edge.model.experts import PARTS, Dense, Expert
from moe2edge.model.family import Config, Family
from moe2edge.model.layers import MoELayer, Router, Shared
from moe2edge.model.model import EMBEDDING, FINAL_NORM, HEAD, Model
from moe2edge.model.parameter_names import Stored
from moe2edge.model.trial_run import try_config
from moe2edge.model.weights import SourceBlocks, Weight

if TYPE_CHECKING:
    from torch import Tensor

# take(name in files, shape) -> handle; a shape of None is not checked
TakeTensor = Callable[[str, tuple[int, ...] | None], Weight]


def build_model(
    family: Family, config: Config, take: TakeTensor, names: Iterable[str] = ()
) -> Model:
    """Build the model of a config.

    Args:
        family: the row of the config.
        config: contents of ``config.json``.
        take: returns the handle of a tensor by its name in files, and checks its shape.
        names: of all tensors in files; none: those that transformers would write.

    Raises:
        InputError: values of the config are wrong, or contradict each other.
        Unsupported: a value changes what the model computes in a way that is not supported.
    """
    given = config
    config = parse_config(family, given)
    architecture = find_architecture(family, config)
    found = DiskNames(architecture, names)
    count = len(architecture.anatomy)
    blocks = tuple(
        _Builder(family, config, architecture, found, take, n).build() for n in range(count)
    )
    if family.generic:
        rest = _take_rest(architecture, found, take)
        carried = {name: take(name, None) for name in found.list_carried(given)}
        try_config(architecture)
        return Model(family, config, blocks, rest, found, given, carried)
    geometry = family.geometry(config)
    table = (geometry.vocab, geometry.hidden)
    rest = {
        EMBEDDING: take(EMBEDDING, table),
        FINAL_NORM: take(FINAL_NORM, (geometry.hidden,)),
    }
    if not geometry.tied:
        rest[HEAD] = take(HEAD, table)
    return Model(family, config, blocks, rest, found, given)


def _take_rest(architecture: Architecture, names: DiskNames, take: TakeTensor) -> dict[str, Weight]:
    """Return the handles of all tensors outside of layers, by their names in the model."""
    model = architecture.model
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    inside = f"{architecture.layers_path}."
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(inside)}
    return {
        name: take(names.find(name).name, shape)
        for name, shape in shapes.items()
        if name not in tied or name in names.stored
    }


@dataclass(frozen=True)
class _Builder:
    """Builds block ``index``."""

    family: Family
    config: Config
    architecture: Architecture
    names: DiskNames
    take: TakeTensor
    index: int

    @property
    def anatomy(self) -> Anatomy:
        """Parts of the layer."""
        return self.architecture.anatomy[self.index]

    def build(self) -> Block:
        """Build the block."""
        weights: dict[str, dict[str, Weight]] = {}
        for role in self.anatomy.roles:
            kind, _, rest = role.partition(".")
            weights.setdefault(kind, {}).update(self._take_role(role, rest))
        body: Any = None
        if self.anatomy.experts is not None:
            body = self._build_experts(weights.pop("router"), weights.pop("shared", None))
        elif "dense" in weights:
            body = Dense(**weights.pop("dense"))
        attention, norms = weights.pop("attention", {}), weights.pop("norms", {})
        others = {f"{kind}.{name}": w for kind, own in weights.items() for name, w in own.items()}
        window = self.family.window_of(self.config, self.index)
        return Block(self.index, self.index, attention, norms, body, window, others)

    def _take_role(self, role: str, rest: str) -> dict[str, Weight]:
        """Return the handles of a role; several where files have it in parts."""
        path = self.anatomy.roles[role]
        stored = self._find(path)
        shape = self.anatomy.shapes[path]
        if not stored.steps:
            return {rest: self.take(stored.name, shape)}
        parts = [self.take(name, None) for name in stored.names_in_order()]
        if sum(part.count for part in parts) != prod(shape):
            raise InputError(
                f"{parts[0].name} and its further parts have shapes "
                f"{[list(part.shape) for part in parts]}, but config.json asks for {list(shape)}"
            )
        return {f"{rest}.part{n}": part for n, part in enumerate(parts)}

    def _find(self, path: str) -> Stored:
        return self.names.find(f"{self.architecture.layers_path}.{self.index}.{path}")

    def _build_experts(
        self, router: dict[str, Weight], shared: dict[str, Weight] | None
    ) -> MoELayer:
        scorer = router.pop("weight")
        axes = self.anatomy.per_expert
        found = Router(
            scorer,
            self.architecture.get_top_k(self.index),
            self.family.renormalizes(self.config),
            router,
            axes={suffix: axes[f"router.{suffix}"] for suffix in router},
            groups=self.family.count_groups(self.config),
        )
        experts = tuple(self._list_experts())
        beside = None
        if shared is not None:
            gate = shared.pop("router", None)
            beside = Shared(Dense(**shared), gate)
        return MoELayer.make_plain(found, experts, beside)

    # ---- experts -----------------------------------------------------------------------------

    def _list_experts(self) -> Iterator[Expert]:
        """Yield the experts, each with handles on matrices [out, in]."""
        form, count = self.anatomy.form, self.anatomy.count
        assert form is not None
        if form.normed:
            raise Unsupported(f"{self.family.model_type} is not supported: a norm follows experts")
        parts = PARTS if form.gated else PARTS[1:]
        columns = {name: self._list_part(name) for name in form.parts}
        for n in range(count):
            found = {name: column[n] for name, column in columns.items()}
            own = {part: found[part] for part in parts}
            own.setdefault("gate", _make_nothing(found["up"]))
            biases = {part: found[f"{part}_bias"] for part in parts if form.biased}
            yield Expert(**own, origin=n, biases=biases)

    def _list_part(self, part: str) -> list[Weight]:
        """Return the handles of one part of all experts."""
        form, count = self.anatomy.form, self.anatomy.count
        assert form is not None
        kind, bias = part.partition("_")[0], part.endswith("_bias")
        matrix = "down_proj" if kind == "down" else form.first
        matrix += "_bias" if bias else ""
        shape = self.anatomy.shapes[f"{self.anatomy.experts}.{matrix}"]
        halves = form.gated and kind != "down"
        own = _get_part_shape(shape, transposed=form.transposed and not bias, halves=halves)
        if self.names.has_single_experts(self.index, self.anatomy):
            return [self.take(self._get_expert_name(n, part), own) for n in range(count)]
        whole = self.take(self._find(f"{self.anatomy.experts}.{matrix}").name, shape)
        cut = _Cut(kind if halves else "", form.concatenated, form.transposed and not bias)
        return [_cut_expert(whole, n, own, cut) for n in range(count)]

    def _get_expert_name(self, n: int, part: str) -> str:
        return self.names.get_block_name(self.index, self.index, f"experts.{n}.{part}")


def _make_nothing(up: Weight) -> Weight:
    """Return a handle on no rows, which is the gate of an expert without one."""
    return up.change(
        name=f"no gate of {up.name}", shape=(0, *up.shape[1:]), load=lambda: up.load()[:0]
    )


def _get_part_shape(shape: tuple[int, ...], *, transposed: bool, halves: bool) -> tuple[int, ...]:
    """Return the shape [out, in] or [out] of one part of an expert.

    Args:
        shape: of the parameter of all experts.
        transposed: whether its matrices are [in, out].
        halves: whether it holds gate and up.
    """
    own = shape[:0:-1] if transposed else shape[1:]
    return (own[0] // 2, *own[1:]) if halves else own


@dataclass(frozen=True)
class _Cut:
    """Place of one part of an expert in its slice of a tensor of all experts.

    Attributes:
        half: gate or up; empty: the slice is the part.
        concatenated: whether gate stands above up; otherwise they alternate.
        transposed: whether the slice is [in, out].
    """

    half: str
    concatenated: bool
    transposed: bool

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the part [out, in] or [out] of a slice."""
        tensor = tensor.T if self.transposed else tensor
        if not self.half:
            return tensor
        if self.concatenated:
            size = len(tensor) // 2
            return tensor[:size] if self.half == "gate" else tensor[size:]
        return tensor[0::2] if self.half == "gate" else tensor[1::2]


def _cut_expert(whole: Weight, n: int, shape: tuple[int, ...], cut: _Cut) -> Weight:
    """Return a handle on a part of expert ``n`` in a tensor of all experts.

    Only what the part needs is read: the tensor is a map of its file.
    """
    part = f" {cut.half}" if cut.half else ""
    load_slice = whole.load_slice or (lambda index: whole.load()[index])

    def load() -> Tensor:
        return cut.apply(load_slice(n))

    # Blocks lie along the inputs, so each part of an expert has whole ones.
    blocks = whole.load if isinstance(whole.load, SourceBlocks) else None
    return whole.change(
        name=f"{whole.name}[{n}]{part}",
        shape=shape,
        load=load if blocks is None else replace(blocks, read=load),
    )
