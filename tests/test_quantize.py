"""Which tensor gets which scheme: options and rules of quantizing passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.recipe import parse
from moe2edge.pipeline.stages import plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make


@pytest.fixture
def model(tiny: Make) -> Model:
    return open_checkpoint(str(tiny("qwen2_moe"))).model


def rtn(**options: Any) -> Rtn:
    return Rtn.model_validate(options)


def test_one_scheme_for_all_without_rules(model: Model) -> None:
    schemes = rtn(bits=8, group_size=32, symmetric=False).schemes(model)
    assert set(schemes.values()) == {Scheme(8, 32, False)}
    # Per block: 4 of attention, 6 experts and a shared one of three matrices.
    assert len(schemes) == 3 * (4 + 7 * 3)


def test_the_first_rule_that_matches_holds(model: Model) -> None:
    step = rtn(
        group_size=32,
        rules=[
            {"match": r"o_proj", "bits": 16},
            {"match": r"self_attn\.", "bits": 8, "symmetric": False},
            {"blocks": [0, -1], "bits": 8, "group_size": -1},
        ],
    )
    (planned,) = plan_passes([step], model).steps
    schemes = step.schemes(model)
    assert "model.layers.1.self_attn.o_proj.weight" not in schemes
    assert schemes["model.layers.0.self_attn.q_proj.weight"] == Scheme(8, 32, False)
    for block, expected in ((0, Scheme(8, -1)), (1, Scheme(4, 32)), (2, Scheme(8, -1))):
        assert schemes[f"model.layers.{block}.mlp.experts.5.up_proj.weight"] == expected
    assert {name: w.scheme for name, _, w in planned.after.tensors() if w.scheme} == schemes
    told = step.describe(planned)
    assert "w8a16_asym, groups of 32: 9 matrices" in told
    assert "w8a16, per channel: 42 matrices" in told
    assert "not quantized, by rule: 3" in told


def test_the_group_size_of_the_source_holds_for_what_is_left(model: Model) -> None:
    """The shared expert is 96 wide; without it, 64 would divide every width."""
    assert rtn().resolve(model).group_size == 32
    rules = [{"match": "experts?\\.", "bits": 4, "group_size": -1}]
    assert rtn(rules=rules).resolve(model).group_size == 64
    kept = rtn(group_size=-1).resolve(model)
    assert kept.group_size == -1
    assert {s.width(96) for s in kept.schemes(model).values()} == {96}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 128}, "group_size 128 does not divide the 64 inputs of model.layers.0"),
        ({"rules": [{"bits": 16}]}, "the rules leave nothing to quantize"),
        ({"rules": [{"match": "mlp.gate.weight", "bits": 8}]}, "applies to no tensor"),
        ({"rules": [{"blocks": [0, 3], "bits": 8}]}, "there is no block 3; the model has 3 blocks"),
        (
            {"rules": [{"match": "up_proj", "bits": 8}, {"match": "experts.*up_proj", "bits": 4}]},
            "or only tensors that rules before it match",
        ),
        (
            {"rules": [{"match": r"experts\.2\.", "bits": 8}]},
            r"experts of block 0 several schemes \(w4a16, groups of 32, w8a16, groups of 32\)",
        ),
        (
            {"rules": [{"match": r"experts\.\d+\.down", "bits": 16}]},
            "experts of block 0 several schemes",
        ),
    ],
)
def test_unsuitable_options_are_refused(
    model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rtn(**options).check(model)


def test_no_group_fits(tiny: Make) -> None:
    odd = open_checkpoint(str(tiny("mixtral", intermediate_size=40))).model
    with pytest.raises(Unsupported, match="set group_size: -1, one scale per row"):
        rtn().check(odd)
    rtn(group_size=-1).check(odd)


def test_a_model_is_quantized_once(model: Model) -> None:
    step = rtn()
    with pytest.raises(InputError, match="quantizes twice"):
        step.check(step.plan(model))


def test_a_tensor_without_its_scheme_is_an_error(model: Model) -> None:
    step = rtn()
    after = step.plan(model)
    step.check_result(model, after)
    block = after.blocks[1]
    weight = dict(block.weights())["experts.3.up"]
    for wrong in (replace(weight, scheme=None), replace(weight, scheme=Scheme(8, 32))):
        broken = after.replace_block(block.with_weights({"experts.3.up": wrong}))
        with pytest.raises(Moe2EdgeError, match=r"layers.1.mlp.experts.3.up_proj.weight is"):
            step.check_result(model, broken)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{match: '(', bits: 8}", "a regular expression"),
        ("{match: x}", "bits"),
        ("{bits: 5}", "bits"),
        ("{bits: 8, groupsize: 32}", "groupsize"),
        ("{bits: 8, blocks: []}", "blocks"),
    ],
)
def test_recipes_name_the_faulty_rule(rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(f"passes: [rtn: {{rules: [{rule}]}}]")
