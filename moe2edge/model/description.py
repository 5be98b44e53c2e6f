"""A block in a line of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense, Replacement, RouterRow, Tied
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.weights import Weight


def describe_block(block: Block) -> str:
    """Describe one block in a line."""
    parts = []
    if block.window:
        parts.append(f"window {block.window}")
    parts.append(_describe_mixer(block))
    if isinstance(block.mlp, MoELayer):
        layer = block.mlp
        width = layer.experts[0].up.shape[0]
        origins = [e.origin for e in layer.experts]
        rule = "renormalized" if layer.router.renormalize else "not renormalized"
        parts.append(
            f"{len(layer.experts)} experts of width {width}, top-{layer.router.top_k} {rule}, "
            f"{_describe_dtype(layer.experts[0].up)}"
        )
        if origins != list(range(len(origins))):
            parts.append(f"from {origins}")
        parts += _describe_rows(layer)
        if layer.router.skip_below:
            parts.append(f"skips below {[round(b, 4) for b in layer.router.skip_below]}")
    dense = block.mlp.expert if isinstance(block.mlp, UnroutedMLP) else block.mlp
    if isinstance(dense, Dense):
        parts.append(f"dense MLP of width {dense.gate.shape[0]}, {_describe_dtype(dense.gate)}")
    if isinstance(block.mlp, MoELayer | UnroutedMLP) and block.mlp.shared is not None:
        parts.append(f"shared expert of width {block.mlp.shared.mlp.gate.shape[0]}")
    if block.mlp is None:
        parts.append("norm only" if block.passes_norm else "no MLP")
    return "; ".join(parts)


def _describe_mixer(block: Block) -> str:
    """Describe attention, or what stands in its place."""
    if "q_proj.weight" in block.attention:
        return f"attention {_describe_dtype(block.attention['q_proj.weight'])}"
    linears = [role for role in block.others if role.startswith("linear.")]
    if not linears:
        return "no matrix before the MLP"
    place = linears[0].split(".")[1]
    return f"{place} {_describe_dtype(block.others[linears[0]])}"


def _describe_rows(layer: MoELayer) -> Iterator[str]:
    """Describe the rows of a layer that are tied or replaced."""
    bases = layer.bases
    if layer.is_tied:
        ran = [layer.rows[n] for n in layer.routed]
        ranks = sorted({row.rank for row in ran if isinstance(row, Tied)}) or [0]
        found = ((layer.rows[n].origin, bases[n]) for n in layer.routed)
        shown = " ".join(f"{origin}:{'-' if base is None else base}" for origin, base in found)
        form = _describe_scheme(ran)
        yield f"tied experts of rank {_describe_range(ranks)}{form}, with their base {shown}"
    if replaced := [row for row in layer.rows if isinstance(row, Replacement)]:
        ranks = sorted({row.rank for row in replaced})
        gone = [row.origin for row in replaced]
        form = _describe_scheme(replaced)
        yield f"{len(gone)} replacements of rank {_describe_range(ranks)}{form} for {gone}"


def _describe_scheme(found: Sequence[RouterRow]) -> str:
    """Return the scheme of low-rank matrices in brackets; nothing if they have none."""
    weights = (weight for one in found for _, weight in one.weights())
    scheme = next((weight.scheme for weight in weights if weight.scheme), None)
    return "" if scheme is None else f" ({scheme})"


def _describe_range(numbers: Sequence[int]) -> str:
    """Return one number, or the ends of several."""
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _describe_dtype(weight: Weight) -> str:
    if weight.scheme is None:
        return weight.dtype
    return str(weight.scheme)
