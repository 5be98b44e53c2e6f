"""Run commands on mutated files, and count what no command may do.

    python -m benchmarks.attack.fuzz --count 15000 [--seed 0] [--kind config] [--workers 2]

Each input is a small valid file (a config, recipe, decisions, tokenizer file, safetensors header,
manifest or graph) with one to three changes. A command runs on it in a process of its own. It may
succeed, or end with one line and a documented exit code. Counted are: tracebacks and lines that
speak of a bug, other exit codes and signals, more than 20 s of CPU or 2 GB, files outside of OUT,
OUT.partial and the lock, connections, code of a folder that is run, and exports that succeed with
logits other than those of stock transformers on the source (1e-4).

Every case is decided by its number and the seed: ``--only N`` runs one again and prints it.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attack import mutate
from benchmarks.attack.children import preload

CODES = (0, 2, 5, 6, 7, 8)
CPU_SECONDS, MEMORY = 20, 2 * 10**9
TEXT = (
    "--set", "calibration.samples=4", "--set", "calibration.length=32",
    "--set", "evaluation.samples=2", "--set", "evaluation.length=32",
)  # fmt: skip
RECIPES = (
    "passes:\n  - expert_drop: {keep: 4}\n  - gptq: {bits: 4, group_size: 32}\n",
    "passes:\n  - rtn: {bits: 4, group_size: 32, rules: [{match: q_proj, bits: 8}]}\n",
    "calibration: {samples: 4, seed: 1}\npasses:\n  - expert_merge: {method: ream, keep: 3}\n",
    "passes:\n  - block_drop: {drop: 1}\n  - awq: {steps: 2}\n",
    "passes:\n  - expert_search: {keep: 4}\n  - sparsify: {method: magnitude, sparsity: 0.5}\n",
)
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@dataclass
class Case:
    """One mutated input and the command that reads it."""

    kind: str
    place: Path
    arguments: list[str]
    compare: bool = False
    sources: tuple[str, ...] = ("m",)


@dataclass
class Found:
    """What a run did."""

    code: int
    signal: int
    cpu: float
    peak: int
    stderr: str
    events: list[str] = field(default_factory=list)
    wrong: str = ""


# ---- inputs ------------------------------------------------------------------------------------


def prepare(base: Path) -> None:
    """Write the valid inputs: checkpoints, outputs and decisions."""
    from click.testing import CliRunner

    from moe2edge.cli.main import main
    from moe2edge.testing import make_checkpoint, make_tokenizer

    for family in FAMILIES:
        make_checkpoint(base / family, family, dtype="bfloat16", num_hidden_layers=2)
        make_tokenizer(base / family)
    (base / "text.txt").write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(4000)))
    model = str(base / "mixtral")
    for target, recipe in (("onnx", "w4-rtn"), ("gptq", "w4-rtn"), ("hf", "as-is")):
        arguments = [
            "export",
            model,
            "-t",
            target,
            "-o",
            str(base / target),
            "-r",
            recipe,
            "--eval",
            "none",
        ]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
    text = ["--calib", str(base / "text.txt"), *TEXT[:4]]
    (base / "trim.yaml").write_text("passes: [{expert_drop: {keep: 4}}]\n")
    arguments = [
        "decide",
        model,
        "-r",
        str(base / "trim.yaml"),
        "-o",
        str(base / "sets.json"),
        *text,
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


def list_config_keys() -> tuple[str, ...]:
    """List the keys of the config classes of all MoE families that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys: set[str] = set()
    for kind in CONFIG_MAPPING:
        if "moe" in kind or kind in (
            *FAMILIES,
            "deepseek_v3",
            "gpt_oss",
            "jamba",
            "phimoe",
            "dbrx",
        ):
            try:
                keys |= set(CONFIG_MAPPING[kind]().to_dict())
            except Exception:  # a class of another library that is not installed
                continue
    return tuple(sorted(keys))


def make_config(place: Path, base: Path, draw: random.Random, keys: tuple[str, ...]) -> Case:
    """Change ``config.json``."""
    shutil.copytree(base / draw.choice(FAMILIES), place / "m")
    path = place / "m/config.json"
    path.write_bytes(mutate.mutate_json(path.read_bytes(), draw, keys))
    if draw.random() < 0.2:
        return Case("config", place, ["inspect", "m"])
    target = draw.choice(("hf", "hf", "onnx:accuracy_level=0"))
    arguments = ["export", "m", "-t", target, "-o", "out", "-r", "as-is", "--eval", "none"]
    return Case("config", place, arguments, compare=True)


def make_recipe(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change a recipe."""
    import yaml

    shutil.copytree(base / draw.choice(FAMILIES), place / "m")
    shutil.copy(base / "text.txt", place)
    text = draw.choice(RECIPES)
    if draw.random() < 0.7:
        tree = mutate.mutate_tree(
            yaml.safe_load(text), draw, ("keep", "drop", "bits", "passes", "seed")
        )
        text = json.dumps(tree)
    else:
        text = mutate.mutate_text(text, draw)
    (place / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    arguments = ["export", "m", "-t", draw.choice(("gptq", "onnx")), "-o", "out", "-r", "r.yaml"]
    arguments += ["--eval", "none", "--calib", "text.txt", *TEXT]
    return Case("recipe", place, arguments)


def make_decisions(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change a file of decisions."""
    shutil.copytree(base / "mixtral", place / "m")
    data = mutate.mutate_json((base / "sets.json").read_bytes(), draw)
    (place / "sets.json").write_bytes(data)
    if draw.random() < 0.3:
        return Case("decisions", place, ["decisions", "show", "sets.json"])
    (place / "r.yaml").write_text("passes: [{apply_decisions: {file: sets.json}}]\n")
    arguments = ["export", "m", "-t", "hf", "-o", "out", "-r", "r.yaml", "--eval", "none"]
    return Case("decisions", place, arguments)


def make_tokenizer_case(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change a file of the tokenizer, or another companion."""
    shutil.copytree(base / draw.choice(FAMILIES), place / "m")
    shutil.copy(base / "text.txt", place)
    names = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    name = draw.choice(names)
    path = place / "m" / name
    path.write_bytes(
        mutate.mutate_json(path.read_bytes(), draw, ("chat_template", "auto_map", "eos_token_id"))
    )
    target, recipe = draw.choice((("onnx", "w4-rtn"), ("gptq", "w4"), ("hf", "as-is")))
    arguments = ["export", "m", "-t", target, "-o", "out", "-r", recipe, "--calib", "text.txt"]
    arguments += ["--eval", "text.txt", *TEXT]
    if recipe == "w4":
        arguments += ["--set", "gptq.group_size=32"]
    return Case("tokenizer", place, arguments)


def make_header(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change the header of a safetensors file."""
    shutil.copytree(base / draw.choice(FAMILIES), place / "m")
    path = place / "m/model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    how = draw.random()
    if how < 0.7:
        header = mutate.mutate_json(header, draw, ("__metadata__", "lm_head.weight"))
        data = len(header).to_bytes(8, "little") + header + rest
    elif how < 0.85:
        data = (
            draw.choice((0, 1, 2**40, length - 1, length + 1)).to_bytes(8, "little") + header + rest
        )
    else:
        data = mutate.mutate_bytes(data[: 8 + length], draw) + rest
    path.write_bytes(data)
    arguments = ["export", "m", "-t", "hf", "-o", "out", "-r", "as-is", "--eval", "none"]
    return Case("header", place, arguments, compare=True)


def make_manifest(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change the manifest or a config of an output."""
    target = draw.choice(("onnx", "gptq", "hf"))
    shutil.copytree(base / target, place / "out")
    names = ["manifest.json"] * 3 + [p.name for p in (place / "out").glob("*.json")]
    path = place / "out" / draw.choice(sorted(names))
    path.write_bytes(mutate.mutate_json(path.read_bytes(), draw))
    if path.name != "manifest.json":
        _fit_manifest(place / "out")
    command = draw.choice((["verify", "out"], ["generate", "out", "abc", "-n", "2"]))
    return Case("manifest", place, command, sources=())


def make_graph(place: Path, base: Path, draw: random.Random, _: tuple[str, ...]) -> Case:
    """Change a graph or weight file of an output, with a manifest that fits."""
    target = draw.choice(("onnx", "onnx", "gptq"))
    shutil.copytree(base / target, place / "out")
    name = (
        draw.choice(("model.onnx", "model.onnx", "model.onnx.data"))
        if target == "onnx"
        else "model.safetensors"
    )
    path = place / "out" / name
    data = path.read_bytes()
    if name == "model.onnx" and draw.random() < 0.6:
        data = _mutate_graph(data, draw)
    else:
        data = mutate.mutate_bytes(data, draw)
    path.write_bytes(data)
    _fit_manifest(place / "out")
    return Case("graph", place, ["verify", "out"], sources=())


def _mutate_graph(data: bytes, draw: random.Random) -> bytes:
    """Change a node, an attribute or an initializer of a graph."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    node = draw.choice(list(graph.node))
    how = draw.randrange(6)
    if how == 0:
        graph.node.remove(node)
    elif how == 1 and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(list(graph.initializer)).name
    elif how == 2 and node.attribute:
        attribute = draw.choice(list(node.attribute))
        attribute.i, attribute.f = draw.choice((0, -1, 1, 7, 2**40)), draw.choice((0.0, -1.0, 1e30))
    elif how == 3:
        tensor = draw.choice(list(graph.initializer))
        if tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice((0, 1, -1, 2**40))
    elif how == 4:
        node.op_type = draw.choice(("Add", "Nothing", "MatMul", "Identity"))
    else:
        for entry in draw.choice(list(graph.initializer)).external_data:
            if draw.random() < 0.5:
                entry.value = draw.choice(("0", "-1", "99999999999", "x", "../m", "/etc/hostname"))
    return bytes(model.SerializeToString())


def _fit_manifest(folder: Path) -> None:
    """Write the digests of the files as they are into the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


Maker = Callable[[Path, Path, random.Random, tuple[str, ...]], Case]
MAKERS: dict[str, Maker] = {
    "config": make_config,
    "recipe": make_recipe,
    "decisions": make_decisions,
    "tokenizer": make_tokenizer_case,
    "header": make_header,
    "manifest": make_manifest,
    "graph": make_graph,
}
# Of twenty cases, how many of each kind.
SHARES = {
    "config": 7,
    "recipe": 4,
    "decisions": 2,
    "tokenizer": 3,
    "header": 1,
    "manifest": 2,
    "graph": 1,
}


# ---- one run -----------------------------------------------------------------------------------


def run_case(case: Case) -> Found:
    """Run the command of a case in a child of this process, which has the libraries loaded."""
    log = case.place / "stderr"
    before = {p.name for p in case.place.iterdir()}
    kept = {name: _digest_folder(case.place / name) for name in case.sources}
    (case.place / "tmp").mkdir()
    pid = os.fork()
    if pid == 0:
        _run_child(case, log)
    _, status, usage = os.wait4(pid, 0)
    events = [line for line in _read(case.place / "events").splitlines() if line]
    for name, digest in kept.items():
        if _digest_folder(case.place / name) != digest:
            events.append(f"changed the source {name}")
    allowed = {"out", "out.partial", "stderr", "events", "tmp", "wrong"}
    for name in {p.name for p in case.place.iterdir()} - before - allowed:
        if "lock" not in name:
            events.append(f"left {name}")
    return Found(
        code=os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss * 1024,
        stderr=_read(log),
        events=sorted(set(events)),
        wrong=_read(case.place / "wrong"),
    )


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path} {path.stat().st_size}".encode() + path.read_bytes())
    return digest.hexdigest()


def _run_child(case: Case, log: Path) -> None:
    """Run the command and end the process; nothing returns from here."""
    code = 99
    try:
        os.chdir(case.place)
        os.environ["TMPDIR"] = str(case.place / "tmp")
        tempfile.tempdir = None
        for number, name in ((1, os.devnull), (2, str(log))):
            handle = os.open(name, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + 1, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(6 * CPU_SECONDS)
        sys.argv = ["moe2edge", *case.arguments]
        _watch(case.place)
        code = _run_command(case)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_command(case: Case) -> int:
    from moe2edge.cli.main import main

    try:
        main(list(case.arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    else:
        code = 0
    if code == 0 and case.compare:
        try:
            off = _compare_with_stock(case.place)
        except Exception as error:  # stock cannot run what was accepted: look at it
            (case.place / "wrong").write_text(f"stock: {type(error).__name__}: {error}"[:300])
        else:
            if not off <= 1e-4:
                (case.place / "wrong").write_text(f"logits differ by {off}")
    return code


def _compare_with_stock(place: Path) -> float:
    """Return the largest difference of the output's logits to stock transformers on the source."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe2edge.pipeline.registry import make_target
    from moe2edge.storage.manifest import open_artifact

    artifact = open_artifact(place / "out")
    vocabulary = json.loads((place / "out/config.json").read_text())["vocab_size"]
    ids = (torch.arange(1, 41) % vocabulary)[None]
    runtime = make_target(artifact.target, artifact.options).reopen(artifact.folder, exact=True)
    # Padding rows matter in training only; stock fails where there is none of that number.
    stock = AutoModelForCausalLM.from_pretrained(
        place / "m", dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager", local_files_only=True, pad_token_id=None,
    )  # fmt: skip
    with torch.no_grad():
        expected = stock(ids, use_cache=False, return_dict=True).logits
    return float((runtime.logits(ids) - expected).abs().max() / expected.abs().max().clamp(min=1))


def _watch(place: Path) -> None:
    """Record files opened for writing elsewhere, connections, programs, and code of the folder."""
    inside = str(place)
    events = os.open(place / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(line: str) -> None:
        os.write(events, line.encode(errors="replace") + b"\n")

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not path.startswith((inside, "/dev/", "/proc/")):
                note(f"wrote {path}")
        elif name == "socket.connect":
            note(f"connected to {arguments[1]}")
        elif name == "subprocess.Popen":
            note(f"ran {arguments[0]}")
        elif name == "exec" and getattr(arguments[0], "co_filename", "").startswith(inside):
            note(f"ran code of {arguments[0].co_filename}")

    sys.addaudithook(hook)


# ---- all runs ----------------------------------------------------------------------------------


def judge(found: Found) -> str:
    """Return what a run did that no command may do; empty if nothing."""
    if found.signal == signal.SIGXCPU or found.cpu > CPU_SECONDS:
        return "over 20 s of CPU"
    if found.signal == signal.SIGALRM:
        return "waited for ever"
    if found.signal:
        return f"signal {found.signal}"
    if found.peak > MEMORY:
        return "over 2 GB"
    if "Traceback" in found.stderr or "a bug in moe2edge" in found.stderr:
        return "fault of moe2edge"
    if found.code not in CODES:
        return f"exit {found.code}"
    if found.events:
        return found.events[0]
    if found.wrong:
        return "wrong acceptance"
    errors = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    if found.code and len(errors) != 1:
        return "not one line"
    return ""


def choose_kind(number: int, only: str | None) -> str:
    """Return the kind of a case by its number."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    return only or kinds[number * 7 % len(kinds)]


def run_numbers(numbers: range, given: argparse.Namespace, base: Path, report: Path) -> None:
    """Run these cases, one after another, and append a line for each to ``report``."""
    from transformers.utils import logging

    preload()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keys = list_config_keys()
    with report.open("a") as lines:
        for number in numbers:
            kind = choose_kind(number, given.kind)
            with tempfile.TemporaryDirectory(dir=base.parent) as folder:
                case = MAKERS[kind](
                    Path(folder), base, random.Random(f"{given.seed} {number}"), keys
                )
                found = run_case(case)
                verdict = judge(found)
                if given.only is not None:
                    print(" ".join(case.arguments), "\n", found, "\n->", verdict or "right")
                    if given.keep:
                        shutil.copytree(folder, given.keep, dirs_exist_ok=True)
            last = found.stderr.strip().splitlines()[-1:] or [""]
            lines.write(
                json.dumps(
                    [
                        number,
                        kind,
                        found.code,
                        verdict,
                        round(found.cpu, 1),
                        found.wrong or last[0][:300],
                    ]
                )
                + "\n"
            )
            lines.flush()


def main() -> None:
    """Run all cases and print a table; exit 1 if a command did what none may do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=15000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(MAKERS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", help="with --only: copy the files of the case to this folder")
    parser.add_argument("--lines", type=Path, help="write a line of JSON for each case")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        pid = os.fork()  # so that no thread of a library is running when workers fork
        if pid == 0:
            prepare(base)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the valid inputs could not be made"
        report = given.lines or Path(folder, "lines.jsonl")
        first = given.only if given.only is not None else given.first
        last = first + (1 if given.only is not None else given.count)
        workers = []
        for worker in range(1 if given.only is not None else given.workers):
            pid = os.fork()
            if pid == 0:
                run_numbers(range(first + worker, last, given.workers), given, base, report)
                os._exit(0)
            workers.append(pid)
        for pid in workers:
            os.waitpid(pid, 0)
        rows = [json.loads(line) for line in report.read_text().splitlines()]
    sys.exit(print_table(rows, time.time() - begun))


def print_table(rows: list[list[Any]], seconds: float) -> int:
    """Print the counts by kind, and each fault with the numbers of its first cases."""
    print(f"{len(rows)} cases, {seconds:.0f} s")
    codes = sorted({row[2] for row in rows})
    print("kind".ljust(12), *(f"exit {code}".rjust(8) for code in codes), "  faults")
    for kind in MAKERS:
        own = [row for row in rows if row[1] == kind]
        counts = collections.Counter(row[2] for row in own)
        faults = sum(bool(row[3]) for row in own)
        print(kind.ljust(12), *(f"{counts[code]:8}" for code in codes), f"{faults:8}")
    faults: dict[str, list[int]] = {}
    for row in rows:
        if row[3]:
            faults.setdefault(f"{row[1]}: {row[3]}", []).append(row[0])
    for what, numbers in sorted(faults.items()):
        print(f"{what}: {len(numbers)}, such as {numbers[:8]}")
    print("largest CPU seconds:", max((row[4] for row in rows), default=0))
    return int(bool(faults))


if __name__ == "__main__":
    main()
