"""Shared bases with low-rank factors in the place of experts. Pure functions on tensors.

LightMoE (https://arxiv.org/abs/2603.12645) replaces the less important experts of a layer in
groups: a group shares a base, the mean of its experts weighted by their importance, and each member
has factors of low rank of its own. There is no public code, and the paper's correction of the
threshold by depth is not known to us; `depth_factors` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize, silu

from moe2edge.numerics.selection import rank_by_score

if TYPE_CHECKING:
    from torch import Tensor

# ---- groups --------------------------------------------------------------------------------------


def compute_cosines(gram: Tensor) -> Tensor:
    """Cosines between vectors of which ``gram`` [n, n] holds the products."""
    norms = gram.diagonal().clamp(min=1e-300).sqrt()
    return gram / norms[:, None] / norms


def group_by_similarity(
    candidates: Sequence[int], importance: Sequence[float], similarity: Tensor, groups: int
) -> list[list[int]]:
    """Groups of experts: the most important ones, each with those most similar to it.

    Args:
        candidates: experts of a layer.
        importance: of all experts of the layer.
        similarity: [E, E].
        groups: how many.

    Returns:
        Of each group the representative, then the others in rising order.
    """
    ranked = sorted(candidates, key=lambda j: (-importance[j], j))
    found = [[j] for j in ranked[:groups]]
    for j in sorted(ranked[groups:]):
        nearest = max(range(groups), key=lambda g: (float(similarity[j, found[g][0]]), -g))
        found[nearest].append(j)
    return found


ExpertGroup = tuple[int, ...]

# Bytes of the outputs of all experts of a layer that are held at once.
CHUNK_BYTES = 128 << 20
# Numbers that REAM's code leaves of a neuron's weights.
REDUCED = 64
# Rounds of subspace iteration, as many as torch.pca_lowrank makes.
ROUNDS = 2


# ---- what experts do ---------------------------------------------------------------------------


class ExpertSums:
    """What all experts of a layer do with all tokens, in sums of float64.

    Attributes:
        tokens: how many there were.
        outputs: sum of what each expert puts out, routed there or not, [experts, hidden].
        cosines: sum of the cosines of what two of them put out for a token, [experts, experts].
        logits: products of columns of router logits, [experts, experts].
    """

    def __init__(self, experts: int, hidden: int) -> None:
        """Nothing seen yet."""
        self.tokens = 0
        self.outputs = torch.zeros(experts, hidden, dtype=torch.float64)
        self.cosines, self.logits = torch.zeros(2, experts, experts, dtype=torch.float64)

    def add_logits(self, logits: Tensor) -> None:
        """Take in router logits [n, experts]."""
        self.tokens += len(logits)
        self.logits += logits.double().T @ logits.double()

    def add_outputs(
        self, inputs: Tensor, output: Callable[[int, Tensor], Tensor], *, cosines: bool
    ) -> None:
        """Run every expert on every token.

        Args:
            inputs: of the layer, [n, hidden].
            output: what an expert makes of inputs.
            cosines: whether `compute_cosines` are wanted rather than `outputs`.
        """
        experts, hidden = self.outputs.shape
        if not cosines:
            for n in range(experts):
                self.outputs[n] += output(n, inputs).sum(0, dtype=torch.float64)
            return
        for part in torch.split(inputs, max(1, CHUNK_BYTES // (4 * experts * hidden))):
            whole = part.new_empty(experts, part.numel())
            for n in range(experts):
                whole[n] = normalize(output(n, part), dim=1).flatten()
            self.cosines += (whole @ whole.T).double()


def estimate_merge_bytes(experts: int, hidden: int, width: int, *, align: bool) -> int:
    """Bytes of gathering and merging in one layer, without the layer itself."""
    sums = 8 * experts * (hidden + 2 * experts) + 2 * CHUNK_BYTES
    merging = 4 * 3 * 3 * hidden * width  # a mean, a member, a member in another order
    aligning = 4 * 2 * 3 * hidden * width + 3 * 8 * width * width + 4 * experts * width * REDUCED
    return sums + merging + (aligning if align else 0)


# ---- which belong together ---------------------------------------------------------------------


def compute_ream_similarity(sums: ExpertSums) -> Tensor:
    """REAM's similarity of two experts, [experts, experts], from 0 to 1.

    The mean of two: the mean cosine of their outputs over all tokens, shifted to 0 to 1, and
    ``1 - d / largest d`` with d the distance of their normalized columns of router logits
    (https://arxiv.org/abs/2604.04356, and its code). The paper's outputs are gated; the weight of
    a token, a positive number, changes no cosine, and is left out.
    """
    outputs = (sums.cosines / max(sums.tokens, 1) + 1) / 2
    distance = (2 - 2 * compute_cosines(sums.logits)).clamp(min=0).sqrt().fill_diagonal_(0)
    routing = 1 - distance / distance.max().clamp(min=torch.finfo(distance.dtype).tiny)
    found: Tensor = (outputs + routing) / 2
    return found


def cluster_experts(means: Tensor, keep: int, scores: Sequence[float]) -> tuple[ExpertGroup, ...]:
    """HC-SMoE (https://arxiv.org/abs/2410.08589): average linkage of mean outputs.

    The tree is cut by the number of merges, not by a height, so that there are ``keep`` groups
    where experts are equally far or equal.

    Args:
        means: mean output of each expert over all tokens, [experts, hidden].
        keep: number of groups.
        scores: the highest of a group is its centroid.
    """
    experts = len(means)
    groups = {n: [n] for n in range(experts)}
    tree = linkage(means.double().numpy(), "average")
    for step, (one, other) in enumerate(tree[: experts - keep, :2].astype(int).tolist()):
        groups[experts + step] = groups.pop(one) + groups.pop(other)
    ranks = {n: rank for rank, n in enumerate(rank_by_score(scores))}
    first = {min(group, key=ranks.__getitem__): group for group in groups.values()}
    return _ordered({centroid: [n for n in of if n != centroid] for centroid, of in first.items()})


def join_nearest(similarity: Tensor, keep: int, scores: Sequence[float]) -> tuple[ExpertGroup, ...]:
    """M-SMoE (https://arxiv.org/abs/2310.01334): the best are centroids, others join the nearest.

    Args:
        similarity: [experts, experts].
        keep: number of centroids.
        scores: of experts.
    """
    groups = group_by_similarity(range(len(scores)), scores, similarity, keep)
    return _ordered({centroid: others for centroid, *others in groups})


def absorb_nearest(
    similarity: Tensor, keep: int, scores: Sequence[float], limit: int
) -> tuple[ExpertGroup, ...]:
    """REAM (https://arxiv.org/abs/2604.04356): the best centroid takes the nearest, then the next.

    Most groups are centroids alone, so that it is close to dropping experts.

    Args:
        similarity: [experts, experts].
        keep: number of centroids.
        scores: of experts.
        limit: so many experts join a centroid at most; ``keep * limit`` is enough for all.
    """
    ranked = rank_by_score(scores)
    left, groups = set(ranked[keep:]), {}
    for centroid in ranked[:keep]:
        alike = rank_by_score(similarity[centroid].tolist())
        groups[centroid] = [n for n in alike if n in left][:limit]
        left -= set(groups[centroid])
    return _ordered(groups)


def _ordered(groups: dict[int, list[int]]) -> tuple[ExpertGroup, ...]:
    """Groups in the order of their centroids."""
    return tuple((centroid, *sorted(groups[centroid])) for centroid in sorted(groups))


# ---- bringing neurons in one order -------------------------------------------------------------


@dataclass(frozen=True)
class Matrices:
    """Numbers of an expert.

    Attributes:
        gate, up: [width, hidden].
        down: [hidden, width].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def neurons(self) -> Tensor:
        """Rows of gate and up and columns of down beside each other, [width, 3 hidden]."""
        return torch.cat([self.gate, self.up, self.down.T], dim=1)

    def compute_intermediate(self, inputs: Tensor) -> Tensor:
        """What its neurons answer to inputs [n, hidden]: [width, n]."""
        return (silu(inputs @ self.gate.T) * (inputs @ self.up.T)).T

    def permute(self, order: Tensor) -> Matrices:
        """The same expert with its neurons in another order."""
        return Matrices(self.gate[order], self.up[order], self.down[:, order])


def compute_weight_cost(centroid: Tensor, member: Tensor) -> Tensor:
    """What it costs to put a neuron in the place of another, [width, width].

    By the sum of squared differences of their weights; as the sum over all places is the same
    for every order but for the products, these alone are taken. M-SMoE, after Git Re-Basin.

    Args:
        centroid: its `Matrices.neurons`, [width, n].
        member: the other's likewise.
    """
    return -centroid @ member.T


def compute_ream_cost(centroid: tuple[Tensor, Tensor], member: tuple[Tensor, Tensor]) -> Tensor:
    """REAM's cost, [width, width]: distances of answers and of reduced weights, normalized.

    Args:
        centroid: what its neurons answer, [width, tokens], and their `reduce_neurons`d weights, [width, n].
        member: the other's likewise.
    """
    pairs = zip(centroid, member, strict=True)
    parts = [torch.cdist(normalize(a, dim=1), normalize(b, dim=1)) for a, b in pairs]
    return parts[0] + parts[1]


def match_neurons(cost: Tensor) -> Tensor:
    """The member's neuron for each place of the centroid's, of least total cost; int64 [width]."""
    _, columns = linear_sum_assignment(cost.double().numpy())
    return torch.from_numpy(columns).long()


def compute_principal_axes(
    rows: Callable[[], Iterator[Tensor]], rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Mean [n] and leading principal axes, times their singular values, of rows: [n, rank].

    By subspace iteration (https://arxiv.org/abs/0909.4061) like torch.pca_lowrank, which REAM's
    code uses, with a random start of its own and without all rows in memory.

    Args:
        rows: yields parts of them, [any, n]; asked for them once a round and twice more.
        rank: number of axes; fewer where there are fewer numbers.
        seed: of the start.
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
    small = torch.zeros(basis.shape[1], basis.shape[1])
    for part in rows():
        seen = (part - mean) @ basis
        small += seen.T @ seen
    squares, vectors = torch.linalg.eigh(small)
    return mean, basis @ vectors.flip(1) * squares.flip(0).clamp(min=0).sqrt()


def compute_layer_axes(
    experts: Callable[[], Iterator[Matrices]], seed: int
) -> tuple[Tensor, Tensor]:
    """`compute_principal_axes` axes of the normalized weights of all neurons of a layer."""
    return compute_principal_axes(
        lambda: (normalize(one.neurons(), dim=1) for one in experts()), REDUCED, seed
    )


def reduce_neurons(neurons: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
    """Normalized weights of neurons [width, n] along `compute_principal_axes` axes: [width, rank]."""
    mean, axes = found
    return (normalize(neurons, dim=1) - mean) @ axes


def align_neurons(
    centroid: Matrices, member: Matrices, inputs: Tensor, found: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The member's neuron for each place of the centroid's; int64 [width].

    Args:
        centroid: the expert whose order it is to be.
        member: another.
        inputs: of the layer, [n, hidden]; unused without ``found``.
        found: `compute_layer_axes`: by `compute_ream_cost`; None: by `compute_weight_cost`.
    """
    if found is None:
        return match_neurons(compute_weight_cost(centroid.neurons(), member.neurons()))
    one, other = (
        (m.compute_intermediate(inputs), reduce_neurons(m.neurons(), found))
        for m in (centroid, member)
    )
    return match_neurons(compute_ream_cost(one, other))


# ---- one in the place of several ---------------------------------------------------------------


def normalize_shares(scores: Sequence[float]) -> tuple[float, ...] | None:
    """Parts of the whole; None where that is nothing."""
    whole = sum(scores)
    return tuple(score / whole for score in scores) if whole > 0 else None


def average_experts(experts: Iterator[tuple[float, Matrices]]) -> Matrices:
    """Sum of matrices times their shares, float32; one expert is in memory at a time."""
    share, first = next(experts)
    total = Matrices(first.gate * share, first.up * share, first.down * share)
    for share, one in experts:
        total.gate.add_(one.gate, alpha=share)
        total.up.add_(one.up, alpha=share)
        total.down.add_(one.down, alpha=share)
    return total
