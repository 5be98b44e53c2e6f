"""Show how a program refuses a folder: the reasons of verdicts ``no`` that were run.

    python benchmarks/readers/refusals.py openvino out-onnx
    python benchmarks/readers/refusals.py mlx-lm out-gptq

Needs the program: ``pip install openvino==2026.4.1`` or ``pip install -e '.[mlx]'``. Exits with 1
if the program takes the folder.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path


def open_in_openvino(folder: Path) -> None:
    """Compile the graph for a CPU."""
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    core.compile_model(core.read_model(folder / "model.onnx"), "CPU")


def open_in_mlx_lm(folder: Path) -> None:
    """Load the model."""
    importlib.import_module("mlx_lm").load(str(folder))


PROGRAMS = {"openvino": open_in_openvino, "mlx-lm": open_in_mlx_lm}


def main() -> int:
    """Print the error; return the exit code."""
    program, folder = sys.argv[1], Path(sys.argv[2])
    print(f"{program} {version(program)}")
    try:
        PROGRAMS[program](folder)
    except Exception as error:  # whatever it may raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {lines[0][:300]}")
        print(*(line[:300] for line in lines[1:8] if "src/" not in line), sep="\n")
        return 0
    print("it takes the folder")
    return 1


if __name__ == "__main__":
    sys.exit(main())
