"""The walk of solvers: blocks one by one, and inside of a block its matrices in order.

Attention and routing are transformers' own modules. Experts are taken a few at a time: their
matrices are loaded and solved, and their outputs are added to the hidden states. So one forward
pass serves both for the statistics and for the inputs of the next matrices, and a block is never
in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.walk import BATCH_TOKENS, embed, list_head_inputs, split_batches
from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.kinds import look_at_blocks
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.model.roles import OUT, QKV, list_gated_mlps, list_quantizable
from moe2edge.pipeline.block_parts import RUN_TOKENS, BlockParts
from moe2edge.pipeline.block_work import (
    CHUNK_NUMBERS,
    BlockWork,
    Inside,
    KeptBatches,
    LowRank,
    Mlp,
    count_gpu_bytes,
    estimate_mlp_bytes,
    make_like,
)
from moe2edge.pipeline.blockwise_report import SolverProgress
from moe2edge.pipeline.solver import Batches, EndSolver, GroupSolver, Solver
from moe2edge.pipeline.staged_work import StagedWork
from moe2edge.pipeline.work import BlockJournal, Store
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import UNLIMITED, Memory, give_back
from moe2edge.storage.solved_blocks import attach_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.progress import Advance

# Copies of the hidden states that are alive at once.
STREAMS = 4

# Matrices of the MLPs here before the last.
GATED = ("gate", "up")


class _TabledWork(BlockWork):
    """The work on one block of a family of the table."""

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for ``hidden`` [samples, length, hidden], which becomes its output."""
        parts = BlockParts(self.model, self.block, self.device, self.dtype)
        self._solve_attention(parts, hidden)
        mlp = self.block.mlp
        if mlp is None:
            if self.block.passes_norm:
                for part in split_batches(hidden):
                    hidden[part] += parts.normalize(hidden[part]).to(hidden.device)
            return self.numbers
        added = make_like(hidden, self.memory).zero_()
        flat, out = hidden.flatten(0, 1), added.flatten(0, 1)
        given = self._normalize(parts, flat, make_like(hidden, self.memory, self.dtype))
        if isinstance(mlp, MoELayer):
            self._solve_experts(parts, mlp, flat, given, out)
        dense = (
            mlp if isinstance(mlp, Dense) else mlp.expert if isinstance(mlp, UnroutedMLP) else None
        )
        if dense is not None:
            self._solve_always_on("dense", given.inputs, None, out)
        if isinstance(mlp, MoELayer | UnroutedMLP) and mlp.shared is not None:
            self._solve_always_on("shared", given.inputs, given.openings, out)
        hidden += added
        return self.numbers

    # ---- attention -------------------------------------------------------------------------------

    def _solve_attention(self, parts: BlockParts, hidden: Tensor) -> None:
        """Solve the matrices of attention; ``hidden`` becomes the hidden states after it."""
        tokens = hidden.shape[0] * hidden.shape[1]
        width = self.weights[OUT].shape[1]
        inside = KeptBatches(_batch_inputs(hidden, parts.compute_output_inputs), tokens * width)
        for roles, inputs in (
            (
                tuple(r for r in QKV if r in self.weights),
                _batch_inputs(hidden, parts.compute_attention_inputs),
            ),
            ((OUT,), inside),
        ):
            self.solve("attention", [self.make_group(roles, inputs, tokens)])
            for role in roles:
                parts.put_attention(role, self.load_matrix(role, self.dtype))
        for part, (x, _) in zip(split_batches(hidden), inside(), strict=True):
            parts.add_attention(hidden[part], x)

    # ---- experts and MLPs ------------------------------------------------------------------------

    def _normalize(self, parts: BlockParts, flat: Tensor, space: Tensor) -> _MlpInputs:
        """Compute once what all MLPs get; experts are routed by inputs in float32.

        Args:
            parts: the rest of the block.
            flat: hidden states after attention, [tokens, hidden].
            space: receives the inputs, as they are multiplied; [samples, length, hidden].
        """
        mlp, inputs = self.block.mlp, space.flatten(0, 1)
        shared = mlp.shared if isinstance(mlp, MoELayer | UnroutedMLP) else None
        gate = None if shared is None or shared.gate is None else load_finite(shared.gate)
        routed, openings = [], []
        for place, x in zip(*(torch.split(t, RUN_TOKENS) for t in (inputs, flat)), strict=True):
            x = parts.normalize(x)
            place.copy_(x)
            if isinstance(mlp, MoELayer):
                routed.append(parts.route(x))
            if gate is not None:
                openings.append(torch.sigmoid(x @ gate.to(x.device).T)[:, 0])
        weights, ids = (
            (torch.cat(both) for both in zip(*routed, strict=True))
            if routed
            else (torch.empty(0), torch.empty(0))
        )
        return _MlpInputs(inputs, weights, ids, torch.cat(openings) if openings else None)

    def _solve_always_on(
        self, kind: str, inputs: Tensor, weights: Tensor | None, out: Tensor
    ) -> None:
        """Solve an MLP that runs for every token, and add its output to ``out``.

        Args:
            kind: first part of the roles of its matrices.
            inputs: of all tokens, [tokens, hidden].
            weights: of the outputs, [tokens]; None: ones.
            out: sum of outputs, [tokens, hidden].
        """
        everything = torch.arange(len(inputs), device=inputs.device)
        batches = self._list_batches(inputs, None, weights)
        self.solve_mlps([_GatedMlp(kind, everything, batches, None, GATED)], out)

    def _solve_experts(
        self, parts: BlockParts, layer: MoELayer, flat: Tensor, given: _MlpInputs, out: Tensor
    ) -> None:
        """Solve the stored experts of a layer, and add the outputs of all rows to ``out``."""
        weights, ids = given.weights, given.ids
        everyone = self._list_batches(given.inputs, None, None)
        mlps = []
        for n in range(len(layer.experts)):
            token, place = torch.where(layer.find_uses(n, ids))
            own = weights[token, place]
            low = LowRank(parts.tied, parts.find_tied(ids[token, place])) if parts.tied else None
            token = token.to(flat.device)
            batches = self._list_batches(given.inputs, token, own)
            mlps.append(_GatedMlp(f"experts.{n}", token, batches, everyone, GATED, low))
        if None in layer.bases:
            parted = (torch.split(t, BATCH_TOKENS) for t in (flat, out, weights, ids))
            for x, place, *chosen in zip(*parted, strict=True):
                place += parts.compute_unstored(parts.normalize(x), *chosen).to(out.device)
        self.solve_experts(layer, mlps, out)

    def _list_batches(
        self, inputs: Tensor, tokens: Tensor | None, weights: Tensor | None
    ) -> Batches:
        """Return inputs of some tokens in batches, with the weights of the outputs.

        Args:
            inputs: of all tokens, [all tokens, hidden].
            tokens: int64 [n]; None: all.
            weights: [n]; None: outputs have none.
        """

        def each() -> Iterator[tuple[Tensor, Tensor | None]]:
            count = len(inputs) if tokens is None else len(tokens)
            for at in range(0, count, BATCH_TOKENS):
                part = slice(at, at + BATCH_TOKENS)
                x = inputs[part] if tokens is None else inputs[tokens[part]]
                own = None if weights is None else weights[part].to(self.device)
                yield x.to(self.device), own

        return each


@dataclass(frozen=True)
class _MlpInputs:
    """Inputs of the MLPs of a block, computed once.

    Attributes:
        inputs: in the dtype in which they are multiplied, [tokens, hidden].
        weights, ids: of the experts that are chosen, [tokens, k]; empty where there are none.
        openings: how far the gate of a shared expert is open, [tokens]; None: it has no gate.
    """

    inputs: Tensor
    weights: Tensor
    ids: Tensor
    openings: Tensor | None


@dataclass(frozen=True)
class _GatedMlp(Mlp):
    """An MLP of the form ``down(silu(gate(x)) * up(x))``.

    Attributes:
        low: factors of tied experts that use its matrices; None: there are none.
    """

    low: LowRank | None = None

    def make_inside(self, matrices: Sequence[Tensor]) -> Inside:
        """Return how to compute ``silu(gate x) * up x``, with factors for routed tokens."""
        gate, up = matrices
        step = max(1, CHUNK_NUMBERS // len(gate))

        def inside(inputs: Batches, *, routed: bool) -> Batches:
            low = self.low if routed else None

            def each() -> Iterator[tuple[Tensor, Tensor | None]]:
                behind = 0
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

        return inside

    def make_outputs(self, down: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return how to compute outputs, float32, from what ``down`` gets from some token on."""

        def compute(x: Tensor, at: int) -> Tensor:
            y = (x @ down.T).float()
            if self.low is not None:
                y += self.low("down", at, x)
            return y

        return compute


def _batch_inputs(hidden: Tensor, inputs: Callable[[Tensor], Tensor]) -> Batches:
    """Return batches of inputs of matrices of attention, from hidden states."""
    return lambda: ((inputs(hidden[part]), None) for part in split_batches(hidden))


def solve_blocks(
    model: Model,
    tokens: Tensor | None,
    solver: Solver | GroupSolver,
    ledger: BlockJournal,
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
    *,
    behind: Callable[[Tensor], None] | None = None,
) -> tuple[Model, list[str], list[str]]:
    """Solve block after block; later blocks see the outputs of the blocks as solved.

    Blocks in the ledger are not solved again.

    Args:
        model: the model to solve.
        tokens: int64 [samples, length]; None for a solver that looks at no activations.
        solver: computes new numbers.
        ledger: keeps them.
        advance: reports progress.
        label: name of the work in progress lines.
        memory: memory that it may take.
        behind: gets the hidden states [samples, length, hidden] after the last block, as a solver
            of groups leaves them; None: nobody needs them.

    Returns:
        The new model, the names of all tensors that were solved, and the solver's notes.
    """
    tally = SolverProgress(label, advance, model, 0 if tokens is None else tokens.numel())
    hidden: Tensor | None = None
    for block in model.blocks:
        if known := ledger.restore(block):
            model = model.replace_block(known[0])
            tally.add_known(known[1])
            continue
        if tokens is not None and hidden is None:
            hidden = _load_hidden(model, tokens, block.index, ledger, memory)
            if isinstance(solver, GroupSolver):
                hidden = _move_near(hidden, solver.device)
        tally.begin(block)
        if isinstance(solver, GroupSolver):
            alone = solver.solve_alone(block)
            shown = attach_numbers(block, alone) if solver.propagate else block
            kind = StagedWork if model.family.generic else _TabledWork
            parts = kind(model, shown, solver, tally, memory)
            numbers = parts.solve_without_tokens() if hidden is None else parts.run(hidden)
            numbers = {**numbers, **alone}
            block = block.with_weights(parts.patterned)
            del parts
        else:
            numbers = _solve_whole(model, block, solver, tally, hidden)
        done = tally.end(block, numbers)
        ahead = hidden if behind or block.index + 1 < len(model.blocks) else None
        model = model.replace_block(ledger.finish(block, numbers, done, ahead))
        del numbers
        give_back()
    tally.finish()
    if behind and tokens is not None:
        if hidden is None:
            hidden = _load_hidden(model, tokens, len(model.blocks), ledger, memory)
        behind(hidden)
    return model, tally.changed, tally.notes


def solve_ends(
    model: Model,
    names: Sequence[str],
    solver: EndSolver,
    store: Store,
    hidden: Tensor | None = None,
) -> tuple[Model, list[str], list[str]]:
    """Solve matrices outside of blocks; killed, a run solves them again.

    Args:
        model: the model to solve.
        names: of the matrices, in ``rest``.
        solver: computes new numbers.
        store: keeps them.
        hidden: hidden states after the last block, if the solver looks at inputs of the head.

    Returns:
        As `solve_blocks`.
    """
    changed: list[str] = []
    notes: list[str] = []

    def list_inputs() -> Iterator[tuple[Tensor, None]]:
        assert hidden is not None
        return ((x, None) for x in list_head_inputs(model, hidden))

    for name in names:
        solved = solver.solve(name, model.rest[name], None if hidden is None else list_inputs)
        model = replace(model, rest=store.put_rest(model.rest, solved.numbers))
        lost, size = solved.loss
        name = model.names.get_rest_name(name)
        changed.append(name)
        notes += [*solved.notes, f"{name}: error {(lost / size) ** 0.5 if size else 0:.2%}"]
        give_back()
    return model, changed, notes


def estimate_largest_part(model: Model, solver: Solver | GroupSolver) -> int:
    """Estimate the bytes of the largest part of a model in memory while it is solved."""

    def look(block: Block) -> int:
        weights = dict(list_quantizable(block))
        if not isinstance(solver, GroupSolver):
            return 8 * sum(w.count for w in weights.values())
        found = [0]
        if model.family.generic:
            # What shares an input is solved together: at most all of one width.
            linear = [w for role, w in weights.items() if not role.startswith("experts.")]
            loaded = 4 * sum(weight.count for weight in linear)
            for width in {weight.shape[1] for weight in linear}:
                shapes = tuple(weight.shape for weight in linear if weight.shape[1] == width)
                found.append(solver.nbytes(shapes) + loaded)
        else:
            attention = 4 * sum(weights[role].count for role in (*QKV, OUT))
            for roles in (QKV, (OUT,)):
                shapes = tuple(weights[role].shape for role in roles)
                found.append(solver.nbytes(shapes) + attention)
        return max(*found, *(estimate_mlp_bytes(solver, mlp) for _, mlp in list_gated_mlps(block)))

    return max(look_at_blocks(model.blocks, look))


def _load_hidden(
    model: Model, tokens: Tensor, index: int, ledger: BlockJournal, memory: Memory
) -> Tensor:
    """Return the hidden states in front of block ``index``, or behind the last one."""
    if index == 0:
        return embed(model, tokens, memory)
    before = ledger.stream()
    assert before is not None, "a finished block has left no hidden states"
    hidden = memory.empty(tuple(before.shape))
    hidden.copy_(before)
    return hidden


def _move_near(hidden: Tensor, device: torch.device) -> Tensor:
    """Return the hidden states on ``device`` if all copies that are alive take little of it."""
    if device.type == "cuda" and STREAMS * hidden.nbytes <= count_gpu_bytes(device) // 4:
        return hidden.to(device)
    return hidden


def _solve_whole(
    model: Model, block: Block, solver: Solver, tally: SolverProgress, hidden: Tensor | None
) -> Mapping[str, Quantized | Tensor]:
    """Solve a block with a solver that first sees all of it; ``hidden`` becomes its output."""
    tally.report("the whole block")
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
