"""What outputs tell, and what they do not: the base model, the license, paths of the user."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from helpers import TEXT, run, write_text
from moe2edge.commands.private_paths import PrivatePaths
from moe2edge.pipeline import recipe
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.storage.hub import get_hub_id
from moe2edge.testing import Make

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def private(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a place where model and texts lie, with an output, and what the export printed."""
    place = tmp_path_factory.mktemp("place") / "of the user"
    place.mkdir()
    model = Path(shutil.copytree(tiny("mixtral"), place / "my [bold]moe"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    write_text(place / "a.txt")
    file = place / "recipe.json"
    mix = f"{place / 'a.txt'}:1, {place / 'a.txt'}x:1"
    (place / "a.txtx").write_text((place / "a.txt").read_text())
    steps = [{"expert_drop": {"keep": 4}}, {"rtn": {"group_size": 32}}]
    file.write_text(json.dumps({"passes": steps, "calibration": {"text": mix}}))
    result = run(
        "export", model, "-t", "onnx", "-o", place / "out", "-r", file, *TEXT,
        "--eval", place / "a.txt", "--set", "evaluation.samples=2", "--set", "evaluation.length=48",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return place, result


def test_no_path_of_the_user_is_in_an_output(private: tuple[Path, Any]) -> None:
    place, result = private
    for path in (place / "out").rglob("*"):
        if path.is_file():
            assert str(place).encode() not in path.read_bytes(), path.name
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["source"] == "my [bold]moe"
    assert report["evaluation"]["text"] == "a.txt"
    assert report["calibration"]["text"] == "a.txt:1, a.txtx:1"
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["source"]["model"] == "my [bold]moe"
    written = recipe.parse((place / "out" / "recipe.resolved.yaml").read_text())
    assert written.evaluation.text == "a.txt"
    # The name is no markup of rich.
    assert "my [bold]moe" in result.stdout


def test_the_card_names_the_license_and_no_base_model(private: tuple[Path, Any]) -> None:
    card = (private[0] / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert "base_model" not in front
    assert "# my [bold]moe, compressed with moe2edge" in card
    assert "are padded on the right" in card


def test_paths_are_kept_where_that_is_asked_for(tiny: Make, tmp_path: Path) -> None:
    text = write_text(tmp_path / "a.txt")
    checkpoint = open_checkpoint(tiny("mixtral"))
    settings = [
        f"calibration.text={json.dumps(f'{text}:0.5,math:0.5')}",
        f"calibration.sources={json.dumps({'math': {'text': str(text)}})}",
    ]
    parsed = recipe.parse("passes: []", settings)
    kept = PrivatePaths.collect(checkpoint, parsed, keep=True)
    assert kept.source == str(tiny("mixtral"))
    assert kept.hide_in(parsed) == parsed
    hidden = PrivatePaths.collect(checkpoint, parsed, keep=False)
    assert hidden.source == tiny("mixtral").name
    assert hidden.hide_in(parsed).calibration.text == "a.txt:0.5,math:0.5"
    assert hidden.hide_in(parsed).calibration.sources["math"].text == "a.txt"
    assert hidden.hide({"notes": (f"of {text}",), "n": 1}) == {"notes": ("of a.txt",), "n": 1}
    assert hidden.hide(f"/elsewhere{text}") == f"/elsewhere{text}"


@pytest.mark.parametrize("options", [[], ["--keep-paths"]])
def test_decisions_tell_paths_only_if_asked(tiny: Make, tmp_path: Path, options: list[str]) -> None:
    file, text = tmp_path / "sets.json", write_text(tmp_path / "a.txt")
    (tmp_path / "r.yaml").write_text("passes: [{expert_drop: {keep: 4}}]")
    result = run(
        "decide", tiny("mixtral"), "-r", tmp_path / "r.yaml", "-o", file, *TEXT, "--calib", text,
        *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = file.read_text()
    assert (str(text) in found) == (str(tiny("mixtral")) in found) == bool(options)


def test_names_on_the_hub_are_those_of_its_cache(tmp_path: Path, tiny: Make) -> None:
    snapshot = tmp_path / "models--org--some-moe" / "snapshots" / COMMIT
    shutil.copytree(tiny("mixtral"), snapshot)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.hub_id == checkpoint.name == "org/some-moe"
    assert open_checkpoint(BUILTIN).hub_id is None
    assert open_checkpoint(BUILTIN).name == BUILTIN
    for other in ("datasets--org--x/snapshots/1", "models--gpt2/snapshots/1", "org/name", "models"):
        assert get_hub_id(tmp_path / other) is None
    odd = tmp_path / "two\nlines"
    shutil.copytree(tiny("mixtral"), odd)
    assert open_checkpoint(odd).name == "two lines"


# ---- padding -----------------------------------------------------------------------------------


def test_prompts_of_a_batch_are_padded_on_the_right(private: tuple[Path, Any]) -> None:
    """Padding on the left gives other logits: cards of outputs and docs/cli.md say so."""
    import onnxruntime

    graph = str(private[0] / "out" / "model.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past")}

    def run_graph(ids: Any, mask: Any) -> Any:
        empty = {n: np.zeros((len(ids), h, 0, d), np.float32) for n, (_, h, _, d) in past.items()}
        return session.run(["logits"], {**empty, "input_ids": ids, "attention_mask": mask})[0]

    short, long = np.arange(1, 6)[None], np.arange(10, 22)[None]
    alone = run_graph(short, np.ones_like(short))[0, -1]
    for places, last, right in ((slice(0, 5), 4, True), (slice(7, 12), -1, False)):
        ids, mask = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
        ids[0, places], mask[0, places], ids[1], mask[1] = short, 1, long, 1
        difference = np.abs(run_graph(ids, mask)[0, last] - alone).max()
        assert (difference < 1e-3) == right
    assert "padded on the right" in (Path(__file__).parents[1] / "docs" / "cli.md").read_text()


# ---- tokens that the model has not -------------------------------------------------------------


def test_a_pad_token_behind_the_table_costs_nothing(tiny: Make, tmp_path: Path) -> None:
    from moe2edge.model.hf_config import build_config
    from moe2edge.runtime.torch_runtime import open_source

    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    ids = torch.arange(1, 9)[None]
    expected = open_source(folder, dtype="float32").logits(ids)
    for pad, written in ((96, None), (95, 95), (-1, -1), (-97, None)):
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        assert build_config(open_checkpoint(folder).model)["pad_token_id"] == written
        assert torch.equal(open_source(folder, dtype="float32").logits(ids), expected)


def test_ids_that_the_model_has_not_are_refused_by_every_target(builtin_out: Path) -> None:
    from moe2edge.commands.generate import continue_in
    from moe2edge.errors import InputError
    from moe2edge.runtime.torch_runtime import open_source
    from moe2edge.storage.manifest import open_artifact

    for target in ("onnx", "gptq"):
        artifact = open_artifact(builtin_out / target)
        with pytest.raises(InputError, match="token ids run from 1 to 99999, but the vocabulary"):
            list(continue_in(artifact, [1, 99999], print, max_tokens=2))
    runtime = open_source(open_checkpoint(BUILTIN).folder)
    for ids in ([1, 99999], [-1, 1]):
        with pytest.raises(InputError, match="but the vocabulary has"):
            runtime.start(ids)
        with pytest.raises(InputError, match="but the vocabulary has"):
            runtime.logits(torch.tensor([ids]))
