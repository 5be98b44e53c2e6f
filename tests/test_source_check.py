"""The source check finds what a walk reads wrongly, and names the block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe2edge
from helpers import QUIET, SMALL, each_family, run
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.commands.run_inputs import open_kept_results
from moe2edge.commands.source_check import PROOF, SourceProof, prove_source
from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.evaluation import source_check
from moe2edge.evaluation.source_check import compare_with_stock
from moe2edge.evaluation.stock_blocks import StockFailed
from moe2edge.evaluation.stock_memory import MEMORY_PARTS
from moe2edge.model.experts import Expert
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.pipeline.decisions import read_decisions
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import IMPORTED
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.export_folder import Resume
from moe2edge.storage.kept_results import RESULTS, KeptResults
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make, make_checkpoint

# Enough memory for the whole model.
WHOLE = None


def count_pairs(model: Model) -> int:
    """Return a limit of memory within which two blocks are loaded at once."""
    return IMPORTED + MEMORY_PARTS * (2 * model.block_nbytes + 1)


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
def test_each_family_agrees_whole_and_in_parts(tiny: Make, family: str) -> None:
    folder = tiny(family)
    model = open_checkpoint(folder).model
    found = [
        compare_with_stock(model, folder, within=within)
        for within in (WHOLE, IMPORTED, count_pairs(model))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].difference < 1e-5
    assert found[0].excepted == 0
    assert len(found[0].peaks) == 3


def test_files_in_16_bits_are_loaded_so(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers loads is converted to float32 afterwards, which changes no number."""
    folder = tiny("qwen3_moe", dtype="bfloat16")
    model = open_checkpoint(folder).model
    found = [compare_with_stock(model, folder, within=within) for within in (WHOLE, IMPORTED)]
    assert found[0].difference < 1e-5
    monkeypatch.setattr("moe2edge.evaluation.stock_blocks.is_narrow", lambda _: False)
    found.append(compare_with_stock(model, folder))
    assert found[0] == found[1] == found[2]


# ---- planted faults ------------------------------------------------------------------------------


def change_block(model: Model, index: int, change: Callable[[MoELayer], MoELayer]) -> Model:
    block = model.blocks[index]
    assert isinstance(block.mlp, MoELayer)
    return model.replace_block(replace(block, mlp=change(block.mlp)))


def swap_experts(model: Model) -> Model:
    def swap(layer: MoELayer) -> MoELayer:
        first, second, *others = layer.experts
        return replace(layer, experts=(second, first, *others))

    return change_block(model, 1, swap)


def transpose(model: Model) -> Model:
    def turn(weight: Weight) -> Weight:
        return replace(weight, load=lambda: weight.load().T)

    weight = model.blocks[1].attention["o_proj.weight"]
    assert weight.shape[0] == weight.shape[1]
    block = model.blocks[1].with_weights({"attention.o_proj.weight": turn(weight)})
    return model.replace_block(block)


def lose_bias(model: Model) -> Model:
    weight = model.blocks[1].attention["k_proj.bias"]
    empty = replace(weight, load=lambda: torch.zeros(weight.shape))
    return model.replace_block(model.blocks[1].with_weights({"attention.k_proj.bias": empty}))


def skip_norm(model: Model) -> Model:
    weight = model.blocks[1].norms["input_layernorm.weight"]
    ones = replace(weight, load=lambda: torch.ones(weight.shape))
    return model.replace_block(model.blocks[1].with_weights({"norms.input_layernorm.weight": ones}))


def renormalize_otherwise(model: Model) -> Model:
    return replace(model, config={**model.config, "norm_topk_prob": True})


def turn_faster(model: Model) -> Model:
    return replace(model, config={**model.config, "rope_parameters": None, "rope_theta": 5e5})


def round_otherwise(model: Model) -> Model:
    return replace(model, config={**model.config, "rms_norm_eps": 1e-2})


def lose_window(model: Model) -> Model:
    return replace(model, config={**model.config, "use_sliding_window": False})


def double_head(model: Model) -> Model:
    head = model.rest["lm_head.weight"]
    doubled = replace(head, load=lambda: 2 * head.load())
    return replace(model, rest={**model.rest, "lm_head.weight": doubled})


def shift_table(model: Model) -> Model:
    table = model.rest["model.embed_tokens.weight"]
    shifted = replace(table, load=lambda: table.load().roll(1, 0))
    return replace(model, rest={**model.rest, "model.embed_tokens.weight": shifted})


FAULTS: list[tuple[Callable[[Model], Model], str]] = [
    (swap_experts, "block 1"),
    (transpose, "block 1"),
    (lose_bias, "block 1"),
    (skip_norm, "block 1"),
    (renormalize_otherwise, "block 0"),
    (turn_faster, "the rotary embedding"),
    (round_otherwise, "block 0"),
    (lose_window, "block 0"),
    (double_head, "the last norm or the head"),
    (shift_table, "the embedding"),
]


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with biases, windows, a shared expert, and square matrices."""
    return make_checkpoint(
        tmp_path_factory.mktemp("rich"), "qwen2_moe", use_sliding_window=True, sliding_window=8,
        max_window_layers=3, norm_topk_prob=False, rope_theta=1e4,
    )  # fmt: skip


@pytest.mark.parametrize("within", [WHOLE, IMPORTED], ids=["whole", "block by block"])
@pytest.mark.parametrize(("plant", "place"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_a_planted_fault_is_found(
    rich: Path, plant: Callable[[Model], Model], place: str, within: int | None
) -> None:
    model = open_checkpoint(rich).model
    with pytest.raises(VerificationFailed, match=f"source check: .*: {place} does not give"):
        compare_with_stock(plant(model), rich, within=within)
    assert compare_with_stock(model, rich, within=within).difference < 1e-5


def test_an_expert_that_no_token_reaches_is_called(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only fault is in an expert that a text of four tokens does not reach."""
    monkeypatch.setattr(source_check, "SHORTEST", 2)
    monkeypatch.setattr(source_check, "TOKENS_PER_EXPERT", 1)
    folder = tiny("mixtral")
    model = open_checkpoint(folder).model
    found = compare_with_stock(model, folder)
    assert found.called > 0
    seen: list[tuple[int, int]] = []
    for block in range(3):
        for expert in range(6):
            try:
                compare_with_stock(double_expert(model, block, expert), folder)
            except VerificationFailed as error:
                seen += [(block, expert)] * (f"block {block}" in str(error))
    assert seen == [(block, expert) for block in range(3) for expert in range(6)]


def double_expert(model: Model, index: int, expert: int) -> Model:
    def double(layer: MoELayer) -> MoELayer:
        experts: list[Expert] = list(layer.experts)
        down = experts[expert].down
        doubled = replace(down, load=lambda: 2 * down.load())
        experts[expert] = replace(experts[expert], down=doubled)
        return replace(layer, experts=tuple(experts))

    return change_block(model, index, double)


# ---- windows that are longer than the text ------------------------------------------------------


def make_windowed(folder: Path, window: int) -> Path:
    return make_checkpoint(
        folder, "qwen2_moe", use_sliding_window=True, sliding_window=window, max_window_layers=3,
        max_position_embeddings=4096,
    )  # fmt: skip


def test_a_long_window_makes_the_text_longer(tmp_path: Path) -> None:
    folder = make_windowed(tmp_path / "model", 600)
    model = open_checkpoint(folder).model
    found = compare_with_stock(model, folder)
    assert (found.tokens, found.window) == (648, 0)
    with pytest.raises(VerificationFailed, match="block 0 does not give"):
        compare_with_stock(lose_window(model), folder)


def test_a_window_that_no_text_reaches_is_said(tmp_path: Path) -> None:
    folder = make_windowed(tmp_path / "model", 2000)
    said: list[str] = []
    proof = prove_source(open_checkpoint(folder), Reporter(said.append, lambda *_: None))
    assert (proof.status, proof.tokens <= 512, proof.window) == ("passed", True, 2000)
    assert said[-1] == "source check: windows of 2000 tokens were not reached"
    assert proof.to_record()["window"] == 2000
    # Transformers says so too where it is ours that is lost; no model has text behind its end.
    model = open_checkpoint(folder).model
    blocks = tuple(replace(block, window=None) for block in model.blocks)
    assert compare_with_stock(replace(model, blocks=blocks), folder).window == 2000
    short = make_windowed(tmp_path / "short", 4096)
    assert compare_with_stock(open_checkpoint(short).model, short).window == 0


# ---- what is excepted, and what cannot be run ----------------------------------------------------


def test_only_near_ties_are_excepted() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 0.99999], [3.0, 2.99999, 1.0]])
    assert source_check._find_near_ties(logits, 2).tolist() == [False, True, False]
    assert source_check._find_near_ties(logits, 3).tolist() == [False] * 3


def test_what_stock_cannot_run_is_said(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel\nreally")

    monkeypatch.setattr(transformers.MixtralForCausalLM, "from_pretrained", refuse)
    folder = tiny("mixtral")
    checkpoint, said = open_checkpoint(folder), list[str]()
    with pytest.raises(StockFailed, match=r"cannot run it \(RuntimeError: no such kernel really"):
        compare_with_stock(checkpoint.model, folder)
    found = prove_source(checkpoint, Reporter(said.append, lambda *_: None))
    assert (found.status, found.transformers) == ("not run", "")
    assert "source check not run: transformers" in said[0]


def test_a_config_for_another_way_to_run_does_not_matter(tiny: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("olmoe"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {"return_dict": False, "use_cache": True, "pad_token_id": 2**31}
    changes |= {"output_router_logits": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert compare_with_stock(open_checkpoint(folder).model, folder).difference < 1e-5


def test_hidden_states_beyond_float16_are_refused_early(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "mixtral", dtype="float16")
    assert prove_source(open_checkpoint(folder), QUIET, targets=[Hf()]).status == "passed"
    tensors = load_file(folder / "model.safetensors")
    for expert in range(6):
        tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"][3] = 60000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unsupported, match=r"block 1 reach \d+ and overflow in float16.*hf would"):
        prove_source(open_checkpoint(folder), QUIET, targets=[Hf()])
    assert prove_source(open_checkpoint(folder), QUIET).status == "passed"


# ---- results of earlier runs ---------------------------------------------------------------------


def test_the_result_is_kept_for_the_same_source(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    compared, said = list[Model](), list[str]()
    original = source_check.compare_with_stock

    def compare(model: Model, *more: Any, **named: Any) -> source_check.Agreement:
        compared.append(model)
        return original(model, *more, **named)

    monkeypatch.setattr(source_check, "compare_with_stock", compare)

    def prove(resume: Resume = "auto") -> tuple[SourceProof, int]:
        checkpoint = open_checkpoint(folder)
        kept = open_kept_results(checkpoint, tmp_path, resume)
        before = len(compared)
        proof = prove_source(checkpoint, Reporter(said.append, lambda *_: None), kept=kept)
        kept.save(tmp_path)
        return proof, len(compared) - before

    proof, count = prove()
    assert count == 1
    assert prove() == (proof, 0)
    assert said[-1].endswith("; of an earlier run)")
    assert prove("never") == (proof, 1)
    # A damaged line is none; another source is another one; the first one is found again.
    kept = tmp_path / RESULTS
    kept.write_bytes(kept.read_bytes().replace(b"difference", b"differenze"))
    assert prove() == (proof, 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert prove()[1] == 1
    (folder / "config.json").write_text(json.dumps(config))
    assert [prove()[1] for _ in range(2)] == [1, 0]


def test_float16_is_judged_by_a_kept_result_too(tiny: Make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "mixtral", dtype="float16"))
    kept = KeptResults()
    prove_source(checkpoint, QUIET, kept=kept)
    found = kept.get(PROOF, {})
    assert found is not None
    kept.put(PROOF, {}, {**found, "peaks": [1.0, 70000.0, 1.0]})
    with pytest.raises(Unsupported, match=r"block 1 reach 70000 and overflow in float16"):
        prove_source(checkpoint, QUIET, targets=[Hf()], kept=kept)


@pytest.mark.parametrize(
    ("name", "number", "dtype", "place"),
    [
        ("lm_head.weight", 3e38, torch.bfloat16, "the last norm or the head"),
        ("model.layers.1.block_sparse_moe.experts.0.w2.weight", 3e38, torch.bfloat16, "block 1"),
        ("model.layers.0.self_attn.v_proj.weight", 3e38, torch.float64, "block 0"),
        ("model.layers.2.block_sparse_moe.gate.weight", 3e38, torch.float32, "block 2"),
    ],
)
def test_weights_that_overflow_in_float32_are_a_fault_of_the_source(
    tmp_path: Path, name: str, number: float, dtype: torch.dtype, place: str
) -> None:
    """They are finite where they are stored, and transformers gives no numbers either."""
    folder = make_checkpoint(tmp_path / "model", "mixtral", dtype=str(dtype).removeprefix("torch."))
    tensors = load_file(folder / "model.safetensors")
    tensors[name][:2] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.sha256  # nothing in it is infinite
    with pytest.raises(InputError, match=f"{place} gives numbers that are not finite, in trans"):
        compare_with_stock(checkpoint.model, folder)


def test_numbers_that_only_the_walk_loses_are_a_difference(tiny: Make) -> None:
    folder = tiny("mixtral")
    model = open_checkpoint(folder).model
    name = "model.norm.weight"
    lost = replace(model.rest[name], load=lambda: torch.full((64,), 3e38))
    with pytest.raises(VerificationFailed, match="the last norm or the head does not give"):
        compare_with_stock(replace(model, rest={**model.rest, name: lost}), folder)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [False, True])
def test_an_export_says_if_its_source_was_checked(
    tiny: Make, tmp_path: Path, left_out: bool
) -> None:
    more = ["--no-source-check"] if left_out else []
    done = run(
        "export", tiny("mixtral"), "-t", "hf", "-o", tmp_path / "out", "-r", "as-is",
        "--eval", "none", *more,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["source_check"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())["source_check"]
    if left_out:
        assert manifest == {"status": "left out", "reason": "--no-source-check"}
        assert "source check left out (--no-source-check)" in done.stderr
        assert "source check left out" in done.stdout
    else:
        assert (manifest["status"], report["tokens"] >= 48) == ("passed", True)
        assert "source check: as transformers" in done.stderr


def test_a_difference_ends_an_export_before_any_work(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BlockRunner.__init__

    def misread(self: BlockRunner, model: Model, block: Any) -> None:
        original(self, swap_experts(model), swap_experts(model).blocks[block.index])

    monkeypatch.setattr(BlockRunner, "__init__", misread)
    for command in (
        ("export", tiny("mixtral"), "-t", "hf", "-o", tmp_path / "out", "-r", "as-is", *SMALL),
        ("decide", tiny("mixtral"), "-o", tmp_path / "sets.json", "-r", "trim", *SMALL[:4]),
    ):
        done = run(*command)
        assert done.exit_code == 7, done.output
        assert "block 1 does not give what transformers" in done.stderr
    assert not list(tmp_path.iterdir())
    recipe = {"passes": [{"expert_drop": {"keep": 4, "criterion": "magnitude"}}]}
    with pytest.raises(VerificationFailed, match="block 1 does not give what transformers"):
        moe2edge.compress(tiny("mixtral"), recipe)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_python_api_and_decisions_record_it(tiny: Make, tmp_path: Path, wanted: bool) -> None:
    recipe = {"passes": [{"expert_drop": {"keep": 4, "criterion": "magnitude"}}]}
    found = moe2edge.compress(tiny("mixtral"), recipe, source_check=wanted)
    assert found.source_check["status"] == ("passed" if wanted else "left out")
    out = tmp_path / "sets.json"
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    more = [] if wanted else ["--no-source-check"]
    done = run("decide", tiny("mixtral"), "-o", out, "-r", tmp_path / "recipe.yaml", *more)
    assert done.exit_code == 0, done.output
    said = "source check left out: --no-source-check"
    assert (said in done.stdout) is not wanted
    assert (said in run("decisions", "show", out).stdout) is not wanted
    recorded = json.loads(out.read_text())["source_check"]
    assert recorded["status"] == ("passed" if wanted else "left out")
    assert bool(recorded["transformers"]) is wanted
    # Files of earlier versions say nothing of it.
    data = json.loads(out.read_text())
    del data["source_check"]
    out.write_text(json.dumps(data))
    assert read_decisions(out)[0].source_check is None
