"""The walk of solvers: blocks one by one, and inside of a block its matrices in order.

Attention and routing are transformers' own modules. Experts are taken a few at a time: their
matrices are loaded and solved, and their outputs are added to the hidden states. So one forward
pass serves both for the statistics and for the inputs of the next matrices, and a block is never
in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from moe2edge.calibration.walk import BATCH_TOKENS, BlockRunner, embed, split_batches
from moe2edge.model.block import SECOND_NORM, Block
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.model.roles import OUT, QKV, list_gated_mlps, list_quantizable
from moe2edge.pipeline.block_parts import BlockParts
from moe2edge.pipeline.block_work import (
    CHUNK_NUMBERS,
    Batches,
    BlockWork,
    KeptBatches,
    count_gpu_bytes,
    estimate_mlp_bytes,
    make_like,
)
from moe2edge.pipeline.blockwise_report import SolverProgress, describe_coverage
from moe2edge.pipeline.solver import GroupSolver, Solved, Solver
from moe2edge.pipeline.staged_work import StagedWork
from moe2edge.pipeline.work import BlockJournal
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import UNLIMITED, Memory, give_back
from moe2edge.storage.solved_blocks import attach_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.progress import Advance
    from moe2edge.runtime.mixed_experts import TiedExperts

# Copies of the hidden states that are alive at once.
STREAMS = 4


class _TabledWork(BlockWork):
    """The work on one block of a family of the table."""

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for ``hidden`` [samples, length, hidden], which becomes its output."""
        parts = BlockParts(self.model, self.block, self.device)
        self._solve_attention(parts, hidden)
        mlp = self.block.mlp
        if mlp is None:
            if SECOND_NORM in self.block.norms:
                for part in split_batches(hidden):
                    hidden[part] += parts.normalize(hidden[part]).to(hidden.device)
            return self.numbers
        added = make_like(hidden, self.memory).zero_()
        flat, out = hidden.flatten(0, 1), added.flatten(0, 1)
        if isinstance(mlp, MoELayer):
            self._solve_experts(parts, mlp, flat, out)
        dense = (
            mlp if isinstance(mlp, Dense) else mlp.expert if isinstance(mlp, UnroutedMLP) else None
        )
        if dense is not None:
            self._solve_always_on("dense", parts, flat, out, None)
        if isinstance(mlp, MoELayer | UnroutedMLP) and mlp.shared is not None:
            gate = mlp.shared.gate
            scorer = None if gate is None else load_finite(gate).to(self.device)
            self._solve_always_on("shared", parts, flat, out, scorer)
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
                parts.put_attention(role, self.load_matrix(role, torch.float32))
        for part, (x, _) in zip(split_batches(hidden), inside(), strict=True):
            hidden[part] += parts.project_attention(x).view_as(hidden[part]).to(hidden.device)

    # ---- experts and MLPs ------------------------------------------------------------------------

    def _solve_always_on(
        self, kind: str, parts: BlockParts, flat: Tensor, out: Tensor, scorer: Tensor | None
    ) -> None:
        """Solve an MLP that runs for every token, and add its output to ``out``.

        Args:
            kind: first part of the roles of its matrices.
            parts: the rest of the block.
            flat: hidden states after attention, [tokens, hidden].
            out: sum of outputs, [tokens, hidden].
            scorer: gate [1, hidden] of a shared expert; None: there is none.
        """

        def weigh(x: Tensor) -> Tensor:
            assert scorer is not None
            return torch.sigmoid(x @ scorer.T)[:, 0]

        everything = torch.arange(len(flat), device=flat.device)
        self._solve_mlps(
            [_GatedMlp(kind, everything, weigh if scorer is not None else None)], parts, flat, out
        )

    def _solve_experts(self, parts: BlockParts, layer: MoELayer, flat: Tensor, out: Tensor) -> None:
        """Solve the stored experts of a layer, and add the outputs of all rows to ``out``."""
        routed = [parts.route(parts.normalize(x)) for x in torch.split(flat, BATCH_TOKENS)]
        weights, ids = (torch.cat(both) for both in zip(*routed, strict=True))
        mlps = []
        for n in range(len(layer.experts)):
            token, place = torch.where(layer.find_uses(n, ids))
            own = weights[token, place]
            low = _Low(parts.tied, parts.find_tied(ids[token, place])) if parts.tied else None
            token = token.to(flat.device)
            mlps.append(_GatedMlp(f"experts.{n}", token, own, everyone=True, low=low))
        counts = [len(mlp.tokens) for mlp in mlps]
        self.tally.add(Solved({}, (describe_coverage(self.block, counts),)))
        if None in layer.bases:
            parted = (torch.split(t, BATCH_TOKENS) for t in (flat, out, weights, ids))
            for x, place, *chosen in zip(*parted, strict=True):
                place += parts.compute_unstored(parts.normalize(x), *chosen).to(out.device)
        size = self.count_together(layer.experts[0])
        for at in range(0, len(mlps), size):
            self._solve_mlps(mlps[at : at + size], parts, flat, out)

    def _solve_mlps(
        self, mlps: Sequence[_GatedMlp], parts: BlockParts, flat: Tensor, out: Tensor
    ) -> None:
        """Solve gated MLPs of one shape, and add their outputs to ``out``."""
        kinds = [mlp.kind for mlp in mlps]
        what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} to {kinds[-1].rpartition('.')[2]}"

        def inputs(mlp: _GatedMlp, everyone: bool) -> Batches:
            return lambda: mlp.inputs(parts.normalize, flat, everyone)

        self.solve(
            f"{what}: gate, up",
            [
                self.make_group(
                    (f"{m.kind}.gate", f"{m.kind}.up"),
                    inputs(m, False),
                    len(m.tokens),
                    everyone=inputs(m, True) if m.everyone else None,
                )
                for m in mlps
            ],
        )
        insides = [
            _make_intermediate(
                *(self.load_matrix(f"{m.kind}.{part}", self.dtype) for part in ("gate", "up"))
            )
            for m in mlps
        ]
        width = self.weights[f"{kinds[0]}.gate"].shape[0]
        own = [
            KeptBatches(inside(inputs(m, False), m.low), len(m.tokens) * width * len(mlps))
            for m, inside in zip(mlps, insides, strict=True)
        ]
        self.solve(
            f"{what}: down",
            [
                self.make_group(
                    (f"{m.kind}.down",),
                    kept,
                    len(m.tokens),
                    everyone=inside(inputs(m, True)) if m.everyone else None,
                )
                for m, inside, kept in zip(mlps, insides, own, strict=True)
            ],
        )
        for mlp, kept in zip(mlps, own, strict=True):
            down = self.load_matrix(f"{mlp.kind}.down", self.dtype)
            at = 0
            for hidden, weights in kept():
                tokens = mlp.tokens[at : at + len(hidden)]
                at += len(hidden)
                y = (hidden @ down.T).float()
                if mlp.low is not None:
                    y += mlp.low("down", at - len(hidden), hidden)
                y = y if weights is None else y.mul_(weights[:, None])
                out.index_add_(0, tokens, y.to(out.device))


@dataclass(frozen=True)
class _Low:
    """Factors of the rows that use a stored expert.

    Attributes:
        experts: tied experts of the layer.
        which: tied expert of each token of the stored expert, int64 [n]; -1: it has no factors.
    """

    experts: TiedExperts
    which: Tensor

    def __call__(self, part: str, at: int, x: Tensor) -> Tensor:
        """Return what factors add to products of ``part`` for tokens from ``at`` on, float32."""
        which = self.which[at : at + len(x)].to(x.device)
        outs = getattr(self.experts, f"{part}_second").shape[1]
        out = x.new_zeros(len(x), outs, dtype=torch.float32)
        has = which >= 0
        out[has] = self.experts.apply_factors(part, which[has], x[has].float())
        return out


@dataclass(frozen=True)
class _GatedMlp:
    """One MLP among those that are solved together.

    Attributes:
        kind: first part of the roles of its matrices.
        tokens: the tokens that it runs for, int64 [n], in rising order.
        weights: gate weights of its output, [n], or how to compute them from its inputs; None: it
            has none.
        everyone: whether it could be shown all tokens instead.
        low: factors of tied experts that use its matrices; None: there are none.
    """

    kind: str
    tokens: Tensor
    weights: Tensor | Callable[[Tensor], Tensor] | None
    everyone: bool = False
    low: _Low | None = None

    def inputs(
        self, norm: Callable[[Tensor], Tensor], flat: Tensor, everyone: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield inputs, from hidden states after attention [tokens, hidden], and weights."""
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


def _make_intermediate(gate: Tensor, up: Tensor) -> _IntermediateMaker:
    """Return how to compute intermediate activations, ``silu(gate x) * up x``, from inputs.

    They are computed for a few tokens at a time, so that they take little memory.

    Args:
        gate: [width, hidden].
        up: [width, hidden].
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


class _IntermediateMaker(Protocol):
    """Computes the intermediate activations of an MLP from its inputs."""

    def __call__(self, inputs: Batches, low: _Low | None = None) -> Batches:
        """Return them, with factors added, for inputs in their order."""
        ...


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
            hidden = _load_hidden(model, tokens, block, ledger, memory)
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
        ahead = hidden if block.index + 1 < len(model.blocks) else None
        model = model.replace_block(ledger.finish(block, numbers, done, ahead))
        del numbers
        give_back()
    tally.finish()
    return model, tally.changed, tally.notes


def estimate_largest_part(model: Model, solver: Solver | GroupSolver) -> int:
    """Estimate the bytes of the largest part of a model in memory while it is solved."""
    found = [0]
    for block in model.blocks:
        weights = dict(list_quantizable(block))
        if not isinstance(solver, GroupSolver):
            found.append(8 * sum(w.count for w in weights.values()))
            continue
        if (
            model.family.generic
        ):  # what shares an input is solved together: at most all of one width
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
        found += [estimate_mlp_bytes(solver, mlp) for _, mlp in list_gated_mlps(block)]
    return max(found)


def _load_hidden(
    model: Model, tokens: Tensor, block: Block, ledger: BlockJournal, memory: Memory
) -> Tensor:
    """Return the hidden states in front of ``block``."""
    if block.index == 0:
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
