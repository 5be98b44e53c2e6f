"""``inspect --routing``: figures, document, table, picture and refusals."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

from helpers import run
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.evaluation import routing_report, routing_view
from moe2edge.evaluation.routing_report import REPORTED_CRITERIA
from moe2edge.model.block import Block
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.runtime import load
from moe2edge.storage import output
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

# With an end token before it, exactly three samples of 20 tokens.
TEXT = "The quick brown fox (37) jumps; over 12 lazy DOGS & 5 cats!"
IDS = torch.tensor([0] + [ord(character) - 31 for character in TEXT]).reshape(3, 20)


def inspect(*arguments: object) -> Result:
    return run("inspect", *map(str, arguments))


@pytest.fixture
def text(tmp_path: Path) -> list[object]:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return ["--text", path, "--samples", 3, "--length", 20]


def document(*arguments: object) -> dict[str, Any]:
    result = inspect(*arguments, "--routing", "--json", "-q")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def routed(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return inputs, logits, weights and ids of every router, from a transformers model."""
    seen: list[dict[str, torch.Tensor]] = []

    def keep(_: Any, args: Any, out: Any) -> None:
        logits, weights, ids = out
        seen.append({"h": args[0].reshape(-1, 64), "logits": logits, "w": weights, "ids": ids})

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(keep)
    with torch.no_grad():
        model(IDS)
    return seen


def slow_loop(router: dict[str, torch.Tensor], mlp: Any) -> list[dict[str, Any]]:
    """Figures of every expert of a layer, token by token."""
    found, experts = [], mlp.experts
    for j in range(experts.gate_up_proj.shape[0]):
        tokens, probability = 0, 0.0
        gates: list[float] = []
        outputs: list[torch.Tensor] = []
        for t in range(IDS.numel()):
            probability += float(router["logits"][t].softmax(-1)[j])
            for place, chosen in enumerate(router["ids"][t].tolist()):
                if chosen == j:
                    tokens += 1
                    gates.append(float(router["w"][t, place]))
                    gate, up = (experts.gate_up_proj[j] @ router["h"][t]).chunk(2)
                    silu = torch.nn.functional.silu(gate)
                    outputs.append((experts.down_proj[j] @ (silu * up)).detach())
        norms = [float(f.norm()) for f in outputs]
        spread = torch.stack(outputs).std(0, unbiased=False).norm() if outputs else 0
        weights = torch.cat([experts.gate_up_proj[j].flatten(), experts.down_proj[j].flatten()])
        rms = float(weights.detach().square().mean().sqrt())
        count = max(tokens, 1)
        found.append(
            {
                "tokens": tokens,
                "gate_mass": sum(gates),
                "mean_probability": probability / IDS.numel(),
                "largest_output": max((float(f.abs().max()) for f in outputs), default=0.0),
                "saliency": {
                    "routing-score": probability / IDS.numel(),
                    "frequency": tokens,
                    "soft-frequency": sum(gates),
                    "ean": sum(norms),
                    "reap": sum(g * n for g, n in zip(gates, norms, strict=True)) / count,
                    "man": sum(norms) / count,
                    "msan": sum(n * n for n in norms) / count,
                    "mone": float(spread) * sum(gates),
                    "magnitude": rms,
                    "aimer": -float(weights.detach().abs().mean()) / rms,
                },
            }
        )
    return found


def assert_equal_figures(layer: dict[str, Any], slow: list[dict[str, Any]]) -> None:
    assert len(layer["experts"]) == len(slow) == layer["expert_count"]
    routed_places = sum(s["tokens"] for s in slow)
    for n, (mine, theirs) in enumerate(zip(layer["experts"], slow, strict=True)):
        assert mine["expert"] == n
        assert mine["tokens"] == theirs["tokens"]
        assert mine["share"] == pytest.approx(theirs["tokens"] / routed_places)
        for key in ("gate_mass", "mean_probability", "largest_output"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-9), key
        assert mine["saliency"] == pytest.approx(theirs["saliency"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_figures_equal_a_loop_over_tokens(tiny: Make, family: str, text: list[object]) -> None:
    folder = tiny(family)
    found = document(folder, *text)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    routers = routed(theirs)
    assert found["tokens"] == 60
    assert [layer["block"] for layer in found["layers"]] == [0, 1, 2]
    for layer, router, block in zip(found["layers"], routers, theirs.model.layers, strict=True):
        assert_equal_figures(layer, slow_loop(router, block.mlp))
        loads = [e["tokens"] for e in layer["experts"]]
        assert sum(loads) == 120
        entropy = sum(n / 120 * math.log2(120 / n) for n in loads if n)
        assert layer["entropy_bits"] == pytest.approx(entropy)
        assert layer["entropy_limit_bits"] == pytest.approx(math.log2(6))
        spread = math.sqrt(sum((n - 20) ** 2 for n in loads) / 6)
        assert layer["coefficient_of_variation"] == pytest.approx(spread / 20)
        assert layer["unused"] == [j for j, n in enumerate(loads) if n == 0]
        ratio = max(loads) / min(loads) if min(loads) else None
        assert layer["max_min_ratio"] == pytest.approx(ratio)
        assert (layer["skipped"], layer["top_k"], layer["origin"]) == (0, 2, layer["block"])


def test_one_walk_and_one_reading_of_the_experts(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    walked: list[int] = []
    runner = BlockRunner

    def count(model: Model, block: Block, *dtype: torch.dtype) -> BlockRunner:
        walked.append(block.index)
        return runner(model, block, *dtype)

    monkeypatch.setattr(walk, "BlockRunner", count)
    read: Counter[str] = Counter()

    def counted(weight: Weight) -> Weight:
        def load() -> torch.Tensor:
            read[weight.name] += 1
            return weight.load()

        return replace(weight, load=load)

    for block in model.blocks:
        new = {role: counted(w) for role, w in block.weights() if role.startswith("experts.")}
        model = model.replace_block(block.with_weights(new))
    routing_report.measure_routing(model, IDS, lambda *_: None)
    assert walked == [0, 1, 2]
    # Once by the walk, once for the scores of weights, both of them.
    assert len(read) == 3 * 6 * 3
    assert set(read.values()) == {2}


# ---- output folders ----------------------------------------------------------------------------

DROPS = """
passes:
- expert_drop: {keep: [5, 2, 3]}
- rtn
"""
FORMS = """
passes:
- expert_drop: {keep: [5, 1, 3], clamp_top_k: true}
- expert_skip
- rtn
"""


def export(source: Path, recipe: str, folder: Path) -> Path:
    """Return a gptq output; ``folder`` is for it and the recipe."""
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    cut = [
        f"--set={part}.{size}"
        for part in ("calibration", "evaluation")
        for size in ("samples=4", "length=32")
    ]
    given = ["export", str(source), "-t", "gptq", "-o", str(folder / "out"), "-r", str(path), *cut]
    result = run(*given)
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.mark.slow
def test_uneven_quantized_output(
    tiny: Make, tmp_path: Path, text: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(tiny("mixtral"), DROPS, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["model"]["origins"] = [0, 2, 3]  # as if a block had been dropped
    (out / "manifest.json").write_text(json.dumps(manifest))
    found = document(out, *text)
    assert found["target"] == "gptq"
    assert [layer["block"] for layer in found["layers"]] == [0, 1, 2]
    assert [layer["expert_count"] for layer in found["layers"]] == [5, 2, 3]
    assert [layer["origin"] for layer in found["layers"]] == [0, 2, 3]
    theirs: Any = load.load(out, dtype=torch.float32)
    for layer, router in zip(found["layers"], routed(theirs), strict=True):
        assert_equal_figures(layer, slow_loop(router, theirs.model.layers[layer["block"]].mlp))

    drawn: list[Any] = []
    draw = routing_view._draw_figure

    def keep(*given: Any) -> Any:
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr(routing_view, "_draw_figure", keep)
    result = inspect(out, "--routing", *text, "-o", tmp_path / "uneven.png", "-q")
    assert result.exit_code == 0, result.output
    image = drawn[0].axes[0].images[0].get_array()
    assert image.shape == (3, 5)
    assert (~image.mask).sum(1).tolist() == [5, 2, 3]
    lines = [line for line in result.stdout.splitlines() if re.match(r"block \d", line)]
    assert [len(line.split()) - 2 for line in lines] == [5, 2, 3]
    assert "1 (was 2)" in result.stdout


@pytest.mark.slow
def test_layers_that_skip_and_layers_without_router(tiny: Make, tmp_path: Path) -> None:
    out = export(tiny("mixtral"), FORMS, tmp_path)
    model = output.open_stored_model(open_checkpoint(str(out)))
    found, _ = routing_report.measure_routing(model, IDS, lambda *_: None)
    # The layer with one expert is a plain MLP: nothing is routed there.
    assert [(layer.block, len(layer.experts)) for layer in found] == [(0, 5), (2, 3)]
    theirs: Any = load.load(out, dtype=torch.float32)
    for layer, router in zip(found, routed(theirs), strict=True):
        assert_equal_figures(
            layer.to_json(), slow_loop(router, theirs.model.layers[layer.block].mlp)
        )
        left_out = int((router["ids"] == len(layer.experts)).sum())
        assert layer.skipped == left_out > 0


def artifact(folder: Path, target: str, **manifest: object) -> Path:
    folder.mkdir()
    data = {"schema_version": 1, "tool": "moe2edge", "target": target, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(data | manifest))
    return folder


def test_onnx_output_is_refused(tmp_path: Path) -> None:
    result = inspect(artifact(tmp_path / "out", "onnx"), "--routing", "--json")
    assert result.exit_code == 6
    assert "-t hf or -t gptq" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_model_without_routers_is_refused(tiny: Make, tmp_path: Path, text: list[object]) -> None:
    folder = tiny("qwen3_moe", mlp_only_layers=[0, 1, 2])
    result = inspect(folder, "--routing", *text)
    assert result.exit_code == 2
    assert "no MoE layer" in result.stderr


# ---- the document ------------------------------------------------------------------------------


def test_document_is_what_the_module_says(tiny: Make, text: list[object]) -> None:
    found = document(tiny("olmoe"), *text)
    assert list(found) == [
        "ok", "schema_version", "kind", "model", "family", "target", "text", "tokens",
        "expert_cache", "criteria", "layers",
    ]  # fmt: skip
    assert (found["schema_version"], found["kind"]) == (1, "moe2edge.routing")
    assert found["family"] == "OlmoeForCausalLM"
    assert found["target"] is None
    provenance = found["text"]
    assert [provenance[key] for key in ("text", "samples", "length", "seed")] == [
        str(text[1]), 3, 20, 0,
    ]  # fmt: skip
    assert len(provenance["sha256"]) == 64
    assert tuple(found["criteria"]) == REPORTED_CRITERIA
    layer = found["layers"][0]
    assert list(layer) == [
        "block", "origin", "top_k", "expert_count", "skipped", "entropy_bits",
        "entropy_limit_bits", "coefficient_of_variation", "max_min_ratio", "unused", "experts",
    ]  # fmt: skip
    assert list(layer["experts"][0]) == [
        "expert", "tokens", "share", "gate_mass", "mean_probability", "largest_output",
        "saliency",
    ]  # fmt: skip
    assert tuple(layer["experts"][0]["saliency"]) == REPORTED_CRITERIA
    described = routing_report.__doc__ or ""
    for key in [*list(found)[1:], *layer, *layer["experts"][0]]:
        assert re.search(rf"\b{key}\b", described), key
    assert document(tiny("olmoe"), *text) == found


def test_seed_and_mix_decide_the_text(tiny: Make, tmp_path: Path, text: list[object]) -> None:
    folder, plain = tiny("mixtral"), document(tiny("mixtral"), *text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"q": "Q" * 30, "a": "a" * 30}) + "\n")
    found = document(folder, "--text", rows, "--field", "q", "--samples", 1, "--length", 20)
    assert found["text"]["sha256"] != plain["text"]["sha256"]
    both = ["--text", rows, "--template", "{q}{a}", "--samples", 2, "--length", 20]
    first, second = (document(folder, *both, "--seed", seed) for seed in (0, 3))
    assert first["text"]["sha256"] != second["text"]["sha256"]
    mix = ["--text", f"{rows}:0.5,{text[1]}:0.5", "--field", "q", "--samples", 2, "--length", 20]
    parts = document(folder, *mix)["text"]["parts"]
    assert [(part["text"], part["samples"]) for part in parts] == [
        (str(rows), 1),
        (str(text[1]), 1),
    ]


# ---- terminal and picture ----------------------------------------------------------------------


def test_terminal(tiny: Make, text: list[object]) -> None:
    result = inspect(tiny("mixtral"), "--routing", *text, "--criterion", "ean")
    assert result.exit_code == 0, result.output
    assert "lowest ean" in result.stdout
    assert "routing: 3 of 3" in result.stderr
    counts = Counter(re.findall(r"^block \d", result.stdout, re.MULTILINE))
    assert counts == {"block 0": 1, "block 1": 1, "block 2": 1}


def test_picture_beside_json(tiny: Make, tmp_path: Path, text: list[object]) -> None:
    path, model = tmp_path / "map.svg", tiny("mixtral")
    found = document(model, *text, "-o", path, "--criterion", "reap")
    assert found["picture"] == str(path)
    picture = path.read_text()
    assert "Saliency: reap" in picture
    # It may be published; what is printed names the model as it was given.
    assert "tokens of text.txt" in picture
    assert model.name in picture
    assert f"/{model.name}" not in picture
    assert found["model"] == str(model)
    assert document(tiny("mixtral"), *text).keys() == found.keys() - {"picture"}


def test_missing_matplotlib_is_reported_before_any_work(
    tiny: Make, tmp_path: Path, text: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "map.png"
    result = inspect(tiny("mixtral"), "--routing", *text, "-o", picture)
    assert result.exit_code == 6
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert "pip install 'matplotlib>=" in lines[0]
    assert not picture.exists()
    assert inspect(tiny("mixtral"), "--routing", *text, "-q").exit_code == 0


# ---- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--routing", "-o", "map.jpg"], ".png, .svg, .pdf"),
        (["--routing", "-o", "nowhere/map.png"], "nowhere does not exist; make it first"),
        (["--routing", "-o", "folder.png"], "is a folder"),
        (["--routing", "--criterion", "rep"], "did you mean 'reap'"),
        (["--routing", "--criterion", "random"], "unknown criterion"),
        (["--routing", "--text", "missing.txt", "--length", "20"], "missing.txt does not exist"),
        (["--routing", "--length", "4"], "fewer samples (--samples=15)"),
        (["--routing", "--length", "4", "--samples", "0"], "samples is 0"),
        (["--routing", "--length", "512"], "--length=128"),
        (["--text", "text.txt"], "--text needs --routing: add --routing"),
        (["-o", "map.png"], "--output needs --routing"),
        (["--criterion", "reap"], "--criterion needs --routing"),
    ],
)
def test_wrong_input_is_one_line(
    tiny: Make,
    tmp_path: Path,
    text: list[object],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    if arguments[0] == "--routing" and "--text" not in arguments:
        arguments = ["--text", "text.txt", *arguments]
    result = inspect(tiny("mixtral"), *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "--set" not in lines[0]


def test_damaged_manifest_is_reported(tiny: Make, tmp_path: Path, text: list[object]) -> None:
    folder = artifact(tmp_path / "out", "hf", model={"origins": [0, 1]})
    for path in tiny("mixtral").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    result = inspect(folder, "--routing", *text, "-q")
    assert result.exit_code == 2
    assert "does not list the indices in the source of its 3 blocks" in result.stderr


def test_help_has_an_example() -> None:
    result = inspect("--help")
    assert result.exit_code == 0
    assert "moe2edge inspect builtin:tiny-moe --routing -o routing.png" in result.stdout
