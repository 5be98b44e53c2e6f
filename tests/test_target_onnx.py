"""Logits of the onnx target in ONNX Runtime, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import each_family, slow_except
from moe2edge.errors import InputError
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets import _onnx_runtime
from moe2edge.targets._onnx_runtime import OnnxRuntime
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

GROUPS_OF_32 = Scheme(group_size=32)
TOLERANCE = 1e-4
# Which experts stay in which of the three layers, in which order; layer 2 has its top-k clamped.
EVEN = ([4, 0, 2],) * 3
UNEVEN = ([5, 1, 3, 0], [2, 4], [3])
KEPT_BLOCKS = [0, 2]


def ids_of(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 96, (batch, length), generator=generator)


# ---- our side: models --------------------------------------------------------------------------


def keep(model: Model, experts: tuple[list[int], ...]) -> Model:
    for block, layer in model.moe_blocks:
        kept = layer.keep(experts[block.index], clamp_top_k=True)
        model = model.replace_block(replace(block, mlp=kept))
    return model


CUTS: dict[str, Callable[[Model], Model]] = {
    "whole": lambda model: model,
    "even": lambda model: keep(model, EVEN),
    "uneven": lambda model: keep(model, UNEVEN),
    "block": lambda model: model.keep_blocks(KEPT_BLOCKS),
}


# ---- the other side: transformers, operated on -------------------------------------------------


def reference(folder: Path) -> Any:
    """Stock transformers with what is in ``folder``, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def keep_experts(stock: Any, experts: tuple[list[int], ...]) -> None:
    for layer, ids in zip(stock.model.layers, experts, strict=True):
        gate, fused = layer.mlp.gate, layer.mlp.experts
        gate.weight = torch.nn.Parameter(gate.weight[ids])
        gate.top_k = min(gate.top_k, len(ids))
        gate.num_experts = fused.num_experts = len(ids)
        fused.gate_up_proj = torch.nn.Parameter(fused.gate_up_proj[ids])
        fused.down_proj = torch.nn.Parameter(fused.down_proj[ids])


def keep_layers(stock: Any, indices: list[int]) -> None:
    stock.model.layers = torch.nn.ModuleList(stock.model.layers[i] for i in indices)


OPERATIONS: dict[str, Callable[[Any], None]] = {
    "whole": lambda stock: None,
    "even": lambda stock: keep_experts(stock, EVEN),
    "uneven": lambda stock: keep_experts(stock, UNEVEN),
    "block": lambda stock: keep_layers(stock, KEPT_BLOCKS),
}


def stock_logits(stock: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = stock(ids, use_cache=False).logits
    return logits


def dequantized_checkpoint(source: Path, model: Model, folder: Path) -> Path:
    """Return a transformers checkpoint with the numbers that the integers of ``model`` mean."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: weight.load().float().contiguous() for name, _, weight in model.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- pairs of both -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A model of ours, and the checkpoint that transformers opens for the same numbers."""

    model: Model
    checkpoint: Path


Pairs = Callable[..., Pair]


@pytest.fixture(scope="session")
def pair(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Make pairs, each once."""
    made: dict[str, Pair] = {}

    def make(family: str, *, int4: bool = False, **changes: Any) -> Pair:
        key = f"{family} {int4} {sorted(changes.items())}"
        if key not in made:
            source = tiny(family, **changes)
            model = open_checkpoint(str(source)).model
            if int4:
                model = quantize(model, GROUPS_OF_32)
                folder = tmp_path_factory.mktemp(family) / "dequantized"
                source = dequantized_checkpoint(source, model, folder)
            made[key] = Pair(model, source)
        return made[key]

    return make


def written(model: Model, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    Onnx().write(model, folder)
    return folder


def assert_logits(folder: Path, stock: Any, ids: Tensor) -> None:
    """Compare a batch at once, and the first row step by step, with uncached transformers."""
    expected = stock_logits(stock, ids)
    runtime = Onnx().reopen(folder, exact=True)
    assert (runtime.logits(ids) - expected).abs().max() < TOLERANCE
    tokens = ids[0].tolist()
    found = [runtime.start(tokens[:-32]), *(runtime.step(t) for t in tokens[-32:])]
    assert (torch.stack(found) - expected[0, -33:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("int4", [False, True], ids=["plain", "int4"])
@pytest.mark.parametrize("family", each_family("qwen3_moe"))
def test_logits_equal_transformers(
    family: str, int4: bool, cut: str, pair: Pairs, tmp_path: Path
) -> None:
    both = pair(family, int4=int4)
    model = CUTS[cut](both.model)
    model.verify()
    stock = reference(both.checkpoint)
    OPERATIONS[cut](stock)
    assert_logits(written(model, tmp_path), stock, ids_of(40, batch=2))


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mixtral", {"sliding_window": 8}),
    "tied": ("mixtral", {"tie_word_embeddings": True}),
    "tied bfloat16": ("mixtral", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    "bfloat16": ("qwen2_moe", {"dtype": "bfloat16"}),
    "float16": ("qwen3_moe", {"dtype": "float16"}),
    "wide heads": ("mixtral", {"head_dim": 48}),
    "windows of some layers": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "no bias": ("qwen2_moe", {"qkv_bias": False}),
    "renormalized qwen2": ("qwen2_moe", {"norm_topk_prob": True}),
    "dense layer with bias": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "dense layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "switched window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
    "bias of all": ("qwen3_moe", {"attention_bias": True}),
    "renormalized qwen3": ("qwen3_moe", {"norm_topk_prob": True}),
    "clip": ("olmoe", {"clip_qkv": 0.7}),
    "bias under norms": ("olmoe", {"attention_bias": True}),
    **{
        kind: (family, {"rope_parameters": rope})
        for (kind, rope), family in zip(
            ROPES.items(), ("olmoe", "qwen3_moe", "qwen2_moe"), strict=True
        )
    },
}


@pytest.mark.parametrize("int4", slow_except([False, True], True), ids=["plain", "int4"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.slow
def test_switches_of_configs(switch: str, int4: bool, pair: Pairs, tmp_path: Path) -> None:
    family, changes = SWITCHES[switch]
    both = pair(family, int4=int4, **changes)
    assert_logits(written(both.model, tmp_path), reference(both.checkpoint), ids_of(48))


@pytest.mark.parametrize(
    "choose",
    [
        lambda role: role.startswith("attention"),
        lambda role: role.startswith(("experts", "shared")),
        lambda role: role.endswith(("q_proj.weight", "shared.gate", "o_proj.weight")),
    ],
    ids=["attention", "experts", "odd ones"],
)
def test_a_model_may_be_quantized_in_part(
    choose: Callable[[str], bool], pair: Pairs, tmp_path: Path
) -> None:
    both = pair("qwen2_moe", dtype="bfloat16")
    model = quantize(both.model, GROUPS_OF_32, choose)
    stock = reference(dequantized_checkpoint(both.checkpoint, model, tmp_path / "reference"))
    folder = written(model, tmp_path / "onnx")
    assert_logits(folder, stock, ids_of(40))


def test_groups_of_64(tiny: Make, tmp_path: Path) -> None:
    source = tiny("olmoe", hidden_size=128, intermediate_size=64)
    model = quantize(open_checkpoint(str(source)).model, Scheme(group_size=64))
    stock = reference(dequantized_checkpoint(source, model, tmp_path / "reference"))
    assert_logits(written(model, tmp_path / "onnx"), stock, ids_of(40))


def test_caches_grow_up_to_the_last_position(
    pair: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_runtime, "SMALLEST_CACHE", 4)
    both = pair("mixtral")
    runtime = Onnx().reopen(written(both.model, tmp_path))
    ids = ids_of(128)
    expected = stock_logits(reference(both.checkpoint), ids)[0]
    tokens = ids[0].tolist()
    found = [runtime.start(tokens[:3]), *(runtime.step(t) for t in tokens[3:])]
    assert (torch.stack(found) - expected[2:]).abs().max() < TOLERANCE
    with pytest.raises(InputError, match="129 tokens, but the model has 128 positions"):
        runtime.step(0)
    assert (runtime.start(tokens[:5]) - expected[4]).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", [False, True], ids=["whole", "window"])
@pytest.mark.parametrize(("chunk", "length"), [(None, 600), (None, 512), (7, 40), (1, 5), (40, 40)])
def test_a_prompt_in_chunks_equals_a_whole_run(
    chunk: int | None,
    length: int,
    window: bool,
    pair: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk is not None:
        monkeypatch.setattr(_onnx_runtime, "CHUNK", chunk)
    changes = {"sliding_window": 20} if window else {}
    both = pair("mixtral", int4=True, max_position_embeddings=1024, **changes)
    runtime = Onnx().reopen(written(both.model, tmp_path), exact=True)
    assert isinstance(runtime, OnnxRuntime)
    rows: list[int] = []
    bind = runtime._bind_output

    def record(name: str, array: Any) -> None:
        if name == "logits":
            rows.append(array.shape[1])
        bind(name, array)

    monkeypatch.setattr(runtime, "_bind_output", record)
    ids = ids_of(length + 20)
    whole = runtime.logits(ids)[0]
    tokens = ids[0].tolist()
    for _ in range(2):  # the second time with caches that hold another sequence
        found = [runtime.start(tokens[:length]), *(runtime.step(t) for t in tokens[length:])]
        assert (torch.stack(found) - whole[length - 1 :]).abs().max() < TOLERANCE
    assert max(rows) == min(chunk or 256, length)


def test_a_prompt_that_cannot_be_run_is_refused_before_its_first_chunk(
    pair: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_runtime, "CHUNK", 2)
    runtime = Onnx().reopen(written(pair("mixtral").model, tmp_path))
    assert isinstance(runtime, OnnxRuntime)
    monkeypatch.setattr(runtime, "_extend", None)
    with pytest.raises(InputError, match="the vocabulary has 96"):
        runtime.start([1, 2, 3, 96])
    with pytest.raises(InputError, match="129 tokens, but the model has 128 positions"):
        runtime.start([1] * 129)


# ---- accuracy level ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_activations_stay_near(family: str, pair: Pairs, tmp_path: Path) -> None:
    # Weights of a trained model's size: large ones blow up any error from layer to layer.
    both = pair(family, int4=True, initializer_range=0.05)
    ids = ids_of(64)
    expected = stock_logits(reference(both.checkpoint), ids)[0]
    found = Onnx().reopen(written(both.model, tmp_path)).logits(ids)[0]
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert 1e-3 < error < 0.03


def test_sequences_that_cannot_be_run(pair: Pairs, tmp_path: Path) -> None:
    runtime = Onnx().reopen(written(pair("mixtral").model, tmp_path))
    with pytest.raises(InputError, match="begin a sequence first"):
        runtime.step(0)
    with pytest.raises(InputError, match="at least one token"):
        runtime.start([])
    with pytest.raises(InputError, match="129 tokens"):
        runtime.logits(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(InputError, match="the vocabulary has 96"):
        runtime.start([1, 96])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_only_what_is_left_to_decide_is_in_the_graph(
    tiny: Make, family: str, tmp_path: Path
) -> None:
    """As many experts as are chosen: nothing to sort; one: no router; none: nothing at all."""
    model = open_checkpoint(str(tiny(family))).model
    for block, ids in zip(model.blocks, ([4, 1], [3], []), strict=True):
        model = model.replace_block(block.keep_experts(ids, clamp_top_k=True))
    Onnx().write(model, tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    for index in range(3):
        here = [node for node in nodes if node.name.startswith(f"/model/layers.{index}/")]
        kinds = {node.op_type for node in here}
        assert not kinds & {"TopK", "Softmax"}
        assert ("MoE" in kinds) is (index == 0)
        assert any("/router/" in node.name for node in here) is (index == 0)
        plain = [node.name for node in here if "/mlp/gate_up_proj" in node.name]
        assert bool(plain) is (index == 1)
