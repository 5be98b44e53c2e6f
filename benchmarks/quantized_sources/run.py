"""Trim folders that other programs quantized, and compare the integers of what stays.

    sh benchmarks/slimming/install_peers.sh PEERS       # GPTQModel, llm-compressor
    python3 -m venv PEERS/autoround && PEERS/autoround/bin/pip install torch==2.13.0 \
        auto-round==0.16.1 transformers==5.23.0 compressed-tensors==0.20.1
    python -m benchmarks.quantized_sources.run PEERS WORK > benchmarks/quantized_sources/results.md

Tiny random Mixtral and Qwen3-MoE models are quantized by each program in its own environment.
Each folder is exported with half of its experts to ``gptq``, which also runs it. The integers of
source and result are unpacked by `benchmarks.slimming.dequantize`, which shares nothing with
moe2edge but the definition. Readers of compressed-tensors are compared with its own compressor.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.slimming.dequantize import unpack
from moe2edge.storage.source_formats.recognition import find_source_format
from moe2edge.storage.source_formats.stored_tensors import StoredTensors
from moe2edge.testing import make_checkpoint, make_tokenizer

HERE = Path(__file__).parent
SLIMMING = HERE.parent / "slimming"
FAMILIES = ("mixtral", "qwen3_moe")
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 32, "intermediate_size": 64,
    "moe_intermediate_size": 64, "num_local_experts": 8,
}  # fmt: skip
GROUP = "32"
# Order of AWQ: the column that lies in each 4 bits of a word.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
EXPERT = re.compile(r".*layers\.(\d+)\..*experts\.(\d+)\.(\w+)")
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


# ---- folders of others ---------------------------------------------------------------------------


def list_peers(peers: Path, model: Path, tokens: Path) -> Iterator[tuple[str, list[object]]]:
    """Yield a name and the command of each quantization; the last argument is the folder."""
    gptqmodel = [peers / "gptqmodel/bin/python", SLIMMING / "peer_gptqmodel.py", model, tokens]
    compressor = [peers / "llmcompressor/bin/python", SLIMMING / "peer_llmcompressor.py"]
    auto = [peers / "autoround/bin/python", HERE / "peer_autoround.py", model]
    common = ["--group-size", GROUP]
    yield "GPTQModel", [*gptqmodel, "OUT", *common]
    yield "GPTQModel, desc_act", [*gptqmodel, "OUT", *common, "--act-order"]
    yield "llm-compressor", [*compressor, model, tokens, "OUT", *common]
    yield "auto-round, auto_gptq", [*auto, "OUT", "auto_gptq", "--sym"]
    yield "auto-round, auto_gptq asymmetric", [*auto, "OUT", "auto_gptq"]
    yield "auto-round, auto_awq", [*auto, "OUT", "auto_awq"]
    yield "auto-round, llm_compressor", [*auto, "OUT", "llm_compressor", "--sym"]


def quantize(command: list[object], out: Path) -> str:
    """Run a program; return the end of what it said if it failed."""
    if (out / "config.json").exists():
        return ""
    filled = [str(out if part == "OUT" else part) for part in command]
    done = subprocess.run(filled, capture_output=True, text=True, cwd=out.parent, check=False)
    out.with_suffix(".txt").write_text(done.stdout + done.stderr)
    if done.returncode == 0 and not (out / "config.json").exists():
        inner = [path.parent for path in out.rglob("config.json")]
        if inner:
            out.rename(out.with_name("moved"))
            (out.with_name("moved") / inner[0].relative_to(out)).rename(out)
    said = [line for line in done.stderr.splitlines() if re.match(r"\w*(Error|Exception)", line)]
    return "" if (out / "config.json").exists() else (said or ["no config.json"])[-1][:120]


# ---- integers ------------------------------------------------------------------------------------


def read_integers(folder: Path) -> dict[tuple[int, int, str], tuple[Tensor, ...]]:
    """Read integers, zero points and scales of each matrix of an expert, [out, ...]."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    stems = {name.rpartition(".")[0] for name in tensors if ".experts." in name}
    found = {}
    for stem in stems:
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{stem}.")}
        match = EXPERT.fullmatch(stem)
        assert match is not None, stem
        layer, expert, part = match.groups()
        key = int(layer), int(expert), PARTS.get(part, part)
        found[key] = decode(parts, settings)
    return found


def decode(parts: Mapping[str, Tensor], settings: Mapping[str, object]) -> tuple[Tensor, ...]:
    """Unpack one matrix of any of the three formats to one form."""
    if "weight_packed" in parts:
        q, scales = unpack(parts["weight_packed"], 4), parts["weight_scale"].float()
        return q, torch.full(scales.shape, 8), scales
    scales = parts["scales"].T.float()
    if str(settings["quant_method"]) == "awq" or "awq" in str(settings.get("packing_format")):
        columns = torch.tensor(AWQ_COLUMNS).argsort()
        q, zeros = (
            unpack(parts[name], 4).view(len(parts[name]), -1, 8)[..., columns].flatten(1).T
            for name in ("qweight", "qzeros")
        )
        return q, zeros, scales
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    q, zeros = unpack(parts["qweight"].T, 4), unpack(parts["qzeros"], 4).T
    return q, (zeros + less) % 16, scales


def compare(source: Path, result: Path) -> str:
    """Compare the kept experts of a result with those of its source; return a sentence."""
    old, new = read_integers(source), read_integers(result)
    layers = sorted({layer for layer, _, _ in new})
    equal, kept = 0, []
    for layer in layers:
        sources = sorted({expert for at, expert, _ in old if at == layer})
        chosen = []
        for expert in sorted({expert for at, expert, _ in new if at == layer}):
            same = [
                n
                for n in sources
                if all(
                    torch.equal(a, b)
                    for part in PARTS.values()
                    for a, b in zip(old[layer, n, part], new[layer, expert, part], strict=True)
                )
            ]
            equal += 3 * bool(same)
            chosen += same[:1]
        kept.append(chosen)
    return f"{equal} of {len(new)} matrices equal (experts {kept})"


# ---- the study -----------------------------------------------------------------------------------


def trim(folder: Path, out: Path, steps: list[dict[str, object]]) -> tuple[str, str]:
    """Export a folder; return what the report says of the source, and the error."""
    recipe = out.with_suffix(".json")
    recipe.write_text(json.dumps({"passes": steps}))
    sizes = [
        option
        for purpose in ("calibration", "evaluation")
        for option in ("--set", f"{purpose}.samples=4", "--set", f"{purpose}.length=48")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "moe2edge", "export", folder, "-t", "gptq", "-o", out, "-r", recipe,
         "--force", "--json", "--calib", "general", *sizes],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return "", f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}"
    report = json.loads(done.stdout)
    found = report["source_format"]["gptq"]
    counts = f"kept {found['kept']}, plain {found['dequantized']}, anew {found['requantized']}"
    return f"{found['name']}: {counts}; source check {report['source_check']['status']}", ""


def compare_compressor(peers: Path, work: Path) -> Iterator[str]:
    """Compare readers with compressed-tensors' own compressor; yield lines of a table."""
    out = work / "compressor"
    command = [str(peers / "llmcompressor/bin/python"), str(HERE / "peer_compressor.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    for folder in sorted(out.iterdir()):
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        form = find_source_format(config, StoredTensors(dict.fromkeys(load_file(path), path)))
        ((name, theirs),) = load_file(folder / "decompressed.safetensors").items()
        assert form is not None
        weight = form.weight(name, tuple(theirs.shape))
        assert weight is not None
        own = weight.load().to(theirs.dtype)
        yield f"| {folder.name} | {form.name} | {torch.equal(own, theirs)} |"


def main() -> None:
    """Run the study, and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peers", type=Path)
    parser.add_argument("work", type=Path)
    given = parser.parse_args()
    work, peers = given.work.resolve(), given.peers.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(1, 96, (16, 64)))
    print("# Folders of other programs, trimmed to four of eight experts\n")
    print("| made by | family | what the report says | integers of the experts that stay |")
    print("|---|---|---|---|")
    for family in FAMILIES:
        model = work / family
        if not model.exists():
            sizes = {k: v for k, v in SIZES.items() if family != "mixtral" or "moe_" not in k}
            make_tokenizer(make_checkpoint(model, family, dtype="bfloat16", **sizes))
        for number, (name, command) in enumerate(list_peers(peers, model, tokens)):
            folder = work / f"{family}-{number}"
            failed = quantize(command, folder)
            if failed:
                print(f"| {name} | {family} | made no folder: {failed} | - |", flush=True)
                continue
            for path in model.glob("token*"):  # some programs write none
                shutil.copyfile(path, folder / path.name)
            steps: list[dict[str, object]] = [{"expert_drop": {"keep": 4}}]
            said, error = trim(folder, work / f"out-{family}-{number}", steps)
            equal = "-" if error else compare(folder, work / f"out-{family}-{number}")
            print(f"| {name} | {family} | {said or error} | {equal} |", flush=True)
    print("\n# Numbers of compressed-tensors' own compressor\n")
    print("| scheme | read as | equal to the bit |\n|---|---|---|")
    for line in compare_compressor(peers, work):
        print(line, flush=True)


if __name__ == "__main__":
    main()
