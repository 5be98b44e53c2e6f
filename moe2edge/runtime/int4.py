"""Matrices that stay in 4 bits while a model runs, by the matmul that torch has for them.

Bfloat16 activations are multiplied with symmetric 4-bit weights, for decoding straight from the
integers: what a token costs is the reading of the weights, and these are a quarter as many bytes.
Everything else (other widths, zero points of their own, other dtypes) is dequantized at load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.errors import Unsupported
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model, is_low_rank
from moe2edge.model.roles import list_gated_mlps
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import give_back
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

# Inputs that share a scale, as the matmul takes them; larger groups are given in pieces.
KERNEL_GROUPS = (256, 128, 64, 32)
# Stands for the module of a decoder layer with the routed experts: see `experts_name`.
EXPERT_MATRICES = "mlp.experts"
# Outputs that it works on at once.
KERNEL_ROWS = 16
# The integer that stands for zero in it.
KERNEL_ZERO = 8
# From so many rows on, a processor is faster to dequantize a matrix and multiply in bfloat16:
#     python -m benchmarks.slimming.packed --rows
MANY_ROWS = 96
# Inputs that are dequantized at once: few enough for float32 numbers to stay in the cache.
SLAB = 128


# ---- what runs packed --------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """How the quantized matrices of a loaded model run; models have it as ``moe2edge_packed``.

    Attributes:
        packed: names on disk of the matrices that stay in 4 bits.
        dequantized: names of the others, each with the reason.
        dtype: of the activations, as torch names it.
    """

    packed: tuple[str, ...] = ()
    dequantized: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        """One line for people; empty if nothing is quantized.

        >>> print(Packed(("a", "b"), {"c": "8 bits"}))
        2 of 3 quantized matrices run in 4 bits, 1 dequantized to bfloat16 (8 bits: 1)
        """
        count = len(self.packed) + len(self.dequantized)
        if not count:
            return ""
        text = f"{len(self.packed)} of {count} quantized matrices run in 4 bits"
        if self.dequantized:
            reasons = Counter(self.dequantized.values()).most_common()
            why = ", ".join(f"{reason}: {n}" for reason, n in reasons)
            text += f", {len(self.dequantized)} dequantized to {self.dtype} ({why})"
        return text


def plan_packing(model: Model, dtype: torch.dtype, *, wanted: bool | None = None) -> Packed:
    """What can run packed, from headers only.

    Args:
        model: the model.
        dtype: of the activations.
        wanted: False: nothing shall; True: something must.

    Raises:
        Unsupported: ``wanted``, and nothing can.
    """
    packed: list[str] = []
    dequantized: dict[str, str] = {}
    for block in model.blocks:
        for role, weight in block.weights():
            if is_low_rank(role) and weight.scheme is not None:
                name = model.family.disk_name(block.index, role)
                dequantized[name] = f"factors of {weight.scheme.bits} bits"
        for unit in _units(block):
            obstacle = "packed=False" if wanted is False else unit.obstacle(dtype)
            for role, weight in unit.weights.items():
                name = model.family.disk_name(block.index, role)
                if obstacle is None:
                    packed.append(name)
                elif weight.scheme is not None:
                    dequantized[name] = obstacle
    found = Packed(tuple(packed), dequantized, _name(dtype))
    if wanted and not packed:
        why = str(found) or "the model is not quantized"
        raise Unsupported(
            f"nothing can run packed: {why}; it takes symmetric 4-bit weights and bfloat16; leave "
            "packed=True out"
        )
    return found


@dataclass(frozen=True)
class _Unit:
    """What one matmul serves: one matrix, or gate and up of an expert below one another.

    Attributes:
        module: its name in a decoder layer.
        weights: by role.
        part: of the experts' module, which of its matrices.
    """

    module: str
    weights: Mapping[str, Weight]
    part: str = ""

    @property
    def numbers(self) -> list[Quantized]:
        """Integers and scales of each weight."""
        return [weight.quantized() for weight in self.weights.values()]

    def obstacle(self, dtype: torch.dtype) -> str | None:
        """Why it cannot run packed, None if it can."""
        schemes = {weight.scheme for weight in self.weights.values()}
        scheme, *others = schemes
        if scheme is None or others:
            return "not quantized alike"
        outs = sum(weight.shape[0] for weight in self.weights.values())
        width = scheme.width(next(iter(self.weights.values())).shape[1])
        if dtype != torch.bfloat16:
            return f"activations in {_name(dtype)}"
        if scheme.bits != 4:
            return f"{scheme.bits} bits"
        if not scheme.symmetric:
            return "asymmetric"
        if width % KERNEL_GROUPS[-1]:
            return f"groups of {width}"
        return f"{outs} outputs, not a multiple of {KERNEL_ROWS}" if outs % KERNEL_ROWS else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _units(block: Block) -> Iterator[_Unit]:
    """All that slimming selects in a block, by the matmuls of the loaded model."""
    for suffix, weight in block.attention.items():
        if suffix.endswith("_proj.weight"):
            module = suffix.removesuffix(".weight")
            yield _Unit(f"self_attn.{module}", {f"attention.{suffix}": weight})
    for kind, mlp in list_gated_mlps(block):
        if kind.startswith("experts."):
            both = {f"{kind}.gate": mlp.gate, f"{kind}.up": mlp.up}
            yield _Unit(EXPERT_MATRICES, both, "gate_up")
            yield _Unit(EXPERT_MATRICES, {f"{kind}.down": mlp.down}, "down")
        else:
            module = "mlp.shared_expert" if kind == "shared" else "mlp"
            yield from _plain_units(kind, module, mlp)


def _plain_units(role: str, module: str, mlp: Dense) -> Iterator[_Unit]:
    for part, weight in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
        yield _Unit(f"{module}.{part}_proj", {f"{role}.{part}": weight})


def pack_layer(layer: nn.Module, block: Block, dtype: torch.dtype) -> frozenset[str]:
    """Put packed modules, filled, into a decoder layer that has no numbers yet.

    One matrix is in memory in other forms at a time. Where any matrix of the experts can be
    packed, all of them are taken over; those that cannot are dequantized.

    Args:
        layer: of transformers, in the form of ``block``.
        block: the block.
        dtype: of the activations.

    Returns:
        Roles of the weights that the layer holds now.
    """
    units = list(_units(block))
    fit = {unit.module for unit in units if unit.obstacle(dtype) is None}
    experts: dict[str, list[nn.Module]] = {"gate_up": [], "down": []}
    for unit in units:
        if unit.module not in fit:
            continue
        if unit.module == EXPERT_MATRICES:
            experts[unit.part].append(_expert_matrix(unit, dtype))
        else:
            replaced: Any = layer.get_submodule(unit.module)
            layer.set_submodule(unit.module, PackedLinear(unit.numbers, replaced.bias))
        give_back()
    if EXPERT_MATRICES in fit:
        assert isinstance(block.mlp, MoELayer)
        place = find_experts_name(block.mlp)
        activation: Any = layer.get_submodule(place).act_fn
        packed = PackedExperts(experts["gate_up"], experts["down"], activation)
        layer.set_submodule(place, packed)
    return frozenset(role for unit in units if unit.module in fit for role in unit.weights)


def _expert_matrix(unit: _Unit, dtype: torch.dtype) -> nn.Module:
    """A matrix of an expert, packed or else dequantized."""
    if unit.obstacle(dtype) is None:
        return PackedLinear(unit.numbers)
    weight = torch.cat([load_finite(weight).to(dtype) for weight in unit.weights.values()])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


# ---- modules -----------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """``nn.Linear`` whose weight [out, in] stays in 4 bits; for inference.

    Its buffers are laid out for the device that they are on, so they are not part of a state dict.
    On a processor it computes in bfloat16 and, after ``.float()``, in float32; on CUDA in bfloat16,
    and any number of rows straight from the integers, which is slow from about a hundred on.
    """

    packed: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(self, parts: Sequence[Quantized], bias: nn.Parameter | None = None) -> None:
        """Pack a weight.

        Args:
            parts: matrices of one scheme that stand below one another, such as gate and up.
            bias: [out], if there is one.
        """
        super().__init__()
        q = torch.cat([part.q for part in parts])
        scales = torch.cat([part.scales for part in parts])
        self.out_features, self.in_features = q.shape
        width = parts[0].scheme.width(self.in_features)
        self.group = next(size for size in KERNEL_GROUPS if width % size == 0)
        scales = scales.repeat_interleave(width // self.group, dim=1).to(torch.bfloat16).T
        # Beside each scale, what is added to each weight: nothing.
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
        self.register_buffer("packed", _pack(q), persistent=False)
        self.register_buffer("scales", pairs, persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) >= MANY_ROWS and self.packed.device.type == "cpu" and _layout():
            out = rows @ self.dequantized(x.dtype)
        else:
            out = _multiply(rows.contiguous(), self.packed, self.group, self.scales)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, transposed: [in, out]. On a processor only."""
        out = torch.empty(self.in_features, self.out_features, dtype=dtype)
        scales = self.scales[..., 0].float().unsqueeze(1)
        step = max(1, SLAB // self.group)
        for at in range(0, len(scales), step):
            scale = scales[at : at + step]
            inputs = slice(at * self.group, (at + len(scale)) * self.group)
            q = self._integers(inputs)
            q.sub_(KERNEL_ZERO).view(len(scale), self.group, -1).mul_(scale)
            out[inputs] = q
        return out

    def _integers(self, inputs: slice) -> Tensor:
        """The integers of some inputs, transposed and in float32: [inputs, out]."""
        layout = _layout()
        assert layout is not None
        return layout.integers(self.packed, inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """What ``.to(device)`` calls: on another kind of device the integers lie differently.

        Raises:
            Unsupported: there is no matmul for them there.
        """
        old, new = self.packed.device, fn(self.packed.new_empty(0)).device
        if old.type == new.type:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        _check_device(new)
        if old.type != "cpu" or _layout() is None:
            raise Unsupported(
                f"packed matrices cannot be moved from {old} to {new}; load the folder again"
            )
        q = self._integers(slice(0, self.in_features)).T.to(torch.uint8)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = _pack(q.to(new))
        return self

    def extra_repr(self) -> str:
        """Shape and group size, for `repr`."""
        return f"{self.in_features}, {self.out_features}, 4 bits in groups of {self.group}"


class PackedExperts(nn.Module):
    """In place of the fused experts of a transformers MoE module; for inference."""

    def __init__(
        self,
        gate_up: Sequence[nn.Module],
        down: Sequence[nn.Module],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        """Take the matrices of all experts.

        Args:
            gate_up: of each expert, gate above up: [2 width, hidden].
            down: of each expert: [hidden, width].
            activation: between them.
        """
        super().__init__()
        self.num_experts = len(down)
        self.gate_up = nn.ModuleList(gate_up)
        self.down = nn.ModuleList(down)
        self.act_fn = activation

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden: [tokens, hidden].
            top_k_index: int64 [tokens, k]; the number of experts stands for none.
            top_k_weights: [tokens, k].
        """
        # In float32, so that the order of experts, which depends on the batch, hardly matters.
        total = torch.zeros_like(hidden, dtype=torch.float32)
        if len(hidden) == 1:
            for place, expert in enumerate(top_k_index[0].tolist()):
                if expert < self.num_experts:
                    total += self._expert(expert, hidden) * top_k_weights[:, place, None]
            return total.to(hidden.dtype)
        ids, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = ids.argsort(stable=True)
        counts = ids.bincount(minlength=self.num_experts + 1).tolist()
        # What stands behind the last expert's places is skipped.
        for expert, places in enumerate(torch.split(order, counts)[: self.num_experts]):
            if len(places):
                tokens = places // top_k_index.shape[1]
                out = self._expert(expert, hidden[tokens]) * weights[places, None]
                total.index_add_(0, tokens, out.float())
        return total.to(hidden.dtype)

    def _expert(self, n: int, x: Tensor) -> Tensor:
        gate, up = self.gate_up[n](x).chunk(2, dim=-1)
        out: Tensor = self.down[n](self.act_fn(gate) * up)
        return out


# ---- torch's matmul ----------------------------------------------------------------------------


def _check_device(device: torch.device) -> None:
    """Refuse a device without a 4-bit matmul.

    Raises:
        Unsupported: it is neither a processor nor CUDA of compute capability 8.0 or later.
    """
    if device.type == "cpu":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return
    raise Unsupported(
        f"packed matrices run on cpu, and on cuda from compute capability 8.0 on, not on {device}; "
        "load the folder with packed=False"
    )


def _pack(q: Tensor) -> Tensor:
    """Integers uint8 [out, in] as the matmul of their device reads them.

    The form for CUDA follows torch's sources (``aten/src/ATen/native/cuda/int4mm.cu``).
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        packed: Tensor = aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return packed
    # Tiles of 16 inputs that lie together: as many as there may be.
    tiles = next(tiles for tiles in (8, 4, 2) if q.shape[1] % (16 * tiles) == 0)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
    packed = aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


def _multiply(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """``x`` [rows, in] times a packed matrix: [rows, out].

    Args:
        x: bfloat16, contiguous; on a processor float32 as well, with scales in float32.
        packed: of `_pack`.
        group: inputs that share a scale.
        scales: [groups, out, 2], a scale and what is added.
    """
    aten = torch.ops.aten
    cpu = x.device.type == "cpu"
    matmul = aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm
    out: Tensor = matmul(x, packed, group, scales)
    return out


@dataclass(frozen=True)
class _Layout:
    """How a processor's matmul has a matrix in memory.

    Rows lie in blocks, the last of which may be smaller; in a block, inputs follow one another,
    and of each input the rows, two to a byte.

    Attributes:
        block: rows in a block.
        halves: a byte of a whole block has a row of the first half and one of the second;
            otherwise, and in the last block, it has neighbours.
    """

    block: int
    halves: bool

    def integers(self, packed: Tensor, inputs: slice) -> Tensor:
        """The integers of some inputs, transposed and in float32: [inputs, out].

        Args:
            packed: of `_pack`, uint8 [out, in / 2].
            inputs: which; without a step.
        """
        outs, ins = packed.shape[0], 2 * packed.shape[1]
        whole = outs // self.block * self.block
        q = torch.empty(len(range(ins)[inputs]), outs)
        if whole:
            found = packed[:whole].view(-1, ins, self.block // 2)[:, inputs].transpose(0, 1)
            _spread(found, q[:, :whole].view(len(q), -1, self.block), halves=self.halves)
        if whole < outs:
            _spread(packed[whole:].view(ins, -1)[inputs], q[:, whole:], halves=False)
        return q


def _spread(found: Tensor, q: Tensor, *, halves: bool) -> None:
    """Write the integers of bytes [..., rows / 2] into ``q`` [..., rows]."""
    half = q.shape[-1] // 2
    low, high = (q[..., :half], q[..., half:]) if halves else (q[..., ::2], q[..., 1::2])
    low.copy_(found & 15)
    high.copy_(found >> 4)


@lru_cache(maxsize=1)
def _layout() -> _Layout | None:
    """How this processor's matmul has matrices in memory, None if in no way that we know.

    It depends on the instructions that torch uses, so it is found out by packing a matrix.
    """
    q = torch.randint(0, 16, (176, 4), dtype=torch.uint8, generator=torch.Generator())
    packed = _pack(q)
    for block in (64, 32, 16):
        for halves in (True, False):
            layout = _Layout(block, halves)
            if torch.equal(layout.integers(packed, slice(None)).T, q.float()):
                return layout
    return None
