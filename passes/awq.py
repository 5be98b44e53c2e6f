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

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
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
    """Quantize with AWQ: scale columns by the size of their inputs, then round to nearest.

    AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978) on attention, experts, shared experts
    and dense MLPs. The scales fold into norms and preceding matrices, so nothing is added to the
    model; norms, routers, shared gates and biases of values change with them. Norms and biases
    change by factors that their dtype represents exactly; a router is rounded to its dtype again.
    Scales do not fold through values that are clipped, nor through a norm whose output is added to
    the residual stream.
    """

    scales: Scales = "mse"
    steps: Annotated[
        int, Field(ge=1, description="number of exponents alpha to try, evenly spaced in [0, 1)")
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

    def solver(self, model: Model) -> Solver:
        """Create the solver, which gathers inputs, then scales and rounds block by block."""
        return _Solver(self, self.schemes(model), model)


class _Solver:
    """Solver of one block after another: samples its inputs, then scales and rounds it."""

    def __init__(self, options: Awq, schemes: Mapping[str, Scheme], model: Model) -> None:
        self._options, self._schemes, self._model = options, schemes, model
        self._samples: dict[str, Sample] = {}
        self._sums: dict[str, Tensor] = {}
        # Squared error of the outputs that rounding causes, and squared size of the outputs.
        self._loss = 0.0, 0.0

    # ---- observing -------------------------------------------------------------------------------

    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of attention, of the layer after it, and of each expert."""
        import torch

        from moe2edge.model.roles import OUT, QKV

        self._sample_all("qkv", trace.linear_inputs[QKV[0]])
        self._sample_all("out", trace.linear_inputs[OUT])
        if trace.block.mlp is None:
            return
        inputs = trace.mlp_inputs.flatten(0, -2)
        self._sample_all("mlp", inputs)
        if isinstance(trace.block.mlp, MoELayer) and trace.routing is not None:
            for n in range(len(trace.block.mlp.experts)):
                tokens, place = torch.where(trace.block.mlp.find_uses(n, trace.routing.ids))
                weights = trace.routing.weights[tokens, place]
                self._get_sample(f"experts.{n}", inputs).add(inputs, tokens, weights)

    def _sample_all(self, name: str, inputs: Tensor) -> None:
        """Sample from all tokens, with weights of one, and sum the magnitudes of their inputs."""
        import torch

        tokens = torch.arange(len(inputs))
        self._get_sample(name, inputs).add(inputs, tokens, torch.ones(len(inputs)))
        sums = inputs.abs().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _get_sample(self, name: str, inputs: Tensor) -> Sample:
        """Return the sample of a name; create it if there is none yet."""
        from moe2edge.numerics.awq_scales import Sample

        if name not in self._samples:
            self._samples[name] = Sample(self._options.samples, inputs.shape[1])
        return self._samples[name]

    # ---- solving ---------------------------------------------------------------------------------

    def solve(self, block: Block) -> Solved:
        """Fold scales at the places that lead to quantized matrices, then round."""
        from moe2edge.numerics.rounding import round_to_nearest
        from moe2edge.passes._awq_folding import Folding, find_folding_places
        from moe2edge.pipeline.blockwise_report import describe_coverage

        weights = dict(block.weights())
        names = {role: self._model.disk_name(block, role) for role in weights}
        schemes = {r: self._schemes[name] for r, name in names.items() if name in self._schemes}
        inputs = self._gather_inputs(block, weights)
        counts = [s.seen for kind, s in self._samples.items() if kind.startswith("experts.")]
        notes = [describe_coverage(block, counts)] if counts else []
        notes += [
            self._describe_under_calibrated(block, kind)
            for kind in self._samples
            if self._is_under_calibrated(kind)
        ]
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
                # The inputs of factors and linear maps are not observed: all columns count alike.
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

    def _gather_inputs(self, block: Block, weights: Mapping[str, Weight]) -> dict[str, AwqInputs]:
        """Gather the inputs of each matrix, by its role."""
        from moe2edge.model.roles import OUT, QKV, list_gated_mlps

        inputs = dict.fromkeys(QKV, self._gather_all("qkv")) | {OUT: self._gather_all("out")}
        for kind, mlp in list_gated_mlps(block):
            outer, inner = self._gather_mlp(kind, mlp, weights)
            inputs |= {f"{kind}.gate": outer, f"{kind}.up": outer, f"{kind}.down": inner}
        return inputs

    def _gather_all(self, name: str) -> AwqInputs:
        """Gather inputs that were sampled from all tokens of the block."""
        from moe2edge.numerics.awq_scales import AwqInputs

        sample = self._samples[name]
        magnitudes = (self._sums[name] / sample.seen).float()
        return AwqInputs.from_sample(sample.inputs, sample.weights, magnitudes, sample.stride)

    def _gather_mlp(
        self, kind: str, mlp: Dense, weights: Mapping[str, Weight]
    ) -> tuple[AwqInputs, AwqInputs]:
        """Gather the inputs of ``gate`` and ``up``, and compute those of ``down``."""
        from moe2edge.numerics.awq_scales import AwqInputs, compute_intermediate

        judged_on = outer = self._gather_all("mlp")
        if kind == "shared":
            x, magnitudes, share = judged_on.x, judged_on.magnitudes, judged_on.share
            gate = (x @ weights["shared.router"].load().float().T).sigmoid()[:, 0]
            judged_on = outer = AwqInputs.from_sample(x, gate, magnitudes, share)
        elif kind in self._samples:
            routed = self._samples[kind]
            outer = AwqInputs.from_sample(
                routed.inputs, routed.weights, judged_on.magnitudes, routed.stride
            )
            if self._is_under_calibrated(kind):
                # Its few tokens still count in the loss of the scales that all experts share.
                outer = replace(outer, importance=judged_on.importance)
            else:
                judged_on = outer
        hidden = compute_intermediate(mlp.gate.load(), mlp.up.load(), judged_on.x)
        return outer, AwqInputs.from_sample(
            hidden, judged_on.weights, hidden.abs().mean(0), judged_on.share
        )

    def _is_under_calibrated(self, kind: str) -> bool:
        """Return whether it is an expert to which few tokens were routed."""
        few = self._samples[kind].seen < self._options.min_tokens
        return kind.startswith("experts.") and few

    def _describe_under_calibrated(self, block: Block, kind: str) -> str:
        return (
            f"block {block.index}: expert {kind.partition('.')[2]} saw {self._samples[kind].seen} "
            f"tokens, fewer than {self._options.min_tokens}: judged by all tokens of the layer"
        )
