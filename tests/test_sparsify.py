"""Sparsify: each method and pattern against slow loops, exact counts, and zeros that stay."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import plan, run
from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.disk_names import DiskNames
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.scheme import Pattern, Scheme
from moe2edge.numerics.sparsity import has_zeros, mask_smallest
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.rtn import Rtn
from moe2edge.passes.sparsify import SAVES_NOTHING, Sparsify
from moe2edge.pipeline import blockwise
from moe2edge.pipeline.contract import Outcome, Slim
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup
from moe2edge.pipeline.stages import enforce, plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.safetensors_files import read_all
from moe2edge.testing import Make, quantize

IDS = torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(0))
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("unstructured", "2:4", "4:8")
RUNS = {"2:4": (4, 2), "4:8": (8, 4)}


def options(**given: Any) -> Sparsify:
    return Sparsify.model_validate(given)


class Memory:
    """Keeps numbers as a work folder does, and forgets what else there is to tell."""

    def restore(self, block: Block) -> None:
        return None

    def stream(self) -> None:
        return None

    def finish(self, block: Block, numbers: Mapping[str, Quantized | Tensor], *_: object) -> Block:
        weights = dict(block.weights())

        def handle(weight: Weight, value: Quantized | Tensor) -> Weight:
            if isinstance(value, Tensor):
                return replace(weight, load=lambda: value)
            return replace(
                weight, load=value.dequantize, scheme=value.scheme, load_quantized=lambda: value
            )

        return block.with_weights({r: handle(weights[r], value) for r, value in numbers.items()})


def apply(step: Slim, model: Model, ids: Tensor = IDS) -> tuple[Model, list[str]]:
    """Return the model after a pass that obeys the contract, and notes."""
    step.check(model)
    solver = step.solver(model)
    assert isinstance(solver, GroupSolver)
    tokens = ids if step.needs_tokens else None
    result, changed, notes = blockwise.solve_blocks(
        model, tokens, solver, Memory(), lambda *_: None, ""
    )
    enforce(step, model, Outcome(result, tuple(changed)))
    return result, notes


def problem(outs: int = 24, ins: int = 192, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [out, in], correlated inputs [n, in] and gates [n]."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(ins, ins, generator=generator) / ins**0.5
    inputs = torch.randn(tokens, ins, generator=generator) @ (mix + 0.3 * torch.eye(ins))
    gates = torch.rand(tokens, generator=generator)
    return torch.randn(outs, ins, generator=generator), inputs, gates


def group(
    weights: Mapping[str, Tensor], inputs: Tensor, gates: Tensor | None, **more: Any
) -> MatrixGroup:
    """Matrices that are shown some inputs, in two batches."""

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in (slice(0, 150), slice(150, None)):
            if len(inputs[part]):
                yield inputs[part], None if gates is None else gates[part]

    handles = {r: Weight(r, tuple(w.shape), "F32", w.clone) for r, w in weights.items()}
    return MatrixGroup(handles, batches, len(inputs), **more)


@pytest.fixture
def block(tiny: Make) -> Block:
    return open_checkpoint(str(tiny("olmoe"))).model.blocks[1]


def solve(step: Sparsify, block: Block, *groups: MatrixGroup) -> tuple[dict[str, Tensor], str]:
    """Matrices by role, and notes."""
    solver = step.solver(Model(FAMILIES["olmoe"], {}, (), {}, cast(DiskNames, None)))
    assert isinstance(solver, GroupSolver)
    solved = solver.solve(block, groups)
    numbers = {r: value for r, value in solved.numbers.items() if isinstance(value, Tensor)}
    return numbers, " ".join(solved.notes)


def solve_one(
    step: Sparsify, block: Block, weight: Tensor, inputs: Tensor, gates: Tensor | None
) -> Tensor:
    return solve(step, block, group({"experts.0.up": weight}, inputs, gates))[0]["experts.0.up"]


# ---- slow twins ----------------------------------------------------------------------------------


def slow_choice(scores: Tensor, length: int, count: int) -> Tensor:
    """Which numbers [out, in] become zero: the least of each run, one after another."""
    flat = scores.flatten().tolist()
    gone = torch.zeros(len(flat), dtype=torch.bool)
    for start in range(0, len(flat), length):
        run = sorted(range(start, start + length), key=lambda n: (flat[n], n))
        gone[run[:count]] = True
    return gone.view(scores.shape)


def slow_sparsegpt(
    weight: Tensor, hessian: Tensor, amount: float, run: tuple[int, int] | None, width: int
) -> Tensor:
    """Run the loop of the paper's code, over columns in reversed order."""
    matrix = weight.double().flip(1)
    h = hessian.double().flip(0, 1)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    out = torch.empty_like(matrix)
    for start in range(0, matrix.shape[1], width):
        end = start + width
        block, factor = matrix[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.empty_like(block)
        diagonal = factor.diagonal()
        scores = block**2 / diagonal**2
        mask = scores <= scores.flatten().sort().values[round(scores.numel() * amount) - 1]
        for i in range(width):
            if run is not None and i % run[0] == 0:
                part = slice(i, i + run[0])
                scores = block[:, part] ** 2 / diagonal[part] ** 2
                least = scores.topk(run[1], dim=1, largest=False).indices
                mask[:, part] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, least, True)
            kept = torch.where(mask[:, i], 0, block[:, i])
            out[:, start + i] = kept
            errors[:, i] = (block[:, i] - kept) / diagonal[i]
            block[:, i:] -= errors[:, i, None] * factor[i, i:]
        matrix[:, end:] -= errors @ inverse[start:end, end:]
    return out.flip(1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_scores_choose_what_a_loop_chooses(
    block: Block, method: str, pattern: str, gated: bool
) -> None:
    weight, inputs, gates = problem()
    amount = 0.3 if pattern == "unstructured" else 0.5
    step = options(method=method, pattern=pattern, amount=amount, gate_weighted=gated)
    found = solve_one(step, block, weight, inputs, gates)
    scores = weight.double().abs()
    if method == "wanda":
        squares = torch.zeros(weight.shape[1], dtype=torch.float64)
        for x, gate in zip(inputs, gates.tolist(), strict=True):
            squares += (x.double() * (gate if gated else 1)) ** 2
        scores = scores * squares.sqrt()
    whole = weight.numel() if method == "magnitude" else weight.shape[1]
    gone = slow_choice(scores, *RUNS.get(pattern, (whole, round(amount * whole))))
    assert torch.equal(found, weight.masked_fill(gone, 0))


@pytest.mark.parametrize("ins", [96, 192, 256])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_equals_the_published_loop(block: Block, pattern: str, ins: int) -> None:
    weight, inputs, gates = problem(ins=ins)
    amount = 0.4 if pattern == "unstructured" else 0.5
    step = options(method="sparsegpt", pattern=pattern, amount=amount)
    found = solve_one(step, block, weight, inputs, gates)
    hessian = (inputs * gates[:, None]).T @ inputs
    run = RUNS.get(pattern)
    width = step.width(ins) if run is None else 32
    expected = slow_sparsegpt(weight, hessian, amount, run, width)
    # Near ties may fall to the other side in float32, and then change what comes after.
    same = (found == 0) == (expected == 0)
    assert same.double().mean() > 0.99
    losses = [
        float(((w - weight.double()) @ hessian.double() * (w - weight.double())).sum())
        for w in (found.double(), expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    if bool(same.all()):
        assert (found - expected).abs().max() < 1e-3


def test_sparsegpt_solves_a_batch_as_its_members(block: Block) -> None:
    weight, inputs, gates = problem()
    step = options(method="sparsegpt", amount=0.3)
    one = {"experts.0.gate": weight, "experts.0.up": weight.flip(0) * 3}
    two = {"experts.1.gate": weight.flip(1), "experts.1.up": weight * 2}
    both, _ = solve(step, block, group(one, inputs, gates), group(two, inputs[:300], None))
    assert set(both) == {*one, *two}
    for role, matrix in (one | two).items():
        own = (inputs, gates) if role in one else (inputs[:300], None)
        alone = solve_one(step, block, matrix, *own)
        assert both[role].is_contiguous()
        assert ((both[role] == 0) == (alone == 0)).double().mean() > 0.99
        # Each matrix of its own: not some rows of one for those of another.
        assert int((both[role] == 0).sum()) == round(0.3 * 24 * 64) * 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_feedback_beats_inputs_beat_magnitudes(block: Block, pattern: str) -> None:
    weight, inputs, gates = problem()
    # Neighbours are of different sizes, or there is little to choose in a run.
    inputs = inputs * torch.linspace(0.1, 3, inputs.shape[1]).view(8, -1).T.flatten()

    def loss(method: str) -> float:
        found = solve_one(options(method=method, pattern=pattern), block, weight, inputs, gates)
        return float((((found - weight) @ inputs.T).square() * gates).sum())

    magnitude, wanda, sparsegpt = map(loss, METHODS)
    assert sparsegpt < 0.9 * wanda < 0.9 * 0.9 * magnitude


def test_of_equal_scores_the_first_are_taken() -> None:
    scores = torch.tensor([[1.0, 1, 1, 1], [2, 0, 2, 0], [3, 2, 1, 0]])
    assert mask_smallest(scores, 2).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert mask_smallest(scores, 3).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert not mask_smallest(scores, 0).any()
    assert mask_smallest(scores, 4).all()


@pytest.mark.parametrize("value", ["random", "equal"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.77])
def test_counts_are_exact(block: Block, method: str, amount: float, value: str) -> None:
    weight, inputs, gates = problem(7, 150)
    if value == "equal":
        weight = torch.ones_like(weight)
    step = options(method=method, amount=amount)
    zeros = solve_one(step, block, weight, inputs, gates) == 0
    if method == "wanda":
        assert (zeros.sum(1) == round(amount * 150)).all()
    elif method == "magnitude":
        assert int(zeros.sum()) == round(amount * 1050)
        if value == "equal":
            assert zeros.flatten()[: round(amount * 1050)].all()
    else:  # blocks of 2 columns, as 128 does not divide 150
        assert step.width(150) == 2
        assert (zeros.view(7, 75, 2).sum((0, 2)) == round(amount * 14)).all()
    for pattern, (length, count) in RUNS.items():
        step = options(method=method, pattern=pattern)
        zeros = solve_one(step, block, weight[:, :40], inputs[:, :40], gates) == 0
        assert (zeros.view(7, -1, length).sum(-1) == count).all()


def test_zeros_and_inputs_that_never_occur_come_first(block: Block) -> None:
    weight, inputs, gates = problem()
    weight[:, 1::2] *= 10
    inputs[:, :40] = 0
    weight[:, 100] = 0
    assert (solve_one(options(), block, weight, inputs, gates)[:, :40] == 0).all()
    # In a block of 64 columns they are more than half.
    found = solve_one(options(method="sparsegpt"), block, weight, inputs, gates)
    assert (found[:, 40:64] != 0).all()
    assert int((found[:, :64] == 0).sum()) == 24 * 32
    # What is zero already comes before what has no input.
    few = solve_one(options(amount=0.006), block, weight, inputs, gates)
    assert torch.equal(few, weight)


def test_zeros_are_recognized() -> None:
    matrix = torch.ones(4, 8)
    matrix[:2] = 0
    assert has_zeros(matrix, 32, 16)
    assert not has_zeros(matrix, 8, 4)
    assert has_zeros(matrix, 16, 8)  # blocks of four columns
    matrix[0, 0] = 1
    assert not has_zeros(matrix, 16, 8)


def mlp_inputs(folder: Path, ids: Tensor) -> list[Tensor]:
    """Return what goes into what follows attention, [tokens, hidden], from transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    return found


def slow_squares(block: Block, inputs: Tensor) -> dict[str, Tensor]:
    """Return sums of squares of weighted inputs by role of the matrix, token by token."""
    layer = block.mlp
    assert isinstance(layer, MoELayer)
    weights = {role: weight.load() for role, weight in block.weights()}
    sums: dict[str, Tensor] = {}

    def see(kind: str, x: Tensor, gate: Tensor) -> None:
        g, u = weights[f"{kind}.gate"] @ x, weights[f"{kind}.up"] @ x
        inside = torch.nn.functional.silu(g) * u
        for part, seen in (("gate", x), ("up", x), ("down", inside)):
            square = (gate * seen).double() ** 2
            sums[f"{kind}.{part}"] = sums.get(f"{kind}.{part}", 0) + square

    for x in inputs:
        p = (weights["router.weight"] @ x).softmax(0)
        top, chosen = p.topk(layer.router.top_k)
        if layer.router.renormalize:
            top = top / top.sum()
        for gate, n in zip(top, chosen.tolist(), strict=True):
            see(f"experts.{n}", x, gate)
        if layer.shared is not None:
            see("shared", x, torch.sigmoid(weights["shared.router"] @ x)[0])
    for n in range(len(layer.experts)):
        if f"experts.{n}.up" not in sums:  # starved
            for x in inputs:
                see(f"experts.{n}", x, torch.ones(()))
    return sums


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gates_weigh_tokens_as_a_loop_does(tiny: Make, family: str) -> None:
    folder = tiny(family)
    model = open_checkpoint(str(folder)).model
    step = options(propagate=False, min_tokens=0)
    ids = IDS[:1, :16]
    result, notes = apply(step, model, ids)
    for old, new, inputs in zip(model.blocks, result.blocks, mlp_inputs(folder, ids), strict=True):
        before, after = dict(old.weights()), dict(new.weights())
        sums = slow_squares(old, inputs)
        assert set(sums) == {role for role, _ in step.selected(model, old)}
        for role, squares in sums.items():
            weight, found = before[role].load(), after[role].load()
            scores = weight.double().abs() * squares.sqrt()
            expected = slow_choice(scores, weight.shape[1], weight.shape[1] // 2)
            assert ((found == 0) == expected).double().mean() > 0.999
            assert (found.eq(weight) | found.eq(0)).all()
    kinds = ["experts"] + ["shared experts"] * (family == "qwen2_moe")
    assert [note.partition(":")[0] for note in notes[-1 - len(kinds) : -1]] == kinds
    assert notes[-1] == SAVES_NOTHING


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pattern", "select"), [("unstructured", "experts"), ("2:4", "all"), ("4:8", "experts")]
)
def test_only_selected_matrices_change(tiny: Make, method: str, pattern: str, select: str) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe", dtype="bfloat16"))).model
    step = options(method=method, pattern=pattern, select=select)
    result, notes = apply(step, model)
    assert str(plan([step], model)) == str(result)
    planned = {name: weight.pattern for name, _, weight in plan([step], model).tensors()}
    zeros = total = 0  # of experts
    for (name, role, old), (_, _, new) in zip(model.tensors(), result.tensors(), strict=True):
        chosen = is_quantizable(role) and (select == "all" or not role.startswith("attention"))
        assert new.pattern == planned[name] == (step.promise if chosen else None)
        before, after = old.load(), new.load()
        assert after.dtype == before.dtype == torch.bfloat16
        if not chosen:
            assert torch.equal(before, after)
            continue
        assert has_zeros(after, *step.split_into_runs(new.shape))
        if role.startswith("experts"):
            zeros, total = zeros + int((after == 0).sum()), total + new.count
        if method != "sparsegpt":
            assert 2 * int((after == 0).sum()) == new.count
            assert (after.eq(before) | after.eq(0)).all()
    assert f"experts: {zeros:,} of {total:,} weights were set to zero ({step.promise})" in notes
    assert notes.count(SAVES_NOTHING) == 1
    assert len([note for note in notes if note.startswith("attention")]) == (select == "all")


@pytest.mark.parametrize("starved", ["borrow", "magnitude"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens(block: Block, method: str, starved: str) -> None:
    weight, inputs, _ = problem(ins=64)
    step = options(method=method, starved=starved, min_tokens=0)
    everyone = group({}, inputs, None).batches
    nothing = group({"experts.2.gate": weight}, inputs[:0], torch.zeros(0), everyone=everyone)
    numbers, notes = solve(step, block, nothing)
    found = numbers["experts.2.gate"]
    if starved == "borrow":
        assert torch.equal(found, solve_one(step, block, weight, inputs, None))
    else:
        length = 64 if method == "wanda" else weight.numel()
        gone = slow_choice(weight.abs(), length, length // 2)
        assert torch.equal(found == 0, gone)
        assert torch.allclose(found, weight.masked_fill(gone, 0), atol=1e-6)
    assert "expert 2 saw 0 tokens, fewer than 1" in notes


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    "after",
    [
        Gptq(group_size=32, min_tokens=4),
        Gptq(group_size=32, act_order=False, bits=3, symmetric=False),
        Rtn(group_size=32),
        Rtn(group_size=32, symmetric=False, scales="mse"),
    ],
    ids=["gptq", "gptq-asymmetric", "rtn", "rtn-asymmetric"],
)
def test_zeros_survive_a_quantizing_pass(tiny: Make, after: Slim, pattern: str) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe"))).model
    step = options(pattern=pattern, select="all")
    plan([step, after], model)
    sparse, _ = apply(step, model)
    result, _ = apply(after, sparse)
    count = 0
    for (_, _, old), (_, _, new) in zip(sparse.tensors(), result.tensors(), strict=True):
        if old.pattern is not None:
            assert new.scheme is not None
            assert new.pattern == old.pattern
            assert (new.quantized().dequantize()[old.load() == 0] == 0).all()
            assert has_zeros(new.load(), *step.split_into_runs(new.shape))
            count += 1
    assert count == 3 * (4 + 6 * 3 + 3)


def test_export_writes_the_zeros(tiny: Make, tmp_path: Path) -> None:
    folder, out, recipe = tiny("mixtral", dtype="bfloat16"), tmp_path / "out", tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"passes": [{"sparsify": {"pattern": "2:4"}}]}))
    sizes = {"calibration.samples": 4, "evaluation.samples": 2}
    sizes |= {"calibration.length": 32, "evaluation.length": 32}
    sets = [part for name, size in sizes.items() for part in ("--set", f"{name}={size}")]
    command = ["export", str(folder), "-t", "hf", "-o", str(out), "-r", str(recipe), "-q", "--json"]
    done = run(*command, *sets)
    assert done.exit_code == 0, done.output
    notes = json.loads(done.stdout)["steps"][0]["notes"]
    assert notes[-2:] == [
        "experts: 55,296 of 110,592 weights were set to zero (2:4)",
        SAVES_NOTHING,
    ]
    before = dict(read_all(folder))
    for name, after in read_all(out):
        assert after.dtype == torch.bfloat16
        if ".experts." in name:
            assert ((after == 0).reshape(-1, 4).sum(-1) == 2).all()
        elif name in before:
            assert torch.equal(after, before[name])


def test_contradictory_options() -> None:
    with pytest.raises(ValidationError, match=r"2:4 makes half of .* zero, not 0\.6"):
        options(pattern="2:4", amount=0.6)
    for bad in ({"amount": 0}, {"amount": 1}, {"pattern": "1:4"}, {"method": "random"}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            options(**bad)


def test_models_that_do_not_fit(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    with pytest.raises(InputError, match="sparsify comes before the pass that quantizes"):
        options().check(quantize(model, Scheme(group_size=32)))
    with pytest.raises(InputError, match="sparsifies twice"):
        plan([options(), options(select="all")], model)
    with pytest.raises(InputError, match=r"amount 0.001 makes 0 of 64 weights of .* zero"):
        options(amount=0.001).check(model)
    with pytest.raises(InputError, match=r"makes 64 of 64 weights"):
        options(amount=0.999).check(model)
    odd = open_checkpoint(str(tiny("olmoe", intermediate_size=36))).model
    options(pattern="2:4").check(odd)
    with pytest.raises(InputError, match=r"4:8 does not fit the 36 inputs of .*, which 8 does not"):
        options(pattern="4:8").check(odd)
    bare = replace(model, blocks=tuple(block.without_mlp() for block in model.blocks))
    with pytest.raises(InputError, match="set select: all"):
        options().check(bare)


def test_a_result_without_the_zeros_is_found(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    step = options(method="magnitude", pattern="2:4")
    said = "2:4 by magnitude: 54 matrices, 55,296 of 110,592 weights become zero"
    (planned,) = plan_passes([step], model).steps
    assert step.describe(planned) == said
    with pytest.raises(Moe2EdgeError, match="zeros are anywhere, expected 2:4"):
        step.check_result(model, model)
    result, _ = apply(step, model)
    block = result.blocks[2]
    lost = replace(dict(block.weights())["experts.5.down"], load=lambda: torch.ones(64, 32))
    broken = result.replace_block(block.with_weights({"experts.5.down": lost}))
    with pytest.raises(Moe2EdgeError, match=r"experts.5.down_proj.weight has fewer zeros than 2:4"):
        step.check_result(model, broken)
    marked = replace(block.norms["input_layernorm.weight"], pattern=Pattern(2, 4))
    broken = result.replace_block(block.with_weights({"norms.input_layernorm.weight": marked}))
    with pytest.raises(Moe2EdgeError, match="zeros are 2:4, expected no pattern"):
        step.check_result(model, broken)
