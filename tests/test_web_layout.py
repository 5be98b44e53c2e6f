"""The web layout of the onnx target: its files, refusals and card; and who runs it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import quote

import onnx
import pytest
import torch

from helpers import SMALL, run
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.targets import _onnx_web, _web_runtime
from moe2edge.targets._onnx_storage import compute_offsets
from moe2edge.targets._web_runtime import MODULES, find_modules, find_node
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

EXAMPLE = Path(__file__).parents[1] / "examples" / "web"
PLAIN, WEB = Onnx(), Onnx(layout="web")
W4 = Scheme(group_size=32)
IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(5))


def opened(tiny: Make, family: str = "olmoe", scheme: Scheme | None = W4) -> Model:
    model = open_checkpoint(str(tiny(family, dtype="bfloat16"))).model
    return quantize(model, scheme) if scheme else model


def written(model: Model, folder: Path, target: Onnx = WEB) -> Path:
    target.accepts(model)
    folder.mkdir(exist_ok=True)
    target.write(model, folder)
    return folder


@pytest.fixture(scope="module")
def small(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output with its manifest. Do not write there."""
    out = tmp_path_factory.mktemp("web") / "out"
    result = run(
        "export", tiny("olmoe", dtype="bfloat16"), "-t", "onnx:layout=web", "-o", out, *SMALL,
        "-r", "w4-rtn", "--set", "rtn.group_size=32", "--no-source-check", "-q", "--eval", "none",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of npm packages that has onnxruntime-web; skips where there is none."""
    if not os.environ.get(MODULES) and (EXAMPLE / "node_modules").is_dir():
        monkeypatch.setenv(MODULES, str(EXAMPLE / "node_modules"))
    try:
        find_node()
        return find_modules()[0]
    except Unsupported as error:
        pytest.skip(str(error))


def test_a_folder_has_the_files_and_the_config_of_transformers_js(small: Path) -> None:
    names = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()}
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"} <= names
    assert not {"model.onnx", "genai_config.json"} & names
    config = json.loads((small / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": 1}
    assert config["model_type"] == "olmoe"
    model = onnx.load(small / "onnx" / "model.onnx", load_external_data=False)
    assert {entry.value for t in model.graph.initializer for entry in t.external_data[:1]} == {
        "model.onnx_data"
    }
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16]
    levels = {
        node.op_type: any(a.name == "accuracy_level" for a in node.attribute)
        for node in model.graph.node
    }
    assert (levels["QMoE"], levels["MatMulNBits"]) == (False, True)
    card = (small / "README.md").read_text()
    assert 'model_type: "qwen3_moe"' in card
    assert "- onnxruntime-web: yes" in card


def test_logits_are_those_of_the_plain_layout(tiny: Make, tmp_path: Path) -> None:
    model = opened(tiny, "qwen3_moe")
    plain, web = (written(model, tmp_path / t.layout, t) for t in (PLAIN, WEB))
    assert verify.audit(WEB, web, WEB.stored(model)) > 50
    exact = PLAIN.reopen(plain, exact=True).logits(IDS)
    assert (WEB.reopen(web, exact=True).logits(IDS) - exact).abs().max() < 1e-5
    assert WEB.estimate(model).disk == (web / "onnx" / "model.onnx_data").stat().st_size
    assert "config: alike" not in WEB.describe_use(model)


def test_data_goes_to_files_that_browsers_read(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tiny)
    whole = WEB.reopen(written(model, tmp_path / "whole"), exact=True).logits(IDS)
    batches = WEB._build(WEB.stored(model)).batches
    monkeypatch.setattr(_onnx_web, "FILE_BYTES", compute_offsets(batches)[1] // 3)
    folder = written(model, tmp_path / "parts")
    names = sorted(path.name for path in (folder / "onnx").glob("*_data*"))
    assert names[:2] == ["model.onnx_data", "model.onnx_data_1"]
    files = [path.stat().st_size for path in (folder / "onnx").glob("*_data*")]
    assert max(files) <= _onnx_web.FILE_BYTES
    assert sum(files) == WEB.estimate(model).disk
    WEB.check_derived(folder)
    assert verify.audit(WEB, folder, WEB.stored(model)) > 50
    assert torch.equal(WEB.reopen(folder, exact=True).logits(IDS), whole)
    (folder / "onnx" / names[-1]).unlink()
    with pytest.raises(VerificationFailed, match=r"config\.json has .* as transformers\.js_config"):
        WEB.check_derived(folder)


def test_what_npm_does_not_run_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one_group = opened(tiny, scheme=Scheme(4, 32, symmetric=False))
    PLAIN.accepts(one_group)
    with pytest.raises(Unsupported, match=r"down_proj.* one group for each row, of which onnxrunt"):
        WEB.accepts(one_group)
    WEB.accepts(opened(tiny, scheme=Scheme(4, 16, symmetric=False)))
    WEB.accepts(opened(tiny, scheme=Scheme(8, 32, symmetric=False)))
    with pytest.raises(
        Unsupported, match=r"experts of 3 bits need onnxruntime 1\.32 or newer, and"
    ):
        WEB.accepts(
            quantize(opened(tiny, scheme=None), Scheme(3, 32), lambda role: "experts" in role)
        )
    with monkeypatch.context() as patch:
        patch.setattr(_onnx_web, "MODEL_BYTES", 10_000)
        with pytest.raises(
            Unsupported, match=r"in memory, and onnxruntime-web holds at most 0\.0 GB"
        ):
            WEB.accepts(opened(tiny))
    monkeypatch.setattr(_onnx_web, "FILE_BYTES", 10_000)
    with pytest.raises(Unsupported, match=r"and a browser reads less than 0\.0 GB into one buffer"):
        WEB.accepts(opened(tiny))


def test_without_node_python_runs_it_and_says_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODULES, str(tmp_path))
    if shutil.which("node") is None:
        monkeypatch.setattr(_web_runtime, "find_node", lambda: "node")
    done = run("verify", small, "--json")
    assert done.exit_code == 0, done.output
    (said,) = json.loads(done.stdout)["not_checked"]
    assert "has no onnxruntime-web" in said
    assert "npm install --prefix ~/.moe2edge onnxruntime-web" in said
    text = run("generate", small, "abc", "-n", "3")
    assert (text.exit_code, "note: target onnx runs it in Python" in text.stderr) == (0, True)
    (tmp_path / "onnxruntime-web").mkdir()
    (tmp_path / "onnxruntime-web" / "package.json").write_text('{"version": "1.22.0"}')
    with pytest.raises(Unsupported, match=r"onnxruntime-web 1\.22\.0 in .* needs 1\.30 or newer"):
        find_modules()


@pytest.mark.parametrize(
    ("script", "said"), [(None, "it is not on the PATH"), ("echo v18.1.0", "this one is v18.1.0")]
)
def test_node_itself_is_missing_or_old(
    script: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        (tmp_path / "node").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "node").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match=f"by Node 20 or newer, and {said}: install Node"):
        find_node()


def test_node_runs_it(small: Path, modules: Path) -> None:
    done = run("verify", small, "--json")
    assert done.exit_code == 0, done.output
    elsewhere = json.loads(done.stdout)["elsewhere"]
    assert elsewhere["parity"]["shipped"] < 1e-4
    assert "onnxruntime-web" in elsewhere["program"]
    text = run("generate", small, "abc", "-n", "8")
    assert (text.exit_code, "in wasm, by Node" in text.stderr) == (0, True)


def test_a_graph_that_it_refuses_fails(small: Path, tmp_path: Path, modules: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(small, folder)
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "QMoE")
    node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    (folder / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationFailed, match=r"onnxruntime-web .* refuses .*accuracy_level"):
        WEB.reopen_elsewhere(folder)


# ---- the example, in Chromium --------------------------------------------------------------------


def start_server(model: Path) -> Any:
    spec = spec_from_file_location("serve", EXAMPLE / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_server(model)


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    server = start_server(model)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium")
    if not (EXAMPLE / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("there are no packages: npm install, in examples/web")
    return found


def read_console(browser: str, address: str, profile: Path) -> str:
    """Open a page without a window; return what it writes to the console, up to its answer."""
    log = profile.with_suffix(".log")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={profile}", "--enable-logging=stderr", address,
    ]  # fmt: skip
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(240):
                if re.search('"(answered|failed): ', log.read_text(errors="replace")):
                    break
                time.sleep(0.25)
        finally:
            process.terminate()
    return log.read_text(errors="replace")


def test_the_server_serves_both_folders_and_no_other(tmp_path: Path) -> None:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.wasm").write_text("x")
    (tmp_path / "secret").write_text("x")
    with served(tmp_path / "model") as address:
        with urlopen(f"{address}/model/a.wasm") as found:
            assert found.headers["Content-Type"] == "application/wasm"
            assert found.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with urlopen(f"{address}/chat.mjs") as found:
            assert found.headers["Content-Type"] == "text/javascript"
        with pytest.raises(HTTPError, match="404") as refused:
            urlopen(f"{address}/model/%2e%2e/secret")
        refused.value.close()


@pytest.mark.slow
def test_the_page_streams_a_turn(tmp_path: Path) -> None:
    browser = find_browser()
    prompt, out = "def read_json(path):\n", tmp_path / "out"
    result = run(
        "export", BUILTIN, "-t", "onnx:layout=web:accuracy_level=0", "-o", out, "-r", "w4-rtn",
        "--no-source-check", "-q", "--eval", "none",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = subprocess.run(
        [sys.executable, "-m", "moe2edge", "generate", str(out), prompt, "-n", "16"],
        capture_output=True, text=True, check=True, env={**os.environ, MODULES: str(tmp_path)},
    ).stdout  # fmt: skip
    with served(out) as address:
        said = read_console(
            browser, f"{address}/?tokens=16&prompt={quote(prompt)}", tmp_path / "profile"
        )
    found = re.search(r'"answered: (\{.*\})", source', said)
    assert found, said[-2000:]
    answer = json.loads(found[1])
    assert answer["tokens"] == 16
    assert answer["speed"] > 0
    assert text.strip().endswith(answer["text"].strip())
