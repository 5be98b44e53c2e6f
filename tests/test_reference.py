"""Parts of a reference: digests, samples without near ties, the far end, a record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from tokenizers import Tokenizer, models

from helpers import ignore, run
from moe2edge.calibration import observation, walk
from moe2edge.errors import VerificationFailed
from moe2edge.evaluation import far_end
from moe2edge.evaluation.folder_record import FolderRecord
from moe2edge.evaluation.margins import MarginObserver, choose_reference_rows
from moe2edge.evaluation.tensor_digests import compute_digest
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import build_manifest
from moe2edge.testing import Make


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


def test_the_far_end_equals_a_text_at_the_first_positions(tiny: Make) -> None:
    """A placed text at positions 0 to n is an ordinary one; windows make positions consecutive."""
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    ids = torch.randint(1, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    placed = far_end.FarEndObserver(model, ids, torch.arange(20))
    hidden = walk.observe(model, ids, [placed], ignore, "")
    assert torch.allclose(placed.result().hidden, hidden[0], atol=1e-5)
    windowed = open_checkpoint(str(tiny("mixtral", sliding_window=16))).model
    chosen = far_end.choose_positions(windowed, 64)
    assert chosen is not None
    assert chosen.tolist() == list(range(112, 128))
    assert far_end.choose_positions(windowed, 113) is None


def test_a_graph_with_a_small_window_is_right_at_the_far_end(tiny: Make, tmp_path: Path) -> None:
    source, target = tiny("mixtral", sliding_window=3), ("-t", "onnx:accuracy_level=0")
    given = ("-o", tmp_path / "out", "-r", "as-is", "--eval", "none", "--no-source-check")
    found = run("export", source, *target, *given)
    assert found.exit_code == 0, found.output


def test_what_the_graph_derives_from_its_config(tiny: Make, tmp_path: Path) -> None:
    target = registry.find_target("onnx")
    target.write(open_checkpoint(str(tiny("mixtral", sliding_window=16))).model, tmp_path)
    target.check_derived(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    node = [n for n in graph.graph.node if n.op_type == "GroupQueryAttention"][1]
    window = next(a for a in node.attribute if a.name == "local_window_size")
    window.i = 80
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationFailed, match=r"layers\.1/attn.*'local_window_size': 80"):
        target.check_derived(tmp_path)
    window.i = 16
    graph.metadata_props[0].value = "4096"
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationFailed, match=r"records 4096 positions.*config\.json has 128"):
        target.check_derived(tmp_path)


def test_a_tokenizer_of_a_few_words_is_not_recorded(tmp_path: Path) -> None:
    """Its library raises an error of no type for whatever it has no token for."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    words.save(str(tmp_path / "tokenizer.json"))
    manifest = build_manifest(tmp_path, "hf")
    assert FolderRecord.make(tmp_path, manifest).tokens is None
