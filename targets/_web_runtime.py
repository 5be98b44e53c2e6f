"""A web folder, run in onnxruntime-web (wasm) by Node, in a process of its own.

The package is looked for in one folder, never in the working folder: that may be the model's own,
and what comes with a model is not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from moe2edge.errors import InputError, Unsupported
from moe2edge.storage.text_files import read_json
from moe2edge.targets._child_process import ModelProcess, ProcessRuntime
from moe2edge.targets._onnx_storage import GRAPH_FILE

# Environment variable with another folder of npm packages.
MODULES = "MOE2EDGE_NODE_MODULES"
PACKAGE = "onnxruntime-web"
OLDEST_NODE, OLDEST_PACKAGE = 20, (1, 30)
INSTALL_WEB = f"npm install --prefix ~/.moe2edge {PACKAGE}"
WORKER = Path(__file__).with_name("_web_worker.mjs")


def find_node() -> str:
    """Return the path of Node.

    Raises:
        Unsupported: it is missing or too old.
    """
    node = shutil.which("node") or shutil.which("nodejs")
    said = ""
    if node is not None:
        run = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
        said = run.stdout.strip()
        version = re.match(r"v(\d+)\.", said)
        if version and int(version[1]) >= OLDEST_NODE:
            return node
    found = f"this one is {said or 'broken'}" if node else "it is not on the PATH"
    raise Unsupported(
        f"a web folder runs in {PACKAGE} by Node {OLDEST_NODE} or newer, and {found}: install Node "
        f"(nodejs.org), then: {INSTALL_WEB}"
    )


def find_modules() -> tuple[Path, str]:
    """Return the folder of npm packages, and the version of onnxruntime-web in it.

    Raises:
        Unsupported: it has none, or one that is too old.
    """
    modules = Path(os.environ.get(MODULES) or Path.home() / ".moe2edge" / "node_modules").absolute()
    file = modules / PACKAGE / "package.json"
    try:
        version = str(read_json(file)["version"])
    except (InputError, KeyError) as error:
        raise Unsupported(
            f"{modules} has no {PACKAGE}, which runs a web folder: {INSTALL_WEB}, or name another "
            f"folder node_modules in {MODULES}"
        ) from error
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_PACKAGE:
        oldest = ".".join(map(str, OLDEST_PACKAGE))
        raise Unsupported(
            f"{PACKAGE} {version} in {modules} lacks operators of this graph, which needs {oldest} "
            f"or newer: {INSTALL_WEB}"
        )
    return modules, version


class WebRuntime(ProcessRuntime):
    """Runs one sequence at a time in onnxruntime-web.

    Attributes:
        note: what runs it, in one line.
    """

    def __init__(self, place: Path, positions: int) -> None:
        """Open a graph.

        Args:
            place: the folder of the graph.
            positions: of the model.

        Raises:
            Unsupported: Node or the package is missing or too old.
            VerificationFailed: onnxruntime-web refuses the graph.
        """
        import torch

        node, (modules, version) = find_node(), find_modules()
        threads = torch.get_num_threads()
        command = [node, str(WORKER), str(modules)]
        path = (place / GRAPH_FILE).absolute()
        process = ModelProcess(f"{PACKAGE} {version}", command, path, {}, threads=threads)
        super().__init__(process, positions, threads)
        self.note = f"{PACKAGE} {version} runs it, in wasm, by Node"
