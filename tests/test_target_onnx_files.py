"""Files of the onnx target: the graph, what is read back from it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make

GROUPS_OF_32 = Scheme(group_size=32)
# Experts that stay in each of the three layers; the last one has its top-k clamped.
UNEVEN = ([5, 1, 3, 0], [2, 4], [3])

Open = Callable[..., Model]


@pytest.fixture(scope="session")
def opened(tiny: Make) -> Open:
    """Open a tiny checkpoint, int4 if asked for."""

    def one(weight: Weight) -> Weight:
        numbers = round_to_nearest(weight.load(), GROUPS_OF_32)
        scheme = GROUPS_OF_32
        return replace(
            weight, load=numbers.dequantize, scheme=scheme, load_quantized=lambda: numbers
        )

    def make(family: str, *, int4: bool = False, **changes: Any) -> Model:
        model = open_checkpoint(str(tiny(family, **changes))).model
        for block in model.blocks if int4 else ():
            new = {role: one(weight) for role, weight in list_quantizable(block)}
            model = model.replace_block(block.with_weights(new))
        return model

    return make


def uneven(model: Model) -> Model:
    for block, layer in model.moe_blocks:
        kept = layer.keep(UNEVEN[block.index], clamp_top_k=True)
        model = model.replace_block(replace(block, mlp=kept))
    return model


def written(model: Model, folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    Onnx(**options).write(model, folder)
    return folder


# ---- the graph ---------------------------------------------------------------------------------


def nodes_of(folder: Path) -> list[Any]:
    return list(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_operators_and_names(opened: Open, tmp_path: Path) -> None:
    model = uneven(opened("olmoe", int4=True))
    folder = written(model, tmp_path)
    onnx.checker.check_model(folder / "model.onnx")
    nodes = {node.name: node for node in nodes_of(folder)}
    assert len(nodes) == len(nodes_of(folder))
    found = [attributes(nodes[f"/model/layers.{n}/moe/QMoE"]) for n in range(3)]
    assert [a["k"] for a in found] == [2, 2, 1]
    assert {a["normalize_routing_weights"] for a in found} == {1}
    assert {a["weights_prepacked"] for a in found} == {0}
    # Two of two experts, and one of one, hold all the mass: nothing to multiply by.
    assert [name for name in nodes if name.endswith("mass/Mul")] == ["/model/layers.0/moe/mass/Mul"]


def test_unquantized_graphs_use_the_moe_operator(opened: Open, tmp_path: Path) -> None:
    nodes = nodes_of(written(opened("olmoe"), tmp_path))
    kinds = {node.op_type for node in nodes}
    assert "MoE" in kinds
    assert not kinds & {"QMoE", "MatMulNBits"}


def test_tied_weights_are_stored_once_in_their_dtype(opened: Open, tmp_path: Path) -> None:
    model = opened("mixtral", tie_word_embeddings=True, dtype="bfloat16")
    graph = onnx.load(written(model, tmp_path) / "model.onnx", load_external_data=False).graph
    tables = [t for t in graph.initializer if list(t.dims) == [96, 64]]
    assert [t.data_type for t in tables] == [onnx.TensorProto.BFLOAT16]


def test_two_writes_give_the_same_bytes(opened: Open, tmp_path: Path) -> None:
    model = opened("qwen2_moe", int4=True)
    first, second = written(model, tmp_path / "a"), written(model, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["config.json", "genai_config.json", "model.onnx", "model.onnx.data"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("int4", [False, True], ids=["plain", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_size_is_predicted(family: str, int4: bool, opened: Open, tmp_path: Path) -> None:
    model = uneven(opened(family, int4=int4))
    size = (written(model, tmp_path) / "model.onnx.data").stat().st_size
    assert Onnx().estimate(model).disk == pytest.approx(size, rel=0.02)


def test_an_expert_at_a_time_is_in_memory(opened: Open, tmp_path: Path) -> None:
    model = opened("mixtral")
    live, peak = 0, 0

    def watched(weight: Weight) -> Weight:
        def load() -> Tensor:
            nonlocal live, peak

            def gone() -> None:
                nonlocal live
                live -= weight.nbytes

            tensor = weight.load()
            live += weight.nbytes
            peak = max(peak, live)
            weakref.finalize(tensor, gone)
            return tensor

        return replace(weight, load=load)

    for block in model.blocks:
        new = {role: watched(weight) for role, weight in block.weights()}
        model = model.replace_block(block.with_weights(new))
    written(model, tmp_path)
    expert = model.moe_blocks[0][1].experts[0]
    assert (
        0
        < peak
        <= expert.gate.nbytes + expert.up.nbytes + model.blocks[0].attention["q_proj.weight"].nbytes
    )


def test_accuracy_level_reaches_every_quantized_node(opened: Open, tmp_path: Path) -> None:
    model = opened("qwen2_moe", int4=True, mlp_only_layers=[1])
    for level in (0, 4):
        nodes = nodes_of(written(model, tmp_path, accuracy_level=level))
        levels = {
            attributes(node).get("accuracy_level")
            for node in nodes
            if node.op_type in ("QMoE", "MatMulNBits")
        }
        assert levels == {level}
    with pytest.raises(InputError, match="accuracy_level is 0"):
        Onnx(accuracy_level=2)


# ---- reading back ------------------------------------------------------------------------------


def assert_same_tensors(model: Model, folder: Path) -> None:
    found = dict(Onnx().tensors(folder))
    assert sorted(found) == sorted(name for name, _, _ in model.tensors())
    for name, _, weight in model.tensors():
        tensor = found[name]
        if weight.scheme is None:
            assert isinstance(tensor, Tensor)
            assert tensor.dtype == weight.load().dtype
            assert torch.equal(tensor, weight.load())
        else:
            assert isinstance(tensor, Quantized)
            assert tensor.scheme == weight.scheme
            assert torch.equal(tensor.q, weight.quantized().q)
            assert torch.equal(tensor.scales, weight.quantized().scales)
            assert (tensor.zeros is None) is weight.scheme.symmetric


@pytest.mark.parametrize("int4", [False, True], ids=["plain", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_read_back_equal(
    family: str, dtype: str, int4: bool, opened: Open, tmp_path: Path
) -> None:
    model = uneven(opened(family, int4=int4, dtype=dtype))
    assert_same_tensors(model, written(model, tmp_path))


def test_biases_and_dense_layers_are_read_back(opened: Open, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"attention_bias": True, "mlp_only_layers": [1]}
    model = opened("qwen3_moe", int4=True, **changes).keep_blocks([1, 2])
    assert_same_tensors(model, written(model, tmp_path))


def damage_data(folder: Path) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:-100])


def damage_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 64)


def drop_data(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def point_elsewhere(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())


DAMAGES: list[Callable[[Path], None]] = [damage_data, damage_graph, drop_data, point_elsewhere]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_named(
    damage: Callable[[Path], None], opened: Open, tmp_path: Path
) -> None:
    folder = written(opened("mixtral"), tmp_path)
    damage(folder)
    with pytest.raises(VerificationFailed, match=r"model\.onnx"):
        list(Onnx().tensors(folder))
    with pytest.raises(VerificationFailed, match=r"model\.onnx"):
        Onnx().reopen(folder)


def test_one_flipped_byte_is_one_changed_tensor(opened: Open, tmp_path: Path) -> None:
    model = opened("olmoe", int4=True)
    folder = written(model, tmp_path)
    data = np.memmap(folder / "model.onnx.data", np.uint8, mode="r+")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (experts,) = (
        t for t in graph.initializer if t.name == "model.layers.1.moe.experts.down_proj.qweight"
    )
    offset = next(int(e.value) for e in experts.external_data if e.key == "offset")
    data[offset + 64 * 16] ^= 1  # the first byte of the second expert: 64 rows of 32 numbers each
    data.flush()
    changed = [
        name
        for (name, tensor), (_, _, weight) in zip(
            sorted(Onnx().tensors(folder), key=lambda t: t[0]),
            sorted(model.tensors(), key=lambda t: t[0]),
            strict=True,
        )
        if isinstance(tensor, Quantized) and not torch.equal(tensor.q, weight.quantized().q)
    ]
    assert changed == ["model.layers.1.mlp.experts.1.down_proj.weight"]


# ---- configs -----------------------------------------------------------------------------------


def test_genai_config(opened: Open, tmp_path: Path) -> None:
    model = opened("qwen3_moe", eos_token_id=[5, 7], pad_token_id=None).keep_blocks([0, 2])
    found = json.loads((written(model, tmp_path) / "genai_config.json").read_text())
    decoder = found["model"].pop("decoder")
    assert decoder["session_options"]["session.intra_op.allow_spinning"] == "1"
    assert found == {
        "model": {
            "type": "decoder",
            "vocab_size": 96,
            "context_length": 128,
            "bos_token_id": 0,
            "eos_token_id": [5, 7],
            "pad_token_id": 5,
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": 128,
            "past_present_share_buffer": True,
        },
    }
    sizes = {key: decoder[key] for key in ("head_size", "hidden_size", "num_hidden_layers")}
    assert sizes == {"head_size": 32, "hidden_size": 64, "num_hidden_layers": 2}
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    names = {value.name for value in (*graph.input, *graph.output)}
    patterns = [v for part in ("inputs", "outputs") for v in decoder[part].values()]
    assert names == {p.replace("%d", str(n)) for p in patterns for n in range(2)}


def test_genai_ends_where_the_generation_config_says(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    found = json.loads((written(opened("olmoe"), tmp_path) / "genai_config.json").read_text())
    assert found["model"]["eos_token_id"] == [3, 9]


def test_config_is_that_of_the_cut_model(opened: Open, tmp_path: Path) -> None:
    model = opened("mixtral").keep_blocks([0, 2])
    config = json.loads((written(model, tmp_path) / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


# ---- refusals ----------------------------------------------------------------------------------


def refused(model: Model) -> Iterator[tuple[str, Model]]:
    """Models that the graph cannot hold, with what the message says."""
    block, layer = model.moe_blocks[0]

    def with_layer(**changes: Any) -> Model:
        return model.replace_block(replace(block, mlp=replace(layer, **changes)))

    def with_expert(expert: Any) -> Model:
        return with_layer(experts=(expert, *layer.experts[1:]))

    def with_scheme(role: str, scheme: Scheme) -> Model:
        weight = dict(block.weights())[role]
        return model.replace_block(block.with_weights({role: replace(weight, scheme=scheme)}))

    bias = Weight("bias", (6,), "F32", load=lambda: torch.zeros(6))
    first = layer.experts[0]
    yield "bias per expert", with_layer(router=replace(layer.router, per_expert={"bias": bias}))
    yield "w3a16.*holds 2, 4, 8 bits", with_scheme("attention.o_proj.weight", Scheme(bits=3))
    yield "per channel.*slower", with_scheme("attention.o_proj.weight", Scheme(group_size=-1))
    yield "groups of 48", with_scheme("attention.o_proj.weight", Scheme(group_size=48))
    yield "groups of 128 do not", with_scheme("attention.o_proj.weight", Scheme())
    yield (
        "the graph holds this tensor in full precision only, and factors",
        with_scheme("router.weight", GROUPS_OF_32),
    )
    yield "experts differ", with_scheme("experts.0.gate", GROUPS_OF_32)
    narrow = replace(first, gate=replace(first.gate, shape=(16, 64)))
    yield "experts differ", with_expert(narrow)
    yield "experts differ", with_expert(replace(first, down=replace(first.down, dtype="BF16")))


def test_models_that_the_graph_cannot_hold_are_refused(opened: Open, tmp_path: Path) -> None:
    model = opened("mixtral")
    for message, bad in refused(model):
        with pytest.raises(Unsupported, match=message):
            Onnx().accepts(bad)
    with pytest.raises(Unsupported, match="heads of size 24"):
        Onnx().accepts(opened("qwen3_moe", head_dim=24))
    for family in FAMILIES:
        Onnx().accepts(opened(family))


def test_a_missing_or_old_runtime_is_named(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(opened("mixtral"), tmp_path)
    monkeypatch.setattr("onnxruntime.__version__", "1.30.2")
    with pytest.raises(Unsupported, match=r"onnxruntime 1\.30\.2 lacks"):
        Onnx().reopen(folder)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match=r"pip install 'onnxruntime>="):
        Onnx().reopen(folder)


def test_importing_the_target_imports_nothing_heavy() -> None:
    code = (
        "import sys, moe2edge.targets.onnx; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'transformers', 'numpy') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_loaders_are_named(opened: Open) -> None:
    verdicts = {loader.program: loader.verdict for loader in Onnx().loaders(opened("mixtral"))}
    assert verdicts == {
        "onnxruntime": "yes",
        "onnxruntime-genai": "yes",
        "onnxruntime, CUDA": "no",
        "optimum-onnx": "yes",
        "OpenVINO": "no",
    }
