"""Replacements, tied experts in the graph: logits against PyTorch's, what is stored and run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from helpers import each_family, run, slow_except
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.experts import (
    PARTS,
    Constant,
    Expert,
    Factors,
    Full,
    Linear,
    Replacement,
    Tied,
    list_full_rows,
)
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import LOW_RANK, Scheme
from moe2edge.passes.rtn import Rtn
from moe2edge.runtime.load import build_transformers_model
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets._onnx_exact import convert_to_float
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

TOLERANCE = 1e-4
INT4 = Scheme(group_size=32)
SKIP = (0.8, 0.6, 0.6)


@dataclass(frozen=True)
class Form:
    """What the six rows of a router stand for.

    Attributes:
        experts: how many stay.
        bases: of full and tied rows; none: each expert has a row.
        ranks: of their factors, 0 for none.
        maps: ranks of the replacements, 0 for constants.
    """

    experts: int
    bases: tuple[int | None, ...] = ()
    ranks: tuple[int, ...] = ()
    maps: tuple[int, ...] = ()


FORMS = {
    "constants": Form(3, maps=(0, 0, 0)),
    "fewer experts than are chosen": Form(2, maps=(0, 2, 2, 0)),
    "a map and a constant": Form(4, maps=(2, 0)),
    "maps of several ranks": Form(1, maps=(2, 3, 0, 3, 2)),
    "merged": Form(3, (0, 0, 1, 1, 1, 2), (0,) * 6),
    "every kind of tied row": Form(3, (0, 0, 1, 1, 2, None), (2, 2, 0, 0, 0, 2)),
    "every base with factors": Form(2, (0, 1, 0, 1, 1, 0), (2,) * 6),
    "a base that is chosen itself": Form(2, (0, 0, 1, 0, 0, 1), (0, 2, 0, 2, 0, 0)),
    "factors alone": Form(1, (None, 0, None, 0, 0, None), (2, 2, 2, 2, 0, 2)),
    "tied rows and replacements": Form(2, (0, 1, 0, None), (2, 0, 2, 2), (2, 0)),
}


def formed(model: Model, form: Form, skip: bool = False) -> Model:
    """``model`` whose layers have that form, with random numbers in the source's dtype."""
    draw = torch.Generator().manual_seed(0)

    def weight(dtype: str, *shape: int) -> Weight:
        numbers = 0.3 * torch.randn(shape, generator=draw)
        if dtype == "BF16":
            numbers = numbers.bfloat16()
        return Weight("new", shape, dtype, lambda: numbers)

    def factors(like: Expert, rank: int) -> dict[str, Factors]:
        shapes = {part: (getattr(like, part).shape, getattr(like, part).dtype) for part in PARTS}
        return {
            part: Factors(weight(dtype, rank, ins), weight(dtype, outs, rank))
            for part, ((outs, ins), dtype) in shapes.items()
            if rank
        }

    def replacement(n: int, rank: int, dtype: str, hidden: int) -> Replacement:
        constant = weight(dtype, hidden)
        if not rank:
            return Constant(n, constant)
        return Linear(n, constant, weight(dtype, rank, hidden), weight(dtype, hidden, rank))

    for block, layer in model.moe_blocks:
        like = layer.experts[0]
        hidden, dtype = like.gate.shape[1], like.gate.dtype
        experts = layer.experts[: form.experts]
        ran = [
            Tied(n, base, factors(like, rank)) if rank else Full(n, base or 0)
            for n, (base, rank) in enumerate(zip(form.bases, form.ranks, strict=True))
        ] or list_full_rows(experts)
        replaced = [replacement(n, rank, dtype, hidden) for n, rank in enumerate(form.maps)]
        mlp = replace(layer, experts=experts, rows=(*ran, *replaced))
        below = SKIP[: layer.router.top_k - 1] if skip else ()
        mlp = replace(mlp, router=replace(mlp.router, skip_below=below))
        model = model.replace_block(replace(block, mlp=mlp))
    model.verify()
    return model


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def written(model: Model, folder: Path) -> Path:
    Onnx().accepts(model)
    folder.mkdir(exist_ok=True)
    Onnx().write(model, folder)
    return folder


def assert_runs(model: Model, folder: Path) -> None:
    """Written, read back, and run: prompts at once, and one token after the other."""
    written(model, folder)
    onnx.checker.check_model(folder / "model.onnx")
    verify.audit(Onnx(), folder, model)
    assert Onnx().estimate(model).disk == (folder / "model.onnx.data").stat().st_size
    ids = ids_of(24)
    with torch.no_grad():
        expected = build_transformers_model(model, torch.float32)(ids).logits
    runtime = Onnx().reopen(folder, exact=True)
    assert (runtime.logits(ids) - expected).abs().max() < TOLERANCE
    tokens = ids[0].tolist()
    found = [runtime.start(tokens[:8]), *(runtime.step(token) for token in tokens[8:])]
    assert (torch.stack(found) - expected[0, 7:]).abs().max() < TOLERANCE


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("int4", [False, True], ids=["plain", "int4"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", each_family("olmoe"))
def test_logits_are_those_of_pytorch(
    family: str, form: str, int4: bool, tiny: Make, tmp_path: Path
) -> None:
    model = open_checkpoint(str(tiny(family, num_experts_per_tok=3))).model
    model = quantize(model, INT4) if int4 else model
    assert_runs(formed(model, FORMS[form]), tmp_path / "all")
    assert_runs(formed(model, FORMS[form], skip=True), tmp_path / "skipping")


def with_eight_bits(model: Model) -> Model:
    """``model`` with factors and linear maps rounded to 8 bits."""
    for block in model.blocks:
        model = model.replace_block(attach_numbers(block, Rtn(factors=8).solve_alone(block, "mse")))
    return model


@pytest.mark.parametrize("dtype", slow_except(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize(
    "form", [name for name, form in FORMS.items() if any(form.ranks + form.maps)]
)
@pytest.mark.slow
def test_factors_and_maps_of_eight_bits(form: str, dtype: str, tiny: Make, tmp_path: Path) -> None:
    source = tiny("olmoe", num_experts_per_tok=3, dtype=dtype)
    whole = formed(quantize(open_checkpoint(str(source)).model, INT4), FORMS[form])
    model = with_eight_bits(whole)
    assert_runs(model, tmp_path / "eight")
    # Each is dequantized where it is used, in a branch, so that it stays small in memory.
    graph = onnx.load(tmp_path / "eight" / "model.onnx", load_external_data=False).graph
    assert not {"DequantizeLinear"} & {node.op_type for node in graph.node}
    found = [node for node in nodes_of(graph) if node.op_type == "DequantizeLinear"]
    matrices = [r for _, r, w in model.tensors() if w.scheme == LOW_RANK]
    assert len(found) == len(matrices) > 0


@pytest.mark.parametrize("bits", slow_except([2, 4, 8], 4))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_scheme(bits: int, symmetric: bool, tiny: Make, tmp_path: Path) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    model = quantize(open_checkpoint(str(tiny("qwen2_moe"))).model, scheme)
    assert_runs(formed(model, FORMS["every kind of tied row"]), tmp_path / "members")
    assert_runs(formed(model, FORMS["a map and a constant"]), tmp_path / "substitutes")


@pytest.mark.parametrize("top_k", slow_except([1, 6], 1))
@pytest.mark.parametrize("form", ["maps of several ranks", "tied rows and replacements"])
def test_one_choice_and_all(form: str, top_k: int, tiny: Make, tmp_path: Path) -> None:
    for norm_topk_prob in (False, True):
        source = tiny("olmoe", num_experts_per_tok=top_k, norm_topk_prob=norm_topk_prob)
        model = quantize(open_checkpoint(str(source)).model, INT4)
        assert_runs(formed(model, FORMS[form]), tmp_path / str(norm_topk_prob))


def test_sixteen_bits(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral", dtype="bfloat16"))).model
    for n, form in enumerate(FORMS.values()):
        assert_runs(formed(quantize(model, INT4), form), tmp_path / str(n))


def test_bases_outside_of_the_fused_operator_may_differ(tiny: Make, tmp_path: Path) -> None:
    """One without a scheme, and one whose three matrices are not alike; but not those in it."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    form = Form(4, (0, 0, 1, 1, 2, 3), (2, 2, 2, 2, 0, 0))
    some = ("experts.1.up", "experts.2", "experts.3")
    assert_runs(formed(quantize(model, INT4, lambda r: r.startswith(some)), form), tmp_path)
    some = ("experts.1.up", "experts.2", "experts.3.gate")
    with pytest.raises(Unsupported, match="experts differ"):
        Onnx().accepts(formed(quantize(model, INT4, lambda r: r.startswith(some)), form))


def test_int8_activations_stay_near(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral", initializer_range=0.05))).model
    model = formed(quantize(model, INT4), FORMS["every kind of tied row"])
    ids = ids_of(64)
    with torch.no_grad():
        expected = build_transformers_model(model, torch.float32)(ids).logits
    found = Onnx().reopen(written(model, tmp_path)).logits(ids)
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert 1e-3 < error < 0.05


def test_without_skipping_every_choice_is_run(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral", num_experts_per_tok=3))).model
    form = FORMS["tied rows and replacements"]
    skipping = formed(quantize(model, INT4), form, skip=True)
    runtime = Onnx(accuracy_level=0).without_skipping(skipping, written(skipping, tmp_path))
    with torch.no_grad():
        whole = build_transformers_model(formed(quantize(model, INT4), form), torch.float32)
        assert (runtime.logits(ids_of(24)) - whole(ids_of(24)).logits).abs().max() < TOLERANCE


# ---- what is stored and run --------------------------------------------------------------------


def nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes, those in branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def attribute(node: Any, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_holds_no_more_numbers_than_the_model(
    form: str, tiny: Make, tmp_path: Path
) -> None:
    """Numbers in the graph are those of the model: it shrinks by as much."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    sizes = []
    for name, one in (("plain", model), ("formed", formed(model, FORMS[form]))):
        graph = onnx.load(written(one, tmp_path / name) / "model.onnx", load_external_data=False)
        parts = [
            tensor
            for tensor in graph.graph.initializer
            if any(p.key == "moe2edge.parts" for p in tensor.metadata_props)
        ]
        assert sum(math.prod(tensor.dims) for tensor in parts) == one.parameters
        size = (tmp_path / name / "model.onnx.data").stat().st_size
        sizes.append(size + sum(len(tensor.raw_data) for tensor in parts))
    saved = model.nbytes - formed(model, FORMS[form]).nbytes
    # Up to how initializers are aligned.
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=0.02 * sizes[0])


def test_the_fused_operator_holds_what_has_no_factors(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral", num_experts_per_tok=3))).model
    model = formed(quantize(model, INT4), FORMS["every kind of tied row"])
    graph = onnx.load(written(model, tmp_path) / "model.onnx", load_external_data=False).graph
    fused = [node for node in graph.node if node.op_type == "QMoE"]
    assert [attribute(node, "k") for node in fused] == [2, 2, 2]
    assert all(node.input[14] == node.input[1] for node in fused)
    branches = [node.name for node in graph.node if node.op_type == "If"]
    assert branches[:2] == ["/model/layers.0/moe/experts.0/If", "/model/layers.0/moe/factors.5/If"]
    assert len(branches) == 6
    names = [node.name for node in nodes_of(graph)]
    assert len(names) == len(set(names))
    model = formed(open_checkpoint(str(tiny("mixtral"))).model, FORMS["every base with factors"])
    graph = onnx.load(written(model, tmp_path) / "model.onnx", load_external_data=False).graph
    assert not {"MoE", "QMoE"} & {node.op_type for node in nodes_of(graph)}


def test_accuracy_levels_reach_branches(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    model = formed(quantize(model, INT4), FORMS["every kind of tied row"])
    shipped = onnx.load(written(model, tmp_path) / "model.onnx", load_external_data=False)
    exact = onnx.load_from_string(convert_to_float(tmp_path, {})[0])
    for graph, level in ((shipped.graph, 4), (exact.graph, 0)):
        quantized = [n for n in nodes_of(graph) if n.op_type in ("QMoE", "MatMulNBits")]
        assert {attribute(node, "accuracy_level") for node in quantized} == {level}
        assert sum("/experts.0/" in node.name for node in quantized) == 6


@pytest.mark.parametrize("length", [1, 5])
def test_only_what_was_chosen_runs(length: int, tiny: Make, tmp_path: Path) -> None:
    """By the runtime's own profile: products with a base, and with maps, of the first layer."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    form = Form(2, (0, 1, None), (2, 2, 2), (2, 2, 2))
    model = formed(quantize(model, INT4), form)
    ids = ids_of(length, 1)
    ran = names_that_ran(written(model, tmp_path), ids, tmp_path)
    chosen = chosen_rows(model, ids)
    for base in (0, 1):
        asked = any(f"/experts.{base}/down_proj/MatMulNBits_kernel" in name for name in ran)
        assert asked == (base in chosen)
    for n in range(3):
        asked = any(f"/substitutes.{n}/second/FusedMatMul" in name for name in ran)
        assert asked == (length > 1 and n + 3 in chosen)
    picked = any("/maps.0/picked/second/FusedMatMul" in name for name in ran)
    assert picked == (length == 1)


@pytest.mark.parametrize("length", [1, 5])
def test_only_factors_of_chosen_rows_run(length: int, tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    form = Form(1, (0, None, 0, None, 0, None), (2,) * 6)
    model = formed(quantize(model, INT4), form)
    ids = ids_of(length, 1)
    ran = names_that_ran(written(model, tmp_path), ids, tmp_path)
    chosen = chosen_rows(model, ids)
    assert len(chosen) < 6
    for row, base in enumerate(form.bases):
        at = f"/factors.{row}/down/{row}" if base is None else f"/experts.0/down/{row}"
        for name in ("first", "second"):
            asked = any(f"{at}/{name}/FusedMatMul" in node for node in ran)
            assert asked == (row in chosen)


def names_that_ran(folder: Path, ids: Tensor, tmp_path: Path) -> set[str]:
    """Nodes of the first layer, by the runtime's profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    cache = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {v.name: cache for v in session.get_inputs() if v.name.startswith("past")}
    mask = np.ones((1, ids.shape[1]), np.int64)
    session.run(None, {**feeds, "input_ids": ids.numpy(), "attention_mask": mask})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {e["name"] for e in events if e["name"].startswith("/model/layers.0/moe")}


def chosen_rows(model: Model, ids: Tensor) -> set[int]:
    """By the first layer's router."""
    loaded = build_transformers_model(model, torch.float32)
    found: list[Tensor] = []
    gate: Any = loaded.get_submodule("model.layers.0.mlp.gate")
    gate.register_forward_hook(lambda _, __, out: found.append(out[2]))
    with torch.no_grad():
        loaded(ids)
    return set(found[0].flatten().tolist())


# ---- exports -----------------------------------------------------------------------------------

RECIPES: dict[str, list[Any]] = {
    "constants": [{"expert_replace": {"with": "constant", "keep": 3}}, "gptq"],
    "maps": [{"expert_replace": {"with": "linear", "keep": 3, "rank": 4, "min_tokens": 0}}, "rtn"],
    "maps, skipping": [
        "expert_skip",
        {"expert_replace": {"with": "linear", "keep": 2, "rank": 2}},
        "rtn",
    ],
    "unquantized": [{"expert_replace": {"with": "linear", "keep": 4, "rank": 3}}],
}


@pytest.mark.parametrize(
    ("recipe", "family"),
    slow_except(zip(RECIPES, sorted(FAMILIES), strict=True), ("maps", "olmoe")),
    ids=list(RECIPES),
)
def test_a_recipe_is_exported(recipe: str, family: str, tiny: Make, tmp_path: Path) -> None:
    steps, out = tmp_path / "recipe.json", tmp_path / "out"
    steps.write_text(json.dumps({"passes": RECIPES[recipe]}))
    command = ["export", str(tiny(family)), "-t", "onnx", "-r", str(steps), "-o", str(out)]
    sizes = [
        f"--set={section}.{key}={value}"
        for section, key, value in (
            ("calibration", "samples", 12),
            ("calibration", "length", 48),
            ("evaluation", "samples", 2),
            ("evaluation", "length", 48),
        )
    ]
    result = run(*command, *sizes, "-q", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["results"][0]["parity"]["exact"] < TOLERANCE
    result = run("verify", str(out))
    assert result.exit_code == 0, result.output


OPEN = """
import sys
import onnxruntime as ort
import psutil

process = psutil.Process()
before = process.memory_info().rss
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
session = ort.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
print(process.memory_info().rss - before)
"""


@pytest.mark.parametrize("bits", slow_except([16, 8], 8))
@pytest.mark.parametrize(
    "kind", slow_except(["maps", "one map", "factors", "no bases"], "maps", "factors")
)
@pytest.mark.slow
def test_low_rank_matrices_are_in_memory_as_they_are_stored(
    tiny: Make, tmp_path: Path, kind: str, bits: int
) -> None:
    """A runtime folds constants when it opens a graph: of 16 bits it would make 32, or twice 32."""
    sides = {"hidden_size": 512, "intermediate_size": 1024}
    source = open_checkpoint(str(tiny("mixtral", dtype="bfloat16", **sides))).model
    forms = {
        "maps": lambda rank: Form(1, maps=(rank,) * 5),
        "one map": lambda rank: Form(5, maps=(2 * rank,)),
        "factors": lambda rank: Form(2, (0, 1, 0, 1, 1, 0), (rank // 2,) * 6),
        "no bases": lambda rank: Form(1, (0, *(None,) * 5), (0, *(rank // 2,) * 5)),
    }
    sizes, taken, told = [], [], []
    for rank in (4, 240):
        model = formed(quantize(source, INT4), forms[kind](rank))
        if bits == 8:
            model = with_eight_bits(model)
        folder = written(model, tmp_path / str(rank))
        sizes.append(Onnx().estimate(model).disk)
        told.append(Onnx().estimate(model).memory)
        command = [sys.executable, "-c", OPEN, str(folder / "model.onnx")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        taken.append(int(ran.stdout))
    assert told[1] - told[0] == sizes[1] - sizes[0]
    assert taken[1] - taken[0] < 1.2 * (sizes[1] - sizes[0]) + (1 << 20)
