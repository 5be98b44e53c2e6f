"""One block of a walk: transformers' own decoder block, its numbers, and what passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.calibration.observation import BlockTrace, RouterTrace
from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.body import find_body, give_nothing
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.stock_router import StockRouter
from moe2edge.runtime.decoder_blocks import find_module_name, load_block_state
from moe2edge.runtime.layer_stage import LayerStage
from moe2edge.runtime.mixed_experts import (
    OutputVisitor,
    compute_expert_intermediate,
    compute_expert_output,
    run_row_by_row,
    visit_outputs,
)
from moe2edge.runtime.products import is_exact_in, narrow_linear
from moe2edge.runtime.torch_runtime import place_tokens

if TYPE_CHECKING:
    from torch import Tensor


class BlockRunner:
    """One block of a model, loaded in float32 into transformers' own module."""

    def __init__(self, model: Model, block: Block, dtype: torch.dtype = torch.float32) -> None:
        """Load the block.

        Args:
            model: the model.
            block: its block.
            dtype: of products with matrices of attention, experts and MLPs; other than float32 only
                for matrices that have it in files.
        """
        self.block = block
        self._architecture = model.architecture
        self._anatomy = self._architecture.anatomy[block.origin]
        self._generic = model.family.generic
        self._stage = LayerStage(model, block)
        self._layer = self._stage.layer
        filled = {name: t for name, t in self._layer.state_dict().items() if not t.is_meta}
        experts = [w for role, w in block.weights() if role.startswith("experts.")]
        own = dtype if all(is_exact_in(weight, dtype) for weight in experts) else torch.float32
        state = load_block_state(model, block, dtype=own) | filled
        self._layer.load_state_dict(state, strict=True, assign=True)
        if dtype != torch.float32:
            weights = dict(block.weights())
            for role, module in self._linear_modules():
                if type(module) is nn.Linear and is_exact_in(weights[role], dtype):
                    narrow_linear(module, dtype)
        if isinstance(block.mlp, MoELayer):
            run_row_by_row(self._experts)

    @torch.no_grad()
    def run(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the output of the block for ``hidden`` [batch, length, hidden].

        With ``positions`` [length], ascending, the tokens stand there, and each sees all before it.
        """
        placed = {} if positions is None else place_tokens(positions, hidden.dtype)
        return self._stage.run(hidden, **placed)

    @torch.no_grad()
    def watch(
        self,
        hidden: Tensor,
        positions: Tensor | None = None,
        visitors: Sequence[OutputVisitor] = (),
    ) -> BlockTrace:
        """Run the block as `run` does, and return its intermediate activations as well.

        ``visitors`` see the outputs of each expert meanwhile.
        """
        linear_inputs: dict[str, Tensor] = {}
        recorded: dict[str, Any] = {}

        def record_input(role: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                linear_inputs[role] = args[0].flatten(0, -2)

            return hook

        def record_attended(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            recorded["attended"] = args[0]

        def record_mlp(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            recorded.update(
                mlp_inputs=args[0], mlp_outputs=out[0] if isinstance(out, tuple) else out
            )

        hooks = [
            module.register_forward_pre_hook(record_input(role))
            for role, module in self._linear_modules()
        ]
        hooks += self._watch_router(recorded)
        if (norm := getattr(self._layer, "post_attention_layernorm", None)) is not None:
            hooks.append(norm.register_forward_pre_hook(record_attended))
        if (mlp := self._find_mlp()) is not None:
            hooks.append(mlp.register_forward_hook(record_mlp))
        shows = isinstance(self.block.mlp, MoELayer) and visitors
        try:
            with visit_outputs(self._experts, visitors) if shows else nullcontext():
                outputs = self.run(hidden, positions)
        finally:
            for handle in hooks:
                handle.remove()
        if recorded.get("mlp_inputs") is None:  # a layer without a part after attention
            recorded |= {"mlp_inputs": hidden, "mlp_outputs": outputs}
        attended = recorded.get("attended", hidden)
        return BlockTrace(
            self.block,
            hidden,
            outputs,
            attended,
            recorded["mlp_inputs"],
            recorded["mlp_outputs"],
            recorded.get("routing"),
            linear_inputs,
            self._expert_hidden,
            self._expert_output,
            self.watch,
            partial(self._run_bare, hidden, positions) if self._generic else lambda: attended,
            self.make_router if self._generic else None,
        )

    def _run_bare(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Return the output of the block if what goes with its experts gave zeros."""
        body = find_body(self._architecture, self.block.origin)
        assert body is not None, "experts cannot go by themselves"
        modules = {self._layer.get_submodule(name): n for name, n in body.modules.items()}
        for module, count in modules.items():
            module.forward = partial(give_nothing, count)
        try:
            return self.run(hidden, positions)
        finally:
            for module in modules:
                del module.forward

    def _watch_router(self, recorded: dict[str, Any]) -> list[Any]:
        """Record what the router chose, as the experts get it, and its logits."""
        if not isinstance(self.block.mlp, MoELayer):
            return []
        experts = self._layer.get_submodule(self._anatomy.experts)
        scorer = self._layer.get_submodule(self._anatomy.roles["router.weight"].rpartition(".")[0])

        def record_logits(_: nn.Module, __: Any, out: Any) -> None:
            logits = out[0] if isinstance(out, tuple) else out
            recorded["logits"] = logits.flatten(0, -2).float()

        def record_routing(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs, ids, weights = args
            found = RouterTrace(inputs, recorded["logits"], weights.float(), ids)
            recorded["routing"] = found

        return [
            scorer.register_forward_hook(record_logits),
            experts.register_forward_pre_hook(record_routing),
        ]

    def _find_mlp(self) -> Any:
        """Return the module of the MoE layer, or of the MLP; None: the layer has none."""
        if self._anatomy.experts is not None:
            path = self._anatomy.moe or self._anatomy.experts
            return self._layer.get_submodule(path)
        dense = self._anatomy.roles.get("dense.gate", "mlp.gate_proj.weight")
        names = dict(self._layer.named_modules())
        return names.get(dense.rpartition(".")[0].rpartition(".")[0])

    def make_router(self) -> StockRouter:
        """Return the router, apart from the layer."""
        assert isinstance(self.block.mlp, MoELayer), "a layer without experts has no router"
        return StockRouter(self._layer, self._anatomy, self.block.mlp.router.top_k)

    @torch.no_grad()
    def run_mlp(self, inputs: Tensor, logits: Tensor) -> Tensor:
        """Return the output [n, hidden] of the MoE layer or MLP for its inputs [n, hidden].

        Args:
            inputs: of the layer.
            logits: of its router, [n, rows]; used where the router gets another input.
        """
        mlp = self._find_mlp()
        if self._anatomy.experts is not None and not self._anatomy.moe:
            rows = torch.ones(logits.shape[1], dtype=torch.bool)
            ids, weights = self.make_router().choose(logits, rows)
            beside: Tensor = mlp(inputs, ids, weights.float())
            return beside
        out: Any = mlp(inputs[None])
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found[0]

    def _linear_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the linear modules outside of routed experts that passes may quantize, by role."""
        for role, _ in self.block.weights():
            if is_quantizable(role) and not role.startswith("experts."):
                name = find_module_name(self._anatomy, role)
                assert name is not None, "a matrix without a module"
                yield role, self._layer.get_submodule(name.removesuffix(".weight"))

    @torch.no_grad()
    def _expert_hidden(self, expert: int, inputs: Tensor) -> Tensor:
        return compute_expert_intermediate(self._experts, expert, inputs)

    @torch.no_grad()
    def _expert_output(self, expert: int, inputs: Tensor) -> Tensor:
        return compute_expert_output(self._experts, expert, inputs)

    @property
    def _experts(self) -> Any:
        """The module of the experts."""
        return self._layer.get_submodule(self._anatomy.experts)
