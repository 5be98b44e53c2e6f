"""GPTQ folders with the config of auto-round: read back, and refused where it would not read them.

``benchmarks/readers/read_auto_round.py`` runs them in transformers with the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from every_family import IDS
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, quantize

TARGET = make_target("gptq", {"config": "auto-round"})
GPTQ = make_target("gptq", {})


def round_some(model: Model) -> Model:
    """Round to 4 bits, with one expert and queries in 8 bits, and values unquantized."""
    model = quantize(model, Scheme(4, 32), lambda role: "v_proj" not in role)
    return quantize(
        model, Scheme(8, 32), lambda role: "q_proj" in role or role.startswith("experts.1.")
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_holds_the_integers_of_target_gptq(family: str, tiny: Make, tmp_path: Path) -> None:
    model = round_some(open_checkpoint(str(tiny(family))).model)
    logits = {}
    for name, target in (("gptq", GPTQ), ("auto", TARGET)):
        out = tmp_path / name
        target.accepts(model)
        out.mkdir()
        target.write(model, out)
        assert verify.audit(target, out, target.stored(model))
        target.check_derived(out)
        logits[name] = target.reopen(out, exact=True).logits(IDS)
        source = open_checkpoint(str(out)).model
        kept = [w.scheme for _, _, w in source.tensors() if w.scheme]
        assert kept == [w.scheme for _, _, w in model.tensors() if w.scheme]
    assert torch.equal(logits["gptq"], logits["auto"])
    settings = json.loads((tmp_path / "auto/config.json").read_text())["quantization_config"]
    usual = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    assert {**settings, **usual, "bits": 4, "group_size": 32, "sym": True} == settings
    extra = settings["extra_config"]
    eight = {"bits": 8, "group_size": 32, "sym": True}
    # Modules are named as in transformers' class.
    assert extra["model.layers.0.mlp.experts.1.gate_proj"] == eight
    assert extra["model.layers.0.self_attn.q_proj"] == eight
    assert extra["model.layers.0.self_attn.v_proj"]["bits"] == 16
    assert any(key.endswith(r"\.mlp\.gate$") for key in extra)
    names = load_file(tmp_path / "auto/model.safetensors")
    assert not any(name.endswith(".g_idx") for name in names)
    assert any(name.endswith(".experts.0.gate_proj.qweight") for name in names)
    moved = tmp_path / "auto/quantization_config.json"
    moved.write_text(json.dumps({**settings, "bits": 8}))
    with pytest.raises(VerificationFailed, match=r"quantization_config\.json is not the"):
        TARGET.check_derived(tmp_path / "auto")


def with_scheme(model: Model, scheme: Scheme | None, chosen: str) -> Model:
    """Only in shapes."""
    for block in model.blocks:
        new = {
            role: replace(weight, scheme=scheme)
            for role, weight in block.weights()
            if role.startswith(chosen) and is_quantizable(role)
        }
        model = model.replace_block(block.with_weights(new))
    return model


def drop_some(model: Model) -> Model:
    block, layer = model.moe_blocks[1]
    return model.replace_block(replace(block, mlp=layer.keep([0, 1])))


REFUSED: list[tuple[Callable[[Model], Model], str]] = [
    (lambda m: with_scheme(m, Scheme(4, 32, symmetric=False), "attention"), "set symmetric: true"),
    (lambda m: with_scheme(m, Scheme(4, -1), "attention"), "and a group_size"),
    (lambda m: with_scheme(m, None, "experts"), "experts.0.gate_proj.weight is not quantized"),
    (drop_some, "takes layers of one form, but the model has"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_it_would_not_read_is_refused(
    change: Callable[[Model], Model], words: str, tiny: Make
) -> None:
    model = with_scheme(open_checkpoint(str(tiny("olmoe"))).model, Scheme(4, 32), "")
    TARGET.accepts(model)
    changed = change(model)
    with pytest.raises(Unsupported, match=words):
        TARGET.accepts(changed)
    GPTQ.accepts(changed)  # the remedy


def test_sizes_and_families(tiny: Make) -> None:
    odd: dict[str, Any] = {"shared_expert_intermediate_size": 48}
    model = open_checkpoint(str(tiny("qwen2_moe", **odd))).model
    fitting = with_scheme(with_scheme(model, Scheme(4, 32), ""), None, "shared")
    model = with_scheme(fitting, Scheme(4, 32), "shared.up")
    with pytest.raises(Unsupported, match="takes matrices whose sizes are multiples of 32"):
        TARGET.accepts(model)
    stock = {each.program: each.verdict for each in TARGET.loaders(fitting)}
    assert stock["transformers"] == "yes"
    assert stock["GPTQModel"] == "not tried"
