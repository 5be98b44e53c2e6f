"""Matrices that stay in 4 bits while a model runs, by the matmul that torch has for them.

Bfloat16 activations are multiplied with symmetric 4-bit weights, for decoding straight from the
integers: the time for a token is that of reading the weights, and these are a quarter as many
bytes. Everything else (other bits, asymmetric weights, other dtypes) is dequantized at load.
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
from moe2edge.model.block import Block, is_low_rank
from moe2edge.model.experts import Dense
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.roles import list_gated_mlps
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import give_back
from moe2edge.runtime.mixed_experts import find_experts_name

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of inputs that share a scale in the matmul; larger groups are given in pieces.
KERNEL_GROUPS = (256, 128, 64, 32)
# Stands for the module of a decoder layer with the stored experts: see `find_experts_name`.
EXPERT_MATRICES = "mlp.experts"
# Outputs that the matmul computes at once.
KERNEL_ROWS = 16
# Integer that stands for zero in the matmul.
KERNEL_ZERO = 8
# From this number of rows on, a CPU is faster with dequantizing and a product in bfloat16:
#     python -m benchmarks.slimming.packed --rows
MANY_ROWS = 96
# Inputs that are dequantized at once: few enough for float32 numbers to stay in the cache.
SLAB = 128


# ---- which matrices run packed -----------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Forms in which quantized matrices of a loaded model run: attribute ``moe2edge_packed``.

    Attributes:
        packed: names on disk of the matrices that stay in 4 bits.
        dequantized: names of the others, each with the reason.
        dtype: of the activations, as torch names it.
    """

    packed: tuple[str, ...] = ()
    dequantized: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        """Return one line for people; empty if nothing is quantized.

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
    """Plan which matrices run packed, from headers only.

    Args:
        model: the model.
        dtype: of the activations.
        wanted: False: none; True: at least one, or it is an error; None: all that can.

    Raises:
        Unsupported: ``wanted``, and nothing can.
    """
    packed: list[str] = []
    dequantized: dict[str, str] = {}
    if model.family.generic:
        return _plan_generic(model, dtype, wanted=bool(wanted))
    for block in model.blocks:
        for role, weight in block.weights():
            if is_low_rank(role) and weight.scheme is not None:
                name = model.disk_name(block, role)
                dequantized[name] = f"factors of {weight.scheme.bits} bits"
        for unit in _list_units(block):
            obstacle = "packed=False" if wanted is False else unit.find_obstacle(dtype)
            for role, weight in unit.weights.items():
                name = model.disk_name(block, role)
                if obstacle is None:
                    packed.append(name)
                elif weight.scheme is not None:
                    dequantized[name] = obstacle
    found = Packed(tuple(packed), dequantized, _name_dtype(dtype))
    if wanted and not packed:
        why = str(found) or "the model is not quantized"
        raise Unsupported(
            f"no matrix can run in 4 bits: {why}; that needs symmetric 4-bit weights and bfloat16; "
            "leave packed=True out"
        )
    return found


def _plan_generic(model: Model, dtype: torch.dtype, *, wanted: bool) -> Packed:
    """Return the plan for a family without a row: nothing runs packed.

    Raises:
        Unsupported: something should.
    """
    kind = model.family.model_type
    if wanted:
        raise Unsupported(
            f"no matrix of {kind} can run in 4 bits; those of {', '.join(FAMILIES)} can: leave "
            "packed=True out"
        )
    names = [name for name, _, weight in model.tensors() if weight.scheme]
    return Packed((), dict.fromkeys(names, f"not for {kind}"), _name_dtype(dtype))


@dataclass(frozen=True)
class _Unit:
    """The weights of one matmul: one matrix, or gate and up of an expert below one another.

    Attributes:
        module: name of the module in a decoder layer.
        weights: the weights by role.
        part: matrix in the module of the experts, ``gate_up`` or ``down``; else empty.
    """

    module: str
    weights: Mapping[str, Weight]
    part: str = ""

    @property
    def numbers(self) -> list[Quantized]:
        """Integers and scales of each weight."""
        return [weight.quantized() for weight in self.weights.values()]

    def find_obstacle(self, dtype: torch.dtype) -> str | None:
        """Return why it cannot run packed; None if it can."""
        schemes = {weight.scheme for weight in self.weights.values()}
        scheme, *others = schemes
        if scheme is None or others:
            return "not quantized alike"
        outs = sum(weight.shape[0] for weight in self.weights.values())
        width = scheme.width(next(iter(self.weights.values())).shape[1])
        if dtype != torch.bfloat16:
            return f"activations in {_name_dtype(dtype)}"
        if scheme.bits != 4:
            return f"{scheme.bits} bits"
        if not scheme.symmetric:
            return "asymmetric"
        if scheme.ordered:
            return "desc_act"
        if width % KERNEL_GROUPS[-1]:
            return f"groups of {width}"
        return f"{outs} outputs, not a multiple of {KERNEL_ROWS}" if outs % KERNEL_ROWS else None


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list_units(block: Block) -> Iterator[_Unit]:
    """Yield the quantizable weights of a block by the matmuls of the loaded model."""
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
            yield from _list_plain_units(kind, module, mlp)


def _list_plain_units(role: str, module: str, mlp: Dense) -> Iterator[_Unit]:
    for part, weight in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
        yield _Unit(f"{module}.{part}_proj", {f"{role}.{part}": weight})


def pack_layer(layer: nn.Module, block: Block, dtype: torch.dtype) -> frozenset[str]:
    """Put packed modules, filled, into a decoder layer that has no numbers yet.

    Only one matrix at a time is in memory in another form. Where any matrix of the experts can be
    packed, the module takes all of them; those that cannot be packed are dequantized.

    Args:
        layer: decoder layer of transformers, in the form of ``block``.
        block: the block.
        dtype: dtype of the activations.

    Returns:
        Roles of the weights that the layer holds now.
    """
    units = list(_list_units(block))
    fit = {unit.module for unit in units if unit.find_obstacle(dtype) is None}
    experts: dict[str, list[nn.Module]] = {"gate_up": [], "down": []}
    for unit in units:
        if unit.module not in fit:
            continue
        if unit.module == EXPERT_MATRICES:
            experts[unit.part].append(_make_expert_matrix(unit, dtype))
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


def _make_expert_matrix(unit: _Unit, dtype: torch.dtype) -> nn.Module:
    """Make the module of a matrix of an expert, packed or else dequantized."""
    if unit.find_obstacle(dtype) is None:
        return PackedLinear(unit.numbers)
    weight = torch.cat([load_finite(weight).to(dtype) for weight in unit.weights.values()])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


# ---- modules -----------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """``nn.Linear`` whose weight [out, in] stays in 4 bits; for inference.

    Its buffers are laid out for the device that they are on, so they are not part of a state dict.
    On a CPU it computes in bfloat16 and, after ``.float()``, in float32; on CUDA in bfloat16, and
    any number of rows straight from the integers, which is slow from about a hundred on.
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
        # Beside each scale stands an offset of the weights: zero.
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
        self.register_buffer("packed", _pack(q), persistent=False)
        self.register_buffer("scales", pairs, persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., in] with the weight: [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) >= MANY_ROWS and self.packed.device.type == "cpu" and _find_layout():
            out = rows @ self.dequantize(x.dtype)
        else:
            out = _multiply(rows.contiguous(), self.packed, self.group, self.scales)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, transposed: [in, out]. On a CPU only."""
        out = torch.empty(self.in_features, self.out_features, dtype=dtype)
        scales = self.scales[..., 0].float().unsqueeze(1)
        step = max(1, SLAB // self.group)
        for at in range(0, len(scales), step):
            scale = scales[at : at + step]
            inputs = slice(at * self.group, (at + len(scale)) * self.group)
            q = self._read_integers(inputs)
            q.sub_(KERNEL_ZERO).view(len(scale), self.group, -1).mul_(scale)
            out[inputs] = q
        return out

    def _read_integers(self, inputs: slice) -> Tensor:
        """Return the integers of some inputs, transposed and in float32: [inputs, out]."""
        layout = _find_layout()
        assert layout is not None
        return layout.read_integers(self.packed, inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Move it, for ``.to(device)``; the layout of the integers depends on the kind of device.

        Raises:
            Unsupported: there is no matmul for them there.
        """
        old, new = self.packed.device, fn(self.packed.new_empty(0)).device
        if old.type == new.type:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        _check_device(new)
        if old.type != "cpu" or _find_layout() is None:
            raise Unsupported(
                f"packed matrices cannot be moved from {old} to {new}; load the folder again"
            )
        q = self._read_integers(slice(0, self.in_features)).T.to(torch.uint8)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = _pack(q.to(new))
        return self

    def extra_repr(self) -> str:
        """Return shape and group size, for `repr`."""
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
            gate_up: for each expert, gate above up: [2 width, hidden].
            down: for each expert: [hidden, width].
            activation: function applied to the output of gate.
        """
        super().__init__()
        self.num_experts = len(down)
        self.gate_up = nn.ModuleList(gate_up)
        self.down = nn.ModuleList(down)
        self.act_fn = activation

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

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
                    total += self._run_expert(expert, hidden) * top_k_weights[:, place, None]
            return total.to(hidden.dtype)
        ids, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = ids.argsort(stable=True)
        counts = ids.bincount(minlength=self.num_experts + 1).tolist()
        # Places with the id behind the last expert are skipped.
        for expert, places in enumerate(torch.split(order, counts)[: self.num_experts]):
            if len(places):
                tokens = places // top_k_index.shape[1]
                out = self._run_expert(expert, hidden[tokens]) * weights[places, None]
                total.index_add_(0, tokens, out.float())
        return total.to(hidden.dtype)

    def _run_expert(self, n: int, x: Tensor) -> Tensor:
        gate, up = self.gate_up[n](x).chunk(2, dim=-1)
        out: Tensor = self.down[n](self.act_fn(gate) * up)
        return out


# ---- torch's matmul ----------------------------------------------------------------------------


def _check_device(device: torch.device) -> None:
    """Refuse a device without a 4-bit matmul.

    Raises:
        Unsupported: it is neither a CPU nor CUDA of compute capability 8.0 or later.
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
    """Convert integers uint8 [out, in] to the layout that the matmul of their device reads.

    The form for CUDA follows torch's sources (``aten/src/ATen/native/cuda/int4mm.cu``).
    """
    aten = torch.ops.aten
    if q.device.type == "cpu":
        packed: Tensor = aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return packed
    # Number of tiles of 16 inputs that lie together: the largest that fits.
    tiles = next(tiles for tiles in (8, 4, 2) if q.shape[1] % (16 * tiles) == 0)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
    packed = aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


def _multiply(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """Multiply ``x`` [rows, in] with a packed matrix: [rows, out].

    Args:
        x: bfloat16, contiguous; on a CPU float32 as well, with scales in float32.
        packed: matrix from `_pack`.
        group: inputs that share a scale.
        scales: [groups, out, 2], a scale and an offset.
    """
    aten = torch.ops.aten
    cpu = x.device.type == "cpu"
    matmul = aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm
    out: Tensor = matmul(x, packed, group, scales)
    return out


@dataclass(frozen=True)
class _Layout:
    """Layout in memory of a matrix for the matmul of a CPU.

    Rows lie in blocks, the last of which may be smaller; in a block, inputs follow one another,
    and within each input the rows, two to a byte.

    Attributes:
        block: rows in a block.
        halves: a byte of a whole block has a row of the first half and one of the second;
            otherwise, and in the last block, it has neighbours.
    """

    block: int
    halves: bool

    def read_integers(self, packed: Tensor, inputs: slice) -> Tensor:
        """Return the integers of some inputs, transposed and in float32: [inputs, out].

        Args:
            packed: matrix from `_pack`, uint8 [out, in / 2].
            inputs: range of inputs, without a step.
        """
        outs, ins = packed.shape[0], 2 * packed.shape[1]
        whole = outs // self.block * self.block
        q = torch.empty(len(range(ins)[inputs]), outs)
        if whole:
            found = packed[:whole].view(-1, ins, self.block // 2)[:, inputs].transpose(0, 1)
            _unpack_bytes(found, q[:, :whole].view(len(q), -1, self.block), halves=self.halves)
        if whole < outs:
            _unpack_bytes(packed[whole:].view(ins, -1)[inputs], q[:, whole:], halves=False)
        return q


def _unpack_bytes(found: Tensor, q: Tensor, *, halves: bool) -> None:
    """Write the integers of bytes [..., rows / 2] into ``q`` [..., rows]."""
    half = q.shape[-1] // 2
    low, high = (q[..., :half], q[..., half:]) if halves else (q[..., ::2], q[..., 1::2])
    low.copy_(found & 15)
    high.copy_(found >> 4)


@lru_cache(maxsize=1)
def _find_layout() -> _Layout | None:
    """Find the layout of this CPU's matmul; None if it is not one that we know.

    It depends on the instructions that torch uses, so a matrix is packed to find it.
    """
    q = torch.randint(0, 16, (176, 4), dtype=torch.uint8, generator=torch.Generator())
    packed = _pack(q)
    for block in (64, 32, 16):
        for halves in (True, False):
            layout = _Layout(block, halves)
            if torch.equal(layout.read_integers(packed, slice(None)).T, q.float()):
                return layout
    return None
