"""Head and embedding in 8 bits: solved by passes, held by targets, or refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from every_family import make_folder
from helpers import SMALL, compute_logits, export, make_context, refuse, run, write_text
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.commands.preflight import suit_targets
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.model import EMBEDDING, HEAD, Model
from moe2edge.model.weights import hide_integers
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._quantize import Quantize
from moe2edge.passes.awq import Awq
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.contract import TextSize, TextSizes
from moe2edge.pipeline.recipe import parse
from moe2edge.pipeline.registry import parse_targets
from moe2edge.pipeline.stages import enforce, plan_passes
from moe2edge.runtime.ends import Ends
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import InMemory, Make

IDS = torch.randint(1, 96, (4, 48), generator=torch.Generator().manual_seed(7))
END = Scheme(8, 32)
BOTH: dict[str, Any] = {"head": 8, "embedding": 8, "group_size": 32}


@pytest.fixture(scope="module")
def untied(tiny: Make) -> Model:
    return open_checkpoint(str(tiny("qwen2_moe", initializer_range=0.1))).model


@pytest.fixture(scope="module")
def tied(tiny: Make) -> Model:
    path = tiny("olmoe", initializer_range=0.1, tie_word_embeddings=True)
    return open_checkpoint(str(path)).model


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a family without a row, which divides logits and multiplies embeddings."""
    folder = tmp_path_factory.mktemp("granite")
    make_folder(folder, "granitemoe")
    return folder


def solve(model: Model, step: Quantize, work: Any = None) -> tuple[Model, tuple[str, ...]]:
    """Run a pass as a recipe does."""
    step = step.resolve(model)
    (planned,) = plan_passes([step], model).steps
    work = work or InMemory()
    journal = work.ledger(0) if isinstance(work, WorkFolder) else work
    ids = IDS if step.needs_tokens else IDS[:0]
    outcome = step.run(make_context(model, ids, store=work, journal=journal))
    enforce(step, model, outcome)
    told = {name: str(w.scheme or w.dtype) for name, _, w in planned.after.tensors()}
    assert told == {name: str(w.scheme or w.dtype) for name, _, w in outcome.model.tensors()}
    assert {*outcome.changed} >= step.schemes(model).keys()
    return outcome.model, outcome.notes


def measure_head(model: Model, source: Model, inputs: torch.Tensor) -> float:
    """Return the squared error that rounding the head makes in its outputs."""
    error = model.rest[HEAD].load() - source.rest[HEAD].load().float()
    return float((inputs @ error.T).square().sum())


@pytest.mark.parametrize("kind", [Rtn, Awq, Gptq])
def test_a_pass_solves_both(kind: type[Quantize], untied: Model) -> None:
    after, notes = solve(untied, kind(**BOTH))
    assert after.rest[HEAD].scheme == after.rest[EMBEDDING].scheme == END
    assert {n.partition(":")[0] for n in notes} >= {HEAD, EMBEDDING}
    for name in (HEAD, EMBEDDING):
        whole = untied.rest[name].load().float()
        assert 0 < (after.rest[name].load() - whole).norm() < 0.01 * whole.norm()
    # What comes later sees them: the embedding at the beginning, the head in logits.
    embedded = walk.embed(after, IDS)
    assert torch.equal(embedded, after.rest[EMBEDDING].load()[IDS])
    plain = after.replace_rest({HEAD: hide_integers(after.rest[HEAD])})
    assert torch.equal(compute_logits(after, IDS), compute_logits(plain, IDS))


def test_gptq_solves_the_head_by_its_inputs(untied: Model) -> None:
    alone: dict[str, Any] = {"head": 8, "rules": [{"bits": 16}], "group_size": 32}
    after, _ = solve(untied, Gptq(**alone, damping=1e-4))
    rounded = Rtn(**alone, scales="mse")
    nearest, _ = solve(untied, rounded)
    assert after.rest[EMBEDDING] == untied.rest[EMBEDDING]
    hidden = walk.embed(after, IDS)
    for block in after.blocks:
        hidden = BlockRunner(after, block).run(hidden)
    inputs = torch.cat(list(walk.list_head_inputs(after, hidden)))
    expected = torch.stack(list(walk.compute_logits(after, hidden))).flatten(0, 1)
    assert torch.allclose(inputs @ after.rest[HEAD].load().T, expected, atol=1e-5)
    errors = [measure_head(model, untied, inputs) for model in (after, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_parts_of_rows_give_the_same(untied: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [solve(untied, kind(**BOTH))[0].rest[HEAD].quantized() for kind in (Rtn, Gptq)]
    monkeypatch.setattr("moe2edge.passes._ends.PART_NUMBERS", 64 * 7)
    parts = [solve(untied, kind(**BOTH))[0].rest[HEAD].quantized() for kind in (Rtn, Gptq)]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.q, b.q)
        assert torch.equal(a.scales, b.scales)


def test_a_killed_run_ends_with_the_same_head(untied: Model, tmp_path: Path) -> None:
    step = Gptq(**BOTH)
    first, _ = solve(untied, step, WorkFolder(tmp_path))
    expected = {name: w.load() for name, _, w in first.tensors()}
    again, _ = solve(untied, step, WorkFolder(tmp_path))  # every block is restored
    assert all(torch.equal(expected[name], w.load()) for name, _, w in again.tensors())


def test_inputs_come_from_the_source_without_propagation(untied: Model) -> None:
    walked: list[torch.Tensor] = []

    def embed(*given: Any) -> torch.Tensor:
        walked.append(walk.embed(*given))
        return walked[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe2edge.pipeline.blockwise.embed", embed)
        solve(untied, Gptq(**BOTH))
        solve(untied, Gptq(**BOTH, propagate=False))
    table = untied.rest[EMBEDDING].load().float()
    assert not torch.equal(walked[0], table[IDS])
    assert torch.equal(walked[1], table[IDS])


@pytest.mark.parametrize("given", [{"head": 8}, {"embedding": 8}, {"head": 8, "embedding": 8}])
def test_one_tensor_that_is_both_has_one_scheme(tied: Model, given: dict[str, Any]) -> None:
    step = Gptq(**given).resolve(tied)
    assert (step.head, step.embedding) == (8, 8)
    (planned,) = plan_passes([step], tied).steps
    assert planned.after.rest[EMBEDDING].scheme == END
    assert "head and embedding, one tensor" in step.describe(planned)


def test_what_does_not_fit_is_refused(tied: Model, untied: Model, tiny: Make) -> None:
    with pytest.raises(InputError, match=r"head: 8 and embedding: 16 differ, but model\.embed_to"):
        plan_passes([Rtn(head=8, embedding=16)], tied)
    assert Rtn(head=8, embedding=16).list_ends(untied) == ((), (HEAD,))
    with pytest.raises(InputError, match=r"applies to no tensor.*; for what is .* give head: 8$"):
        plan_passes([parse_rtn(rules=[{"match": "lm_head", "bits": 8}])], untied)
    plain, more = (plan_passes([step], untied).steps[0] for step in (Rtn(), Rtn(**BOTH)))
    texts = TextSizes(TextSize(4, 48))
    assert more.step.estimate(more, texts).disk > plain.step.estimate(plain, texts).disk
    assert Rtn().resolve(untied).head == 16
    narrow = open_checkpoint(
        str(tiny("qwen3_moe", hidden_size=48, num_attention_heads=3, num_key_value_heads=3))
    ).model
    with pytest.raises(InputError, match="groups of 32, which do not divide the 48 inputs of lm_"):
        plan_passes([Rtn(head=8, group_size=16)], narrow)


@pytest.mark.parametrize("form", ["tied", "untied"])
def test_the_onnx_graph_holds_them(form: str, tied: Model, untied: Model, tmp_path: Path) -> None:
    model, _ = solve(tied if form == "tied" else untied, Rtn(**BOTH))
    target = Onnx(accuracy_level=0)
    target.accepts(model)
    target.write(model, tmp_path)
    assert verify.audit(target, tmp_path, target.stored(model)) > 10
    expected = compute_logits(model, IDS)
    assert (target.reopen(tmp_path, exact=True).logits(IDS) - expected).abs().max() < 1e-4
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    nodes = {node.name: node for node in graph.node}
    gather = nodes["/model/embed_tokens/GatherBlockQuantized"]
    head = nodes["/lm_head/MatMulNBits"]
    assert (gather.input[0] == head.input[1]) == (form == "tied")
    names = {proto.name for proto in graph.initializer}
    assert (HEAD.replace("weight", "qweight") in names) == (form == "untied")
    assert target.estimate(model).disk >= (tmp_path / "model.onnx.data").stat().st_size


def parse_rtn(**options: Any) -> Rtn:
    return Rtn.model_validate(options)


def find_remedies(error: Exception) -> list[str]:
    """Return the targets that a message names."""
    said = str(error).rpartition("export to ")[2].partition(", which")[0]
    return said.replace(" or ", ", ").split(", ")


@pytest.mark.parametrize("target", ["hf", "gptq"])
def test_other_targets_refuse_before_calibration(
    target: str, tiny: Make, granite: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"head": 8, "group_size": 32}
    steps = [{"gptq": options}]
    out = tmp_path / "out"
    error = refuse(tiny("qwen2_moe"), out, steps, target)
    assert isinstance(error, Unsupported)
    assert "lm_head.weight" in str(error)
    assert {"onnx", "hf:dequantize=true"} <= {*find_remedies(error)}
    others = find_remedies(refuse(granite, out, steps, target))
    assert "hf:dequantize=true" in others
    for source, names in ((tiny("qwen2_moe"), find_remedies(error)), (granite, others)):
        model = open_checkpoint(str(source)).model
        (planned,) = plan_passes([Gptq(**options)], model).steps
        for named in parse_targets(",".join(names)):
            named.accepts(planned.after)


@pytest.mark.slow
def test_an_export_verifies_in_the_targets_that_hold_them(tiny: Make, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = tiny("qwen2_moe", initializer_range=0.1)
    more = ("--calib", text, "--eval", text, *SMALL)
    code, said, _ = export(
        model, tmp_path / "out", [{"gptq": BOTH}], "onnx,hf:dequantize=true", *more
    )
    assert code == 0, said
    for name in ("onnx", "hf"):
        result = run("verify", str(tmp_path / "out" / name))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("target", "steps", "bits"),
    [
        ("onnx", [{"rtn": {}}], 8),
        ("onnx", [{"rtn": {"head": 16}}], 16),
        ("onnx", [{"rtn": {"embedding": 8}}], 8),
        ("onnx", [{"rtn": {}}, {"expert_drop": {"keep": 4}}], 8),
        ("onnx", [{"rtn": {}}, {"sparsify": {"pattern": "2:4"}}], 16),
        ("onnx,gptq", [{"rtn": {}}], 16),
        ("onnx,gguf", [{"rtn": {"group_size": 32}}], 8),
        ("gguf:dequantize=true", [{"rtn": {"group_size": 32}}], 16),
    ],
)
def test_the_default_head_is_what_all_targets_hold(
    target: str, steps: list[Any], bits: int, untied: Model
) -> None:
    recipe = suit_targets(parse(json.dumps({"passes": steps})), parse_targets(target))
    recipe = recipe.resolve(untied)
    (quantized,) = (step for step in recipe.passes if isinstance(step, Quantize))
    assert (quantized.head or 16) == bits


def test_a_default_head_whose_groups_do_not_fit_stays(tied: Model) -> None:
    step = Rtn().narrow_head(tied)
    assert step.head == 8
    assert Rtn(embedding=16).narrow_head(tied).head is None
    odd = replace(tied.rest[EMBEDDING], shape=(96, 40))
    assert Rtn().narrow_head(tied.replace_rest({EMBEDDING: odd})).head is None


def test_a_head_of_any_family_is_solved_by_what_it_gets(granite: Path) -> None:
    model = open_checkpoint(str(granite)).model
    after, _ = solve(model, Gptq(head=8, embedding=8, group_size=32))
    assert after.head is not None
    assert after.rest[after.head].scheme == END
    hidden = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat(list(walk.list_head_inputs(after, hidden)))
    scaling = model.config["logits_scaling"]
    found = inputs @ after.rest[after.head].load().T / scaling
    assert torch.allclose(found, Ends(after).compute_logits(hidden)[0], atol=1e-5)
