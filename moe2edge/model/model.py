"""A checkpoint as a value: blocks, routers, experts, every tensor a lazy handle.

Nothing here reads a number. A pass returns a new `Model` in which only the changed parts are new;
dropping experts is slicing of tuples, quantizing swaps handles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.architecture import Architecture, find_architecture
from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.description import describe_block
from moe2edge.model.disk_names import DiskNames
from moe2edge.model.experts import Dense
from moe2edge.model.family import Family
from moe2edge.model.kinds import look_at_blocks
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme

# Tensors outside of blocks by their names on disk, which are those of all families.
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Model:
    """A whole model.

    Attributes:
        family: the row of the family table.
        config: ``config.json`` of the source, untouched; see `build_config` for the new one.
        blocks: the transformer blocks, in order.
        rest: tensors outside of blocks by their name on disk (embeddings, last norm, head).
        names: names of the tensors in files.
        given: ``config.json`` of the source to the letter; the text model may be a part of it.
        about: what cards say of the source: its name, hub id and license keys.
        carried: tensors in files that belong to other parts of a model (a vision tower, layers
            that predict several tokens), by name. They are written as they are, or left out.
    """

    family: Family
    config: Mapping[str, Any]
    blocks: tuple[Block, ...]
    rest: Mapping[str, Weight]
    names: DiskNames = field(compare=False, repr=False)
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    carried: Mapping[str, Weight] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def architecture(self) -> Architecture:
        """Transformers' model of the source's config."""
        return find_architecture(self.family, self.config)

    def tensors(self) -> Iterator[tuple[str, str, Weight]]:
        """Yield every tensor as (name on disk, role, handle); blocks and experts renumbered."""
        yield from self._named_tensors

    @cached_property
    def _named_tensors(self) -> tuple[tuple[str, str, Weight], ...]:
        """The tensors, which are asked for dozens of times: a large model has tens of thousands."""
        rest = [(self.names.get_rest_name(n), "rest", weight) for n, weight in self.rest.items()]
        return (*rest, *chain.from_iterable(self.named_blocks))

    @cached_property
    def named_blocks(self) -> tuple[tuple[tuple[str, str, Weight], ...], ...]:
        """The tensors of each block, as `tensors` yields them."""
        return tuple(
            tuple((self.disk_name(block, role), role, weight) for role, weight in block.weights())
            for block in self.blocks
        )

    @cached_property
    def matrices(self) -> tuple[tuple[str, Block, Weight], ...]:
        """The tensors that passes quantize or prune, by name on disk, with their blocks."""
        return tuple(
            (name, block, weight)
            for block, tensors in zip(self.blocks, self.named_blocks, strict=True)
            for name, role, weight in tensors
            if is_quantizable(role)
        )

    def disk_name(self, block: Block, role: str) -> str:
        """Return the name in files of a tensor of a block."""
        return self.names.get_block_name(block.index, block.origin, role)

    @property
    def moe_blocks(self) -> tuple[tuple[Block, MoELayer], ...]:
        """The blocks that have an MoE layer, with it."""
        return tuple((b, b.mlp) for b in self.blocks if isinstance(b.mlp, MoELayer))

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return tuple(len(layer.experts) for _, layer in self.moe_blocks)

    @property
    def is_uniform(self) -> bool:
        """True if all MoE layers have one size, and every block a form that the family knows.

        Where the config lists top-k by layer, it may differ.
        """
        listed = isinstance(self.config.get(self.family.top_k_key), list)
        sizes = {(m.router_rows, 0 if listed else m.router.top_k) for _, m in self.moe_blocks}
        return len(sizes) <= 1 and all(is_stock_form(self, b) for b in self.blocks)

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the quantized weights, None if nothing is quantized."""
        return next((w.scheme for _, _, w in self.tensors() if w.scheme), None)

    @cached_property
    def schemes(self) -> frozenset[Scheme]:
        """The schemes of the quantized weights."""
        # Most are one object, whose identity is found sooner than its hash.
        found = {id(weight.scheme): weight.scheme for _, _, weight in self.tensors()}
        return frozenset(scheme for scheme in found.values() if scheme is not None)

    @property
    def vocabulary(self) -> int:
        """Entries of the embedding table, and of the logits."""
        return self.embedding.shape[0]

    @property
    def embedding(self) -> Weight:
        """The embedding table, [vocabulary, hidden]."""
        return self.rest[self.architecture.embedding]

    @property
    def head(self) -> str | None:
        """Name in ``rest`` of the head: that of the embedding if one tensor is both.

        None: the class of transformers names no head.
        """
        head, embedding = self.architecture.head, self.architecture.embedding
        return head if head is None or head in self.rest else embedding

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        rest = sum(weight.count for weight in self.rest.values())
        return rest + sum(look_at_blocks(self.blocks, lambda block: block.parameters))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: without the experts that are not chosen.

        Embedding rows that are not looked up count, as is usual.
        """
        return self.parameters - sum(look_at_blocks(self.blocks, _count_inactive))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        rest = sum(weight.nbytes for weight in self.rest.values())
        return rest + sum(look_at_blocks(self.blocks, lambda block: block.nbytes))

    def new_beside(self, before: Model) -> list[tuple[str, Weight]]:
        """Return the tensors, with their roles, that read other numbers than any of ``before``."""
        known = {weight.load for _, _, weight in before.tensors()}
        return [(role, w) for _, role, w in self.tensors() if w.load not in known]

    @property
    def block_nbytes(self) -> int:
        """Bytes of the largest block in float32."""
        return 4 * max(look_at_blocks(self.blocks, lambda block: block.parameters))

    def replace_block(self, block: Block) -> Model:
        """Return the model with the block at ``block.index`` replaced."""
        blocks = list(self.blocks)
        blocks[block.index] = block
        return replace(self, blocks=tuple(blocks))

    def replace_rest(self, weights: Mapping[str, Weight]) -> Model:
        """Return the model with other handles on some tensors outside of blocks."""
        return replace(self, rest={**self.rest, **weights})

    def keep_blocks(self, indices: Sequence[int]) -> Model:
        """Return the model with only the blocks at ``indices``, renumbered."""
        kept = (replace(self.blocks[i], index=n) for n, i in enumerate(indices))
        return replace(self, blocks=tuple(kept))

    @property
    def replaced_count(self) -> int:
        """Number of experts with a replacement: a linear map or a constant."""
        return sum(len(layer.replaced) for _, layer in self.moe_blocks)

    @property
    def tied_count(self) -> int:
        """Number of experts that are run without stored matrices of their own."""
        return sum(len(layer.routed) - len(layer.experts) for _, layer in self.moe_blocks)

    @property
    def skips(self) -> bool:
        """True if some router skips dynamically."""
        return any(layer.router.skip_below for _, layer in self.moe_blocks)

    def verify(self) -> None:
        """Check that the parts fit.

        Raises:
            Moe2EdgeError: router rows differ from experts, top-k cannot be reached, blocks are
                not numbered in order, shapes disagree with the config, a tensor appears twice.
        """
        names = [name for name, _, _ in self.tensors()]
        if len(set(names)) < len(names):
            twice = [name for name, n in Counter(names).items() if n > 1]
            raise Moe2EdgeError(f"tensors appear twice: {twice[:3]}")
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise Moe2EdgeError("blocks are not numbered in order")
        if not self.blocks:
            raise Moe2EdgeError("no block is left")
        for block, layer in self.moe_blocks:
            n = layer.router_rows
            for suffix, weight in (
                ("weight", layer.router.weight),
                *layer.router.per_expert.items(),
            ):
                if (rows := weight.shape[layer.router.axes.get(suffix, 0)]) != n:
                    raise Moe2EdgeError(
                        f"block {block.index}: {weight.name} has {rows} rows for {n} experts"
                    )
            if not 1 <= layer.router.top_k <= n:
                raise Moe2EdgeError(
                    f"block {block.index}: top-k is {layer.router.top_k}, but the router has {n} "
                    "rows"
                )
            if len(layer.router.skip_below) not in (0, layer.router.top_k - 1):
                raise Moe2EdgeError(
                    f"block {block.index}: {len(layer.router.skip_below)} thresholds for "
                    f"top-k {layer.router.top_k}"
                )

        check_shapes(self)

    def __str__(self) -> str:
        """Return deterministic text, one line per block."""
        lines = [
            f"{self.family.architecture}: {len(self.blocks)} blocks, "
            f"{self.parameters:,} parameters ({self.active_parameters:,} active)"
        ]
        for block in self.blocks:
            source = "" if block.origin == block.index else f" (was {block.origin})"
            lines.append(f"block {block.index}{source}: {describe_block(block)}")
        for name, weight in self.rest.items():
            lines.append(f"{name}: {weight.scheme or weight.dtype} {list(weight.shape)}")
        return "\n".join(lines)


def _count_inactive(block: Block) -> int:
    return block.mlp.inactive_parameters if isinstance(block.mlp, MoELayer) else 0


def list_end_names(model: Model) -> tuple[str, ...]:
    """List the names on disk of embedding and head, which passes quantize where asked to."""
    found = dict.fromkeys((model.architecture.embedding, model.head))
    return tuple(model.names.get_rest_name(name) for name in found if name is not None)


def is_stock_form(model: Model, block: Block) -> bool:
    """Return whether transformers' class of the family holds a block by the common config alone."""
    if isinstance(block.mlp, MoELayer):
        return block.mlp.is_plain and not block.mlp.router.skip_below
    if model.family.generic:
        return model.architecture.anatomy[block.origin].experts is None
    if not isinstance(block.mlp, Dense) or not model.family.dense_layers:
        return False
    return block.mlp.gate.shape[0] == model.config.get("intermediate_size")


def check_shapes(model: Model) -> None:
    """Check that every block has the tensors and shapes of the geometry.

    Raises:
        Moe2EdgeError: a shape differs.
    """
    geometry = model.family.geometry(model.config)
    for block in model.blocks:
        mlps: list[Dense] = [block.mlp] if isinstance(block.mlp, Dense) else []
        if isinstance(block.mlp, MoELayer):
            mlps += block.mlp.experts
            block.mlp.check_rows()
        if isinstance(block.mlp, UnroutedMLP) and block.mlp.expert is not None:
            mlps.append(block.mlp.expert)
        if isinstance(block.mlp, MoELayer | UnroutedMLP) and block.mlp.shared is not None:
            mlps.append(block.mlp.shared.mlp)
        for mlp in mlps if not model.family.generic else ():
            width = mlp.gate.shape[0]
            for part, shape in (
                (mlp.gate, (width, geometry.hidden)),
                (mlp.up, (width, geometry.hidden)),
                (mlp.down, (geometry.hidden, width)),
            ):
                if part.shape != shape:
                    raise Moe2EdgeError(
                        f"{part.name} has shape {list(part.shape)}, expected {list(shape)}"
                    )
