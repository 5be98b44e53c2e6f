"""Inputs of the matrices of a block, by which AWQ judges their scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.roles import OUT, QKV, list_gated_mlps
from moe2edge.model.weights import Weight
from moe2edge.numerics.awq_scales import AwqInputs, Sample, compute_intermediate
from moe2edge.pipeline.blockwise_report import describe_coverage
from moe2edge.pipeline.staged_work import make_inside
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.layer_stage import LayerStage
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Name of the inputs of an MoE layer, or of a dense MLP.
MLP = "mlp"


class InputSampler(ABC):
    """Samples the inputs of one block after another."""

    def __init__(self, samples: int, min_tokens: int) -> None:
        """Begin with nothing.

        Args:
            samples: most tokens that are kept of an input.
            min_tokens: an expert with fewer tokens is judged by all tokens of its layer.
        """
        self._limit, self._least = samples, min_tokens
        self._samples: dict[str, Sample] = {}
        self._sums: dict[str, Tensor] = {}

    @abstractmethod
    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of attention, of the layer after it, and of each expert."""

    @abstractmethod
    def gather(self, block: Block, weights: Mapping[str, Weight]) -> dict[str, AwqInputs]:
        """Gather the inputs of each matrix, by its role."""

    def describe(self, block: Block) -> list[str]:
        """Describe how many tokens the experts of a block saw, and which saw few."""
        counts = [s.seen for kind, s in self._samples.items() if kind.startswith("experts.")]
        return [
            *([describe_coverage(block, counts)] if counts else []),
            *(
                f"block {block.index}: expert {kind.partition('.')[2]} saw "
                f"{self._samples[kind].seen} tokens, fewer than {self._least}: judged by all "
                "tokens of the layer"
                for kind in self._samples
                if self._is_under_calibrated(kind)
            ),
        ]

    def forget(self) -> None:
        """Forget the block."""
        self._samples, self._sums = {}, {}

    def _sample_all(self, name: str, inputs: Tensor) -> None:
        """Sample from all tokens, with weights of one, and sum the magnitudes of their inputs."""
        tokens = torch.arange(len(inputs))
        self._get_sample(name, inputs).add(inputs, tokens, torch.ones(len(inputs)))
        sums = inputs.abs().sum(0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _sample_experts(self, trace: BlockTrace, inputs: Tensor) -> None:
        """Sample, for each expert, from the tokens that are routed to it."""
        if not isinstance(trace.block.mlp, MoELayer) or trace.routing is None:
            return
        for n in range(len(trace.block.mlp.experts)):
            tokens, place = torch.where(trace.block.mlp.find_uses(n, trace.routing.ids))
            weights = trace.routing.weights[tokens, place]
            self._get_sample(f"experts.{n}", inputs).add(inputs, tokens, weights)

    def _get_sample(self, name: str, inputs: Tensor) -> Sample:
        """Return the sample of a name; create it if there is none yet."""
        if name not in self._samples:
            self._samples[name] = Sample(self._limit, inputs.shape[1])
        return self._samples[name]

    def _gather_all(self, name: str) -> AwqInputs:
        """Gather inputs that were sampled from all tokens of the block."""
        sample = self._samples[name]
        magnitudes = (self._sums[name] / sample.seen).float()
        return AwqInputs.from_sample(sample.inputs, sample.weights, magnitudes, sample.stride)

    def _gather_routed(self, kind: str) -> tuple[AwqInputs, AwqInputs]:
        """Gather the inputs of an expert, and those by which its last matrix is judged."""
        everyone, routed = self._gather_all(MLP), self._samples[kind]
        outer = AwqInputs.from_sample(
            routed.inputs, routed.weights, everyone.magnitudes, routed.stride
        )
        if self._is_under_calibrated(kind):
            # Its few tokens still count in the loss of the scales that all experts share.
            return replace(outer, importance=everyone.importance), everyone
        return outer, outer

    def _is_under_calibrated(self, kind: str) -> bool:
        """Return whether it is an expert to which few tokens were routed."""
        few = self._samples[kind].seen < self._least
        return kind.startswith("experts.") and few


class TabledSampler(InputSampler):
    """Samples the inputs of blocks of a family of the table."""

    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of attention, of the layer after it, and of each expert."""
        self._sample_all("qkv", trace.linear_inputs[QKV[0]])
        self._sample_all("out", trace.linear_inputs[OUT])
        if trace.block.mlp is None:
            return
        inputs = trace.mlp_inputs.flatten(0, -2)
        self._sample_all(MLP, inputs)
        self._sample_experts(trace, inputs)

    def gather(self, block: Block, weights: Mapping[str, Weight]) -> dict[str, AwqInputs]:
        """Gather the inputs of each matrix, by its role."""
        inputs = dict.fromkeys(QKV, self._gather_all("qkv")) | {OUT: self._gather_all("out")}
        for kind, mlp in list_gated_mlps(block):
            outer, inner = self._gather_mlp(kind, mlp, weights)
            inputs |= {f"{kind}.gate": outer, f"{kind}.up": outer, f"{kind}.down": inner}
        return inputs

    def _gather_mlp(
        self, kind: str, mlp: Dense, weights: Mapping[str, Weight]
    ) -> tuple[AwqInputs, AwqInputs]:
        """Gather the inputs of ``gate`` and ``up``, and compute those of ``down``."""
        if kind == "shared":
            everyone = self._gather_all(MLP)
            gate = (everyone.x @ weights["shared.router"].load().float().T).sigmoid()[:, 0]
            outer = judged_on = AwqInputs.from_sample(
                everyone.x, gate, everyone.magnitudes, everyone.share
            )
        elif kind in self._samples:
            outer, judged_on = self._gather_routed(kind)
        else:
            outer = judged_on = self._gather_all(MLP)
        return outer, _make_inner(
            judged_on, compute_intermediate(mlp.gate.load(), mlp.up.load(), judged_on.x)
        )


class StagedSampler(InputSampler):
    """Samples the inputs of blocks of any family, as their modules get them."""

    def __init__(self, model: Model, samples: int, min_tokens: int) -> None:
        super().__init__(samples, min_tokens)
        self._model = model
        # The first of the matrices that share an input, by each of their roles.
        self._first: dict[str, str] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Sample the inputs of the modules of matrices, each once, and of each expert."""
        known: dict[tuple[int, tuple[int, ...]], str] = {}
        for role, inputs in trace.linear_inputs.items():
            first = known.setdefault((inputs.data_ptr(), tuple(inputs.shape)), role)
            if self._first.setdefault(role, first) == role:
                self._sample_all(role, inputs)
        if trace.routing is not None:
            inputs = trace.routing.inputs.flatten(0, -2)
            self._sample_all(MLP, inputs)
            self._sample_experts(trace, inputs)

    def gather(self, block: Block, weights: Mapping[str, Weight]) -> dict[str, AwqInputs]:
        """Gather the inputs of each matrix, by its role; none of one that no module multiplies."""
        each = {role: self._gather_all(role) for role in set(self._first.values())}
        inputs = {role: each[first] for role, first in self._first.items()}
        if not isinstance(block.mlp, MoELayer):
            return inputs
        anatomy = self._model.architecture.anatomy[block.origin]
        assert anatomy.form is not None, "a layer with experts has none in transformers' class"
        path = find_experts_name(block.mlp, str(anatomy.experts))
        module: Any = LayerStage(self._model, block).layer.get_submodule(path)
        for n, expert in enumerate(block.mlp.experts):
            outer, judged_on = self._gather_routed(f"experts.{n}")
            parts = ("gate", "up") if expert.gate.count else ("up",)
            matrices = [load_finite(getattr(expert, part)) for part in parts]
            inside = make_inside(expert, module, anatomy.form, matrices)
            inputs |= {f"experts.{n}.{part}": outer for part in parts}
            inputs[f"experts.{n}.down"] = _make_inner(judged_on, inside(judged_on.x))
        return inputs

    def forget(self) -> None:
        """Forget the block."""
        super().forget()
        self._first = {}


def _make_inner(outer: AwqInputs, hidden: Tensor) -> AwqInputs:
    """Make the inputs of a last matrix from those of the first ones."""
    return AwqInputs.from_sample(hidden, outer.weights, hidden.abs().mean(0), outer.share)
