"""The walk of solvers: blocks one by one, and inside of a block its matrices in order.

Attention and routing are transformers' own modules. Experts are taken a few at a time: their
matrices are loaded, solved, and add what they put out to the stream, so that one forward pass does
for the statistics and for what comes next, and a block is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model import (
    SECOND_NORM,
    Always,
    Block,
    Dense,
    Model,
    MoELayer,
    is_quantizable,
)
from moe2edge.modules import Nothing, block_state, finite
from moe2edge.pipeline import Group, GroupSolver, Solved, Store
from moe2edge.walk import BATCH_TOKENS, batches, embed, skeleton

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.progress import Advance
    from moe2edge.rounding import Quantized

QKV = tuple(f"attention.{name}_proj.weight" for name in ("q", "k", "v"))
OUT = "attention.o_proj.weight"
# Numbers that an expert puts out inside at once; and at most so many are kept for a second use.
CHUNK_NUMBERS, KEPT_NUMBERS = 1 << 24, 1 << 25
# For what is solved together.
MEMORY = 256 << 20

Batches = Callable[[], Iterator[tuple["Tensor", "Tensor | None"]]]


class Parts:
    """A block without the matrices of its experts and MLPs: attention, norms and router."""

    def __init__(self, model: Model, block: Block) -> None:
        self._base = skeleton(model, block)
        layer: Any = self._base.layers[0]
        state = block_state(block, ("norms", "attention", "router"))
        layer.load_state_dict(state, strict=False, assign=True)
        self.norm, self._mlp = layer.post_attention_layernorm, layer.mlp
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()
        self._layer = layer

    @torch.no_grad()
    def attend(self, hidden: Tensor) -> Tensor:
        """The stream after attention, for ``hidden`` [batch, length, hidden]."""
        out: Tensor = self._base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out

    @torch.no_grad()
    def attention_inputs(self, hidden: Tensor) -> Tensor:
        """Inputs [tokens, hidden] of q, k and v."""
        out: Tensor = self._layer.input_layernorm(hidden)
        return out.flatten(0, -2)

    def output_inputs(self, hidden: Tensor) -> Tensor:
        """Inputs [tokens, heads * head size] of the output projection."""
        found: list[Tensor] = []
        hook = self._layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: found.append(args[0].flatten(0, -2))
        )
        try:
            self.attend(hidden)
        finally:
            hook.remove()
        return found[0]

    def put_attention(self, role: str, matrix: Tensor) -> None:
        """Replace a matrix of attention."""
        name = role.removeprefix("attention.").removesuffix(".weight")
        getattr(self._layer.self_attn, name).weight = nn.Parameter(matrix, requires_grad=False)

    @torch.no_grad()
    def normed(self, attended: Tensor) -> Tensor:
        """Inputs of what follows attention."""
        out: Tensor = self.norm(attended)
        return out

    @torch.no_grad()
    def route(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of the chosen experts, [N, k]; an id beyond the last is skipped."""
        _, weights, ids = self._mlp.gate(inputs)
        return weights.float(), ids


@dataclass
class Tally:
    """What a walk has to tell, and tells while it runs."""

    label: str
    advance: Advance
    total: int
    blocks: int
    done: int = 0
    notes: list[str] = field(default_factory=list)
    loss: float = 0.0
    reference: float = 0.0

    def at(self, block: Block, what: str) -> None:
        """Tell where the work is."""
        error = f", error {(self.loss / self.reference) ** 0.5:.2%}" if self.reference else ""
        detail = f"block {block.index + 1} of {self.blocks}, {what}{error}"
        self.advance(self.label, self.done, self.total, detail)

    def add(self, solved: Solved) -> None:
        """Count what was solved."""
        self.done += len(solved.numbers)
        self.notes += solved.notes
        self.loss += solved.loss[0]
        self.reference += solved.loss[1]


class _BlockWork:
    """The work on one block."""

    def __init__(
        self, model: Model, block: Block, solver: GroupSolver, tally: Tally, memory: int
    ) -> None:
        self.numbers: dict[str, Quantized | Tensor] = {}
        self._model, self._block, self._solver = model, block, solver
        self._tally, self._memory = tally, memory
        self._weights = {r: w for r, w in block.weights() if is_quantizable(r)}

    # ---- solving ---------------------------------------------------------------------------------

    def _solve(self, what: str, groups: Sequence[Group]) -> None:
        self._tally.at(self._block, what)
        solved = self._solver.solve(self._block, groups)
        self.numbers.update(solved.numbers)
        self._tally.add(solved)

    def _group(self, roles: Sequence[str], inputs: Batches, tokens: int, **more: Any) -> Group:
        return Group({role: self._weights[role] for role in roles}, inputs, tokens, **more)

    def _matrix(self, role: str) -> Tensor:
        """The matrix that what comes next is computed with."""
        if not self._solver.propagate or role not in self.numbers:
            return finite(self._weights[role])
        numbers = self.numbers[role]
        return numbers.float() if isinstance(numbers, torch.Tensor) else numbers.dequantize()

    def without_tokens(self) -> None:
        """Solve all matrices by themselves."""
        for role in self._weights:
            self._solve(role, [self._group([role], lambda: iter(()), 0)])

    @torch.no_grad()
    def run(self, hidden: Tensor) -> None:
        """Solve the block for the stream ``hidden`` [samples, length, hidden], and move it on."""
        parts = Parts(self._model, self._block)
        self._attention(parts, hidden)
        mlp = self._block.mlp
        if mlp is None:
            if SECOND_NORM in self._block.norms:
                for part in batches(hidden):
                    hidden[part] += parts.normed(hidden[part])
            return
        added = torch.zeros_like(hidden)
        flat, out = hidden.flatten(0, 1), added.flatten(0, 1)
        if isinstance(mlp, MoELayer):
            self._experts(parts, mlp, flat, out)
        dense = mlp if isinstance(mlp, Dense) else mlp.expert if isinstance(mlp, Always) else None
        if dense is not None:
            self._always_on("dense", parts, flat, out, None)
        if isinstance(mlp, MoELayer | Always) and mlp.shared is not None:
            self._always_on("shared", parts, flat, out, finite(mlp.shared.gate))
        hidden += added

    # ---- attention -------------------------------------------------------------------------------

    def _attention(self, parts: Parts, hidden: Tensor) -> None:
        """Solve the matrices of attention; ``hidden`` becomes the stream after it."""
        tokens = hidden.shape[0] * hidden.shape[1]
        for roles, inputs in (
            (tuple(r for r in QKV if r in self._weights), parts.attention_inputs),
            ((OUT,), parts.output_inputs),
        ):
            self._solve("attention", [self._group(roles, _each(hidden, inputs), tokens)])
            for role in roles:
                parts.put_attention(role, self._matrix(role))
        for part in batches(hidden):
            hidden[part] = parts.attend(hidden[part])

    # ---- experts and MLPs ------------------------------------------------------------------------

    def _always_on(
        self, kind: str, parts: Parts, flat: Tensor, out: Tensor, scorer: Tensor | None
    ) -> None:
        """An MLP that every token goes through; ``scorer`` [1, hidden] is a shared expert's."""

        def weigh(x: Tensor) -> Tensor:
            assert scorer is not None
            return torch.sigmoid(x @ scorer.T)[:, 0]

        everything = torch.arange(len(flat))
        self._mlps(
            [_Member(kind, everything, weigh if scorer is not None else None)], parts, flat, out
        )

    def _experts(self, parts: Parts, layer: MoELayer, flat: Tensor, out: Tensor) -> None:
        routed = [parts.route(parts.normed(x)) for x in flat.split(BATCH_TOKENS)]
        weights, ids = (torch.cat(both) for both in zip(*routed, strict=True))
        members = []
        for n in range(len(layer.experts)):
            token, place = torch.where(ids == n)
            own = weights[token, place]
            members.append(_Member(f"experts.{n}", token, own, everyone=True))
        size = self._together(layer.experts[0])
        for at in range(0, len(members), size):
            self._mlps(members[at : at + size], parts, flat, out)

    def _together(self, expert: Dense) -> int:
        """Experts that are solved at once within the memory that there is."""
        first = self._solver.nbytes((expert.gate.shape, expert.up.shape))
        second = self._solver.nbytes((expert.down.shape,))
        matrices = 4 * (expert.gate.count + expert.up.count + expert.down.count)
        return max(1, self._memory // (max(first, second) + matrices))

    def _mlps(self, members: Sequence[_Member], parts: Parts, flat: Tensor, out: Tensor) -> None:
        """Solve gated MLPs of one shape, and add what they put out to ``out``."""
        kinds = [member.kind for member in members]
        what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} to {kinds[-1].rpartition('.')[2]}"

        def inputs(member: _Member, everyone: bool) -> Batches:
            return lambda: member.inputs(parts.normed, flat, everyone)

        self._solve(
            f"{what}: gate, up",
            [
                self._group(
                    (f"{m.kind}.gate", f"{m.kind}.up"),
                    inputs(m, False),
                    len(m.tokens),
                    everyone=inputs(m, True) if m.everyone else None,
                )
                for m in members
            ],
        )
        insides = [
            _Inside(self._matrix(f"{m.kind}.gate"), self._matrix(f"{m.kind}.up")) for m in members
        ]
        self._solve(
            f"{what}: down",
            [
                self._group(
                    (f"{m.kind}.down",),
                    inside.kept(inputs(m, False), len(m.tokens)),
                    len(m.tokens),
                    everyone=inside.of(inputs(m, True)) if m.everyone else None,
                )
                for m, inside in zip(members, insides, strict=True)
            ],
        )
        for member, inside in zip(members, insides, strict=True):
            down = self._matrix(f"{member.kind}.down")
            at = 0
            for hidden, weights in inside.kept(inputs(member, False), len(member.tokens))():
                tokens = member.tokens[at : at + len(hidden)]
                at += len(hidden)
                y = hidden @ down.T
                out.index_add_(0, tokens, y if weights is None else y.mul_(weights[:, None]))


@dataclass(frozen=True)
class _Member:
    """One MLP among those that are solved together.

    Attributes:
        kind: first part of the roles of its matrices.
        tokens: the tokens that go through it, int64 [n], in rising order.
        weights: what its output is multiplied with, [n], or how to compute that from its inputs;
            None: nothing.
        everyone: whether it could be shown all tokens instead.
    """

    kind: str
    tokens: Tensor
    weights: Tensor | Callable[[Tensor], Tensor] | None
    everyone: bool = False

    def inputs(
        self, norm: Callable[[Tensor], Tensor], flat: Tensor, everyone: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs, from the stream after attention [tokens, hidden], and weights."""
        if everyone:
            yield from ((norm(x), None) for x in flat.split(BATCH_TOKENS))
            return
        for at in range(0, len(self.tokens), BATCH_TOKENS):
            x = norm(flat[self.tokens[at : at + BATCH_TOKENS]])
            if self.weights is None or isinstance(self.weights, torch.Tensor):
                own = None if self.weights is None else self.weights[at : at + BATCH_TOKENS]
            else:
                own = self.weights(x)
            yield x, own


class _Inside:
    """What an MLP has between its matrices: ``silu(gate x) * up x``."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self._gate, self._up = gate, up
        self._known: list[tuple[Tensor, Tensor | None]] | None = None

    def of(self, inputs: Batches) -> Batches:
        """Computed from inputs, a chunk of tokens at a time."""

        def each() -> Iterator[tuple[Tensor, Tensor | None]]:
            step = max(1, CHUNK_NUMBERS // len(self._gate))
            for x, weights in inputs():
                for at in range(0, len(x), step):
                    rows = x[at : at + step]
                    y = nn.functional.silu(rows @ self._gate.T).mul_(rows @ self._up.T)
                    yield y, None if weights is None else weights[at : at + step]

        return each

    def kept(self, inputs: Batches, tokens: int) -> Batches:
        """The same, computed once if it is not too large to keep."""
        if tokens * len(self._gate) > KEPT_NUMBERS:
            return self.of(inputs)

        def each() -> Iterator[tuple[Tensor, Tensor | None]]:
            if self._known is None:
                self._known = list(self.of(inputs)())
            yield from self._known

        return each


def _each(hidden: Tensor, inputs: Callable[[Tensor], Tensor]) -> Batches:
    """Inputs of matrices of attention, from the stream."""
    return lambda: ((inputs(hidden[part]), None) for part in batches(hidden))


def solve(
    model: Model,
    tokens: Tensor | None,
    solver: GroupSolver,
    store: Store,
    advance: Advance,
    label: str,
    memory: int = MEMORY,
) -> tuple[Model, list[str], list[str]]:
    """Solve block after block; later blocks see the outputs of the blocks as solved.

    Args:
        model: what to solve.
        tokens: int64 [samples, length]; None for a solver that looks at no activations.
        solver: computes new numbers.
        store: keeps them.
        advance: told about progress.
        label: name of the work in progress lines.
        memory: for what is solved together, bytes.

    Returns:
        The new model, the names of all tensors that were solved, and the solver's notes.
    """
    total = sum(is_quantizable(role) for _, role, _ in model.tensors())
    tally = Tally(label, advance, total, len(model.blocks))
    hidden = None if tokens is None else embed(model, tokens)
    changed: list[str] = []
    for block in model.blocks:
        work = _BlockWork(model, block, solver, tally, memory)
        if hidden is None:
            work.without_tokens()
        else:
            work.run(hidden)
        changed += [model.family.disk_name(block.index, role) for role in work.numbers]
        model = model.replace_block(store.put(block, work.numbers))
    advance(label, total, total, "")
    return model, changed, tally.notes
