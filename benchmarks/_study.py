"""Rows of a study that may be stopped: kept one by one, never made twice. Helpers of reports."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2edge import Reporter

Row = dict[str, Any]
QUIET = Reporter(lambda _: None, lambda *_: None)


@dataclass(frozen=True)
class Job:
    """A row that a study needs.

    Attributes:
        model: that it is about; None if it is about none.
        key: name of the row, once for each model.
        make: measures, and returns the rest of the row.
    """

    model: str | None
    key: str
    make: Callable[[], Row]


class Study:
    """The rows in a file of JSON lines."""

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self.path = path
        self._retry_failed = retry_failed

    def read(self) -> list[Row]:
        """Return all rows; of several with one model and key the last, in the first one's place."""
        if not self.path.exists():
            return []
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return list({(row.get("model"), row["key"]): row for row in rows}.values())

    def list_missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs without a row, and those that failed if they are to be tried again."""
        done = {
            (row.get("model"), row["key"])
            for row in self.read()
            if not (self._retry_failed and "failed" in row)
        }
        return [job for job in jobs if (job.model, job.key) not in done]

    def run(self, jobs: Iterable[Job], describe: Callable[[Row], str] = lambda _: "") -> None:
        """Make every row that is missing and append it at once; print progress.

        Args:
            jobs: in order.
            describe: what to print about a row.
        """
        missing = self.list_missing(jobs)
        begun = time.perf_counter()
        for n, job in enumerate(missing, start=1):
            about = {"model": job.model} if job.model is not None else {}
            row = {**about, "key": job.key, **job.make()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - begun) / n * (len(missing) - n)
            name = job.key if job.key.startswith(job.model or "") else f"{job.model} {job.key}"
            print(
                f"[{n}/{len(missing)}] {name}: {describe(row)}; about {left / 60:.0f} min left",
                flush=True,
            )


# ---- the command line --------------------------------------------------------------------------


def make_parser(description: str | None, results: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that every study has.

    Args:
        description: docstring of the study; its first line is shown.
        results: file of the rows.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--only", default="", help="rows whose key holds this")
    parser.add_argument("--results", type=Path, default=results, help="file of the rows")
    return parser


def list_checkpoints(folder: Path) -> dict[str, Path]:
    """Return the checkpoints below a folder by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


# ---- reports -----------------------------------------------------------------------------------


def make_table(lines: Iterable[Sequence[str]], heads: Sequence[str]) -> str:
    """Return a table in Markdown; short lines are filled up."""
    table = [heads, ["---"] * len(heads)]
    table += [[*cells, *[""] * (len(heads) - len(cells))] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def import_pyplot() -> Any:
    """Return ``matplotlib.pyplot`` that draws into files and opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
