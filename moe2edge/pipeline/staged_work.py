"""The work of a solver on one block of any family, inside of transformers' own layer.

The layer says itself in which order its matrices are used, and what each gets: one run of it is
watched. Then the matrices outside of the experts are solved one input after another, each with the
layer run up to it, and what is solved takes its place. The experts are solved one after another
from what the layer hands them; from then on the layer gets their summed outputs, so the numbers of
all experts are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.calibration.walk import BATCH_TOKENS, split_batches
from moe2edge.model.anatomy import ExpertsForm
from moe2edge.model.block import Block
from moe2edge.model.experts import Expert
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.pipeline.block_work import (
    CHUNK_NUMBERS,
    Batches,
    BlockWork,
    Inside,
    KeptBatches,
    LowRank,
    Mlp,
)
from moe2edge.pipeline.blockwise_report import SolverProgress
from moe2edge.pipeline.solver import GroupSolver, Solved
from moe2edge.runtime.decoder_blocks import (
    arrange_gate_up,
    find_module_name,
    load_block_state,
    load_finite,
)
from moe2edge.runtime.layer_stage import LayerStage, share_numbers
from moe2edge.runtime.memory import Memory
from moe2edge.runtime.mixed_experts import MixedExperts

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# In the order of use: paths of linear modules that share their input; none for the experts.
Steps = list[tuple[str, ...]]


class _Taken(Exception):
    """Ends a run of the layer once what a module gets is known."""


class _KnownOutputs:
    """Takes the place of a layer's experts. It knows no layer, which is freed with its block.

    Attributes:
        outputs: sum of the outputs of all experts, [tokens, size]; None: they are not solved yet.
        at: the first token of the batch that runs.
    """

    def __init__(self) -> None:
        self.outputs: Tensor | None = None
        self.at = 0

    def give(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the outputs of the experts for the batch that runs; zeros until they are known."""
        if self.outputs is None:
            return torch.zeros_like(inputs)
        count = inputs.shape[:-1].numel()
        found = self.outputs[self.at : self.at + count]
        return found.view(*inputs.shape[:-1], -1).to(inputs.device, inputs.dtype)


class StagedWork(BlockWork):
    """The work on one block of any family."""

    def __init__(
        self, model: Model, block: Block, solver: GroupSolver, tally: SolverProgress, memory: Memory
    ) -> None:
        super().__init__(model, block, solver, tally, memory)
        self._anatomy = model.architecture.anatomy[block.origin]
        # Matrices of each linear module; a module whose matrix files have in parts has several.
        self._roles: dict[str, list[str]] = {}
        for role in self.weights:
            if not role.startswith("experts."):
                name = find_module_name(self._anatomy, role)
                assert name is not None, "a matrix without a module"
                self._roles.setdefault(name.removesuffix(".weight"), []).append(role)
        self._known = _KnownOutputs()

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for ``hidden`` [samples, length, hidden], which becomes its output."""
        self._open()
        steps = self._watch_steps(hidden)
        self._solve_uncalled(self._roles.keys() - {path for paths in steps for path in paths})
        for paths in steps:
            if paths:
                self._solve_linears(paths, hidden)
            else:
                self._solve_experts(hidden)
        for part in split_batches(hidden):
            hidden[part] = self._run_stage(hidden, part).to(hidden.device)
        return self.numbers

    # ---- the layer -------------------------------------------------------------------------------

    def _open(self) -> None:
        """Load the layer without the matrices of its experts."""
        self._stage = LayerStage(self.model, self.block)
        self._layer: Any = self._stage.layer
        state = load_block_state(self.model, self.block, lambda r: not r.startswith("experts."))
        state = {name: tensor.to(self.device) for name, tensor in state.items()}
        self._layer.load_state_dict(state, strict=False, assign=True)
        for module in self._layer.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self._stage.to(self.device)
        if isinstance(self.block.mlp, MoELayer):
            assert self._anatomy.experts is not None, "a layer has experts that were not found"
            self._experts: Any = self._layer.get_submodule(self._anatomy.experts)
            self._experts.forward = self._known.give

    def _run_stage(self, hidden: Tensor, part: slice) -> Tensor:
        """Return the output of the layer for one batch of the hidden states."""
        self._known.at = part.start * hidden.shape[1]
        return self._stage.run(hidden[part].to(self.device))

    def _watch_steps(self, hidden: Tensor) -> Steps:
        """Run one sample, and return which modules are used, in their order."""
        steps: Steps = []
        seen: list[Tensor | None] = [None]

        def note(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if any(path in paths for paths in steps):
                    return
                before = seen[-1]
                if path and before is not None and share_numbers(before, args[0]):
                    steps[-1] = (*steps[-1], path)
                else:
                    steps.append((path,) if path else ())
                # Kept, so that its memory is not given to another tensor.
                seen.append(args[0] if path else None)

            return hook

        modules = {path: self._layer.get_submodule(path) for path in self._roles}
        if isinstance(self.block.mlp, MoELayer):
            modules[""] = self._experts
        hooks = [module.register_forward_pre_hook(note(path)) for path, module in modules.items()]
        try:
            self._run_stage(hidden, slice(0, 1))
        finally:
            for handle in hooks:
                handle.remove()
        return steps

    def _take_inputs(self, module: nn.Module, hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield what a module gets in each batch, with the layer run no further than that."""
        taken: list[tuple[Tensor, ...]] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            taken.append(args)
            raise _Taken

        for part in split_batches(hidden):
            handle = module.register_forward_pre_hook(take)
            try:
                self._run_stage(hidden, part)
            except _Taken:
                yield taken.pop()
            finally:
                handle.remove()

    # ---- matrices outside of the experts ---------------------------------------------------------

    def _solve_linears(self, paths: Sequence[str], hidden: Tensor) -> None:
        """Solve linear modules that share their input, and put the results in their place."""
        module = self._layer.get_submodule(paths[0])
        roles = [role for path in paths for role in self._roles[path]]
        tokens = hidden.shape[0] * hidden.shape[1]

        def batches() -> Iterator[tuple[Tensor, None]]:
            return ((x.flatten(0, -2), None) for x, *_ in self._take_inputs(module, hidden))

        kept = KeptBatches(batches, tokens * module.in_features)
        self.solve(", ".join(path.rpartition(".")[2] for path in paths), [
            self.make_group(roles, kept, tokens)
        ])  # fmt: skip
        for path in paths:
            self._put(path)

    def _solve_uncalled(self, paths: Collection[str]) -> None:
        """Solve matrices that transformers does not call as modules: nobody sees what they get."""
        for path in sorted(paths):
            for role in self._roles[path]:
                self.solve_unseen(role)
            note = f"block {self.block.index}: {path} is solved without inputs: none are to be seen"
            self.tally.add(Solved({}, (note,)))
            self._put(path)

    def _put(self, path: str) -> None:
        """Give a linear module the matrix with which the next inputs are computed."""
        parts = [self.load_matrix(role, torch.float32) for role in self._roles[path]]
        matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._layer.get_submodule(path).weight = nn.Parameter(matrix, requires_grad=False)

    # ---- experts ---------------------------------------------------------------------------------

    def _solve_experts(self, hidden: Tensor) -> None:
        """Solve the experts, a few at a time, and sum their outputs."""
        layer = self.block.mlp
        assert isinstance(layer, MoELayer), "a layer without experts was asked for them"
        taken = [
            (x.flatten(0, -2).to(hidden.device), ids.cpu(), weights.float().cpu())
            for x, ids, weights in self._take_inputs(self._experts, hidden)
        ]
        inputs, ids, weights = (torch.cat(parts) for parts in zip(*taken, strict=True))
        outputs = torch.zeros(len(inputs), layer.hidden, device=hidden.device)
        mixed = self._experts if isinstance(self._experts, MixedExperts) else None
        if mixed is not None:
            for part in torch.split(torch.arange(len(inputs)), BATCH_TOKENS):
                given = (t[part].to(self.device) for t in (inputs, ids, weights))
                outputs[part] = mixed.compute_unstored(*given).to(outputs.device)
        mlps = []

        def everyone() -> Iterator[tuple[Tensor, None]]:
            return ((x.to(self.device), None) for x in torch.split(inputs, BATCH_TOKENS))

        for n, expert in enumerate(layer.experts):
            token, place = torch.where(layer.find_uses(n, ids))
            low = None
            if mixed is not None and mixed.members is not None:
                low = LowRank(mixed.members, mixed.find_tied(ids[token, place]))
            own = self._list_routed(inputs, token, weights[token, place])
            parts = ("gate", "up") if expert.gate.count else ("up",)
            mlps.append(
                _StagedExpert(
                    f"experts.{n}", token, own, everyone, parts, expert,
                    self._experts if mixed is None else mixed.experts, self._anatomy.form, low,
                )
            )  # fmt: skip
        self.solve_experts(layer, mlps, outputs)
        self._known.outputs = outputs

    def _list_routed(self, inputs: Tensor, tokens: Tensor, weights: Tensor) -> Batches:
        """Return the inputs of some tokens, from those of all, with the weights of outputs."""

        def each() -> Iterator[tuple[Tensor, Tensor | None]]:
            for at in range(0, len(tokens), BATCH_TOKENS):
                some = tokens[at : at + BATCH_TOKENS].to(inputs.device)
                own = weights[at : at + BATCH_TOKENS].to(self.device)
                yield inputs[some].to(self.device), own

        return each


@dataclass(frozen=True)
class _StagedExpert(Mlp):
    """An expert in the form that transformers' module of experts has.

    Attributes:
        expert: its tensors.
        module: the module of the experts, whose activation it has.
        form: of the matrices of the module.
        low: factors of tied experts that use its matrices; None: there are none.
    """

    expert: Expert
    module: Any
    form: ExpertsForm | None
    low: LowRank | None = None

    def make_inside(self, matrices: Sequence[Tensor]) -> Inside:
        """Return how to compute what ``down`` gets, as transformers does."""
        assert self.form is not None, "a layer with experts has none in transformers' class"
        form, low = self.form, self.low
        compute = make_inside(self.expert, self.module, form, matrices)
        dtype = matrices[0].dtype
        step = max(1, CHUNK_NUMBERS // sum(len(matrix) for matrix in matrices))

        def inside(inputs: Batches, *, routed: bool) -> Batches:
            def each() -> Iterator[tuple[Tensor, Tensor | None]]:
                behind = 0
                for x, weights in inputs():
                    for at in range(0, len(x), step):
                        rows = x[at : at + step].to(dtype)
                        more = None
                        if low is not None and routed:
                            sides = [low(part, behind, rows) for part in ("gate", "up")]
                            more = arrange_gate_up(torch.cat(sides, dim=1), form)
                        behind += len(rows)
                        y = compute(rows, more)
                        yield y, None if weights is None else weights[at : at + step]

            return each

        return inside

    def make_outputs(self, down: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return how to compute outputs, float32, from what ``down`` gets from some token on."""
        bias = _load_biases(self.expert, ("down",), down)

        def compute(x: Tensor, at: int) -> Tensor:
            y = nn.functional.linear(x, down, bias).float()
            return y if self.low is None else y + self.low("down", at, x)

        return compute


def make_inside(
    expert: Expert, module: Any, form: ExpertsForm, matrices: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Return how to compute what ``down`` of an expert gets from its inputs [n, hidden].

    A second argument is added to their products with gate and up.

    Args:
        expert: the expert, for its biases.
        module: transformers' module of experts, whose activation it has.
        form: of the matrices of that module.
        matrices: gate and up, or up alone.
    """
    matrix = arrange_gate_up(torch.cat(list(matrices))[None], form)[0]
    bias = _load_biases(expert, ("gate", "up")[-len(matrices) :], matrix)
    bias = None if bias is None else arrange_gate_up(bias[None], form)[0]
    act = module._apply_gate if form.gated else module.act_fn

    def inside(x: Tensor, more: Tensor | None = None) -> Tensor:
        both = nn.functional.linear(x, matrix, bias)
        y: Tensor = act(both if more is None else both + more.to(both.dtype))
        return y

    return inside


def _load_biases(expert: Expert, parts: Sequence[str], matrix: Tensor) -> Tensor | None:
    """Return the biases of some matrices, one after another, beside a matrix of them."""
    if not expert.biases:
        return None
    found = torch.cat([load_finite(expert.biases[part]) for part in parts])
    return found.to(matrix.device, matrix.dtype)
