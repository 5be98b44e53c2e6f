"""Quantize with AWQ: scale up the columns of large inputs, then round to nearest.

AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978). Scales fold as described in
`moe2edge.passes._awq_folding`: input norm to q, k and v; values to the output projection, shared
by query heads that read the same values; second norm to everything that reads it, router included;
and ``up`` to ``down`` of each gated MLP. Of scales ``m ** alpha``, with m the mean magnitude of
each input, the alpha is taken with the least squared error of the outputs of the place's matrices.

In MoE layers the error of an expert is measured on tokens routed to it, weighted by their weight
in its output. AWQ's clipping of weights is the search for the range of each group (``scales:
mse``), in which the columns count by the mean square of their scaled inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moe2edge.model.layers import Dense, MoELayer, Weight
from moe2edge.model.model import Block, Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._quantize import Quantize, Scales
from moe2edge.pipeline.solver import Solved, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.awq_scales import AwqInputs, Sample
    from moe2edge.numerics.grid import Quantized
    from moe2edge.passes._awq_folding import Folding, FoldingPlace


class Awq(Quantize):
    """Scale attention, experts, shared experts and dense MLPs by activations, then round.

    The scales fold into norms and into the matrices before, so that nothing is added to the model;
    norms, routers, shared gates and biases of values change with them. A norm changes by factors
    that its dtype holds exactly, and so do biases; a router is rounded to its own dtype again.
    Scales stop at values that are clipped and at a norm that is added to the residual stream.
    """

    scales: Scales = "mse"
    steps: Annotated[
        int,
        Field(
            ge=1, description="number of exponents alpha that are tried, evenly spaced in [0, 1)"
        ),
    ] = 20
    samples: Annotated[
        int,
        Field(ge=2, description="most tokens of a layer or expert that alpha is chosen by"),
    ] = 512
    min_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="an expert with fewer routed tokens uses tokens of the whole layer",
        ),
    ] = 32

    def solver(self, model: Model) -> Solver:
        """Make a solver that gathers inputs, then scales and rounds block after block."""
        return _Solver(self, self.schemes(model), model)


class _Solver:
    """Samples of the inputs of one block, and its solution."""

    def __init__(self, options: Awq, schemes: Mapping[str, Scheme], model: Model) -> None:
        self._options, self._schemes, self._model = options, schemes, model
        self._samples: dict[str, Sample] = {}
        self._sums: dict[str, Tensor] = {}
        # Squared size of what rounding costs in outputs, and of the outputs.
        self._loss = 0.0, 0.0

    # ---- seeing ----------------------------------------------------------------------------------

    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of attention, of what follows it, and of each expert."""
        import torch

        from moe2edge.model.roles import OUT, QKV

        self._take("qkv", trace.linear_inputs[QKV[0]])
        self._take("out", trace.linear_inputs[OUT])
        if trace.block.mlp is None:
            return
        inputs = trace.mlp_inputs.flatten(0, -2)
        self._take("mlp", inputs)
        if isinstance(trace.block.mlp, MoELayer) and trace.routing is not None:
            for n in range(len(trace.block.mlp.experts)):
                tokens, place = torch.where(trace.block.mlp.chosen(n, trace.routing.ids))
                weights = trace.routing.weights[tokens, place]
                self._sample(f"experts.{n}", inputs).add(inputs, tokens, weights)

    def _take(self, name: str, inputs: Tensor) -> None:
        import torch

        everything = torch.arange(len(inputs))
        self._sample(name, inputs).add(inputs, everything, torch.ones(len(inputs)))
        sums = inputs.abs().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _sample(self, name: str, inputs: Tensor) -> Sample:
        from moe2edge.numerics.awq_scales import Sample

        if name not in self._samples:
            self._samples[name] = Sample(self._options.samples, inputs.shape[1])
        return self._samples[name]

    # ---- solving ---------------------------------------------------------------------------------

    def solve(self, block: Block) -> Solved:
        """Fold scales through the places that lead to quantized matrices, then round."""
        from moe2edge.numerics.rounding import round_to_nearest
        from moe2edge.passes._awq_folding import Folding, find_folding_places
        from moe2edge.pipeline.blockwise_report import describe_coverage

        weights = dict(block.weights())
        names = {role: self._model.family.disk_name(block.index, role) for role in weights}
        schemes = {r: self._schemes[name] for r, name in names.items() if name in self._schemes}
        inputs = self._inputs(block, weights)
        counts = [s.seen for kind, s in self._samples.items() if kind.startswith("experts.")]
        notes = [describe_coverage(block, counts)] if counts else []
        notes += [self._note(block, kind) for kind in self._samples if self._few(kind)]
        self._loss = 0.0, 0.0
        folding = Folding()
        for place in find_folding_places(block, self._model.family.geometry(self._model.config)):
            quantized = {r: schemes[r] for r in place.consumers if r in inputs and r in schemes}
            if quantized:
                self._fold(place, quantized, folding, weights, inputs)
        numbers: dict[str, Quantized | Tensor] = {}
        for role in weights:
            if role in schemes:
                matrix = folding.apply(role, weights[role].load())
                # Factors and linear maps are rounded as they are.
                importance = inputs[role].importance if role in inputs else None
                if importance is not None and role in folding.columns:
                    importance = importance / folding.columns[role].square()
                how = self._options.scales
                numbers[role] = round_to_nearest(matrix, schemes[role], how, importance)
            elif role in folding.roles:
                numbers[role] = folding.apply(role, weights[role].load())
        self._samples, self._sums = {}, {}
        return Solved(numbers, tuple(notes), self._loss)

    def _fold(
        self,
        place: FoldingPlace,
        quantized: Mapping[str, Scheme],
        folding: Folding,
        weights: Mapping[str, Weight],
        inputs: Mapping[str, AwqInputs],
    ) -> None:
        """Add the best scales of a place to ``folding``, unless that is none at all.

        Args:
            place: where they fold.
            quantized: schemes of the consumers that are quantized, by role.
            folding: of the block.
            weights: of the block.
            inputs: of its matrices.
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
                scales = round_to_exact(scales, weights[role].load())
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

    # ---- inputs ----------------------------------------------------------------------------------

    def _inputs(self, block: Block, weights: Mapping[str, Weight]) -> dict[str, AwqInputs]:
        """Return the inputs of each matrix, by role."""
        from moe2edge.model.roles import OUT, QKV, list_gated_mlps

        found = dict.fromkeys(QKV, self._of_all("qkv")) | {OUT: self._of_all("out")}
        for kind, mlp in list_gated_mlps(block):
            outer, inner = self._of_mlp(kind, mlp, weights)
            found |= {f"{kind}.gate": outer, f"{kind}.up": outer, f"{kind}.down": inner}
        return found

    def _of_all(self, name: str) -> AwqInputs:
        """Return the inputs over all tokens of the block."""
        from moe2edge.numerics.awq_scales import AwqInputs

        sample = self._samples[name]
        magnitudes = (self._sums[name] / sample.seen).float()
        return AwqInputs.of(sample.inputs, sample.weights, magnitudes, sample.stride)

    def _of_mlp(
        self, kind: str, mlp: Dense, weights: Mapping[str, Weight]
    ) -> tuple[AwqInputs, AwqInputs]:
        """Return the inputs of gate and up, and of down."""
        from moe2edge.numerics.awq_scales import AwqInputs, compute_intermediate

        shown = outer = self._of_all("mlp")
        if kind == "shared":
            gate = (shown.x @ weights["shared.router"].load().float().T).sigmoid()[:, 0]
            shown = outer = AwqInputs.of(shown.x, gate, shown.magnitudes, shown.share)
        elif kind in self._samples:
            own = self._samples[kind]
            outer = AwqInputs.of(own.inputs, own.weights, shown.magnitudes, own.stride)
            if self._few(kind):
                # Its few tokens still count in the loss that it shares with others.
                outer = replace(outer, importance=shown.importance)
            else:
                shown = outer
        hidden = compute_intermediate(mlp.gate.load(), mlp.up.load(), shown.x)
        return outer, AwqInputs.of(hidden, shown.weights, hidden.abs().mean(0), shown.share)

    def _few(self, kind: str) -> bool:
        """Return whether it is an expert that few tokens were routed to."""
        few = self._samples[kind].seen < self._options.min_tokens
        return kind.startswith("experts.") and few

    def _note(self, block: Block, kind: str) -> str:
        return (
            f"block {block.index}: expert {kind.partition('.')[2]} saw {self._samples[kind].seen} "
            f"tokens, fewer than {self._options.min_tokens}: judged by all tokens of the layer"
        )
