"""Blocks without routing, without an MLP, or with dynamic skipping: every carrier of such a model.

Each form is held against stock transformers modules that are operated on here: experts sliced off,
modules stood in for, routers replaced by a loop over tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from helpers import SCHEME, compute_logits, each_family, run_module, slow_except
from moe2edge.errors import Unsupported
from moe2edge.model.block import Block
from moe2edge.model.edits import remove_skipping
from moe2edge.model.experts import Expert
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.runtime.load import load
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, assert_cache_changes_nothing, quantize

IDS = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(11))
TOLERANCE = 1e-4
EXPERT = 4
# Near the medians of the ratios in these random models.
SKIP = {2: (0.5,), 3: (0.6, 0.3)}


# ---- our side ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What follows attention, made by the product and by an operation on transformers' layer."""

    ours: Callable[[Block], Block]
    operate: Callable[[Any], None]
    top_k: int = 2
    shared: bool | None = None  # only in families with, without shared experts; None: in both


def skipping(k: int) -> Callable[[Block], Block]:
    def change(block: Block) -> Block:
        assert isinstance(block.mlp, MoELayer)
        router = replace(block.mlp.router, skip_below=SKIP[k])
        return replace(block, mlp=replace(block.mlp, router=router))

    return change


# ---- the other side: transformers, operated on -------------------------------------------------


def one_expert(layer: Any) -> None:
    gate, fused = layer.mlp.gate, layer.mlp.experts
    gate.weight.data = gate.weight.data[[EXPERT]]
    gate.top_k = gate.num_experts = fused.num_experts = 1
    for name in ("gate_up_proj", "down_proj"):
        getattr(fused, name).data = getattr(fused, name).data[[EXPERT]]


def nothing(layer: Any) -> None:
    layer.mlp.forward = torch.zeros_like


def norm_only(layer: Any) -> None:
    layer.mlp.forward = lambda x: x


def shared_only(layer: Any) -> None:
    layer.mlp.experts.down_proj.data.zero_()


def skip(layer: Any) -> None:
    """Return a router that goes through tokens and their experts one by one."""
    gate = layer.mlp.gate
    renormalize = getattr(gate, "norm_topk_prob", True)  # Mixtral has no such switch
    gate.skipped = gate.routed = 0
    below_of_places = SKIP[gate.top_k]  # of fewer places, the first ones

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x.reshape(-1, gate.hidden_dim) @ gate.weight.T
        weights, chosen = [], []
        for row in logits:
            p = row.double().softmax(-1).tolist()
            best = sorted(range(len(p)), key=lambda j: -p[j])[: gate.top_k]
            w = [p[best[0]]]
            for below, j in zip(below_of_places, best[1:], strict=False):
                w.append(0.0 if p[j] < below * p[best[0]] else p[j])
            total = sum(w) if renormalize else 1.0
            weights.append([v / total for v in w])
            chosen.append(best)
            gate.routed += len(w)
            gate.skipped += w.count(0.0)
        return logits, torch.tensor(weights).to(x.dtype), torch.tensor(chosen)

    gate.forward = forward


def stock(folder: Path, *, int4: bool) -> Any:
    """Stock transformers in float32; with ``int4`` every selected matrix rounded in place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if int4:
        for name, parameter in model.model.layers.named_parameters():
            if name.endswith("_proj.weight") or ".experts." in name:
                for matrix in parameter.data.reshape(-1, *parameter.shape[-2:]):
                    matrix.copy_(round_to_nearest(matrix, SCHEME).dequantize())
    return model


def logits_of(model: Any) -> Tensor:
    return run_module(model, IDS)


# ---- both --------------------------------------------------------------------------------------

FORMS = {
    "dense": Form(lambda b: b.keep_experts([EXPERT], clamp_top_k=True), one_expert),
    "none": Form(lambda b: b.without_mlp(), nothing),
    "norm": Form(lambda b: b.without_mlp(keep_norm=True), norm_only),
    "shared": Form(lambda b: b.keep_experts([]), shared_only, shared=True),
    "no experts": Form(lambda b: b.keep_experts([]), nothing, shared=False),
    "skip 2": Form(skipping(2), skip),
    "skip 3": Form(skipping(3), skip, top_k=3),
}
CASES = slow_except(
    [
        (family, name)
        for family, row in FAMILIES.items()
        for name, form in FORMS.items()
        if form.shared in (None, row.shared)
    ],
    *(("qwen2_moe", name) for name in FORMS),
    ("mixtral", "no experts"),
)
ENDS, ALL = (0, 2), (0, 1, 2)


@dataclass(frozen=True)
class Pair:
    """A model of ours with a form in some blocks, and transformers' logits of the same numbers."""

    model: Model
    logits: Tensor


Pairs = Callable[..., Pair]


@pytest.fixture(scope="module")
def pair(tiny: Make) -> Pairs:
    made: dict[Any, Pair] = {}

    def make(
        family: str, name: str, *, int4: bool, at: tuple[int, ...] = ENDS, **changes: Any
    ) -> Pair:
        key = (family, name, int4, at, str(changes))
        if key not in made:
            form = FORMS[name]
            folder = tiny(family, num_experts_per_tok=form.top_k, **changes)
            theirs = stock(folder, int4=int4)
            model = open_checkpoint(str(folder)).model
            for index in at:
                form.operate(theirs.model.layers[index])
                model = model.replace_block(form.ours(model.blocks[index]))
            logits = logits_of(theirs)
            if form.operate is skip:
                gates = [theirs.model.layers[index].mlp.gate for index in at]
                rates = [gate.skipped / gate.routed for gate in gates]
                assert all(0.1 < rate < 0.6 for rate in rates), rates  # or this shows nothing
            model.verify()
            made[key] = Pair(quantize(model, SCHEME) if int4 else model, logits)
        return made[key]

    return make


def check_steps(runtime: Runtime, expected: Tensor) -> None:
    """Compare a batch at once; then a row in a prefill and cached steps."""
    assert (runtime.logits(IDS) - expected).abs().max() < TOLERANCE
    found = [runtime.start(IDS[1, :9].tolist())]
    found += [runtime.step(token) for token in IDS[1, 9:].tolist()]
    assert (torch.stack(found) - expected[1, 8:]).abs().max() < TOLERANCE


def walked(model: Model) -> Tensor:
    return compute_logits(model, IDS)


def by_walk(model: Model, folder: Path, expected: Tensor) -> None:
    assert (walked(model) - expected).abs().max() < TOLERANCE


def by_target(target: Gptq | Hf | Onnx) -> Callable[[Model, Path, Tensor], None]:
    def check(model: Model, folder: Path, expected: Tensor) -> None:
        target.accepts(model)
        target.write(model, folder)
        assert {n for n, _ in target.tensors(folder)} == {n for n, _, _ in model.tensors()}
        check_steps(target.reopen(folder, exact=True), expected)

    return check


# Name of the carrier: whether its numbers are int4, and the check.
CARRIERS: dict[str, tuple[bool, Callable[[Model, Path, Tensor], None]]] = {
    "walk": (False, by_walk),
    "walk int4": (True, by_walk),
    "hf": (False, by_target(Hf(layout="natural"))),
    "gptq": (True, by_target(Gptq())),
    "onnx": (False, by_target(Onnx())),
    "onnx int4": (True, by_target(Onnx())),
}


@pytest.mark.parametrize("carrier", slow_except(CARRIERS, "gptq", "onnx"))
@pytest.mark.parametrize(("family", "form"), CASES)
def test_logits_equal_transformers(
    family: str, form: str, carrier: str, pair: Pairs, tmp_path: Path
) -> None:
    int4, check = CARRIERS[carrier]
    both = pair(family, form, int4=int4)
    check(both.model, tmp_path, both.logits)


@pytest.mark.parametrize("carrier", slow_except(["hf", "gptq", "onnx int4"], "hf"))
@pytest.mark.parametrize(("family", "form"), CASES)
def test_every_block_may_have_the_form(
    family: str, form: str, carrier: str, pair: Pairs, tmp_path: Path
) -> None:
    int4, check = CARRIERS[carrier]
    both = pair(family, form, int4=int4, at=ALL)
    check(both.model, tmp_path, both.logits)


SWITCHES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "none", {"sliding_window": 6, "tie_word_embeddings": True}),
    ("mixtral", "norm", {"tie_word_embeddings": True}),
    ("mixtral", "skip 2", {"dtype": "bfloat16"}),
    ("qwen2_moe", "skip 3", {"norm_topk_prob": True}),
    ("qwen2_moe", "dense", {"use_sliding_window": True, "sliding_window": 6}),
    ("qwen2_moe", "shared", {"mlp_only_layers": [1]}),
    ("qwen3_moe", "dense", {"mlp_only_layers": [1], "intermediate_size": 32}),
    ("qwen3_moe", "dense", {"mlp_only_layers": [1], "dtype": "bfloat16"}),
    ("qwen3_moe", "skip 3", {"norm_topk_prob": True}),
    ("olmoe", "norm", {"attention_bias": True, "clip_qkv": 0.7}),
    ("olmoe", "skip 2", {"norm_topk_prob": True}),
]


@pytest.mark.parametrize("carrier", slow_except(CARRIERS, "hf"))
@pytest.mark.parametrize(("family", "form", "switches"), SWITCHES, ids=str)
@pytest.mark.slow
def test_switches_of_configs(
    family: str, form: str, switches: dict[str, Any], carrier: str, pair: Pairs, tmp_path: Path
) -> None:
    int4, check = CARRIERS[carrier]
    both = pair(family, form, int4=int4, **switches)
    check(both.model, tmp_path, both.logits)


Both = tuple[Callable[[Block], Block], Callable[[Any], None]]
NONE: Both = (FORMS["none"].ours, nothing)
SKIP_3: Both = (FORMS["skip 3"].ours, skip)


def keep(*ids: int) -> Both:
    """Both ways to have some experts only; the router chooses no more than there are."""

    def operate(layer: Any) -> None:
        gate, fused = layer.mlp.gate, layer.mlp.experts
        gate.weight.data = gate.weight.data[list(ids)]
        gate.num_experts = fused.num_experts = len(ids)
        gate.top_k = min(gate.top_k, len(ids))
        for name in ("gate_up_proj", "down_proj"):
            getattr(fused, name).data = getattr(fused, name).data[list(ids)]

    return lambda block: block.keep_experts(ids, clamp_top_k=True), operate


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("family", each_family("olmoe"))
def test_a_model_with_many_forms_at_once(
    family: str, carrier: str, tiny: Make, tmp_path: Path
) -> None:
    """Also skipping where every expert is chosen, and where fewer are than in the source."""
    int4, check = CARRIERS[carrier]
    folder = tiny(family, num_experts_per_tok=3, num_hidden_layers=8)
    theirs, model = stock(folder, int4=int4), open_checkpoint(str(folder)).model
    parts: list[list[Both]] = [
        [NONE],
        [SKIP_3, keep(5, 1, 3, 0)],
        [(FORMS["norm"].ours, norm_only)],
        [(FORMS["dense"].ours, one_expert)],
        [keep(2, 4)],
        [SKIP_3, keep(5, 1, 3)],
        [SKIP_3, keep(2, 4)],
        [NONE],
    ]
    for index, steps in enumerate(parts):
        for ours, operate in steps:
            model = model.replace_block(ours(model.blocks[index]))
            operate(theirs.model.layers[index])
    model.verify()
    check(quantize(model, SCHEME) if int4 else model, tmp_path, logits_of(theirs))


# ---- other readers -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", slow_except([((1,),), (ENDS,), (ALL,)], ((1,),)), ids=str)
@pytest.mark.parametrize(("family", "form"), CASES)
def test_stock_transformers_refuses_it(
    family: str, form: str, at: tuple[int, ...], pair: Pairs, tmp_path: Path
) -> None:
    model = pair(family, form, int4=False, at=at).model
    assert not model.is_uniform
    Hf(layout="natural").write(model, tmp_path)
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="is a per-layer attribute"):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("at", slow_except([((1,),), (ALL,)], ((1,),)), ids=str)
@pytest.mark.parametrize(
    "target", [Hf(layout="natural"), Gptq(), Onnx()], ids=["hf", "gptq", "onnx"]
)
@pytest.mark.parametrize("form", FORMS)
def test_its_tokenizer_is_read_by_stock_transformers(
    form: str,
    target: Gptq | Hf | Onnx,
    at: tuple[int, ...],
    tiny: Make,
    pair: Pairs,
    tmp_path: Path,
) -> None:
    family = "qwen2_moe" if FORMS[form].shared else "mixtral"
    target.write(pair(family, form, int4=not isinstance(target, Hf), at=at).model, tmp_path)
    for path in tiny(family).glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids == [66, 67, 68]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_generation_with_a_cache_equals_that_without(
    family: str, form: str, pair: Pairs, tmp_path: Path
) -> None:
    Hf(layout="natural").write(pair(family, form, int4=False).model, tmp_path)
    model = load(tmp_path)
    assert_cache_changes_nothing(model, IDS[:, :20])


@pytest.mark.parametrize(("family", "form"), CASES)
def test_saving_it_with_transformers_is_refused(
    family: str, form: str, pair: Pairs, tmp_path: Path
) -> None:
    """It would lose thresholds without a word."""
    Hf(layout="natural").write(pair(family, form, int4=False).model, tmp_path)
    model = load(tmp_path)
    with pytest.raises(Unsupported, match="copy the folder"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("family", "form"), CASES)
def test_written_folders_read_back_equal(
    family: str, form: str, pair: Pairs, tmp_path: Path
) -> None:
    model = pair(family, form, int4=True, at=(1,)).model
    Gptq().write(model, tmp_path)
    back = open_stored_model(open_checkpoint(str(tmp_path)))
    for mine, theirs in zip(model.blocks, back.blocks, strict=True):
        assert type(mine.mlp) in (type(theirs.mlp), Expert)
        assert mine.norms.keys() == theirs.norms.keys()
        assert [role for role, _ in mine.weights()] == [role for role, _ in theirs.weights()]
        if isinstance(mine.mlp, MoELayer) and isinstance(theirs.mlp, MoELayer):
            assert mine.mlp.router.skip_below == theirs.mlp.router.skip_below
    for (name, role, weight), (*same, other) in zip(model.tensors(), back.tensors(), strict=True):
        assert [name, role] == same
        assert torch.equal(weight.load(), other.load())


@pytest.mark.parametrize("name", ["hf", "gptq", "onnx"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_skipping_can_be_taken_off(name: str, top_k: int, pair: Pairs, tmp_path: Path) -> None:
    """To time the same folder with every chosen expert run."""
    target = {"hf": Hf(layout="natural"), "gptq": Gptq(), "onnx": Onnx(accuracy_level=0)}[name]
    both = pair("qwen3_moe", f"skip {top_k}", int4=name != "hf")
    target.write(both.model, tmp_path)
    runtime = target.without_skipping(both.model, tmp_path)
    whole, found = walked(remove_skipping(both.model)), runtime.logits(IDS)
    assert (whole - both.logits).abs().max() > 0.1  # or this shows nothing
    if name == "gptq":  # runs in bfloat16, where near ties in routers fall otherwise
        assert (found - whole).abs().median() < 0.3 * (found - both.logits).abs().median()
    else:
        assert (found - whole).abs().max() < TOLERANCE


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("none", {"moe2edge": {"mlp": "dense+shared"}}),
    ("none", {"moe2edge": {"mlp": "shared"}}),
    ("none", {"moe2edge": {"mlp": "both"}}),
    ("none", {"moe2edge": {"mlp": "none", "skip_below": [0.5]}}),
    ("none", {"moe2edge": ["none"]}),
    ("skip 2", {"moe2edge": {"skip_below": [0.5, 0.5]}}),
    ("skip 2", {"moe2edge": {"skip_below": ["half"]}}),
    ("skip 2", {"moe2edge": {"skip_below": [-0.5]}}),
    ("skip 2", {"moe2edge": {"skip_below": 0.5}}),
    ("skip 2", {"moe2edge": {"skip_above": [0.5]}}),
    ("skip 2", {"moe2edge_new": True}),
    ("skip 2", {"num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("form", "changes"), WRONG, ids=str)
def test_unknown_forms_are_refused(
    form: str, changes: dict[str, Any], pair: Pairs, tmp_path: Path
) -> None:
    Hf(layout="natural").write(pair("olmoe", form, int4=False).model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["per_layer_config"]["2"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="layer 2: per_layer_config ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
