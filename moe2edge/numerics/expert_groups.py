"""Groups of similar experts and their merging: similarity, neuron alignment, means. Pure functions.

The methods are M-SMoE (https://arxiv.org/abs/2310.01334), HC-SMoE
(https://arxiv.org/abs/2410.08589) and REAM (https://arxiv.org/abs/2604.04356); LightMoE's groups of
experts that share a base (https://arxiv.org/abs/2603.12645) are found by `group_by_similarity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import linear, normalize, silu

from moe2edge.numerics.selection import rank_by_score

if TYPE_CHECKING:
    from torch import Tensor

# A group of experts that become one: the centroid, then the others.
ExpertGroup = tuple[int, ...]

# Bytes of the outputs of all experts of a layer that are held at once.
CHUNK_BYTES = 128 << 20
# Dimensions to which REAM's code reduces the weights of a neuron.
REDUCED = 64
# Rounds of subspace iteration, as many as in torch.pca_lowrank.
ROUNDS = 2
# Matrices with a row for each neuron.
NEURON_ROWS = ("gate", "up")


# ---- similarity ----------------------------------------------------------------------------------


def compute_cosines(gram: Tensor) -> Tensor:
    """Compute the cosines between vectors from their inner products ``gram`` [n, n]."""
    norms = gram.diagonal().clamp(min=1e-300).sqrt()
    return gram / norms[:, None] / norms


def group_by_similarity(
    candidates: Sequence[int], importance: Sequence[float], similarity: Tensor, groups: int
) -> list[list[int]]:
    """Group experts: the most important ones, each with those most similar to it.

    Args:
        candidates: experts of a layer to group.
        importance: importance of all experts of the layer.
        similarity: [E, E].
        groups: number of groups.

    Returns:
        For each group its representative, then the others in rising order.
    """
    ranked = sorted(candidates, key=lambda j: (-importance[j], j))
    result = [[j] for j in ranked[:groups]]
    for j in sorted(ranked[groups:]):
        nearest = max(range(groups), key=lambda g: (float(similarity[j, result[g][0]]), -g))
        result[nearest].append(j)
    return result


class ExpertSums:
    """Outputs and router logits of all experts of a layer on all tokens, in sums of float64.

    Attributes:
        tokens: number of tokens.
        outputs: sum of the outputs of each expert, routed there or not, [experts, hidden].
        cosines: sum over tokens of the cosines between outputs of two experts, [experts, experts].
        logits: inner products of the columns of router logits, [experts, experts].
    """

    def __init__(self, experts: int, hidden: int) -> None:
        """Start with no tokens."""
        self.tokens = 0
        self.outputs = torch.zeros(experts, hidden, dtype=torch.float64)
        self.cosines, self.logits = torch.zeros(2, experts, experts, dtype=torch.float64)

    def select(self, some: slice) -> ExpertSums:
        """Return the sums of some neighbours among the experts."""
        found = ExpertSums(0, 0)
        found.tokens, found.outputs = self.tokens, self.outputs[some]
        found.cosines, found.logits = self.cosines[some, some], self.logits[some, some]
        return found

    def add_logits(self, logits: Tensor) -> None:
        """Add router logits [n, experts]."""
        self.tokens += len(logits)
        self.logits += logits.double().T @ logits.double()

    def add_outputs(
        self, inputs: Tensor, output: Callable[[int, Tensor], Tensor], *, cosines: bool
    ) -> None:
        """Run every expert on every token and add the outputs.

        Args:
            inputs: inputs of the layer, [n, hidden].
            output: computes the output of an expert for inputs.
            cosines: whether to sum `cosines` instead of `outputs`.
        """
        experts, hidden = self.outputs.shape
        if not cosines:
            for n in range(experts):
                self.outputs[n] += output(n, inputs).sum(0, dtype=torch.float64)
            return
        for part in torch.split(inputs, max(1, CHUNK_BYTES // (4 * experts * hidden))):
            directions = part.new_empty(experts, part.numel())
            for n in range(experts):
                directions[n] = normalize(output(n, part), dim=1).flatten()
            self.cosines += (directions @ directions.T).double()


def estimate_merge_bytes(experts: int, hidden: int, width: int, *, align: bool) -> int:
    """Estimate the bytes of gathering and merging in one layer, without the layer itself."""
    sums = 8 * experts * (hidden + 2 * experts) + 2 * CHUNK_BYTES
    merging = 4 * 3 * 3 * hidden * width  # a mean, an expert, the expert in another order
    aligning = 4 * 2 * 3 * hidden * width + 3 * 8 * width * width + 4 * experts * width * REDUCED
    return sums + merging + (aligning if align else 0)


# ---- grouping ----------------------------------------------------------------------------------


def compute_ream_similarity(sums: ExpertSums) -> Tensor:
    """Compute REAM's similarity between experts, [experts, experts], from 0 to 1.

    The mean of two terms: the mean cosine of their outputs over all tokens, shifted to 0 to 1, and
    ``1 - d / largest d`` with d the distance of their normalized columns of router logits
    (https://arxiv.org/abs/2604.04356, and its code). The paper's outputs are gated; the gate weight
    of a token is positive, changes no cosine, and is left out.
    """
    outputs = (sums.cosines / max(sums.tokens, 1) + 1) / 2
    distance = (2 - 2 * compute_cosines(sums.logits)).clamp(min=0).sqrt().fill_diagonal_(0)
    routing = 1 - distance / distance.max().clamp(min=torch.finfo(distance.dtype).tiny)
    similarity: Tensor = (outputs + routing) / 2
    return similarity


def cluster_experts(means: Tensor, keep: int, scores: Sequence[float]) -> tuple[ExpertGroup, ...]:
    """Cluster experts by average linkage of their mean outputs (HC-SMoE).

    See https://arxiv.org/abs/2410.08589. The tree is cut by the number of merges instead of by a
    height, so that there are ``keep`` groups even if experts are equally far apart or equal.

    Args:
        means: mean output of each expert over all tokens, [experts, hidden].
        keep: number of groups.
        scores: scores of experts; the highest in a group is its centroid.
    """
    experts = len(means)
    groups = {n: [n] for n in range(experts)}
    tree = linkage(means.double().numpy(), "average")
    for step, (one, other) in enumerate(tree[: experts - keep, :2].astype(int).tolist()):
        groups[experts + step] = groups.pop(one) + groups.pop(other)
    ranks = {n: rank for rank, n in enumerate(rank_by_score(scores))}
    first = {min(group, key=ranks.__getitem__): group for group in groups.values()}
    return _sort_groups(
        {centroid: [n for n in group if n != centroid] for centroid, group in first.items()}
    )


def join_nearest(similarity: Tensor, keep: int, scores: Sequence[float]) -> tuple[ExpertGroup, ...]:
    """Let the best experts be centroids and every other one join the most similar (M-SMoE).

    See https://arxiv.org/abs/2310.01334.

    Args:
        similarity: [experts, experts].
        keep: number of centroids.
        scores: scores of experts.
    """
    groups = group_by_similarity(range(len(scores)), scores, similarity, keep)
    return _sort_groups({centroid: others for centroid, *others in groups})


def absorb_nearest(
    similarity: Tensor, keep: int, scores: Sequence[float], limit: int
) -> tuple[ExpertGroup, ...]:
    """Let each centroid, the best first, absorb the experts most similar to it (REAM).

    See https://arxiv.org/abs/2604.04356. Most groups hold the centroid alone, so that it is close
    to dropping experts.

    Args:
        similarity: [experts, experts].
        keep: number of centroids.
        scores: scores of experts.
        limit: most experts that join one centroid; ``keep * limit`` must be enough for all.
    """
    ranked = rank_by_score(scores)
    left, groups = set(ranked[keep:]), {}
    for centroid in ranked[:keep]:
        alike = rank_by_score(similarity[centroid].tolist())
        groups[centroid] = [n for n in alike if n in left][:limit]
        left -= set(groups[centroid])
    return _sort_groups(groups)


def _sort_groups(groups: dict[int, list[int]]) -> tuple[ExpertGroup, ...]:
    """Sort groups by their centroids, and the others in each."""
    return tuple((centroid, *sorted(groups[centroid])) for centroid in sorted(groups))


# ---- neuron alignment --------------------------------------------------------------------------


# From gate and up [n, width] to what ``down`` gets; gate is [n, 0] where experts have none.
Activate = Callable[["Tensor", "Tensor"], "Tensor"]


def apply_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``."""
    return silu(gate) * up


@dataclass(frozen=True)
class Matrices:
    """Weights of an expert.

    Attributes:
        gate, up: [width, hidden]; gate is [0, hidden] where experts have none.
        down: [hidden, width].
        biases: of these, by name; empty where experts have none.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def neurons(self) -> Tensor:
        """Concatenate the rows of gate and up, their biases, and the columns of down.

        [width, 3 hidden], where experts have a gate and no biases.
        """
        inner = [part for part in NEURON_ROWS if len(getattr(self, part))]
        biases = [self.biases[part][:, None] for part in inner if part in self.biases]
        return torch.cat([*(getattr(self, part) for part in inner), *biases, self.down.T], dim=1)

    def compute_intermediate(self, inputs: Tensor, activate: Activate = apply_silu) -> Tensor:
        """Compute the intermediate activations [width, n] for inputs [n, hidden]."""
        gate, up = (
            linear(inputs, getattr(self, part), self.biases.get(part)) for part in NEURON_ROWS
        )
        return activate(gate, up).T

    def permute(self, order: Tensor) -> Matrices:
        """Return the expert with its neurons in another order."""
        biases = {p: b[order] if p in NEURON_ROWS else b for p, b in self.biases.items()}
        gate = self.gate[order] if len(self.gate) else self.gate
        return Matrices(gate, self.up[order], self.down[:, order], biases)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its tensors with the names that roles have for them."""
        if len(self.gate):
            yield "gate", self.gate
        yield "up", self.up
        yield "down", self.down
        for part, bias in self.biases.items():
            yield f"{part}_bias", bias


def compute_weight_cost(centroid: Tensor, member: Tensor) -> Tensor:
    """Compute from weights the cost of putting a neuron in the place of another, [width, width].

    The cost is the sum of squared differences. Summed over all places, only the products differ
    between orders, so these alone are used. M-SMoE, after Git Re-Basin.

    Args:
        centroid: `Matrices.neurons` of the centroid, [width, n].
        member: those of the other expert.
    """
    return -centroid @ member.T


def compute_ream_cost(centroid: tuple[Tensor, Tensor], member: tuple[Tensor, Tensor]) -> Tensor:
    """Compute REAM's cost of putting a neuron in the place of another, [width, width].

    The sum of two distances: of normalized activations, and of normalized reduced weights.

    Args:
        centroid: intermediate activations of the centroid, [width, tokens], and its neurons after
            `reduce_neurons`, [width, n].
        member: those of the other expert.
    """
    pairs = zip(centroid, member, strict=True)
    parts = [torch.cdist(normalize(a, dim=1), normalize(b, dim=1)) for a, b in pairs]
    return parts[0] + parts[1]


def match_neurons(cost: Tensor) -> Tensor:
    """Match neurons to places at the least total cost; int64 [width].

    Entry i is the other expert's neuron for the place of the centroid's neuron i.
    """
    _, columns = linear_sum_assignment(cost.double().numpy())
    return torch.from_numpy(columns).long()


def compute_principal_axes(
    rows: Callable[[], Iterator[Tensor]], rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute the mean [n] of rows and their leading principal axes, times singular values.

    By subspace iteration (https://arxiv.org/abs/0909.4061) like torch.pca_lowrank, which REAM's
    code uses, with a random start of its own and without all rows in memory.

    Args:
        rows: yields chunks of rows, [any, n]; called once per round and twice more.
        rank: number of axes; fewer if there are fewer rows or columns.
        seed: seed of the start.

    Returns:
        The mean, and the axes [n, rank].
    """
    mean, count = torch.zeros(()), 0
    for part in rows():
        mean, count = mean + part.sum(0), count + len(part)
    mean /= count
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(len(mean), min(rank, len(mean), count), generator=generator)
    for _ in range(ROUNDS):
        image = torch.zeros_like(basis)
        for part in rows():
            image += (part - mean).T @ ((part - mean) @ basis)
        basis = torch.linalg.qr(image).Q
    gram = torch.zeros(basis.shape[1], basis.shape[1])
    for part in rows():
        projected = (part - mean) @ basis
        gram += projected.T @ projected
    squares, vectors = torch.linalg.eigh(gram)
    return mean, basis @ vectors.flip(1) * squares.flip(0).clamp(min=0).sqrt()


def compute_layer_axes(
    experts: Callable[[], Iterator[Matrices]], seed: int
) -> tuple[Tensor, Tensor]:
    """Compute the principal axes of the normalized weights of all neurons of a layer."""
    return compute_principal_axes(
        lambda: (normalize(one.neurons(), dim=1) for one in experts()), REDUCED, seed
    )


def reduce_neurons(neurons: Tensor, principal: tuple[Tensor, Tensor]) -> Tensor:
    """Project normalized weights of neurons [width, n] on principal axes: [width, rank]."""
    mean, axes = principal
    return (normalize(neurons, dim=1) - mean) @ axes


def align_neurons(
    centroid: Matrices,
    member: Matrices,
    inputs: Tensor,
    principal: tuple[Tensor, Tensor] | None,
    activate: Activate = apply_silu,
) -> Tensor:
    """Match the neurons of another expert to those of a centroid; int64 [width].

    Args:
        centroid: the expert that sets the order.
        member: the other expert.
        inputs: inputs of the layer, [n, hidden]; unused without ``principal``.
        principal: result of `compute_layer_axes`, to match by `compute_ream_cost`; None: match by
            `compute_weight_cost`.
        activate: function between the matrices; unused without ``principal``.
    """
    if principal is None:
        return match_neurons(compute_weight_cost(centroid.neurons(), member.neurons()))
    one, other = (
        (m.compute_intermediate(inputs, activate), reduce_neurons(m.neurons(), principal))
        for m in (centroid, member)
    )
    return match_neurons(compute_ream_cost(one, other))


# ---- merging -----------------------------------------------------------------------------------


def normalize_shares(scores: Sequence[float]) -> tuple[float, ...] | None:
    """Normalize scores to a sum of one; None if they sum to zero."""
    total = sum(scores)
    return tuple(score / total for score in scores) if total > 0 else None


def average_experts(experts: Iterator[tuple[float, Matrices]]) -> Matrices:
    """Average matrices by their shares, float32; one expert is in memory at a time."""
    share, first = next(experts)
    total = Matrices(
        first.gate * share,
        first.up * share,
        first.down * share,
        {part: bias * share for part, bias in first.biases.items()},
    )
    sums = dict(total.parts())
    for share, one in experts:
        for name, numbers in one.parts():
            sums[name].add_(numbers, alpha=share)
    return total
