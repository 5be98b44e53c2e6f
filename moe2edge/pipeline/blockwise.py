"""The walk of solvers: blocks one by one, and inside of a block its matrices in order.

Attention and routing are transformers' own modules. Experts are taken a few at a time: their
matrices are loaded, solved, and add what they put out to the stream, so that one forward pass does
for the statistics and for what comes next, and a block is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moe2edge.calibration.walk import BATCH_TOKENS, BlockRunner, embed, split_batches
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import SECOND_NORM, Block, Model
from moe2edge.model.roles import OUT, QKV, list_gated_mlps, list_quantizable
from moe2edge.model.weights import Weight
from moe2edge.pipeline.block_parts import BlockParts
from moe2edge.pipeline.blockwise_report import SolverProgress, describe_coverage
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup, Solved, Solver
from moe2edge.pipeline.work import BlockJournal
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import UNLIMITED, Memory, give_back
from moe2edge.storage.solved_blocks import attach_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.progress import Advance
    from moe2edge.runtime.mixed_experts import TiedExperts

# Numbers that an expert has inside at once; and at most so many are kept for a second use, of all
# experts that are solved together.
CHUNK_NUMBERS, KEPT_NUMBERS = 1 << 24, 1 << 25

# Streams that are alive at once.
STREAMS = 4

Batches = Callable[[], Iterator[tuple["Tensor", "Tensor | None"]]]


class _BlockWork:
    """The work on one block."""

    def __init__(
        self, model: Model, block: Block, solver: GroupSolver, tally: SolverProgress, memory: Memory
    ) -> None:
        self.numbers: dict[str, Quantized | Tensor] = {}
        # Handles that are to carry a pattern from now on.
        self.patterned: dict[str, Weight] = {}
        self._model, self._block, self._solver = model, block, solver
        self._tally, self._memory = tally, memory
        self._device, self._dtype = solver.device, solver.dtype
        self._weights = dict(list_quantizable(block))

    # ---- solving ---------------------------------------------------------------------------------

    def _solve(self, what: str, groups: Sequence[MatrixGroup]) -> None:
        self._tally.tell(what)
        solved = self._solver.solve(self._block, groups)
        self.numbers.update(solved.numbers)
        if solved.pattern is not None:
            for role in solved.numbers:
                self.patterned[role] = replace(self._weights[role], pattern=solved.pattern)
        self._tally.add(solved)

    def _group(
        self, roles: Sequence[str], inputs: Batches, tokens: int, **more: Any
    ) -> MatrixGroup:
        return MatrixGroup({role: self._weights[role] for role in roles}, inputs, tokens, **more)

    def _matrix(self, role: str, dtype: torch.dtype) -> Tensor:
        """The matrix that what comes next is computed with."""
        if not self._solver.propagate or role not in self.numbers:
            return load_finite(self._weights[role]).to(self._device, dtype)
        numbers = self.numbers[role]
        found = numbers if isinstance(numbers, torch.Tensor) else numbers.dequantize()
        return found.to(self._device, dtype)

    def without_tokens(self) -> Mapping[str, Quantized | Tensor]:
        """Solve all matrices by themselves."""
        for role in self._weights:
            self._solve(role, [self._group([role], lambda: iter(()), 0)])
        return self.numbers

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for the stream ``hidden`` [samples, length, hidden], and move it on."""
        parts = BlockParts(self._model, self._block, self._device)
        self._attention(parts, hidden)
        mlp = self._block.mlp
        if mlp is None:
            if SECOND_NORM in self._block.norms:
                for part in split_batches(hidden):
                    hidden[part] += parts.normed(hidden[part]).to(hidden.device)
            return self.numbers
        added = _like(hidden, self._memory).zero_()
        flat, out = hidden.flatten(0, 1), added.flatten(0, 1)
        if isinstance(mlp, MoELayer):
            self._experts(parts, mlp, flat, out)
        dense = (
            mlp if isinstance(mlp, Dense) else mlp.expert if isinstance(mlp, UnroutedMLP) else None
        )
        if dense is not None:
            self._always_on("dense", parts, flat, out, None)
        if isinstance(mlp, MoELayer | UnroutedMLP) and mlp.shared is not None:
            scorer = load_finite(mlp.shared.gate).to(self._device)
            self._always_on("shared", parts, flat, out, scorer)
        hidden += added
        return self.numbers

    # ---- attention -------------------------------------------------------------------------------

    def _attention(self, parts: BlockParts, hidden: Tensor) -> None:
        """Solve the matrices of attention; ``hidden`` becomes the stream after it."""
        tokens = hidden.shape[0] * hidden.shape[1]
        width = self._weights[OUT].shape[1]
        inside = _Kept(_each(hidden, parts.output_inputs), tokens * width)
        for roles, inputs in (
            (tuple(r for r in QKV if r in self._weights), _each(hidden, parts.attention_inputs)),
            ((OUT,), inside),
        ):
            self._solve("attention", [self._group(roles, inputs, tokens)])
            for role in roles:
                parts.put_attention(role, self._matrix(role, torch.float32))
        for part, (x, _) in zip(split_batches(hidden), inside(), strict=True):
            hidden[part] += parts.attended(x).view_as(hidden[part]).to(hidden.device)

    # ---- experts and MLPs ------------------------------------------------------------------------

    def _always_on(
        self, kind: str, parts: BlockParts, flat: Tensor, out: Tensor, scorer: Tensor | None
    ) -> None:
        """An MLP that every token goes through; ``scorer`` [1, hidden] is a shared expert's."""

        def weigh(x: Tensor) -> Tensor:
            assert scorer is not None
            return torch.sigmoid(x @ scorer.T)[:, 0]

        everything = torch.arange(len(flat), device=flat.device)
        self._mlps(
            [_GatedMlp(kind, everything, weigh if scorer is not None else None)], parts, flat, out
        )

    def _experts(self, parts: BlockParts, layer: MoELayer, flat: Tensor, out: Tensor) -> None:
        routed = [parts.route(parts.normed(x)) for x in torch.split(flat, BATCH_TOKENS)]
        weights, ids = (torch.cat(both) for both in zip(*routed, strict=True))
        mlps = []
        for n in range(len(layer.experts)):
            token, place = torch.where(layer.find_uses(n, ids))
            own = weights[token, place]
            low = _Low(parts.tied, parts.find_tied(ids[token, place])) if parts.tied else None
            token = token.to(flat.device)
            mlps.append(_GatedMlp(f"experts.{n}", token, own, everyone=True, low=low))
        counts = [len(one.tokens) for one in mlps]
        self._tally.add(Solved({}, (describe_coverage(self._block, counts),)))
        if None in layer.bases:
            parted = (torch.split(t, BATCH_TOKENS) for t in (flat, out, weights, ids))
            for x, place, *chosen in zip(*parted, strict=True):
                place += parts.compute_unstored(parts.normed(x), *chosen).to(out.device)
        size = self._together(layer.experts[0])
        for at in range(0, len(mlps), size):
            self._mlps(mlps[at : at + size], parts, flat, out)

    def _together(self, expert: Dense) -> int:
        """Experts that are solved at once within the memory that there is."""
        room = self._memory.group_bytes
        if self._device.type == "cuda":
            # There a loop over columns takes as long for one expert as for many.
            room = _gpu_memory(self._device) // 2
        return max(1, room // _needs(self._solver, expert))

    def _mlps(
        self, mlps: Sequence[_GatedMlp], parts: BlockParts, flat: Tensor, out: Tensor
    ) -> None:
        """Solve gated MLPs of one shape, and add what they put out to ``out``."""
        kinds = [one.kind for one in mlps]
        what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} to {kinds[-1].rpartition('.')[2]}"

        def inputs(one: _GatedMlp, everyone: bool) -> Batches:
            return lambda: one.inputs(parts.normed, flat, everyone)

        self._solve(
            f"{what}: gate, up",
            [
                self._group(
                    (f"{m.kind}.gate", f"{m.kind}.up"),
                    inputs(m, False),
                    len(m.tokens),
                    everyone=inputs(m, True) if m.everyone else None,
                )
                for m in mlps
            ],
        )
        insides = [
            _inside(*(self._matrix(f"{m.kind}.{part}", self._dtype) for part in ("gate", "up")))
            for m in mlps
        ]
        width = self._weights[f"{kinds[0]}.gate"].shape[0]
        own = [
            _Kept(inside(inputs(m, False), m.low), len(m.tokens) * width * len(mlps))
            for m, inside in zip(mlps, insides, strict=True)
        ]
        self._solve(
            f"{what}: down",
            [
                self._group(
                    (f"{m.kind}.down",),
                    kept,
                    len(m.tokens),
                    everyone=inside(inputs(m, True)) if m.everyone else None,
                )
                for m, inside, kept in zip(mlps, insides, own, strict=True)
            ],
        )
        for one, kept in zip(mlps, own, strict=True):
            down = self._matrix(f"{one.kind}.down", self._dtype)
            at = 0
            for hidden, weights in kept():
                tokens = one.tokens[at : at + len(hidden)]
                at += len(hidden)
                y = (hidden @ down.T).float()
                if one.low is not None:
                    y += one.low("down", at - len(hidden), hidden)
                y = y if weights is None else y.mul_(weights[:, None])
                out.index_add_(0, tokens, y.to(out.device))


@dataclass(frozen=True)
class _Low:
    """Factors of those that use the matrices of an expert.

    Attributes:
        experts: tied experts of the layer.
        own: of each token of the expert, which of them, int64 [n]; -1: it has no factors.
    """

    experts: TiedExperts
    own: Tensor

    def __call__(self, part: str, at: int, x: Tensor) -> Tensor:
        """What is added to the products of ``part`` for the tokens from ``at`` on, float32."""
        own = self.own[at : at + len(x)].to(x.device)
        outs = getattr(self.experts, f"{part}_second").shape[1]
        out = x.new_zeros(len(x), outs, dtype=torch.float32)
        has = own >= 0
        out[has] = self.experts.apply_factors(part, own[has], x[has].float())
        return out


@dataclass(frozen=True)
class _GatedMlp:
    """One MLP among those that are solved together.

    Attributes:
        kind: first part of the roles of its matrices.
        tokens: the tokens that go through it, int64 [n], in rising order.
        weights: what its output is multiplied with, [n], or how to compute that from its inputs;
            None: nothing.
        everyone: whether it could be shown all tokens instead.
        low: what factors add, where several use the matrices; None: nothing.
    """

    kind: str
    tokens: Tensor
    weights: Tensor | Callable[[Tensor], Tensor] | None
    everyone: bool = False
    low: _Low | None = None

    def inputs(
        self, norm: Callable[[Tensor], Tensor], flat: Tensor, everyone: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs, from the stream after attention [tokens, hidden], and weights."""
        if everyone:
            yield from ((norm(x), None) for x in torch.split(flat, BATCH_TOKENS))
            return
        for at in range(0, len(self.tokens), BATCH_TOKENS):
            x = norm(flat[self.tokens[at : at + BATCH_TOKENS]])
            if self.weights is None or isinstance(self.weights, torch.Tensor):
                own = None if self.weights is None else self.weights[at : at + BATCH_TOKENS]
                own = None if own is None else own.to(x.device)
            else:
                own = self.weights(x)
            yield x, own


def _inside(gate: Tensor, up: Tensor) -> _Inside:
    """What an MLP has between its matrices [width, hidden], ``silu(gate x) * up x``, of inputs.

    It is computed for so many tokens at a time that the numbers are few.
    """

    def of(inputs: Batches, low: _Low | None = None) -> Batches:
        def each() -> Iterator[tuple[Tensor, Tensor | None]]:
            step, behind = max(1, CHUNK_NUMBERS // len(gate)), 0
            for x, weights in inputs():
                for at in range(0, len(x), step):
                    rows = x[at : at + step].to(gate.dtype)
                    first, second = rows @ gate.T, rows @ up.T
                    if low is not None:
                        first = first + low("gate", behind, rows).to(first.dtype)
                        second = second + low("up", behind, rows).to(second.dtype)
                    behind += len(rows)
                    y = nn.functional.silu(first).mul_(second)
                    yield y, None if weights is None else weights[at : at + step]

        return each

    return of


class _Inside(Protocol):
    """Makes of inputs what is between the matrices of an MLP."""

    def __call__(self, inputs: Batches, low: _Low | None = None) -> Batches:
        """With what factors add, for inputs in their order."""
        ...


class _Kept:
    """Batches that are computed once, if they are not too many numbers to keep."""

    def __init__(self, batches: Batches, numbers: int) -> None:
        """Of so many numbers, with all that are kept at the same time."""
        self._batches, self._keep = batches, numbers <= KEPT_NUMBERS
        self._known: list[tuple[Tensor, Tensor | None]] | None = None

    def __call__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches."""
        if not self._keep:
            return self._batches()
        if self._known is None:
            self._known = list(self._batches())
        return iter(self._known)


def _each(hidden: Tensor, inputs: Callable[[Tensor], Tensor]) -> Batches:
    """Inputs of matrices of attention, from the stream."""
    return lambda: ((inputs(hidden[part]), None) for part in split_batches(hidden))


def solve_blocks(
    model: Model,
    tokens: Tensor | None,
    solver: Solver | GroupSolver,
    ledger: BlockJournal,
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
) -> tuple[Model, list[str], list[str]]:
    """Solve block after block; later blocks see the outputs of the blocks as solved.

    What the ledger has is not solved again.

    Args:
        model: what to solve.
        tokens: int64 [samples, length]; None for a solver that looks at no activations.
        solver: computes new numbers.
        ledger: keeps them.
        advance: told about progress.
        label: name of the work in progress lines.
        memory: what it may take.

    Returns:
        The new model, the names of all tensors that were solved, and the solver's notes.
    """
    tally = SolverProgress(label, advance, model, 0 if tokens is None else tokens.numel())
    hidden: Tensor | None = None
    for block in model.blocks:
        if known := ledger.restore(block):
            model = model.replace_block(known[0])
            tally.take(known[1])
            continue
        if tokens is not None and hidden is None:
            hidden = _stream(model, tokens, block, ledger, memory)
            if isinstance(solver, GroupSolver):
                hidden = _near(hidden, solver.device)
        tally.begin(block)
        if isinstance(solver, GroupSolver):
            alone = solver.alone(block)
            shown = attach_numbers(block, alone) if solver.propagate else block
            parts = _BlockWork(model, shown, solver, tally, memory)
            numbers = parts.without_tokens() if hidden is None else parts.run(hidden)
            numbers = {**numbers, **alone}
            block = block.with_weights(parts.patterned)
            del parts
        else:
            numbers = _solve_whole(model, block, solver, tally, hidden)
        done = tally.end(block, numbers)
        ahead = hidden if block.index + 1 < len(model.blocks) else None
        model = model.replace_block(ledger.finish(block, numbers, done, ahead))
        del numbers
        give_back()
    tally.finished()
    return model, tally.changed, tally.notes


def estimate_largest_part(model: Model, solver: Solver | GroupSolver) -> int:
    """Bytes of the largest part of a model that is in memory at once while it is solved."""
    found = [0]
    for block in model.blocks:
        weights = dict(list_quantizable(block))
        if not isinstance(solver, GroupSolver):
            found.append(8 * sum(w.count for w in weights.values()))
            continue
        attention = 4 * sum(weights[role].count for role in (*QKV, OUT))
        for roles in (QKV, (OUT,)):
            shapes = tuple(weights[role].shape for role in roles)
            found.append(solver.nbytes(shapes) + attention)
        found += [_needs(solver, mlp) for _, mlp in list_gated_mlps(block)]
    return max(found)


def _needs(solver: GroupSolver, mlp: Dense) -> int:
    """Bytes of one MLP while it is solved."""
    solving = max(solver.nbytes((mlp.gate.shape, mlp.up.shape)), solver.nbytes((mlp.down.shape,)))
    return solving + 4 * mlp.count


def _stream(
    model: Model, tokens: Tensor, block: Block, ledger: BlockJournal, memory: Memory
) -> Tensor:
    """Hidden states in front of ``block``."""
    if block.index == 0:
        return embed(model, tokens, memory)
    before = ledger.stream()
    assert before is not None, "a finished block has left no stream"
    hidden = memory.empty(tuple(before.shape))
    hidden.copy_(before)
    return hidden


def _gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU: all of them, as what is free differs from run to run and numbers may not."""
    return torch.cuda.get_device_properties(device).total_memory


def _near(hidden: Tensor, device: torch.device) -> Tensor:
    """The stream on the device where the work is done, if all that are alive take little of it."""
    if device.type == "cuda" and STREAMS * hidden.nbytes <= _gpu_memory(device) // 4:
        return hidden.to(device)
    return hidden


def _like(hidden: Tensor, memory: Memory) -> Tensor:
    """A stream without numbers where ``hidden`` lies."""
    if hidden.device.type == "cpu":
        return memory.empty(tuple(hidden.shape))
    return torch.empty_like(hidden)


def _solve_whole(
    model: Model, block: Block, solver: Solver, tally: SolverProgress, hidden: Tensor | None
) -> Mapping[str, Quantized | Tensor]:
    """The work of a solver that wants to have seen all of a block; moves ``hidden`` on."""
    tally.tell("the whole block")
    if hidden is not None:
        runner = BlockRunner(model, block)
        for part in split_batches(hidden):
            solver.observe(runner.watch(hidden[part]))
        del runner
    solved = solver.solve(block)
    tally.add(solved)
    if hidden is not None and block.index + 1 < len(model.blocks):
        runner = BlockRunner(model, attach_numbers(block, solved.numbers))
        for part in split_batches(hidden):
            hidden[part] = runner.run(hidden[part])
    return solved.numbers
