"""Commands in children of a process that has loaded the libraries, and inputs of attacks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attack.operations import Fate, Operations

# Imported before a child is forked, which would otherwise spend most of its time on them.
PRELOADED = (
    "accelerate", "click.testing", "moe2edge.cli.main", "moe2edge.commands.api",
    "moe2edge.passes.gptq", "moe2edge.runtime.torch_runtime", "moe2edge.testing",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder.configuration_encoder_decoder",
    "moe2edge.commands.decide", "moe2edge.commands.export",
    "moe2edge.commands.generate", "moe2edge.evaluation.verify", "moe2edge.runtime.load",
    "onnxruntime",
    "moe2edge.targets._onnx_decoder", "moe2edge.targets._onnx_runtime", "moe2edge.targets.gptq",
    "moe2edge.targets.hf", "moe2edge.targets.onnx", "rich.console", "rich.table", "scipy.optimize",
    "torch._dynamo", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.mixtral.modeling_mixtral", "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.tokenization_utils_tokenizers",
)  # fmt: skip
# The one file of an output that holds times, and the manifest's line for it.
TIMED = ("manifest.json", "report.json", "times.json", "run.json")
SMALL = (
    "--eval", "none", "--calib", "text.txt", "--set", "calibration.samples=4",
    "--set", "calibration.length=32", "-q",
)  # fmt: skip


def preload() -> None:
    """Import what commands import, so that a child only does the work."""
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)


@dataclass
class Ended:
    """What a command did.

    Attributes:
        code: exit code; -9 if it was killed.
        said: last line of stderr.
        names: its file operations.
        log: what was recorded of them.
    """

    code: int
    said: str = ""
    names: list[str] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)


def run_child(
    place: Path, arguments: Sequence[str], at: int | None = None, fate: Fate = "before",
    *, count: bool = False, record: bool = False,
) -> Ended:  # fmt: skip
    """Run a command in ``place`` in a child; operation ``at`` meets ``fate``.

    Args:
        place: working folder; operations below it count.
        arguments: of moe2edge.
        at: number of an operation; None: nothing happens to any.
        fate: see `Operations`.
        count: return the names of the operations.
        record: return a record of the operations, see `benchmarks.attack.power`.
    """
    aside = place.parent / f"{place.name}.aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    pid = os.fork()
    if pid == 0:
        end_child(place, arguments, aside, at, fate, count=count, record=record)
    _, status = os.waitpid(pid, 0)
    ended = Ended(os.waitstatus_to_exitcode(status))
    lines = (aside / "stderr").read_text(errors="replace").strip().splitlines()
    ended.said = lines[-1] if lines else ""
    if (aside / "log").exists():
        ended.names, ended.log = pickle.loads((aside / "log").read_bytes())
    shutil.rmtree(aside)
    return ended


def end_child(
    place: Path, arguments: Sequence[str], aside: Path, at: int | None, fate: Fate,
    *, count: bool, record: bool,
) -> None:  # fmt: skip
    """Run a command and end this process with its exit code."""
    from moe2edge.cli.main import main

    os.chdir(place)
    handle = os.open(aside / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    log: list[Any] = []
    operations = Operations(place, at, fate)
    if record:
        operations.record = lambda *event: log.append(event)
    if at is not None or count or record:
        operations.install()
    code = 1
    try:
        main(list(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException as error:  # a test of the product must not hang on its own fault
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        operations.record = None
        if count or record:
            (aside / "log").write_bytes(pickle.dumps((operations.names, log)))
        sys.stderr.flush()
        os._exit(code)


def prepare(base: Path) -> None:
    """Write a checkpoint of two families and a text."""
    from moe2edge.testing import make_checkpoint, make_tokenizer

    make_checkpoint(base / "m", "qwen3_moe", num_hidden_layers=2)
    make_tokenizer(base / "m")
    (base / "text.txt").write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(4000)))


def export(*more: str, target: str = "gptq", recipe: str = "w4") -> list[str]:
    """Return the command of an export in the folder that `prepare` wrote."""
    group = ["--set", "gptq.group_size=32"] if recipe == "w4" else []
    return ["export", "m", "-t", target, "-o", "out", "-r", recipe, *SMALL, *group, *more]


@contextlib.contextmanager
def copy_of(base: Path, name: str = "case") -> Iterator[Path]:
    """Yield a copy of a folder, which is removed afterwards."""
    place = base.parent / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def digest(folder: Path) -> dict[str, str]:
    """Return the digest of each file of an output, but of those with times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def find_leftovers(place: Path) -> list[str]:
    """Return what lies beside OUT that was not there before."""
    return sorted({path.name for path in place.iterdir()} - {"m", "text.txt", "out"})


def start_base(folder: Path) -> Path:
    """Set the environment, and make the inputs in a process of their own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    base = folder / "base"
    base.mkdir()
    pid = os.fork()  # so that no thread of a library is running when commands fork
    if pid == 0:
        prepare(base)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the inputs could not be made"
    preload()
    return base
