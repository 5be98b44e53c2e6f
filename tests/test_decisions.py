"""Decide, show, compare, apply: the choice of a recipe as a file of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import QUIET, each_family, run, save_decisions, write_text
from moe2edge.commands.decide import check_decidable, decide
from moe2edge.commands.texts import load_calibration
from moe2edge.errors import InputError
from moe2edge.model.experts import Dense
from moe2edge.model.model import Model
from moe2edge.pipeline import decisions, recipe
from moe2edge.pipeline.contract import Outcome, Pass, PassContext, Search
from moe2edge.pipeline.runner import run_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import Make

SMALL = ["calibration.samples=8", "calibration.length=64"]
SET = [part for setting in SMALL for part in ("--set", setting)]
# Every form that a block can take, and every pass that chooses.
RECIPES = {
    "experts": "[{expert_drop: {keep: 4}}]",
    "experts, unevenly": "[{expert_drop: {keep: 0.7, scope: global}}]",
    "experts, to nothing": "[{expert_drop: {keep: [0, 1, 2], clamp_top_k: true}}]",
    "experts, below top-k": "[{expert_drop: {keep: [6, 1, 2], clamp_top_k: true}}]",
    "blocks": "[{block_drop: {drop: 1}}]",
    "layers": "[{layer_drop: {drop: 1}}]",
    "layers without their norms": "[{layer_drop: {drop: 2, norm: false}}]",
    "skipping": "[expert_skip]",
    "all": "[{expert_drop: {keep: 4}}, {block_drop: {drop: 1}}, {layer_drop: {drop: 1}},"
    " {expert_skip: {quantile: 0.3}}]",
    "search": "[{expert_search: {keep: 4}}]",
    "budget": "[{expert_budget: {keep: 4}}]",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(path)
    return path


def parse(passes: str, text: Path, *settings: str) -> recipe.Recipe:
    texts = [f"{name}.text={json.dumps(str(text))}" for name in ("calibration", "evaluation")]
    return recipe.parse(f"passes: {passes}", [*texts, *SMALL, *settings])


def original(folder: Path, parsed: recipe.Recipe, work: Path) -> Model:
    """Return what an export with the recipe would write."""
    checkpoint = open_checkpoint(str(folder))
    parsed = parsed.resolve(checkpoint.model)
    tokens = load_calibration(checkpoint, parsed, QUIET)
    return run_passes(checkpoint.model, parsed, tokens, WorkFolder(work), QUIET)[0]


def applied(folder: Path, file: Path, **options: object) -> Model:
    """Return the model with a file applied, as an export does it."""
    settings = {"file": str(file), **options}
    parsed = recipe.parse(f"passes: [{{apply_decisions: {json.dumps(settings)}}}]")
    model = open_checkpoint(str(folder)).model
    (step,) = parsed.resolve(model).passes
    step.check(model)
    step.check_source(lambda: open_checkpoint(str(folder)).sha256)
    found, _ = run_passes(model, parsed.resolve(model), None, WorkFolder(file.parent), QUIET)
    assert str(found) == str(step.plan(model))
    return found


def assert_equal(a: Model, b: Model) -> None:
    assert str(a) == str(b)
    for mine, theirs in zip(a.blocks, b.blocks, strict=True):
        assert mine.expert_origins == theirs.expert_origins
        assert (mine.index, mine.origin, mine.window) == (
            theirs.index,
            theirs.origin,
            theirs.window,
        )
        if router := getattr(mine.mlp, "router", None):
            assert router.skip_below == theirs.mlp.router.skip_below  # type: ignore[union-attr]
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    for (name, role, weight), (other, other_role, same) in pairs:
        assert (name, role) == (other, other_role)
        assert torch.equal(weight.load(), same.load()), name


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
@pytest.mark.parametrize("name", RECIPES)
def test_applying_gives_the_model_of_the_recipe(
    tiny: Make, tmp_path: Path, text: Path, family: str, name: str
) -> None:
    folder, parsed = tiny(family), parse(RECIPES[name], text)
    found, steps = decide(open_checkpoint(str(folder)), parsed, QUIET)
    assert len(steps) == len(parsed.passes)
    file = tmp_path / "sets.json"
    save_decisions(found, file)
    assert decisions.read_decisions(file)[0] == found
    assert_equal(applied(folder, file), original(folder, parsed, tmp_path))


@pytest.mark.parametrize("drop", ["block_drop", "layer_drop"])
def test_dense_blocks_of_the_source_stay_as_they_are(
    tiny: Make, tmp_path: Path, text: Path, drop: str
) -> None:
    folder = tiny("qwen3_moe", mlp_only_layers=[1])
    parsed = parse(f"[{{expert_drop: {{keep: 3}}}}, {{{drop}: {{drop: 1}}}}]", text)
    found, _ = decide(open_checkpoint(str(folder)), parsed, QUIET)
    assert found.experts_before == (6, 0, 6)
    save_decisions(found, tmp_path / "sets.json")
    result = applied(folder, tmp_path / "sets.json")
    assert_equal(result, original(folder, parsed, tmp_path))
    dense = [block for block in result.blocks if block.origin == 1]
    assert all(isinstance(block.mlp, Dense) for block in dense)
    if drop == "layer_drop":
        assert found.blocks[1].model_dump()["mlp"] == "dense"
        assert len(dense) == 1


def test_the_document_says_what_stays(tiny: Make, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "sets.json"
    (tmp_path / "r.yaml").write_text(
        "passes: [{expert_drop: {keep: [0, 1, 2], criterion: magnitude, clamp_top_k: true}},"
        " {expert_skip: {quantile: 0.5}}]"
    )
    arguments: list[str | Path] = [
        "decide", tiny("qwen2_moe"), "-r", tmp_path / "r.yaml", "-o", file, "-q",
        "--calib", text, *SET,
    ]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"written: {file}\n")
    data = json.loads(file.read_text())
    weights = open_checkpoint(str(tiny("qwen2_moe"))).model
    size = [
        [
            sum(float(w.load().double().square().sum()) for w in (e.gate, e.up, e.down))
            for e in m.experts
        ]
        for _, m in weights.moe_blocks
    ]
    best = [sorted(range(6), key=lambda j, row=row: -row[j]) for row in size]  # type: ignore[misc]
    below = data["blocks"][2]["skip_below"]
    assert data["blocks"] == [
        {
            "origin": 0, "experts_before": 6, "mlp": "shared", "experts": [], "top_k": None,
            "skip_below": [],
        },
        {
            "origin": 1, "experts_before": 6, "mlp": "dense+shared", "experts": best[1][:1],
            "top_k": None, "skip_below": [],
        },
        {
            "origin": 2, "experts_before": 6, "mlp": "moe", "experts": sorted(best[2][:2]),
            "top_k": 2, "skip_below": below,
        },
    ]  # fmt: skip
    assert len(below) == 1
    assert 0 < below[0] < 1
    assert (data["kind"], data["schema_version"]) == ("moe2edge.decisions", 1)
    assert data["source"]["sha256"] == open_checkpoint(str(tiny("qwen2_moe"))).sha256
    assert recipe.parse(data["recipe"]).passes[0].model_dump()["keep"] == [0, 1, 2]
    assert data["calibration"]["samples"] == 8
    assert data["calibration"]["parts"][0]["text"] == text.name
    assert "torch" in data["versions"]
    # The same again, and as JSON.
    before = file.read_bytes()
    again = run(*arguments, "--force", "--json")
    assert again.exit_code == 0, again.output
    assert file.read_bytes() == before
    assert json.loads(again.stdout)["decisions"] == data
    shown = run("decisions", "show", file, "--json")
    assert json.loads(shown.stdout) == {"ok": True, "decisions": data}
    plain = run("decisions", "show", file).stdout
    assert "shared" in plain
    assert f"dense+shared {best[1][0]}" in plain
    assert f"{best[2][:2][0]}" in plain


def test_an_export_needs_no_calibration_then(tiny: Make, tmp_path: Path, text: Path) -> None:
    folder, file = tiny("olmoe"), tmp_path / "sets.json"
    parsed = parse("[{expert_drop: {keep: 4}}, {block_drop: {drop: 1}}]", text)
    save_decisions(decide(open_checkpoint(str(folder)), parsed, QUIET)[0], file)
    (tmp_path / "r.yaml").write_text(parsed.render())
    (tmp_path / "apply.yaml").write_text(f"passes: [{{apply_decisions: {{file: {file}}}}}]")
    small: list[str | Path] = [
        "--eval",
        text,
        "--set",
        "evaluation.samples=2",
        "--set",
        "evaluation.length=64",
    ]
    for name, source in (("out", "r.yaml"), ("again", "apply.yaml")):
        result = run(
            "export", folder, "-t", "hf", "-o", tmp_path / name, "-r", tmp_path / source, *small,
            "--keep-paths",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["calibration"] is None
    (step,) = report["steps"]
    assert all(change.startswith("block ") for change in step["changed"])
    # What was applied can be found out: the recipe of the output holds the digest of the file.
    resolved = (tmp_path / "again" / "recipe.resolved.yaml").read_text()
    assert decisions.read_decisions(file)[1] in resolved
    file.write_text(file.read_text() + "\n")
    (tmp_path / "resolved.yaml").write_text(resolved)
    result = run(
        "export", folder, "-t", "hf", "-o", tmp_path / "third", "-r", tmp_path / "resolved.yaml",
        *small,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "the recipe was made with" in result.stderr


# ---- what cannot be decided --------------------------------------------------------------------


class Computes(Search):
    """Plans no other structure."""

    def plan(self, model: Model) -> Model:
        return model


class ComputesToo(Search):
    """Drops a block, and computes numbers besides."""

    def plan(self, model: Model) -> Model:
        return model.keep_blocks([0, 1])

    def search(self, context: PassContext) -> Outcome:
        kept = context.model.keep_blocks([0, 1])
        block = kept.blocks[1]
        role, weight = next(iter(block.weights()))
        return Outcome(kept.replace_block(context.store.put(block, {role: weight.load()})), ("x",))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("[gptq]", "the recipe has gptq, which computes numbers"),
        ("[{expert_drop: {keep: 4}}, rtn]", "the recipe has rtn, which computes numbers"),
        ("[{expert_replace: {with: constant, keep: 1}}]", "expert_replace, which computes"),
        ("[{expert_replace: {with: base, budget: 0.7, rank: 1}}]", "expert_replace, which"),
        ("[{expert_merge: {method: ream, keep: 4}}]", "expert_merge, which computes numbers"),
        ("[{expert_merge: {method: m-smoe, keep: 4}}]", "expert_merge, which computes numbers"),
        ("[]", "no passes"),
        ("[{expert_drop: {keep: 6}}]", "keeps every expert"),
        # The first pass that does not fit is named, whatever stands behind it.
        ("[{expert_drop: {keep: 6}}, rtn]", "keeps every expert"),
        ("[{expert_merge: {method: ream, keep: 4}}, {expert_drop: {keep: 3}}]", "has expert_merge"),
    ],
)
def test_passes_that_compute_weights_are_refused(
    tiny: Make, text: Path, passes: str, message: str
) -> None:
    """Before any work; through the command line in test_routing."""
    model = open_checkpoint(str(tiny("mixtral"))).model
    parsed = parse(passes, text).resolve(model)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_decidable(parsed.passes, model)
    assert "\n" not in str(caught.value)


def test_a_search_that_computes_weights_is_refused(tiny: Make, text: Path) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    passes: list[Pass] = [Computes()]
    with pytest.raises(InputError, match="the recipe has test_decisions, which computes numbers"):
        check_decidable(passes, checkpoint.model)
    check_decidable([ComputesToo()], checkpoint.model)
    parsed = parse("[]", text)
    broken = recipe.Recipe(parsed.calibration, parsed.evaluation, (ComputesToo(),))
    with pytest.raises(InputError, match=r"a pass computed numbers .* of block 1"):
        decide(checkpoint, broken, QUIET)


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tiny: Make, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Four of six experts in two of three blocks of the tiny OLMoE, with skipping. Read only."""
    folder = tmp_path_factory.mktemp("sets")
    parsed = parse("[{expert_drop: {keep: 4}}, {block_drop: {drop: 1}}, expert_skip]", text)
    save_decisions(decide(open_checkpoint(str(tiny("olmoe"))), parsed, QUIET)[0], folder / "s.json")
    return folder / "s.json"


def kept_block(data: dict[str, Any]) -> dict[str, Any]:
    block: dict[str, Any] = next(b for b in data["blocks"] if not b.get("dropped"))
    return block


DAMAGE: list[tuple[str, Any, str]] = [
    ("kind", lambda d: d.update(kind="moe2edge.export"), "holds no decisions"),
    ("version", lambda d: d.update(schema_version=2), "schema_version 2, this moe2edge reads 1"),
    ("no version", lambda d: d.pop("schema_version"), "schema_version None"),
    ("no source", lambda d: d.pop("source"), r"is damaged \(source: Field required\)"),
    ("another key", lambda d: d.update(extra=1), r"is damaged \(extra: Extra inputs"),
    ("no blocks", lambda d: d.update(blocks=[]), "no block is left"),
    ("a block less", lambda d: d["blocks"].pop(0), "not those of a source, in order"),
    ("repeated", lambda d: kept_block(d).update(experts=[1, 1, 2]), r"experts \[1, 1, 2\] of 6"),
    ("out of range", lambda d: kept_block(d).update(experts=[1, 6]), r"experts \[1, 6\] of 6"),
    ("negative", lambda d: kept_block(d).update(experts=[-1, 2]), r"experts \[-1, 2\] of 6"),
    ("no integer", lambda d: kept_block(d).update(experts=[1.5, 2]), "valid integer"),
    ("text", lambda d: kept_block(d).update(top_k="2"), "valid integer"),
    ("top-k", lambda d: kept_block(d).update(top_k=5), "top_k 5 of 4 experts"),
    ("no top-k", lambda d: kept_block(d).update(top_k=None), "top_k None of 4 experts"),
    ("thresholds", lambda d: kept_block(d).update(skip_below=[0.1, 0.2]), "for top_k 2"),
    ("threshold", lambda d: kept_block(d).update(skip_below=[-0.5]), r"skip_below \[-0.5\]"),
    ("not finite", lambda d: kept_block(d).update(skip_below=[float("nan")]), "is damaged"),
    ("form", lambda d: kept_block(d).update(mlp="moa"), "is damaged"),
    ("no form", lambda d: kept_block(d).pop("mlp"), "mlp is missing"),
    ("dense of 4", lambda d: kept_block(d).update(mlp="dense"), "4 experts for mlp dense"),
    ("dropped", lambda d: kept_block(d).update(dropped=True), "a dropped block has nothing else"),
    (
        "top-k of none",
        lambda d: kept_block(d).update(mlp="none", experts=[], skip_below=[]),
        "go with mlp moe, not none",
    ),
]


@pytest.mark.parametrize(("change", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_files_are_refused(sets: Path, tmp_path: Path, change: Any, message: str) -> None:
    data = json.loads(sets.read_text())
    change(data)
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        decisions.read_decisions(tmp_path / "s.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xff", b"null"])
def test_files_of_something_else_are_refused(
    tiny: Make, tmp_path: Path, sets: Path, content: bytes
) -> None:
    (tmp_path / "s.json").write_bytes(content)
    for command in (["show"], ["compare", sets]):
        result = run("decisions", *command, tmp_path / "s.json")
        assert result.exit_code == 2
        assert "is damaged" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    (tmp_path / "r.yaml").write_text("passes: [{apply_decisions: {file: s.json}}]")
    result = run(
        "export", tiny("olmoe"), "-t", "onnx", "-o", tmp_path / "out", "-r", tmp_path / "r.yaml",
        "--set", f"apply_decisions.file={tmp_path / 's.json'}",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "is damaged" in result.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.json", "x" * 5000, "~no-such-user/s.json", str(tmp_path)):
        with pytest.raises(InputError, match=r"cannot be read .* moe2edge decide") as caught:
            decisions.read_decisions(Path(name))
        assert len(str(caught.value)) < 500


def test_output_files_that_cannot_be_written_are_refused(
    tiny: Make, tmp_path: Path, sets: Path, text: Path
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "old.json").write_bytes(sets.read_bytes())
    (tmp_path / "link.json").symlink_to(tmp_path / "old.json")
    for name, more, message in (
        ("mine.json", ["--force"], "exists and holds no decisions"),
        ("link.json", ["--force"], "exists and holds no decisions"),
        ("old.json", [], "replace it with --force"),
        ("none/s.json", [], "none does not exist; make it first"),
        (".", ["--force"], "exists and holds no decisions"),
    ):
        result = run("decide", tiny("olmoe"), "-r", "trim", "-o", tmp_path / name, *more)
        assert result.exit_code == 2
        assert message in result.stderr
    assert (tmp_path / "mine.json").read_text() == "{}"
    result = run(
        "decide", tiny("olmoe"), "-r", "trim", "-o", tmp_path / "old.json", "--force",
        "--calib", text, *SET,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "old.json").read_bytes() != sets.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


# ---- other models ------------------------------------------------------------------------------


def test_a_source_with_other_weights_is_refused(tiny: Make, sets: Path) -> None:
    other = tiny("olmoe", dtype="bfloat16")
    with pytest.raises(InputError, match=r"sha256 .*any_source: true") as caught:
        applied(other, sets)
    assert "\n" not in str(caught.value)
    found = applied(other, sets, any_source=True)
    assert decisions.describe_blocks(found) == decisions.read_decisions(sets)[0].blocks
    # On the command line, before any work.
    result = run("export", other, "-t", "onnx", "-o", sets.parent / "out", "-r", write_apply(sets))
    assert result.exit_code == 2
    assert "set any_source: true" in result.stderr


def write_apply(sets: Path) -> Path:
    path = sets.with_name("apply.yaml")
    path.write_text(f"passes: [{{apply_decisions: {{file: {sets}}}}}]")
    return path


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {}, "for olmoe with 3 blocks of 6 experts, but this model is mixtral with 3 b"),
        ("olmoe", {"num_experts": 8}, "6 experts, but this model is olmoe with 3 blocks of 8"),
        ("olmoe", {"num_hidden_layers": 4}, "but this model is olmoe with 4 blocks of 6 experts"),
    ],
)
def test_a_model_of_another_shape_is_refused(
    tiny: Make, sets: Path, family: str, changes: Mapping[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        applied(tiny(family, **changes), sets, any_source=True)
    assert "\n" not in str(caught.value)


def test_a_larger_top_k_than_the_router_has_is_refused(
    tiny: Make, sets: Path, tmp_path: Path
) -> None:
    data = json.loads(sets.read_text())
    for block in data["blocks"]:
        if not block.get("dropped"):
            block.update(top_k=3, skip_below=[])
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"is moe .* and cannot become moe of experts \[.*top-3; put"
    ):
        applied(tiny("olmoe"), tmp_path / "s.json")


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({"keep": 2}, "cannot become moe of experts"),
        (
            {"drop": 2},
            r"keep blocks \[.*\], which an earlier pass dropped; put apply_decisions first",
        ),
    ],
)
def test_experts_that_an_earlier_pass_removed_are_an_error(
    tiny: Make, sets: Path, before: dict[str, int], message: str
) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    if "keep" in before:
        for block, _ in model.moe_blocks:
            model = model.replace_block(block.keep_experts([0, 5]))
    else:
        dropped = [b.origin for b in decisions.read_decisions(sets)[0].blocks if b.dropped]
        model = model.keep_blocks(dropped)
    with pytest.raises(InputError, match=message):
        decisions.carry_out_decisions(decisions.read_decisions(sets)[0], model)


def test_they_can_follow_a_pass_that_left_what_they_keep(tiny: Make, sets: Path) -> None:
    source = open_checkpoint(str(tiny("olmoe"))).model
    found = decisions.read_decisions(sets)[0]
    model = source
    for block, _ in model.moe_blocks:
        kept = set(found.blocks[block.origin].experts)
        spare = next(j for j in range(6) if j not in kept)
        if kept:
            model = model.replace_block(block.keep_experts(sorted({*kept, spare})))
    assert model.expert_counts.count(5) == 2
    assert_equal(
        decisions.carry_out_decisions(found, model), decisions.carry_out_decisions(found, source)
    )


def test_thresholds_of_an_earlier_pass_are_not_thrown_away(
    tiny: Make, text: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny("olmoe")))
    found, _ = decide(checkpoint, parse("[{expert_drop: {keep: 4}}]", text), QUIET)
    skipping = original(tiny("olmoe"), parse("[expert_skip]", text), tmp_path)
    with pytest.raises(
        InputError, match=r"with skipping and cannot .*; put apply_decisions before"
    ):
        decisions.carry_out_decisions(found, skipping)


def test_decisions_that_keep_everything_are_refused(tiny: Make, sets: Path, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    data = decisions.read_decisions(sets)[0].model_copy(
        update={"blocks": decisions.describe_blocks(model)}
    )
    save_decisions(data, tmp_path / "s.json")
    with pytest.raises(InputError, match="keeps everything; nothing to do"):
        applied(tiny("olmoe"), tmp_path / "s.json")
