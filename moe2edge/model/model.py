"""A checkpoint as a value: blocks, routers, experts, every tensor a lazy handle.

Nothing here reads a number. A pass returns a new `Model` in which only the changed parts are new;
dropping experts is slicing of tuples, quantizing swaps handles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.experts import Dense, Expert, Replacement, RouterRow, Tied
from moe2edge.model.layers import MoELayer, Shared, UnroutedMLP
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme

if TYPE_CHECKING:
    from moe2edge.model.family import Family

# Tensors outside of blocks by their names on disk, which are those of all families.
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SECOND_NORM = "post_attention_layernorm.weight"


@dataclass(frozen=True)
class Block:
    """A transformer block: attention, then an MoE layer or a dense MLP.

    Attributes:
        index: position in this model.
        origin: position in the source model.
        attention: its tensors by suffix (``q_proj.weight``, ``q_proj.bias``, ``q_norm.weight``).
        norms: the two norms by suffix; without an MLP the second is missing, or its output is
            added to the residual stream in the MLP's place.
        mlp: the part after attention; None: there is none.
        window: tokens that attention sees at most, None for all.
    """

    index: int
    origin: int
    attention: Mapping[str, Weight]
    norms: Mapping[str, Weight]
    mlp: MoELayer | Dense | UnroutedMLP | None
    window: int | None = None

    @property
    def expert_origins(self) -> tuple[int, ...]:
        """Indices in the source of full and tied experts, and of one that became a plain MLP."""
        if isinstance(self.mlp, MoELayer):
            return tuple(self.mlp.rows[row].origin for row in self.mlp.routed)
        only = self.mlp.expert if isinstance(self.mlp, UnroutedMLP) else self.mlp
        return (only.origin,) if isinstance(only, Expert) else ()

    def keep_experts(self, ids: Sequence[int], *, clamp_top_k: bool = False) -> Block:
        """Return the block with only the experts ``ids``, and no more routing than they need.

        One expert that stays is always chosen, with weight one, so it becomes a plain MLP. When
        none stays, nothing follows attention but a shared expert, which is never removed.

        Raises:
            InputError: as `MoELayer.keep`; none stays only where ``ids`` is empty.
        """
        if not isinstance(self.mlp, MoELayer):
            raise InputError(f"block {self.index} has no MoE layer")
        shared = self.mlp.shared
        if not ids and not self.mlp.replaced:
            return self.without_mlp() if shared is None else replace(self, mlp=UnroutedMLP(shared))
        layer = self.mlp.keep(ids, clamp_top_k=clamp_top_k)
        if layer.router_rows > 1:
            return replace(self, mlp=layer)
        only = layer.experts[0]
        return replace(self, mlp=only if shared is None else UnroutedMLP(shared, only))

    def without_mlp(self, *, keep_norm: bool = False) -> Block:
        """Return the block without its MLP.

        Args:
            keep_norm: add the output of the norm to the residual stream in the MLP's place.
        """
        norms = dict(self.norms)
        if not keep_norm:
            norms.pop(SECOND_NORM, None)
        return replace(self, norms=norms, mlp=None)

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield all tensors with their roles: ``experts.3.gate``, ``attention.q_proj.weight``."""
        for suffix, weight in self.norms.items():
            yield f"norms.{suffix}", weight
        for suffix, weight in self.attention.items():
            yield f"attention.{suffix}", weight
        yield from _list_body_weights(self.mlp)

    def with_weights(self, new: Mapping[str, Weight]) -> Block:
        """Return the block with some tensors replaced, by role.

        Raises:
            Moe2EdgeError: a role is not one of this block's.
        """
        if unknown := set(new) - {role for role, _ in self.weights()}:
            raise Moe2EdgeError(f"block {self.index} has no tensors {sorted(unknown)}")

        def swap_mlp(prefix: str, mlp: Any) -> Any:
            return replace(
                mlp,
                gate=new.get(f"{prefix}.gate", mlp.gate),
                up=new.get(f"{prefix}.up", mlp.up),
                down=new.get(f"{prefix}.down", mlp.down),
            )

        def swap_shared(shared: Shared) -> Shared:
            gate = new.get("shared.router", shared.gate)
            return Shared(swap_mlp("shared", shared.mlp), gate)

        mlp: Any = self.mlp
        if isinstance(mlp, MoELayer):
            router = replace(
                mlp.router,
                weight=new.get("router.weight", mlp.router.weight),
                per_expert={k: new.get(f"router.{k}", w) for k, w in mlp.router.per_expert.items()},
            )
            shared = mlp.shared and swap_shared(mlp.shared)
            experts = tuple(swap_mlp(f"experts.{n}", e) for n, e in enumerate(mlp.experts))
            rows = tuple(
                row.with_weights({p: new.get(f"{role}.{p}", w) for p, w in row.weights()})
                for role, row in zip(mlp.row_roles, mlp.rows, strict=True)
            )
            mlp = MoELayer(router, experts, rows, shared)
        elif isinstance(mlp, UnroutedMLP):
            expert = mlp.expert and swap_mlp("dense", mlp.expert)
            mlp = UnroutedMLP(swap_shared(mlp.shared), expert)
        elif mlp is not None:
            mlp = swap_mlp("dense", mlp)
        return replace(
            self,
            attention={k: new.get(f"attention.{k}", w) for k, w in self.attention.items()},
            norms={k: new.get(f"norms.{k}", w) for k, w in self.norms.items()},
            mlp=mlp,
        )


def _list_body_weights(mlp: MoELayer | Dense | UnroutedMLP | None) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors after attention with their roles."""
    if isinstance(mlp, Dense):
        yield from _list_mlp_weights("dense", mlp)
        return
    if mlp is None:
        return
    if isinstance(mlp, UnroutedMLP):
        if mlp.expert is not None:
            yield from _list_mlp_weights("dense", mlp.expert)
    else:
        yield "router.weight", mlp.router.weight
        for suffix, weight in mlp.router.per_expert.items():
            yield f"router.{suffix}", weight
        for n, expert in enumerate(mlp.experts):
            yield from _list_mlp_weights(f"experts.{n}", expert)
        roles = mlp.row_roles
        for row in (*mlp.routed, *mlp.replaced):
            for part, weight in mlp.rows[row].weights():
                yield f"{roles[row]}.{part}", weight
    if mlp.shared is not None:
        yield from _list_mlp_weights("shared", mlp.shared.mlp)
        yield "shared.router", mlp.shared.gate


def _list_mlp_weights(prefix: str, mlp: Dense) -> Iterator[tuple[str, Weight]]:
    yield f"{prefix}.gate", mlp.gate
    yield f"{prefix}.up", mlp.up
    yield f"{prefix}.down", mlp.down


def is_quantizable(role: str) -> bool:
    """Return whether quantizing and pruning select a tensor: a matrix of attention or an MLP.

    Router, embeddings, head, norms, biases and the gate of a shared expert keep their precision.

    >>> [is_quantizable(r) for r in ("experts.0.up", "router.weight", "attention.q_proj.bias")]
    [True, False, False]
    """
    kind, _, rest = role.partition(".")
    if kind == "attention":
        return rest.endswith("_proj.weight")
    return kind in ("experts", "dense") or (kind == "shared" and rest != "router")


def is_low_rank(role: str) -> bool:
    """Return whether a tensor is a factor of a tied expert or a matrix of a linear map.

    Passes quantize it only where their options say so.

    >>> [is_low_rank(r) for r in ("members.2.up.first", "substitutes.0.second")]
    [True, True]
    >>> [is_low_rank(r) for r in ("substitutes.0.constant", "experts.0.up")]
    [False, False]
    """
    kind, _, rest = role.partition(".")
    return kind in ("members", "substitutes") and rest.rpartition(".")[2] in ("first", "second")


@dataclass(frozen=True)
class Model:
    """A whole model.

    Attributes:
        family: the row of the family table.
        config: ``config.json`` of the source, untouched; see `build_config` for the new one.
        blocks: the transformer blocks, in order.
        rest: tensors outside of blocks by their name on disk (embeddings, last norm, head).
    """

    family: Family
    config: Mapping[str, Any]
    blocks: tuple[Block, ...]
    rest: Mapping[str, Weight]

    def tensors(self) -> Iterator[tuple[str, str, Weight]]:
        """Yield every tensor as (name on disk, role, handle); blocks and experts renumbered."""
        for name, weight in self.rest.items():
            yield name, "rest", weight
        for block in self.blocks:
            for role, weight in block.weights():
                yield self.family.disk_name(block.index, role), role, weight

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
        """True if all MoE layers have one size, and every block a form that the family knows."""
        sizes = {(m.router_rows, m.router.top_k) for _, m in self.moe_blocks}
        return len(sizes) <= 1 and all(is_stock_form(self, b) for b in self.blocks)

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the quantized weights, None if nothing is quantized."""
        return next((w.scheme for _, _, w in self.tensors() if w.scheme), None)

    @property
    def vocabulary(self) -> int:
        """Entries of the embedding table, and of the logits."""
        return self.rest["model.embed_tokens.weight"].shape[0]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(w.count for _, _, w in self.tensors())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: without the experts that are not chosen.

        Embedding rows that are not looked up count, as is usual.
        """
        return self.parameters - sum(layer.inactive_parameters for _, layer in self.moe_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(w.nbytes for _, _, w in self.tensors())

    def new_beside(self, before: Model) -> list[tuple[str, Weight]]:
        """Return the tensors, with their roles, that read other numbers than any of ``before``."""
        known = {weight.load for _, _, weight in before.tensors()}
        return [(role, w) for _, role, w in self.tensors() if w.load not in known]

    @property
    def block_nbytes(self) -> int:
        """Bytes of the largest block in float32."""
        return max(4 * sum(w.count for _, w in block.weights()) for block in self.blocks)

    def replace_block(self, block: Block) -> Model:
        """Return the model with the block at ``block.index`` replaced."""
        blocks = list(self.blocks)
        blocks[block.index] = block
        return replace(self, blocks=tuple(blocks))

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
        names = Counter(name for name, _, _ in self.tensors())
        if twice := [name for name, n in names.items() if n > 1]:
            raise Moe2EdgeError(f"tensors appear twice: {twice[:3]}")
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise Moe2EdgeError("blocks are not numbered in order")
        if not self.blocks:
            raise Moe2EdgeError("no block is left")
        for block, layer in self.moe_blocks:
            n = layer.router_rows
            for weight in (layer.router.weight, *layer.router.per_expert.values()):
                if weight.shape[0] != n:
                    raise Moe2EdgeError(
                        f"block {block.index}: {weight.name} has {weight.shape[0]} rows "
                        f"for {n} experts"
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
            lines.append(f"block {block.index}{source}: {_describe(block)}")
        for name, weight in self.rest.items():
            lines.append(f"{name}: {weight.dtype} {list(weight.shape)}")
        return "\n".join(lines)


def _describe(block: Block) -> str:
    """Describe one block in a line."""
    parts = []
    if block.window:
        parts.append(f"window {block.window}")
    parts.append(f"attention {_describe_dtype(block.attention['q_proj.weight'])}")
    if isinstance(block.mlp, MoELayer):
        layer = block.mlp
        width = layer.experts[0].gate.shape[0]
        origins = [e.origin for e in layer.experts]
        rule = "renormalized" if layer.router.renormalize else "not renormalized"
        parts.append(
            f"{len(layer.experts)} experts of width {width}, top-{layer.router.top_k} {rule}, "
            f"{_describe_dtype(layer.experts[0].gate)}"
        )
        if origins != list(range(len(origins))):
            parts.append(f"from {origins}")
        parts += _describe_rows(layer)
        if layer.router.skip_below:
            parts.append(f"skips below {[round(b, 4) for b in layer.router.skip_below]}")
    dense = block.mlp.expert if isinstance(block.mlp, UnroutedMLP) else block.mlp
    if isinstance(dense, Dense):
        parts.append(f"dense MLP of width {dense.gate.shape[0]}, {_describe_dtype(dense.gate)}")
    if isinstance(block.mlp, MoELayer | UnroutedMLP) and block.mlp.shared is not None:
        parts.append(f"shared expert of width {block.mlp.shared.mlp.gate.shape[0]}")
    if block.mlp is None:
        parts.append("norm only" if SECOND_NORM in block.norms else "no MLP")
    return "; ".join(parts)


def _describe_rows(layer: MoELayer) -> Iterator[str]:
    """Describe the rows of a layer that are tied or replaced."""
    bases = layer.bases
    if layer.is_tied:
        ran = [layer.rows[n] for n in layer.routed]
        ranks = sorted({row.rank for row in ran if isinstance(row, Tied)}) or [0]
        found = ((layer.rows[n].origin, bases[n]) for n in layer.routed)
        shown = " ".join(f"{origin}:{'-' if base is None else base}" for origin, base in found)
        form = _describe_scheme(ran)
        yield f"tied experts of rank {_describe_range(ranks)}{form}, with their base {shown}"
    if replaced := [row for row in layer.rows if isinstance(row, Replacement)]:
        ranks = sorted({row.rank for row in replaced})
        gone = [row.origin for row in replaced]
        form = _describe_scheme(replaced)
        yield f"{len(gone)} replacements of rank {_describe_range(ranks)}{form} for {gone}"


def _describe_scheme(found: Sequence[RouterRow]) -> str:
    """Return the scheme of low-rank matrices in brackets; nothing if they have none."""
    weights = (weight for one in found for _, weight in one.weights())
    scheme = next((weight.scheme for weight in weights if weight.scheme), None)
    return "" if scheme is None else f" ({scheme})"


def _describe_range(numbers: Sequence[int]) -> str:
    """Return one number, or the ends of several."""
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _describe_dtype(weight: Weight) -> str:
    if weight.scheme is None:
        return weight.dtype
    return str(weight.scheme)


# The part after attention; "norm" is the norm alone, whose output is added to the hidden states.
Form = Literal["moe", "dense", "none", "norm", "shared", "dense+shared"]


def is_stock_form(model: Model, block: Block) -> bool:
    """Return whether transformers' class of the family holds a block by the common config alone."""
    if isinstance(block.mlp, MoELayer):
        return block.mlp.is_plain and not block.mlp.router.skip_below
    if not isinstance(block.mlp, Dense) or not model.family.dense_layers:
        return False
    return block.mlp.gate.shape[0] == model.config.get("intermediate_size")


def get_form(block: Block) -> Form:
    """Return the form of the part after attention."""
    if isinstance(block.mlp, MoELayer):
        return "moe"
    if isinstance(block.mlp, Dense):
        return "dense"
    if isinstance(block.mlp, UnroutedMLP):
        return "shared" if block.mlp.expert is None else "dense+shared"
    return "norm" if SECOND_NORM in block.norms else "none"


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
            block.mlp.check_rows(geometry.hidden)
        if isinstance(block.mlp, UnroutedMLP) and block.mlp.expert is not None:
            mlps.append(block.mlp.expert)
        if isinstance(block.mlp, MoELayer | UnroutedMLP) and block.mlp.shared is not None:
            mlps.append(block.mlp.shared.mlp)
        for mlp in mlps:
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
