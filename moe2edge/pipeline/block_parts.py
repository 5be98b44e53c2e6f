"""A block without the matrices of its experts and MLPs, as transformers computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.roles import OUT, QKV
from moe2edge.runtime.decoder_blocks import Nothing, load_block_state
from moe2edge.runtime.layer_stage import LayerStage
from moe2edge.runtime.mixed_experts import MixedExperts, TiedExperts

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")

# Tokens that run through a part of the layer at once: few enough for the C library to take the
# memory of one operation's results for those of the next, as the system clears what it gives.
RUN_TOKENS = 2048

# First parts of the roles that are loaded.
LOADED = ("norms", "attention", "linear", "other", "router", "substitutes", "members")


class _Reached(Exception):
    """Ends a run of the layer at the output projection of attention."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


class _RoundedLinear(nn.Module):
    """A linear module whose inputs, matrix and products are rounded to a dtype.

    What goes in and comes out is in float32, as for the module that it takes the place of.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for ``x`` [..., in], float32."""
        out = nn.functional.linear(x.to(self.weight.dtype), self.weight).float()
        return out if self.bias is None else out.add_(self.bias)


class BlockParts:
    """A block without the matrices of its experts and MLPs: attention, norms and router."""

    def __init__(
        self,
        model: Model,
        block: Block,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load it; hidden states may be on another device than ``device``, results are on it.

        Products of attention are in ``dtype``; norms, softmax and router are in float32.
        """
        self._stage = LayerStage(model, block)
        layer: Any = self._stage.layer
        state = load_block_state(model, block, lambda role: role.partition(".")[0] in LOADED)
        state = {name: tensor.to(device) for name, tensor in state.items()}
        layer.load_state_dict(state, strict=False, assign=True)
        self.norm, self._mlp = layer.post_attention_layernorm, layer.mlp
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()
        self._stage.to(device)
        self._layer, self._device, self._dtype = layer, device, dtype
        if dtype != torch.float32:
            for role in (*QKV, OUT):
                name = _find_attention_name(role)
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, _RoundedLinear(linear, dtype))

    @torch.no_grad()
    def compute_attention_inputs(self, hidden: Tensor) -> Tensor:
        """Return the inputs [tokens, hidden] of q, k and v, as they are multiplied."""
        return self._run_by_parts(hidden, self._layer.input_layernorm)

    @torch.no_grad()
    def compute_output_inputs(self, hidden: Tensor) -> Tensor:
        """Return the inputs [tokens, heads * head size] of the output projection.

        Args:
            hidden: hidden states in front of the block.
        """
        hook = self._layer.self_attn.o_proj.register_forward_pre_hook(_stop)
        try:
            return self._run_by_parts(hidden, self._run_to_output)
        finally:
            hook.remove()

    def _run_to_output(self, hidden: Tensor) -> Tensor:
        """Run the layer up to the output projection, and return what that gets."""
        try:
            self._stage.run(hidden)
        except _Reached as reached:
            return reached.inputs
        raise AssertionError("attention has no output projection")

    def _run_by_parts(self, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return results [tokens, size] of a few samples at a time, as they are multiplied."""
        samples = max(1, RUN_TOKENS // hidden.shape[1])
        parts = torch.split(hidden, samples)
        return torch.cat([
            run(part.to(self._device)).flatten(0, -2).to(self._dtype) for part in parts
        ])  # fmt: skip

    @torch.no_grad()
    def add_attention(self, hidden: Tensor, inputs: Tensor) -> None:
        """Add what attention puts out to hidden states [samples, length, hidden].

        Args:
            hidden: in front of the block; overwritten.
            inputs: result of `compute_output_inputs`.
        """
        flat = hidden.flatten(0, 1)  # a view of whole samples
        for place, x in zip(*(torch.split(t, RUN_TOKENS) for t in (flat, inputs)), strict=True):
            place += self._layer.self_attn.o_proj(x).to(hidden.device)

    def put_attention(self, role: str, matrix: Tensor) -> None:
        """Replace a matrix of attention."""
        module = getattr(self._layer.self_attn, _find_attention_name(role))
        module.weight = nn.Parameter(matrix.to(self._dtype), requires_grad=False)

    @torch.no_grad()
    def normalize(self, attended: Tensor) -> Tensor:
        """Return the inputs of the part after attention."""
        out: Tensor = self.norm(attended.to(self._device))
        return out

    @torch.no_grad()
    def route(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and rows of the chosen experts, [N, k], on the CPU.

        A number beyond the last row stands for a skipped place.
        """
        _, weights, ids = self._mlp.gate(inputs)
        return weights.float().cpu(), ids.cpu()

    @property
    def tied(self) -> TiedExperts | None:
        """Tied experts of the layer; None if it has none."""
        experts = self._mlp.experts
        return experts.members if isinstance(experts, MixedExperts) else None

    def find_tied(self, rows: Tensor) -> Tensor:
        """Return which of `tied` each chosen row of the router runs, int64; -1 for none."""
        found: Tensor = self._mlp.experts.find_tied(rows)
        return found

    @torch.no_grad()
    def compute_unstored(self, inputs: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Return the part [tokens, hidden] of rows that use no stored expert, in a mixed layer."""
        experts, shown = self._mlp.experts, inputs.to(self._device)
        found: Tensor = experts.compute_unstored(
            shown, ids.to(self._device), weights.to(self._device)
        )
        return found


def _find_attention_name(role: str) -> str:
    """Return the name of a matrix of attention in transformers' module."""
    return role.removeprefix("attention.").removesuffix(".weight")
