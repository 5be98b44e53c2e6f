"""`verify` finds damage also when the manifest was written anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from helpers import run, slow_except
from moe2edge.calibration import observation, walk
from moe2edge.errors import VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.evaluation.folder_record import REFERENCE
from moe2edge.evaluation.margins import MarginObserver, choose_reference_rows
from moe2edge.evaluation.reference import Reference
from moe2edge.evaluation.tensor_digests import compute_digest
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import open_artifact, write_manifest
from moe2edge.testing import Make


@pytest.fixture(scope="module")
def folders(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    text = out.parent / "text.txt"
    text.write_text("".join(chr(33 + n * n % 90) for n in range(3000)))
    result = run(
        "export", str(tiny("olmoe")), "-t", "onnx,gptq", "-o", str(out), "-r", "w4-rtn",
        "--eval", str(text), "--set", "evaluation.samples=3", "--set", "evaluation.length=64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def check(folder: Path) -> Result:
    return run("verify", str(folder))


def renew_manifest(folder: Path) -> None:
    old = dict(open_artifact(folder).manifest)
    kept = {k: v for k, v in old.items() if k in ("model", "source", "texts", "versions")}
    write_manifest(folder, str(old["target"]), **kept)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("at", slow_except([0.1, 0.5, 0.9], 0.5))
@pytest.mark.parametrize("target", ["onnx", "gptq"])
@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.slow
def test_one_flipped_bit(
    folders: Path, tmp_path: Path, target: str, at: float, renew: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders / target, folder)
    assert check(folder).exit_code == 0
    flip(folder / {"onnx": "model.onnx.data", "gptq": "model.safetensors"}[target], at)
    if renew:
        renew_manifest(folder)
    assert check(folder).exit_code == 7


EXPERTS = "model.layers.1.mlp.experts."


def gptq_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERTS}2.up_proj.scales"][0, 3] *= 2


def gptq_swap(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("qweight", "scales"):
            a, b = (f"{EXPERTS}{n}.{part}.{kind}" for n in (0, 4))
            tensors[a], tensors[b] = tensors[b], tensors[a]


# Random weights, and trained ones, on which faults change less.
both = pytest.mark.parametrize("made", slow_except(["folders", "builtin_out"], "folders"))


@both
@pytest.mark.parametrize("damage", [gptq_scale, gptq_swap])
def test_gptq_damage_under_a_new_manifest(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    made: str,
    damage: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "gptq", folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert EXPERTS in result.stderr


def onnx_array(folder: Path, name: str) -> Any:
    """Return a writable view of an initializer in the data file."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    proto = next(p for p in graph.initializer if p.name == name)
    where = {e.key: e.value for e in proto.external_data}
    dtype = {1: np.float32, 2: np.uint8}[proto.data_type]
    return np.memmap(
        folder / "model.onnx.data", dtype, "r+", int(where["offset"]), tuple(proto.dims)
    )


def onnx_scale(folder: Path) -> None:
    onnx_array(folder, "model.layers.1.moe.experts.gate_up_proj.scales")[2, 5, 0] *= 2


def onnx_swap(folder: Path) -> None:
    for part in ("gate_up_proj", "down_proj"):
        for kind in ("qweight", "scales"):
            array = onnx_array(folder, f"model.layers.1.moe.experts.{part}.{kind}")
            array[[0, 4]] = array[[4, 0]]


@both
@pytest.mark.parametrize("damage", [onnx_scale, onnx_swap])
def test_onnx_damage_under_a_new_manifest(
    request: pytest.FixtureRequest, tmp_path: Path, made: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "onnx", folder)
    damage(folder)
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert EXPERTS in result.stderr


@both
def test_logits_alone_find_swapped_experts(
    request: pytest.FixtureRequest, tmp_path: Path, made: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "onnx", folder)
    onnx_swap(folder)
    target, recorded = registry.find_target("onnx"), Reference.read(folder)
    with pytest.raises(VerificationFailed, match="logits of the output differ"):
        verify.measure_exact(recorded, target, folder)


def test_a_missing_or_damaged_reference(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders / "onnx", folder)
    (folder / REFERENCE).write_bytes(b"nothing")
    renew_manifest(folder)
    assert check(folder).exit_code == 7
    # One that an earlier version wrote, with other notes.
    old = {"ids": torch.zeros(1, 2), "logits": torch.zeros(1, 2, 2)}
    save_file(old, folder / REFERENCE, {"reference": '{"prefill": 1, "probes": {}}'})
    renew_manifest(folder)
    assert check(folder).exit_code == 7
    (folder / REFERENCE).unlink()
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert "cannot be verified" in result.stderr


def test_tensors_that_come_or_go(folders: Path) -> None:
    recorded = Reference.read(folders / "onnx")
    pairs = [(name, torch.ones(2)) for name in ("a", "b")]
    small = replace(recorded, digests={name: compute_digest(value) for name, value in pairs})
    assert verify.check_tensors(small, pairs) == 2
    with pytest.raises(VerificationFailed, match="1 tensors are missing, such as b"):
        verify.check_tensors(small, pairs[:1])
    with pytest.raises(VerificationFailed, match="was not exported"):
        verify.check_tensors(small, [*pairs, ("c", torch.ones(2))])
    with pytest.raises(VerificationFailed, match="b does not hold the values"):
        verify.check_tensors(small, [pairs[0], ("b", torch.tensor([1.0, 1.0001]))])


def test_a_digest_depends_on_every_bit_and_on_the_form() -> None:
    value = torch.randn(4, 6)
    changed = value.clone()
    changed.view(torch.int32)[3, 5] ^= 1
    scheme = Scheme(group_size=32)
    q = torch.zeros(4, 32, dtype=torch.uint8)
    packed = Quantized(q, torch.ones(4, 1), scheme)
    forms: list[torch.Tensor | Quantized] = [value, changed, value.view(6, 4), value.double(), q]
    forms += [packed, Quantized(q, torch.full((4, 1), 2.0), scheme)]
    assert len({compute_digest(form) for form in forms}) == len(forms)
    assert compute_digest(value) == compute_digest(value.clone())


def test_another_model_as_reference_is_refused(tiny: Make, folders: Path) -> None:
    for vocabulary in (52, 200):
        other = tiny("olmoe", vocab_size=vocabulary)
        result = run("verify", str(folders / "gptq"), "--reference", str(other))
        assert result.exit_code == 2, result.output
        assert f"{vocabulary} entries in its vocabulary, the folder has 96" in result.stderr


def test_a_folder_of_links_is_verified_as_the_hub_keeps_it(folders: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for n, path in enumerate(sorted((folders / "onnx").iterdir())):
        shutil.copyfile(path, blobs / f"{n:040x}")
        (folder / path.name).symlink_to(blobs / f"{n:040x}")
    result = check(folder)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("target", ["onnx", "gptq"])
def test_the_built_in_model_whole_and_with_one_flipped_bit(
    builtin_out: Path, tmp_path: Path, target: str, renew: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(builtin_out / target, folder)
    if renew:
        assert check(folder).exit_code == 0
    flip(folder / {"onnx": "model.onnx.data", "gptq": "model.safetensors"}[target], 0.6)
    if renew:
        renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert ("does not hold the values" if renew else "has changed: sha256") in result.stderr


def test_the_reference_avoids_near_ties(tiny: Make) -> None:
    """Margins equal a loop over tokens; the samples with the largest ones are taken."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = torch.randint(1, 96, (5, 20), generator=torch.Generator().manual_seed(0))
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.6,))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    observer, least = MarginObserver(12), torch.full((5,), torch.inf)

    class Loop:
        def observe(self, trace: observation.BlockTrace) -> None:
            assert trace.routing is not None
            logits = trace.routing.logits.view(5, 20, 6)
            for sample in range(5):
                for z in logits[sample, :12]:
                    p = z.softmax(0).sort(descending=True).values
                    order = z.sort(descending=True).values
                    both = torch.stack([order[1] - order[2], (p[1] / p[0] - 0.6).abs()])
                    least[sample] = torch.minimum(least[sample], both.min())

        def result(self) -> None: ...

    walk.observe(model, ids, [observer, Loop()], lambda *_: None, "")
    found = observer.result()
    assert found is not None
    assert torch.allclose(found, least, atol=1e-6)
    rows = choose_reference_rows(found, 5)
    assert rows == sorted(sorted(range(5), key=lambda n: -float(least[n]))[:2])
    assert choose_reference_rows(None, 5) == [0, 1]
    assert choose_reference_rows(None, 1) == [0]
