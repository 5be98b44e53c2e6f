"""Quantize with AWQ: scale up the columns of large inputs, then round to nearest.

AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978). Scales fold at four kinds of places,
which `moe2edge.passes._awq_folding` lists: from the input norm to q, k and v; from the values to
the output projection, one scale for all query heads that read the same values; from the second norm
to everything that reads it, the router included; and from ``up`` to ``down`` of each gated MLP.
Candidates are ``m ** alpha``, with m the mean magnitude of each input; the alpha with the least
squared error of the outputs of the place's matrices is chosen.

In an MoE layer, an expert is judged by the tokens that are routed to it, each counted by its weight
in the expert's output. AWQ's weight clipping is the search for the range of each group (``scales:
mse``), in which columns count by the mean square of their scaled inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.errors import Unsupported
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.traits import Trait
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._ends import RoundedEnds
from moe2edge.passes._quantize import Quantize, Scales
from moe2edge.pipeline.solver import EndSolver, Solved, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.awq_scales import AwqInputs
    from moe2edge.numerics.grid import Quantized
    from moe2edge.passes._awq_folding import Folding, FoldingPlace


class Awq(Quantize):
    """Quantize with AWQ: scale columns by the size of their inputs, then round to nearest.

    AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978) on attention, experts, shared experts
    and dense MLPs. The scales fold into norms and preceding matrices, so nothing is added to the
    model; norms, routers, shared gates and biases of values change with them. Norms and biases
    change by factors that their dtype represents exactly; a router is rounded to its dtype again.
    Scales do not fold through values that are clipped, nor through a norm whose output is added to
    the residual stream.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    scales: Scales = "mse"
    steps: Annotated[
        int,
        Field(
            ge=1, le=1000, description="number of exponents alpha to try, evenly spaced in [0, 1)"
        ),
    ] = 20
    samples: Annotated[
        int,
        Field(ge=2, description="most tokens per layer or expert on which alpha is chosen"),
    ] = 512
    min_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="an expert with fewer routed tokens is judged by all tokens of its layer",
        ),
    ] = 32

    def check(self, model: Model) -> None:
        """Refuse models that `Quantize` refuses, and those without a place where scales fold."""
        super().check(model)
        schemes = self.schemes(model)
        if not model.family.generic or any(
            model.disk_name(block, role) in schemes
            for block in model.blocks
            for place in _list_places(model, block)
            for role in place.consumers
        ):
            return
        raise Unsupported(
            f"awq does not work on {model.family.model_type}: scales fold nowhere, as none of the "
            "matrices to quantize reads what a norm, values or up alone give; use gptq or rtn"
        )

    def solver(self, model: Model) -> Solver:
        """Create the solver, which gathers inputs, then scales and rounds block by block."""
        return _Solver(self, self.schemes(model), model)

    def end_solver(self, model: Model) -> EndSolver:
        """Create the solver of head and embedding, into which no scales fold."""
        return RoundedEnds(*self.list_ends(model), self.scales)


class _Solver:
    """Solver of one block after another: samples its inputs, then scales and rounds it."""

    def __init__(self, options: Awq, schemes: Mapping[str, Scheme], model: Model) -> None:
        from moe2edge.passes._awq_inputs import StagedSampler, TabledSampler

        self._options, self._schemes, self._model = options, schemes, model
        limits = options.samples, options.min_tokens
        generic = model.family.generic
        self._sampler = StagedSampler(model, *limits) if generic else TabledSampler(*limits)
        # Squared error of the outputs that rounding causes, and squared size of the outputs.
        self._loss = 0.0, 0.0

    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of a batch."""
        self._sampler.observe(trace)

    def solve(self, block: Block) -> Solved:
        """Fold scales at the places that lead to quantized matrices, then round."""
        from moe2edge.numerics.rounding import round_to_nearest
        from moe2edge.passes._awq_folding import Folding

        weights = dict(block.weights())
        names = {role: self._model.disk_name(block, role) for role in weights}
        schemes = {r: self._schemes[name] for r, name in names.items() if name in self._schemes}
        inputs = self._sampler.gather(block, weights)
        notes = self._sampler.describe(block)
        if self._model.family.generic and block.index + 1 == len(self._model.blocks):
            notes += _describe_unscaled(self._model, self._schemes)
        self._loss = 0.0, 0.0
        folding = Folding()
        for place in _list_places(self._model, block):
            quantized = {r: schemes[r] for r in place.consumers if r in inputs and r in schemes}
            if quantized:
                self._fold(place, quantized, folding, weights, inputs)
        numbers: dict[str, Quantized | Tensor] = {}
        for role in weights:
            if role in schemes:
                matrix = folding.apply(role, weights[role].load())
                # The inputs of factors and linear maps are not observed: all columns count alike.
                importance = inputs[role].importance if role in inputs else None
                if importance is not None and role in folding.columns:
                    importance = importance / folding.columns[role].square()
                how = self._options.scales
                numbers[role] = round_to_nearest(matrix, schemes[role], how, importance)
            elif role in folding.roles:
                numbers[role] = folding.apply(role, weights[role].load())
        self._sampler.forget()
        return Solved(numbers, tuple(notes), self._loss)

    def _fold(
        self,
        place: FoldingPlace,
        quantized: Mapping[str, Scheme],
        folding: Folding,
        weights: Mapping[str, Weight],
        inputs: Mapping[str, AwqInputs],
    ) -> None:
        """Add the best scales of a place to ``folding``, unless no scaling is best.

        Args:
            place: the place.
            quantized: schemes of the consumers that are quantized, by role.
            folding: scales of the block, which are extended.
            weights: weights of the block, by role.
            inputs: inputs of its matrices, by role.
        """
        import torch

        from moe2edge.numerics.awq_scales import (
            compute_losses,
            list_candidates,
            measure_output_size,
            round_to_exact,
        )

        magnitudes = inputs[next(iter(quantized))].magnitudes
        scales = list_candidates(place.gather(magnitudes), self._options.steps)
        for role in place.producers:
            if len(weights[role].shape) == 1:
                offset = 0.0 if role.endswith("bias") else place.offset
                scales = round_to_exact(scales, weights[role].load(), offset)
        spread, how = place.spread(scales), self._options.scales
        total = torch.zeros(len(scales), dtype=torch.float64)
        size = 0.0
        for role, scheme in quantized.items():
            matrix = weights[role].load()
            total += compute_losses(matrix, spread, inputs[role], scheme, how)
            size += measure_output_size(matrix, inputs[role])
        self._loss = self._loss[0] + float(total.min()), self._loss[1] + size
        if best := int(total.argmin()):
            folding.add(place, scales[best])


def _list_places(model: Model, block: Block) -> Sequence[FoldingPlace]:
    """List the places of a block where scales fold."""
    from moe2edge.passes._awq_folding import find_folding_places

    if not model.family.generic:
        return list(find_folding_places(block, model.family.geometry(model.config)))
    from moe2edge.passes._awq_trials import find_places_by_trial

    return list(find_places_by_trial(model, block))


def _list_unscaled(model: Model, block: Block, schemes: Mapping[str, Scheme]) -> list[str]:
    """List the roles of quantized matrices of a block that no place has as consumers."""
    scaled = {role for place in _list_places(model, block) for role in place.consumers}
    return [
        role
        for role, _ in list_quantizable(block)
        if role not in scaled and model.disk_name(block, role) in schemes
    ]


def _describe_unscaled(model: Model, schemes: Mapping[str, Scheme]) -> list[str]:
    """Name the matrices into which no scales fold, with their blocks."""
    blocks: dict[str, list[int]] = {}
    for block in model.blocks:
        paths = model.architecture.anatomy[block.origin].roles
        for role in _list_unscaled(model, block, schemes):
            kind, _, part = role.rpartition(".")
            known = paths.get(role.partition(".part")[0], "").removesuffix(".weight")
            name = known or f"{part} of {kind.partition('.')[0]}"
            found = blocks.setdefault(name, [])
            if block.index not in found:
                found.append(block.index)
    return [
        f"{name}: no scales fold in before it, so it is rounded as it is; blocks "
        f"{', '.join(map(str, indices))}"
        for name, indices in blocks.items()
    ]
