"""Target ``compressed-tensors``: its config, its tensors, and what the library reads of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from every_family import make_folder
from moe2edge.commands.write_target import fit_for_targets
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.model.edits import change_weights
from moe2edge.model.model import Model
from moe2edge.numerics.decoding import unpack_words
from moe2edge.numerics.packing import pack_words
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target, make_target
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, quantize

TARGET = find_target("compressed-tensors")
W4, W8 = Scheme(4, 32), Scheme(8, 32)
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(5))
Schemes = Callable[[str], Scheme | None]


def rounded(folder: Path, choose: Schemes = lambda _: W4) -> Model:
    """Return a model with each matrix in the scheme that is chosen for its role."""
    model = open_checkpoint(str(folder)).model
    roles = {role for block in model.blocks for role, _ in block.weights()}
    for scheme in sorted({s for role in roles if (s := choose(role))}, key=str):
        model = quantize(model, scheme, partial(chosen, choose, scheme))
    return model


def chosen(choose: Schemes, scheme: Scheme, role: str) -> bool:
    return choose(role) == scheme


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    TARGET.accepts(model)
    TARGET.write(model, folder)
    assert verify.audit(TARGET, folder, TARGET.stored(model)) > 20
    TARGET.check_derived(folder)
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = config["quantization_config"]
    return settings


def run_stock(folder: Path) -> torch.Tensor:
    """Run the folder in stock transformers, as the library opens it."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.inference_mode():
        model(IDS)  # decompresses attention
        torch.nn.Module.float(model)  # experts have the dtype of the scales
        logits: torch.Tensor = model(IDS).logits
    return logits


def compare(folder: Path) -> None:
    own = TARGET.reopen(folder, exact=True)
    assert isinstance(own, TorchRuntime)
    # It rounds numbers of 8 bits, and not of 4, to the dtype of the scales: float16 here.
    torch.testing.assert_close(run_stock(folder), own.logits(IDS), atol=2e-3, rtol=0)


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_one_stream_of_bits(bits: int) -> None:
    q = torch.randint(0, 1 << bits, (3, 45), generator=torch.Generator().manual_seed(bits))
    words = pack_words(q.to(torch.uint8), bits)
    assert words.shape == (3, -(-45 * bits // 32))
    for row, packed in zip(q.tolist(), words.tolist(), strict=True):
        stream = sum(n << (bits * i) for i, n in enumerate(row))
        assert [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(packed))] == [
            word & 0xFFFFFFFF for word in packed
        ]
    assert torch.equal(unpack_words(words, bits, 45), q.to(torch.uint8))


def test_layout_and_config_are_those_of_the_library(tiny: Make, tmp_path: Path) -> None:
    folder = written(rounded(tiny("mixtral", dtype="bfloat16")), tmp_path / "out")
    stem = "model.layers.1.block_sparse_moe.experts.5.w2"
    tensors = load_file(folder / "model.safetensors")
    parts = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(f"{stem}.")}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == {
        "weight_packed": (torch.int32, (64, 4)),  # [out, in / 8]
        "weight_scale": (torch.bfloat16, (64, 1)),  # [out, groups]
        "weight_shape": (torch.int64, (2,)),
    }
    settings = read_settings(folder)
    assert settings["ignore"] == [
        "lm_head", r"re:model\.layers\.\d+\.block_sparse_moe\.gate$", *settings["ignore"][2:]
    ]  # fmt: skip
    library = pytest.importorskip("compressed_tensors")
    read = library.QuantizationConfig.model_validate(settings).model_dump(mode="json")
    theirs = {key: value for key, value in read.items() if value is not None}
    ours = {key: value for key, value in settings.items() if value is not None}
    assert ours == theirs | {"version": ours["version"]}


MIXED: dict[str, Schemes] = {
    "attention": lambda role: W8 if role.startswith("attention") else W4,
    "experts": lambda role: W8 if role.startswith("experts") else W4,
    # Transformers takes a pattern with shared_experts for that of the experts.
    "shared": lambda role: W8 if role.startswith("shared") else W4,
    "experts alone": lambda role: W4 if role.startswith("experts") else None,
    "3 bits, whole rows": lambda _: Scheme(3, -1),
}


@pytest.mark.parametrize("name", MIXED)
def test_transformers_reads_mixed_schemes(name: str, shared_experts: Path, tmp_path: Path) -> None:
    compare(written(rounded(shared_experts, MIXED[name]), tmp_path / "out"))


@pytest.fixture(scope="module")
def shared_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny GLM-4 MoE: blocks with a dense MLP, and shared experts."""
    folder = tmp_path_factory.mktemp("glm") / "source"
    sizes = {"head_dim": 32, "num_hidden_layers": 2, "shared_expert_intermediate_size": 64}
    make_folder(folder, "glm4_moe", **sizes)
    return folder


def test_transformers_reads_routers_under_other_names(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", "phimoe", num_hidden_layers=2)
    compare(written(rounded(tmp_path / "source"), tmp_path / "out"))


@pytest.mark.parametrize("scheme", [Scheme(4, 32, symmetric=False), Scheme(2, 16)])
def test_everything_reads_back(scheme: Scheme, tiny: Make, tmp_path: Path) -> None:
    model = rounded(tiny("qwen2_moe"), lambda role: scheme if role.endswith("up") else W8)
    folder = written(model, tmp_path / "out")
    as_source = open_checkpoint(str(folder)).model  # by the reader of sources as well
    for name, _, weight in as_source.tensors():
        if weight.scheme is not None:
            assert weight.kept
            expected = next(w for n, _, w in model.tensors() if n == name).quantized()
            assert torch.equal(weight.quantized().dequantize(), expected.dequantize())


def test_scales_of_a_source_keep_their_dtype(tiny: Make, tmp_path: Path) -> None:
    """A scale of float16 that bfloat16 does not hold, in a model of bfloat16."""
    first = written(rounded(tiny("olmoe", dtype="bfloat16")), tmp_path / "first")
    tensors = load_file(first / "model.safetensors")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].half() * (1 + 2**-10)
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    folder = written(open_checkpoint(str(first)).model, tmp_path / "again")
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_a_changed_shape_is_found(tiny: Make, tmp_path: Path) -> None:
    folder = written(rounded(tiny("olmoe")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = {f"{name}_scale": torch.full_like(tensors[f"{name}_scale"], torch.nan)}
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"weight_scale of .* is not finite"):
        dict(TARGET.tensors(folder))


# ---- what is refused, and who reads it -----------------------------------------------------------


def test_refusals(tiny: Make, tmp_path: Path) -> None:
    plain = open_checkpoint(str(tiny("olmoe"))).model
    with pytest.raises(Unsupported, match="is not quantized, nor is any other weight"):
        TARGET.accepts(plain)
    ordered = change_weights(
        quantize(plain, W4),
        lambda _, w: replace(w, scheme=Scheme(4, 32, True, True)) if w.scheme else None,
    )
    with pytest.raises(Unsupported, match=r"neighbouring inputs only; .* or export to gptq"):
        TARGET.accepts(ordered)
    make_folder(tmp_path / "gpt_oss", "gpt_oss", num_hidden_layers=1)
    other = quantize(open_checkpoint(str(tmp_path / "gpt_oss")).model, Scheme(4, 16))
    with pytest.raises(
        Unsupported,
        match="compressed-tensors does not support gpt_oss yet; targets gguf, gptq, hf and mlx",
    ):
        fit_for_targets(other, [TARGET], materialize=False)
    for_us = make_target("compressed-tensors", {"layout": "natural"})
    fit_for_targets(other, [for_us], materialize=False)


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (MIXED["attention"], {"transformers": "yes", "vLLM": "as read", "SGLang": "no"}),
        (lambda _: W4, {"transformers": "yes", "vLLM": "as read", "SGLang": "as read"}),
        (
            lambda role: W8 if role.endswith("down") else W4,
            {"transformers": "no", "vLLM": "no", "SGLang": "no"},
        ),
        (
            lambda _: Scheme(4, 32, symmetric=False),
            {"transformers": "no", "vLLM": "no", "SGLang": "no"},
        ),
        (lambda _: Scheme(4, 16), {"transformers": "yes", "vLLM": "no", "SGLang": "no"}),
    ],
)
def test_programs_that_load_it(choose: Schemes, expected: dict[str, str], tiny: Make) -> None:
    """SGLang takes for the experts the scheme of most matrices: the eights are more in blocks."""
    loaders = TARGET.loaders(rounded(tiny("olmoe", num_experts=1, num_experts_per_tok=1), choose))
    verdicts = {loader.program: loader.verdict for loader in loaders}
    assert {program: verdicts[program] for program in expected} == expected
