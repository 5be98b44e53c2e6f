"""A checkout with an environment of its own, and the worker that runs its commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Side:
    """A checkout with its environment, its folder and its worker."""

    name: str
    checkout: Path
    python: Path
    folder: Path
    core: int
    about: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def start(self) -> None:
        """Start the worker, and check that it runs the sources of the checkout, compiled.

        Raises:
            SystemExit: it does not.
        """
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._worker = subprocess.Popen(
            [self.python, "-P", HERE / "_same_bytes_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, **dict.fromkeys(threads, "1"), "HF_HUB_OFFLINE": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, {self.core}),
        )
        self.about = self._ask({"ask": "about"})
        folders = {name: Path(place) for name, place in self.about["folders"].items()}
        sources = {**folders, "moe2edge": self.checkout / "moe2edge"}
        sources |= {name: self.checkout / name for name in ("passes", "targets")}
        for name, place in folders.items():
            if hash_sources(place) != hash_sources(sources[name]):
                raise SystemExit(f"{self.python} has another {name} than {self.checkout}")
        if not self.about["compiled"]:
            raise SystemExit(f"{self.python} has no compiled loops; install {self.checkout} again")
        self.digest = "".join(hash_sources(place) for place in sources.values())

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        line = self._worker.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} ended; see above")
        return json.loads(line)

    def list_commands(self) -> Any:
        """Return the tree of commands and options."""
        return self._ask({"ask": "commands"})

    def run(self, argv: Sequence[str]) -> dict[str, Any]:
        """Run a command in this side's folder; return code, stdout and stderr."""
        found: dict[str, Any] = self._ask({"argv": list(argv), "cwd": str(self.folder)})
        return found

    def export(self, argv: Sequence[str], out: str) -> dict[str, Any]:
        """Run a command that writes the folder ``out``, unless an earlier run did the same."""
        note = self.folder / f"{out}.json"
        key = [self.digest, *argv]
        if note.exists() and (found := json.loads(note.read_text()))["key"] == key:
            return dict(found)
        shutil.rmtree(self.folder / out, ignore_errors=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        found = {**self.run(argv), "key": key}
        note.write_text(json.dumps(found))
        return dict(found)

    @property
    def commit(self) -> str:
        """Commit of the checkout, and whether files differ from it."""
        command = ["git", "-C", self.checkout, "describe", "--always", "--dirty", "--abbrev=7"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or "no git checkout"

    def stop(self) -> None:
        """End the worker."""
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait()


def hash_sources(folder: Path) -> str:
    """Return a digest over the source files of a package."""
    digest = hashlib.sha256()
    kinds = (".py", ".yaml", ".c") if (folder / "recipes").exists() else (".py",)
    found = {
        str(path.relative_to(folder)): path
        for path in folder.rglob("*")
        if path.suffix in kinds and not {"passes", "targets"} & set(path.relative_to(folder).parts)
    }
    # An installed package has no C source.
    for name in sorted(name for name in found if not name.endswith(".c")):
        digest.update(f"{name}\0{hashlib.sha256(found[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def make_environment(checkout: Path, folder: Path) -> Path:
    """Install a checkout into a virtual environment of its own, and return its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {checkout} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # From a copy: building leaves files in the sources.
        with tempfile.TemporaryDirectory() as parent:
            copy = Path(parent) / "checkout"
            shutil.copytree(
                checkout, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "*.so")
            )
            options = ["-c", copy / "constraints.txt", f"{copy}[cpu,train]"]
            subprocess.run([python, "-m", "pip", "install", "-q", *options], check=True)
        (folder / "complete").touch()
    return python
