"""GPTQ on blocks: whose tokens count for which matrix, and what becomes of starved experts."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ignore
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.commands.preflight import estimate_hidden_bytes
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import error_feedback, metrics
from moe2edge.numerics.grid import Quantized
from moe2edge.passes._quantize import Quantize
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline import blockwise
from moe2edge.pipeline.contract import TextSize, TextSizes
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup, Solved
from moe2edge.pipeline.stages import plan_passes
from moe2edge.runtime.memory import SOLVED_TOGETHER_BYTES, Memory
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.testing import InMemory, Make


def tokens(model: Model, samples: int = 12, length: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, model.vocabulary, (samples, length), generator=generator)


def solve(model: Model, step: Quantize, ids: torch.Tensor) -> tuple[Model, list[str]]:
    step = step.resolve(model)
    step.check(model)
    given = ids if step.needs_tokens else None
    after, changed, notes = blockwise.solve_blocks(
        model, given, step.solver(model), InMemory(), ignore, "test"
    )
    assert sorted(changed) == sorted(step.schemes(model))
    step.check_result(model, after)
    return after, notes


class Watching(GroupSolver):
    """Records the groups that a walk offers, and rounds them to nearest."""

    def __init__(self, model: Model, *, propagate: bool) -> None:
        step = Rtn(group_size=32)
        self._inner: Any = step.solver(model)
        self.propagate = propagate
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        self.everyone: dict[tuple[int, str], int] = {}

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Small enough for two experts at once."""
        return SOLVED_TOGETHER_BYTES // 3

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Keep the Hessians."""
        for group in groups:
            first = next(iter(group.weights))
            ins = group.shapes[0][1]
            hessian = torch.zeros(ins, ins)
            error_feedback.sum_hessian(hessian, group.batches())
            self.seen[block.index, first] = hessian
            assert group.tokens == sum(len(x) for x, _ in group.batches())
            if group.everyone is not None:
                self.everyone[block.index, first] = sum(len(x) for x, _ in group.everyone())
        found: Solved = self._inner.solve(block, groups)
        return found


def slow_hessians(
    model: Model, solved: Model, ids: torch.Tensor
) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    """Hessians from whole blocks, token by token: of the stream of blocks as solved."""
    hidden = walk.embed(model, ids)
    for block, after in zip(model.blocks, solved.blocks, strict=True):
        attention = {r: w for r, w in after.weights() if r.startswith("attention")}
        seen = BlockRunner(model, block.with_weights(attention)).watch(hidden)
        x = BlockRunner(model, block).watch(hidden).linear_inputs["attention.q_proj.weight"]
        yield (block.index, "attention.q_proj.weight"), x.T @ x
        runner = BlockRunner(model, after)
        inside = runner.watch(hidden)
        if isinstance(block.mlp, MoELayer) and seen.routing is not None:
            for n in range(len(block.mlp.experts)):
                gate = torch.zeros(2, 64, 64), torch.zeros(2, 32, 32)
                for token, chosen in enumerate(seen.routing.ids.tolist()):
                    if n in chosen:
                        weight = seen.routing.weights[token, chosen.index(n)]
                        x = seen.routing.inputs[token]
                        y = inside.expert_hidden(n, x[None])[0]
                        gate[0][0] += weight * torch.outer(x, x)
                        gate[1][0] += weight * torch.outer(y, y)
                yield (block.index, f"experts.{n}.gate"), gate[0][0]
                yield (block.index, f"experts.{n}.down"), gate[1][0]
        hidden = runner.run(hidden)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hessians_are_those_of_routed_tokens_by_weight(tiny: Make, family: str) -> None:
    model = open_checkpoint(str(tiny(family))).model
    ids = tokens(model, 3, 20)
    watching = Watching(model, propagate=True)
    solver: GroupSolver = watching
    after, _, _ = blockwise.solve_blocks(model, ids, solver, InMemory(), ignore, "test")
    expected = dict(slow_hessians(model, after, ids))
    assert len(expected) == 3 * (1 + 2 * 6)
    for key, hessian in expected.items():
        scale = hessian.abs().max().clamp(min=1e-6)
        assert ((watching.seen[key] - hessian).abs().max() / scale) < 1e-4, key
    shared = {key for key in watching.seen if key[1].startswith("shared")}
    assert len(shared) == (6 if family == "qwen2_moe" else 0)
    assert set(watching.everyone.values()) == {60}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_stream_is_that_of_the_whole_blocks(tiny: Make, family: str) -> None:
    """What the walk of solvers carries on is what transformers' own blocks put out."""
    model = open_checkpoint(str(tiny(family))).model
    ids = tokens(model)
    for propagate in (True, False):
        ledger = InMemory()
        solver = Watching(model, propagate=propagate)
        after, _, _ = blockwise.solve_blocks(model, ids, solver, ledger, ignore, "test")
        through = after if propagate else model
        hidden = walk.embed(model, ids)
        for block in through.blocks[:-1]:
            hidden = BlockRunner(through, block).run(hidden)
        found = ledger.last
        assert found is not None
        assert (found - hidden).abs().max() < 1e-4 * hidden.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_nearer_to_the_source_than_rounding(bits: int, symmetric: bool) -> None:
    """On the built-in model; KL decides, as perplexity barely moves at 4 bits."""
    from moe2edge.calibration.sources import TextSource
    from moe2edge.calibration.tokens import load_tokens
    from moe2edge.storage.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(BUILTIN)
    model, tokenizer = checkpoint.model, load_tokenizer(checkpoint.folder)

    def text(purpose: str, samples: int) -> torch.Tensor:
        source = TextSource(text="builtin", samples=samples, length=256)
        return load_tokens(source, tokenizer, purpose, (512, model.vocabulary)).ids

    held_out = text("evaluation", 8)
    before = torch.stack(list(logits(model, held_out)))
    found = []
    for step in (Rtn, Gptq):
        options = {"bits": bits, "symmetric": symmetric, "scales": "mse", "group_size": 64}
        after, _ = solve(model, step.model_validate(options), text("calibration", 24))
        kl = metrics.measure(held_out, logits(after, held_out), iter(before)).kl
        assert kl is not None
        found.append(kl)
    assert found[1] < 0.75 * found[0]


def logits(model: Model, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    return walk.compute_logits(model, walk.observe(model, ids, (), ignore, "test"))


def numbers(model: Model, block: int, role: str) -> Quantized:
    return dict(model.blocks[block].weights())[role].quantized()


def test_under_calibrated_experts_fall_back_to_tokens_of_the_layer_or_rounding(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = tokens(model, 2, 24)
    options = {"group_size": 32, "min_tokens": 49, "scales": "absmax", "act_order": False}
    rounded, notes = solve(model, Gptq.model_validate({**options, "starved": "round"}), ids)
    coverage = [note for note in notes if "experts saw" in note]
    assert len(coverage) == 3
    counts = [int(note.split()[5]) for note in notes if note not in coverage][:6]
    least, most, median = min(counts), max(counts), round(statistics.median(counts))
    expected = f"block 0: 6 experts saw {least} to {most} tokens each, median {median}"
    assert coverage[0] == expected
    starved = [note for note in notes if note not in coverage]
    assert len(starved) == 3 * 6  # no expert of 48 tokens has seen more
    assert all("fewer than 49: rounded to nearest" in note for note in starved)
    plain, _ = solve(model, Rtn(group_size=32), ids)
    role = "experts.2.down"
    assert torch.equal(numbers(rounded, 0, role).q, numbers(plain, 0, role).q)
    borrowed, notes = solve(model, Gptq.model_validate({**options, "starved": "borrow"}), ids)
    assert sum("it uses the Hessian of all tokens of the layer" in note for note in notes) == 3 * 6
    assert not torch.equal(numbers(borrowed, 0, role).q, numbers(plain, 0, role).q)
    own, notes = solve(model, Gptq.model_validate({**options, "min_tokens": 0}), ids)
    assert notes[0] == coverage[0]
    assert len(notes) == 3
    assert not torch.equal(numbers(own, 0, role).q, numbers(borrowed, 0, role).q)


def test_the_dtype_of_the_computation_is_chosen_and_reported(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    chosen = Gptq().resolve(model).compute
    assert chosen == str(Gptq().dtype()).removeprefix("torch.")
    (planned,) = plan_passes([Gptq()], model).steps
    assert f"in {chosen}" in planned.step.describe(planned)
    ids, found = tokens(model), {}
    for compute in ("float32", "bfloat16"):
        step = Gptq.model_validate({"group_size": 32, "compute": compute})
        assert step.resolve(model).compute == compute
        found[compute], _ = solve(model, step, ids)
    pairs = zip(*(m.tensors() for m in found.values()), strict=True)
    same = [torch.equal(a.load(), b.load()) for (_, _, a), (_, _, b) in pairs if a.scheme]
    assert not all(same)
    source = list(logits(model, ids))
    kls = [metrics.measure(ids, logits(m, ids), source).kl for m in found.values()]
    assert kls[1] == pytest.approx(kls[0], rel=0.3)


def test_an_expert_that_no_token_reaches(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    ids = torch.full((2, 3), 5)  # one token: two experts of six
    for starved in ("borrow", "round"):
        after, notes = solve(model, Gptq(group_size=32, min_tokens=0, starved=starved), ids)
        assert notes[0] == "block 0: 6 experts saw 0 to 6 tokens each, median 0"
        assert len(notes) == 3
        for _, _, weight in after.tensors():
            assert weight.load().isfinite().all()


def test_order_of_columns_leaves_groups_where_they_are(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = tokens(model)
    after, _ = solve(model, Gptq(group_size=32, scales="absmax", act_order=True), ids)
    plain, _ = solve(model, Rtn(group_size=32), ids)
    for role in ("experts.1.gate", "attention.q_proj.weight"):
        assert torch.equal(numbers(after, 0, role).scales, numbers(plain, 0, role).scales)
        assert not torch.equal(numbers(after, 0, role).q, numbers(plain, 0, role).q)


def test_memory_does_not_change_numbers(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few experts at once, and the stream on the disk, in no more bytes than were planned."""
    mapped, most = 0, [0]
    empty = Memory.empty

    def count(memory: Memory, *form: Any) -> Any:
        nonlocal mapped
        found = empty(memory, *form)
        mapped += found.nbytes
        most.append(mapped)
        weakref.finalize(found, release, found.nbytes)
        return found

    def release(size: int) -> None:
        nonlocal mapped
        mapped -= size

    monkeypatch.setattr(Memory, "empty", count)
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    ids = tokens(model)
    step = Gptq(group_size=32).resolve(model)
    found = []
    texts = TextSizes(TextSize(*ids.shape))
    for memory in (Memory(), Memory(group_bytes=1, hidden_bytes=0, folder=tmp_path)):
        ledger = InMemory()
        after, _, _ = blockwise.solve_blocks(
            model, ids, step.solver(model), ledger, ignore, "test", memory
        )
        found.append(after)
        assert not list(tmp_path.iterdir())
    planned = estimate_hidden_bytes(plan_passes([step], model), texts, 0, memory)
    on_disk = 2 * 4 * ids.numel() * model.embedding.shape[1]  # in front of a block and behind it
    assert max(most) <= planned - on_disk <= 1.5 * max(most)
    for (name, _, a), (_, _, b) in zip(found[0].tensors(), found[1].tensors(), strict=True):
        if a.scheme is not None:
            same = (a.quantized().q == b.quantized().q).double().mean()
            assert same > 0.99, name  # sums in another order round differently now and then


def test_signed_scales_fitted_to_the_integers_lose_less(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = tokens(model)
    source, kls = list(logits(model, ids)), []
    for more in ({}, {"scales": "signed"}, {"scales": "signed", "refit": 1}):
        step = Gptq.model_validate({"group_size": 32, "compute": "float32", **more})
        after, _ = solve(model, step, ids)
        kls.append(metrics.measure(ids, logits(after, ids), source).kl or 0)
    assert kls[1] < kls[0]
    assert kls[2] < kls[1]
    scales = numbers(after, 0, "experts.1.gate").scales
    assert torch.equal(scales, scales.to(torch.float16).float())
    assert (scales < 0).any()


def test_refit_is_refused_where_scales_are_chosen_on_the_way(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    with pytest.raises(InputError, match="refit needs act_order: true"):
        Gptq(group_size=32, refit=1, act_order=False).check(model)
