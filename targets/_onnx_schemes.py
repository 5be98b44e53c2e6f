"""Schemes that the operators of the graph take."""

from __future__ import annotations

from collections.abc import Collection

from moe2edge.errors import Unsupported
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.targets._tensors import check_group_size

# Limits of QMoE and MatMulNBits: bits, and inputs per scale, which are a power of two.
GRAPH_BITS = (2, 4, 8)
SMALLEST_GROUP = 16
# Bits that QMoE alone takes, and its groups then.
EXPERT_BITS, EXPERT_GROUPS = 3, (32, 64, 128)
# Bits of a quantized head or embedding.
END_BITS = 8


def accept_graph_scheme(
    name: str, shape: tuple[int, ...], scheme: Scheme, widths: Collection[int]
) -> None:
    """Refuse a matrix whose scheme the operators do not take, or for which they are slow.

    Args:
        name: its name on disk.
        shape: its shape.
        scheme: its scheme.
        widths: numbers of inputs of all quantized matrices, which one group size should divide.

    Raises:
        Unsupported: names the scheme, and the schemes or targets to choose instead.
    """
    group = scheme.group_size
    if scheme.ordered:
        raise Unsupported(
            f"{name} is {scheme}, and the graph has groups of neighbouring inputs only; quantize "
            "it anew in the recipe (rtn or gptq), or export to gptq, which keeps it, or to hf"
        )
    if scheme.bits not in GRAPH_BITS:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds {', '.join(map(str, GRAPH_BITS))} bits; choose "
            rf"one of these, with {EXPERT_BITS} for experts alone (a rule {{match: 'experts\.', "
            f"bits: {EXPERT_BITS}}}, onnxruntime 1.32 or newer), or export to hf:dequantize=true"
        )
    if group == WHOLE_ROW:
        sizes = (128, 64, 32, SMALLEST_GROUP)
        size = next((n for n in sizes if all(width % n == 0 for width in widths)), None)
        remedy = f"set group_size to {size}, " if size else ""
        raise Unsupported(
            f"{name} is {scheme}, with which ONNX Runtime's experts are 10 to 25 times slower; "
            f"{remedy}leave it in 16 bits with a rule with bits: 16, or export to gptq or "
            "hf:dequantize=true"
        )
    if group < SMALLEST_GROUP or group & (group - 1):
        raise Unsupported(
            f"{name} is {scheme}; the graph takes a group_size that is a power of two, at least "
            f"{SMALLEST_GROUP}"
        )
    check_group_size(name, shape[1], scheme)


def accept_graph_end(name: str, weight: Weight) -> None:
    """Refuse a quantized head or embedding in a form that their operators do not take.

    Args:
        name: its name on disk.
        weight: the matrix.

    Raises:
        Unsupported: names the form, and those to choose instead.
    """
    scheme = weight.scheme
    assert scheme is not None
    if scheme.bits != END_BITS or not scheme.symmetric:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds a head or an embedding in {END_BITS} bits, "
            "symmetric, or unquantized: choose 8 or 16 bits for them"
        )
    accept_graph_scheme(name, weight.shape, scheme, {weight.shape[1]})


def accept_graph_3_bits(name: str, weight: Weight) -> None:
    """Refuse a matrix of an expert of 3 bits in a form that the operator does not take.

    Args:
        name: its name on disk.
        weight: the matrix.

    Raises:
        Unsupported: names the form, and those to choose instead.
    """
    scheme, groups = weight.scheme, ", ".join(map(str, EXPERT_GROUPS))
    assert scheme is not None
    if scheme.ordered or not scheme.symmetric or scheme.group_size not in EXPERT_GROUPS:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds {EXPERT_BITS} bits symmetric, in groups of "
            f"{groups}; set symmetric: true and such a group_size, choose 4 bits, or export to "
            "hf:dequantize=true"
        )
    check_group_size(name, weight.shape[1], scheme)
    if weight.kept and weight.scale_dtype != "F16":
        raise Unsupported(
            f"{name} has integers of {EXPERT_BITS} bits of the source with scales that are "
            f"{weight.scale_dtype}, and the graph holds such with float16 scales; quantize it anew "
            "in the recipe (rtn or gptq), or export to hf:dequantize=true"
        )
