"""A block without the matrices of its experts and MLPs, as transformers computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.runtime.decoder_blocks import Nothing, load_block_state
from moe2edge.runtime.layer_stage import LayerStage
from moe2edge.runtime.mixed_experts import MixedExperts, TiedExperts

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")

# First parts of the roles that are loaded.
LOADED = ("norms", "attention", "linear", "other", "router", "substitutes", "members")


class BlockParts:
    """A block without the matrices of its experts and MLPs: attention, norms and router."""

    def __init__(self, model: Model, block: Block, device: torch.device = CPU) -> None:
        """Load it; hidden states may be on another device than ``device``, results are on it."""
        self._stage = LayerStage(model, block)
        layer: Any = self._stage.layer
        state = load_block_state(model, block, lambda role: role.partition(".")[0] in LOADED)
        state = {name: tensor.to(device) for name, tensor in state.items()}
        layer.load_state_dict(state, strict=False, assign=True)
        self.norm, self._mlp = layer.post_attention_layernorm, layer.mlp
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing()
        self._stage.to(device)
        self._layer, self._device = layer, device

    @torch.no_grad()
    def compute_attention_inputs(self, hidden: Tensor) -> Tensor:
        """Return the inputs [tokens, hidden] of q, k and v."""
        out: Tensor = self._layer.input_layernorm(hidden.to(self._device))
        return out.flatten(0, -2)

    @torch.no_grad()
    def compute_output_inputs(self, hidden: Tensor) -> Tensor:
        """Return the inputs [tokens, heads * head size] of the output projection.

        Args:
            hidden: hidden states in front of the block.
        """
        found: list[Tensor] = []
        hook = self._layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: found.append(args[0].flatten(0, -2))
        )
        try:
            self._stage.run(hidden.to(self._device))
        finally:
            hook.remove()
        return found[0]

    @torch.no_grad()
    def project_attention(self, inputs: Tensor) -> Tensor:
        """Return what attention adds to the hidden states, [tokens, hidden].

        Args:
            inputs: result of `compute_output_inputs`.
        """
        out: Tensor = self._layer.self_attn.o_proj(inputs)
        return out

    def put_attention(self, role: str, matrix: Tensor) -> None:
        """Replace a matrix of attention."""
        name = role.removeprefix("attention.").removesuffix(".weight")
        getattr(self._layer.self_attn, name).weight = nn.Parameter(matrix, requires_grad=False)

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
