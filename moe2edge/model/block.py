"""A transformer block as a value: attention, router, experts, every tensor a lazy handle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal
from weakref import WeakValueDictionary

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.experts import PARTS, Dense, Expert
from moe2edge.model.layers import MoELayer, Shared, UnroutedMLP
from moe2edge.model.weights import Weight

SECOND_NORM = "post_attention_layernorm.weight"


class BlockKind:
    """Common parts of blocks that differ in place, names and numbers alone; a key of tables."""

    def __init__(self, *parts: tuple[object, ...], alive: object = None) -> None:
        """Take tuples that are equal for blocks of one kind, and what their identities are of."""
        self._parts, self._hash, self._alive = parts, hash(parts), alive

    def __hash__(self) -> int:
        """Return a hash, which is computed once: there are thousands of parts."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Compare the parts."""
        return isinstance(other, BlockKind) and self._parts == other._parts


_KINDS: WeakValueDictionary[BlockKind, BlockKind] = WeakValueDictionary()


@dataclass(frozen=True)
class Block:
    """A transformer block: attention, then an MoE layer or a dense MLP.

    Attributes:
        index: position in this model.
        origin: position in the source model.
        attention: its tensors by suffix (``q_proj.weight``, ``q_proj.bias``, ``q_norm.weight``).
        norms: the norms by suffix; without an MLP those are missing that belong to it, or see
            ``passes_norm``.
        mlp: the part after attention; None: there is none.
        window: tokens that attention sees at most, None for all.
        others: all other tensors, by role: ``linear.`` and the path in transformers' layer for
            matrices that passes may quantize, ``other.`` and the path for the rest.
        passes_norm: whether the output of the norm is added in the place of an MLP that is gone.
    """

    index: int
    origin: int
    attention: Mapping[str, Weight]
    norms: Mapping[str, Weight]
    mlp: MoELayer | Dense | UnroutedMLP | None
    window: int | None = None
    others: Mapping[str, Weight] = field(default_factory=dict)
    passes_norm: bool = False

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
        """Return the block without its MLP, in families with a row; see `edits.drop_mlp`.

        Args:
            keep_norm: add the output of the norm to the residual stream in the MLP's place.
        """
        norms = dict(self.norms)
        if not keep_norm:
            norms.pop(SECOND_NORM, None)
        return replace(self, norms=norms, mlp=None, passes_norm=keep_norm)

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield all tensors with their roles: ``experts.3.gate``, ``attention.q_proj.weight``."""
        yield from self._weights

    @cached_property
    def _weights(self) -> tuple[tuple[str, Weight], ...]:
        """The tensors with their roles."""
        return (
            *((f"norms.{suffix}", weight) for suffix, weight in self.norms.items()),
            *((f"attention.{suffix}", weight) for suffix, weight in self.attention.items()),
            *self.others.items(),
            *_list_body_weights(self.mlp),
        )

    @cached_property
    def matrices(self) -> tuple[tuple[str, Weight], ...]:
        """The tensors that passes quantize or prune, with their roles."""
        return tuple(one for one in self._weights if is_quantizable(one[0]))

    @cached_property
    def kind(self) -> BlockKind:
        """All of its tensors but their names and numbers, and its routing."""
        weights = [weight for _, weight in self._weights]
        schemes = tuple(weight.scheme for weight in weights)
        routing = (self.mlp.router.top_k, self.mlp.bases) if isinstance(self.mlp, MoELayer) else ()
        kind = BlockKind(
            tuple(role for role, _ in self._weights),
            tuple(weight.shape for weight in weights),
            tuple(weight.dtype for weight in weights),
            tuple(weight.held for weight in weights),
            tuple(map(id, schemes)),
            routing,
            alive=schemes,
        )
        # One object for each, so that comparing them takes no time.
        return _KINDS.setdefault(kind, kind)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.count for _, weight in self._weights)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(weight.nbytes for _, weight in self._weights)

    def with_weights(self, new: Mapping[str, Weight]) -> Block:
        """Return the block with some tensors replaced, by role.

        Raises:
            Moe2EdgeError: a role is not one of this block's.
        """
        if unknown := new.keys() - {role for role, _ in self.weights()}:
            raise Moe2EdgeError(f"block {self.index} has no tensors {sorted(unknown)}")

        def swap_mlp(prefix: str, mlp: Any) -> Any:
            return replace(
                mlp,
                gate=new.get(f"{prefix}.gate", mlp.gate),
                up=new.get(f"{prefix}.up", mlp.up),
                down=new.get(f"{prefix}.down", mlp.down),
            )

        def swap_shared(shared: Shared) -> Shared:
            gate = new.get("shared.router", shared.gate) if shared.gate else None
            return Shared(swap_mlp("shared", shared.mlp), gate)

        def swap_expert(prefix: str, expert: Expert) -> Expert:
            biases = expert.biases
            if biases:
                biases = {p: new.get(f"{prefix}.{p}_bias", bias) for p, bias in biases.items()}
            gate, up, down = (new.get(f"{prefix}.{p}", getattr(expert, p)) for p in PARTS)
            return Expert(gate, up, down, expert.origin, biases)

        mlp: Any = self.mlp
        if isinstance(mlp, MoELayer):
            router = replace(
                mlp.router,
                weight=new.get("router.weight", mlp.router.weight),
                per_expert={k: new.get(f"router.{k}", w) for k, w in mlp.router.per_expert.items()},
            )
            shared = mlp.shared and swap_shared(mlp.shared)
            experts = tuple(swap_expert(f"experts.{n}", e) for n, e in enumerate(mlp.experts))
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
            others={k: new.get(k, w) for k, w in self.others.items()},
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
        yield from _list_routed_weights(mlp)
    if mlp.shared is not None:
        yield from _list_mlp_weights("shared", mlp.shared.mlp)
        if mlp.shared.gate is not None:
            yield "shared.router", mlp.shared.gate


def _list_routed_weights(layer: MoELayer) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of the router, of the experts and of rows with tensors of their own."""
    yield "router.weight", layer.router.weight
    for suffix, weight in layer.router.per_expert.items():
        yield f"router.{suffix}", weight
    for n, expert in enumerate(layer.experts):
        yield from _list_mlp_weights(f"experts.{n}", expert)
        for part, bias in expert.biases.items():
            yield f"experts.{n}.{part}_bias", bias
    roles = layer.row_roles
    for row in (*layer.routed, *layer.replaced):
        for part, weight in layer.rows[row].weights():
            yield f"{roles[row]}.{part}", weight


def _list_mlp_weights(prefix: str, mlp: Dense) -> Iterator[tuple[str, Weight]]:
    if mlp.gate.count:
        yield f"{prefix}.gate", mlp.gate
    yield f"{prefix}.up", mlp.up
    yield f"{prefix}.down", mlp.down


@cache
def is_quantizable(role: str) -> bool:
    """Return whether quantizing and pruning select a tensor: a matrix of attention or an MLP.

    Router, norms, biases and the gate of a shared expert keep their precision. Embedding and head,
    which are outside of blocks, are quantized where an option asks for it.

    >>> [is_quantizable(r) for r in ("experts.0.up", "router.weight", "attention.q_proj.bias")]
    [True, False, False]
    """
    kind, _, rest = role.partition(".")
    if kind == "attention":
        return rest.endswith("_proj.weight")
    if kind == "experts":
        return not rest.endswith("_bias")
    return kind in ("dense", "linear") or (kind == "shared" and rest != "router")


@cache
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


# The part after attention; "norm" is the norm alone, whose output is added to the hidden states.
Form = Literal["moe", "dense", "none", "norm", "shared", "dense+shared"]


def get_form(block: Block) -> Form:
    """Return the form of the part after attention."""
    if isinstance(block.mlp, MoELayer):
        return "moe"
    if isinstance(block.mlp, Dense):
        return "dense"
    if isinstance(block.mlp, UnroutedMLP):
        return "shared" if block.mlp.expert is None else "dense+shared"
    return "norm" if block.passes_norm else "none"
