"""Run commands of the moe2edge that this interpreter has, each in a fresh fork.

`same_bytes.py` starts one in each environment. Slow imports are done once; every command then
runs in a process of its own, which begins in the same state.

On stdin, one JSON document a line: ``{"argv": [...], "cwd": "..."}``, or ``{"ask": "about"}`` or
``{"ask": "commands"}``. On stdout, one line for each: ``{"code", "stdout", "stderr", "seconds"}``,
or the answer.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

# Words for people, which may differ.
PROSE = ("help", "short_help", "epilog", "deprecated", "callback")
WARM = (
    "torch", "transformers.modeling_utils", "transformers.models.olmoe.modeling_olmoe",
    "transformers.models.mixtral.modeling_mixtral", "scipy.linalg", "scipy.optimize", "onnx",
    "onnxruntime", "safetensors.torch", "tokenizers", "rich.table", "psutil", "yaml", "pydantic",
)  # fmt: skip


def find_program() -> Any:
    """Return the click command behind ``moe2edge``, wherever this version keeps it."""
    scripts = importlib.metadata.entry_points(group="console_scripts", name="moe2edge")
    return next(iter(scripts)).load()


def describe() -> dict[str, Any]:
    """Return folders of the packages, whether the loops are compiled, and versions."""
    import moe2edge
    import moe2edge.passes
    import moe2edge.targets

    try:
        import moe2edge._columns as columns

        compiled = bool(columns)
    except ImportError:
        compiled = False
    names = ("moe2edge", "torch", "transformers", "peft", "numpy", "scipy", "onnx", "onnxruntime")
    return {
        "folders": {
            "moe2edge": moe2edge.__path__[0],
            "passes": moe2edge.passes.__path__[0],
            "targets": moe2edge.targets.__path__[0],
        },
        "compiled": compiled,
        "versions": {
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in names},
        },
    }


def strip(value: Any) -> Any:
    """Return a description of commands without words for people."""
    if isinstance(value, dict):
        return {key: strip(part) for key, part in value.items() if key not in PROSE}
    if isinstance(value, list | tuple):
        return [strip(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def list_commands(program: Any) -> Any:
    """Return every command and option as click describes them."""
    import click

    return strip(program.to_info_dict(click.Context(program)))


def run_forked(work: Callable[[], object], cwd: str) -> dict[str, Any]:
    """Run ``work`` in a fork that starts in ``cwd``, and return how it ended and what it wrote."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.chdir(cwd)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                work()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": texts[0],
        "stderr": texts[1],
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program = find_program()
    for name in WARM:
        __import__(name)

    def run(argv: list[str]) -> None:
        sys.argv = ["moe2edge", *argv]
        program()

    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            argv = list(request["argv"])
            answer = run_forked(lambda argv=argv: run(argv), request["cwd"])
        else:
            answer = describe() if request["ask"] == "about" else list_commands(program)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
