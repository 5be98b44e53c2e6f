"""Equal rows in routers are judged at the start, or behind the pass that chooses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import SMALL, each_family, export, parse_passes, run
from moe2edge.commands.router_ties import Tie, TieJudge, find_ties
from moe2edge.errors import Unsupported
from moe2edge.passes._recover_selection import Selection
from moe2edge.passes.recover import Recover
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts"


def make_ties(
    folder: Path,
    out: Path,
    *groups: tuple[int, ...],
    change: Callable[[Tensor], Tensor] = lambda row: row,
) -> Path:
    """Copy a checkpoint, and make rows of block 1's router those of the first of each group."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for first, *others in groups:
        for n in others:
            tensors[ROUTER][n] = change(tensors[ROUTER][first])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def judge(folder: Path, target: object, steps: list[object]) -> list[str]:
    """Look at a source before the passes of a recipe; return what is said."""
    said: list[str] = []
    model = open_checkpoint(folder).model
    TieJudge([target], Reporter(said.append, lambda *_: None)).look(  # type: ignore[list-item]
        model, parse_passes(steps, model)
    )
    return said


def test_ties_are_found_with_the_numbers_of_experts(tiny: Make, tmp_path: Path) -> None:
    assert find_ties(open_checkpoint(tiny("mixtral")).model) == []
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4), (0, 3, 5))
    assert find_ties(open_checkpoint(folder).model) == [
        Tie(1, (0, 3, 5), 2), Tie(1, (1, 4), 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (lambda row: row * 2, False),
        (lambda row: -row, False),
        (lambda row: row + 1e-4, False),
        (lambda row: row * (1 + 1e-8), True),
    ],
    ids=["scaled", "negated", "close", "equal in float32"],
)
def test_only_rows_that_give_equal_scores_are_ties(
    tiny: Make, tmp_path: Path, change: Callable[[Tensor], Tensor], tied: bool
) -> None:
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4), change=change)
    assert bool(find_ties(open_checkpoint(folder).model)) == tied


def test_equal_rows_of_equal_experts_are_no_ties(tiny: Make, tmp_path: Path) -> None:
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4))
    tensors = load_file(folder / "model.safetensors")
    for part in ("w1", "w2", "w3"):
        tensors[f"{EXPERT}.4.{part}.weight"] = tensors[f"{EXPERT}.1.{part}.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert find_ties(open_checkpoint(folder).model) == []


def test_where_every_expert_runs_there_are_no_ties(tiny: Make, tmp_path: Path) -> None:
    folder = make_ties(tiny("mixtral", num_experts_per_tok=6), tmp_path / "m", (1, 4))
    assert find_ties(open_checkpoint(folder).model) == []


def test_ties_are_judged_by_target_at_the_start(tiny: Make, tmp_path: Path) -> None:
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4), (0, 3, 5))
    message = r"block 1: .* experts 0, 3 and 5 are equal \(top-2\), and 1 more such .* onnx chooses"
    with pytest.raises(Unsupported, match=message):
        judge(folder, Onnx(), ["gptq"])
    for target in (Hf(), Gptq()):
        assert "which of them a token gets depends on the runtime" in judge(folder, target, [])[0]
    # What these passes leave is not known yet.
    drops = [{"expert_drop": {"keep": 4}}, {"block_drop": {"drop": 1}}]
    unknown: list[object] = [*drops, {"routing": {}}, {"recover": {"train": "router"}}]
    for step in unknown:
        assert judge(folder, Onnx(), [step, "gptq"]) == []
    # Adapters leave routers as they are.
    with pytest.raises(Unsupported, match=message):
        judge(folder, Onnx(), [{"recover": {"train": "lora"}}, "gptq"])


@pytest.mark.parametrize("family", each_family("mixtral"))
def test_adapters_train_no_router(tiny: Make, family: str) -> None:
    model = open_checkpoint(tiny(family)).model
    for train in ("full", "experts", "router", "lora"):
        step = Recover.model_validate({"train": train, "steps": 1})
        taken = {
            role
            for block in model.blocks
            for role, _ in block.weights()
            if Selection(train, anneals=False).takes(block, role)
        }
        assert step.changes_routers is ("router.weight" in taken)


def test_equal_experts_that_are_parted_are_judged_again(tiny: Make, tmp_path: Path) -> None:
    """Whatever trains or quantizes experts may make a tie of equal rows of equal experts."""
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4))
    parted = open_checkpoint(folder).model
    tensors = load_file(folder / "model.safetensors")
    for part in ("w1", "w2", "w3"):
        tensors[f"{EXPERT}.4.{part}.weight"] = tensors[f"{EXPERT}.1.{part}.weight"].clone()
    (tmp_path / "equal").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "equal")
    save_file(tensors, tmp_path / "equal" / "model.safetensors", {"format": "pt"})
    equal = open_checkpoint(tmp_path / "equal").model
    judge_all = TieJudge([Onnx()], Reporter(lambda _: None, lambda *_: None))
    judge_all.look(equal, parse_passes(["gptq"], equal))
    with pytest.raises(Unsupported, match="experts 1 and 4 are equal"):
        judge_all.look(parted, [])


def test_the_command_refuses_at_the_start(tiny: Make, tmp_path: Path) -> None:
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4))
    out = tmp_path / "out"
    done = run("export", folder, "-t", "onnx", "-o", out, *SMALL)
    assert done.exit_code == 6
    assert "experts 1 and 4 are equal" in done.stderr
    assert "source check" not in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_ties_are_judged_again_behind_the_pass_that_chooses(tiny: Make, tmp_path: Path) -> None:
    """Decisions without one of the pair are what the message asks for; with both it is refused."""
    folder = make_ties(tiny("mixtral"), tmp_path / "m", (1, 4))
    for kept, code in (([0, 1, 2, 4], 6), ([0, 1, 2, 3], 0)):
        file = tmp_path / f"{code}.json"
        recipe = {"passes": [{"expert_drop": {"keep": 4, "criterion": "magnitude"}}]}
        (tmp_path / "r.json").write_text(json.dumps(recipe))
        done = run("decide", folder, "-r", tmp_path / "r.json", "-o", file, "--no-source-check")
        assert done.exit_code == 0, done.output
        decided = json.loads(file.read_text())
        for block in decided["blocks"]:
            block["experts"] = kept
        file.write_text(json.dumps(decided))
        steps = [{"apply_decisions": {"file": str(file)}}, "gptq"]
        found, said, _ = export(folder, tmp_path / f"out{code}", steps, "onnx")
        assert found == code, said
        assert ("experts 1 and 4 are equal" in said) == (code == 6)
        assert "block 0: " not in said


# ---- what the runtimes do ------------------------------------------------------------------------


def run_moe(scores: np.ndarray, top_k: int) -> list[set[int]]:
    """Return the experts that ONNX Runtime's MoE operator runs for each row of scores."""
    count = scores.shape[1]
    first = np.full((count, count, count), 1 / count, np.float32)
    second = np.zeros_like(first)
    second[range(count), range(count)] = 1 / count  # expert n writes into place n
    node = helper.make_node(
        "MoE", ["x", "scores", "first", "", "second"], ["y"], domain="com.microsoft",
        k=top_k, activation_type="relu", normalize_routing_weights=1,
    )  # fmt: skip
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", count])
        for name in ("x", "scores", "y")
    }
    weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    graph = helper.make_graph([node], "g", [infos["x"], infos["scores"]], [infos["y"]], weights)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": np.ones_like(scores), "scores": scores})
    return [set(np.nonzero(row > 1e-6)[0].tolist()) for row in found]


def test_runtimes_break_ties_as_the_docs_say() -> None:
    """ONNX Runtime's operator takes the highest of equal rows, PyTorch neither end reliably."""
    assert onnx.__version__
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((200, 8)).astype(np.float32)
    scores[:, [3, 6]] = scores[:, :1]
    ordered = np.sort(scores)[:, ::-1]
    cut = ordered[:, 1] == ordered[:, 2]
    assert cut.sum() > 20
    numbers = np.broadcast_to(np.arange(8), scores.shape)
    highest = [set(order[:2].tolist()) for order in np.lexsort((-numbers, -scores))]
    lowest = [set(order[:2].tolist()) for order in np.lexsort((numbers, -scores))]
    torch_found = [set(row) for row in torch.from_numpy(scores).topk(2).indices.tolist()]
    assert run_moe(scores, 2) == highest
    assert highest != torch_found != lowest
