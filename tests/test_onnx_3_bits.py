"""Experts of 3 bits in the onnx target: with float16 activations, from onnxruntime 1.32 on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from helpers import SMALL, compute_logits, export, run, write_text
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.edits import change_weights
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.packing import pack_words
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
runs = pytest.mark.skipif(VERSION < (1, 32), reason="needs onnxruntime 1.32")
IDS = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(7))
EXPERTS, OTHERS = Scheme(3, 32), Scheme(4, 32)


def opened(tiny: Make, family: str, scheme: Scheme = EXPERTS, **changes: Any) -> Model:
    model = open_checkpoint(str(tiny(family, initializer_range=0.1, **changes))).model
    model = quantize(model, OTHERS, lambda role: not role.startswith("experts."))
    return quantize(model, scheme, lambda role: role.startswith("experts."))


def skip(model: Model) -> Model:
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.7,))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    return model


def check(model: Model, folder: Path) -> None:
    """Write, read everything back, and run it with float32 and with float16 activations."""
    folder.mkdir()
    target = Onnx(accuracy_level=0)
    target.accepts(model)
    target.write(model, folder)
    assert verify.audit(target, folder, target.stored(model)) > 10
    expected = compute_logits(model, IDS)
    exact = target.reopen(folder, exact=True)
    assert (exact.logits(IDS) - expected).abs().max() < 1e-4
    runtime = target.reopen(folder)
    found = runtime.logits(IDS)
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.01
    steps = [runtime.start(IDS[1, :30].tolist())]
    steps += [runtime.step(token) for token in IDS[1, 30:].tolist()]
    assert (torch.stack(steps) - found[1, 29:]).abs().max() < 0.02


@runs
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_logits_equal_pytorch(family: str, tiny: Make, tmp_path: Path) -> None:
    model = opened(tiny, family)
    check(model, tmp_path / "plain")
    check(skip(model), tmp_path / "skipping")


@runs
def test_large_experts_are_read_from_the_data_file(tiny: Make, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1}
    for renormalize in (True, False):
        model = opened(tiny, "qwen3_moe", Scheme(3, 128), norm_topk_prob=renormalize, **sizes)
        check(model, tmp_path / str(renormalize))


@runs
def test_numbers_beyond_float16_are_named(tiny: Make, tmp_path: Path) -> None:
    def enlarge(role: str, weight: Weight) -> Weight:
        if not role.endswith(".down"):
            return weight
        numbers = weight.quantized()
        large = replace(numbers, scales=(numbers.scales * 0 + 2.0**14))
        return replace(weight, load=large.dequantize, load_quantized=lambda: large)

    model = change_weights(opened(tiny, "olmoe"), enlarge)
    Onnx().write(model, tmp_path)
    assert Onnx().reopen(tmp_path, exact=True).logits(IDS).isfinite().all()
    runtime = Onnx().reopen(tmp_path)
    said = "3 bits compute in float16, whose largest number is 65504.*choose 2, 4 or 8 bits"
    with pytest.raises(Unsupported, match=said):
        runtime.logits(IDS)
    with pytest.raises(Unsupported, match=said):
        runtime.start(IDS[0].tolist())


@runs
@pytest.mark.slow
def test_replaced_experts_stand_beside_them_but_not_factors(tiny: Make, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = tiny("olmoe", initializer_range=0.05)
    rules = [{"match": r"experts\.", "bits": 3}]
    quantizing = {"rtn": {"bits": 4, "group_size": 32, "rules": rules}}
    more = ("--calib", text, "--eval", text, *SMALL)
    linear = {"expert_replace": {"with": "linear", "keep": 4}}
    code, said, _ = export(model, tmp_path / "a", [linear, quantizing], "onnx", *more)
    assert code == 0, said
    shared = {"expert_replace": {"with": "base", "budget": 0.8, "rank": 4}}
    code, said, _ = export(model, tmp_path / "b", [shared, quantizing], "onnx", *more)
    assert code == 6
    assert "is w3a16, groups of 32, and experts with low-rank factors are not in the fused" in said


def test_rows_are_streams_of_bits() -> None:
    q = torch.randint(0, 8, (3, 64), generator=torch.Generator().manual_seed(0))
    bits = np.unpackbits(pack_words(q, 3).view(torch.uint8).numpy(), axis=1, bitorder="little")
    assert torch.equal(torch.from_numpy(bits).view(3, 64, 3).long() @ torch.tensor([1, 2, 4]), q)


def test_an_older_onnxruntime_is_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tiny, "olmoe")
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.32.0")
        Onnx().write(model, tmp_path)
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    said = "3 bits need onnxruntime 1.32 or newer, and 1.31.1 is installed: pip install"
    with pytest.raises(Unsupported, match=said):
        Onnx().accepts(model)
    for exact in (False, True):
        with pytest.raises(Unsupported, match=said):
            Onnx().reopen(tmp_path, exact=exact)


REFUSED: list[tuple[str, Scheme, Scheme, str]] = [
    (
        "attention",
        Scheme(3, 32),
        EXPERTS,
        r"q_proj\.weight is w3a16.*match: 'experts\\\.', bits: 3",
    ),
    ("zero points", OTHERS, Scheme(3, 32, symmetric=False), "set symmetric: true"),
    ("small groups", OTHERS, Scheme(3, 16), "in groups of 32, 64, 128"),
    ("rows", OTHERS, Scheme(3, -1), "in groups of 32, 64, 128"),
]


@pytest.mark.parametrize(("name", "others", "experts", "said"), REFUSED)
def test_other_forms_are_refused(
    name: str, others: Scheme, experts: Scheme, said: str, tiny: Make
) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe"))).model
    model = quantize(model, others, lambda role: not role.startswith("experts."))
    model = quantize(model, experts, lambda role: role.startswith("experts."))
    with pytest.raises(Unsupported, match=said) as caught:
        Onnx().accepts(model)
    assert "\n" not in str(caught.value)


@runs
def test_what_the_refusal_of_attention_says_to_do_works(tiny: Make, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = tiny("qwen2_moe", initializer_range=0.05)
    more = ("--calib", text, "--eval", text, *SMALL)
    code, said, _ = export(model, tmp_path / "a", [{"rtn": {"bits": 3}}], "onnx", *more)
    assert code == 6, said
    rules = [{"match": r"experts\.", "bits": 3}]
    step = {"rtn": {"bits": 4, "group_size": 32, "rules": rules}}
    code, said, report = export(model, tmp_path / "b", [step], "onnx", *more)
    assert code == 0, said
    (first, *_) = report["loaders"]["onnx"]
    assert "1.32 or newer" in first["note"]
    assert "five times as long as those of 4" in first["note"]
    done = run("verify", tmp_path / "b")
    assert done.exit_code == 0, done.output
