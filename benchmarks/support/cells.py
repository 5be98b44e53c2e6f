"""The cells of the table of what works: a pass, or two, and the target that is written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (
    "--set", "calibration.samples=8", "--set", "calibration.length=64",
    "--set", "evaluation.samples=2", "--set", "evaluation.length=32",
)  # fmt: skip
TRAINING = ("--set", "training.samples=6", "--set", "training.length=32")
# Columns of a table of the page.
COLUMNS = 8
# What a cell begins with that is not right.
WRONG = "wrong"
DROP, BLOCK = "expert_drop: {keep: 4}", "block_drop: {drop: 1}"
SEARCH, BUDGET = "expert_search: {keep: 4}", "expert_budget: {keep: 6}"
MERGE, SKIP = "expert_merge: {method: ream, keep: 4}", "expert_skip: {quantile: 0.5}"
LAYER, REPLACE = "layer_drop: {drop: 1}", "expert_replace: {with: linear, keep: 4, rank: 4}"
SPARSE, AWQ = "sparsify: {min_tokens: 8}", "awq: {bits: 4, group_size: -1, steps: 4, min_tokens: 8}"
RECOVER = "recover: {steps: 2, batch: 2, held_out: 2, eval_every: 1, learning_rate: 0.001}"
GPTQ, RTN = "gptq: {bits: 4, group_size: -1}", "rtn: {bits: 4, group_size: -1}"

Run = Callable[..., Any]


@dataclass(frozen=True)
class Cell:
    """A column of the table.

    Attributes:
        title: its heading.
        passes: lines of the recipe.
        target: the target, as on the command line.
        decided: whether `decide` runs the passes, and `apply_decisions` carries them out.
        form: format in which the source is quantized, as in `source_files`; empty: it is not.
    """

    title: str
    passes: tuple[str, ...]
    target: str
    decided: bool = False
    form: str = ""


CELLS = (
    Cell("`expert_drop` → `hf`", (DROP,), "hf"),
    Cell("`block_drop` → `hf`", (BLOCK,), "hf"),
    Cell("`apply_decisions` → `hf`", (DROP,), "hf", decided=True),
    Cell("`gptq` → `gptq`", (GPTQ,), "gptq"),
    Cell("`rtn` → `gptq`", (RTN,), "gptq"),
    Cell("`gptq` → `hf`", (GPTQ,), "hf:dequantize=true"),
    Cell("`expert_drop`, `gptq` → `gptq`", (DROP, GPTQ), "gptq"),
    Cell("`block_drop`, `rtn` → `gptq`", (BLOCK, RTN), "gptq"),
    Cell("`expert_search` → `hf`", (SEARCH,), "hf"),
    Cell("`expert_search`, `rtn` → `gptq`", (SEARCH, RTN), "gptq"),
    Cell("`expert_search`, decided → `hf`", (SEARCH,), "hf", decided=True),
    Cell("`expert_budget` → `hf`", (BUDGET,), "hf:layout=natural"),
    Cell("`expert_budget`, `rtn` → `gptq`", (BUDGET, RTN), "gptq"),
    Cell("`expert_merge` → `hf`", (MERGE,), "hf"),
    Cell("`expert_merge`, `rtn` → `gptq`", (MERGE, RTN), "gptq"),
    Cell("`expert_drop`, `routing` → `hf`", (DROP, "routing"), "hf"),
    Cell("`expert_skip` → `hf`", (SKIP,), "hf:layout=natural"),
    Cell("`expert_skip`, `rtn` → `gptq`", (SKIP, RTN), "gptq"),
    Cell("`sparsify` → `hf`", (SPARSE,), "hf"),
    Cell("`awq` → `gptq`", (AWQ,), "gptq"),
    Cell("`awq` → `hf`", (AWQ,), "hf:dequantize=true"),
    Cell("`expert_drop`, `recover` → `hf`", (DROP, RECOVER), "hf"),
    Cell("`layer_drop` → `hf`", (LAYER,), "hf:layout=natural"),
    Cell("`layer_drop`, `rtn` → `gptq`", (LAYER, RTN), "gptq"),
    Cell("`expert_replace` → `hf`", (REPLACE,), "hf:layout=natural"),
    Cell("from GPTQ: `expert_drop` → `gptq`", (DROP,), "gptq", form="gptq"),
    Cell("from AWQ: `expert_drop` → `gptq`", (DROP,), "gptq", form="awq"),
    Cell("from W4A16: `expert_drop` → `gptq`", (DROP,), "gptq", form="compressed-tensors"),
    Cell("from FP8: `expert_drop` → `hf`", (DROP,), "hf", form="fp8"),
)


def make_text(place: Path) -> Path:
    """Write a text of the characters that the tokenizer of the tests has."""
    draw = random.Random(0)
    place.write_text("".join(chr(draw.randrange(33, 126)) for _ in range(8000)))
    return place


def try_cell(cell: Cell, source: Path, work: Path, run: Run) -> str:
    """Export a model through a cell and verify the output.

    Args:
        cell: the cell.
        source: a checkpoint with a tokenizer.
        work: an empty folder.
        run: runs a command of moe2edge and returns its exit code and output, as click's runner.

    Returns:
        "yes"; or why it is refused (exit code 2 or 6), in the words of the message.

    Raises:
        AssertionError: the export, or what verifies its output, ends otherwise.
    """
    text, recipe, out = make_text(work / "text.txt"), work / "recipe.yaml", work / "out"
    if cell.form:
        from source_files import quantize_folder

        quantize_folder(source, work / "source", cell.form)
        source = work / "source"
    recipe.write_text("passes:\n" + "".join(f"  - {line}\n" for line in cell.passes))
    given = ["-r", recipe, "--calib", text, "--eval", text, *SIZES]
    if cell.decided:
        decisions = work / "decisions.json"
        found = run("decide", source, "-r", recipe, "-o", decisions, "--calib", text, *SIZES[:4])
        assert found.exit_code in (0, 2, 6), found.output
        if found.exit_code:
            return read_refusal(found.output)
        recipe.write_text(f"passes:\n  - apply_decisions: {{file: {decisions}}}\n")
        given = ["-r", recipe, "--eval", text, *SIZES[4:]]
    if RECOVER in cell.passes:
        given += [*TRAINING, "--set", f"training.text={text}"]
    found = run("export", source, "-t", cell.target, "-o", out, *given)
    assert found.exit_code in (0, 2, 6), found.output
    if found.exit_code:
        return read_refusal(found.output)
    found = run("verify", out)
    assert found.exit_code == 0, found.output
    return "yes"


def read_refusal(output: str) -> str:
    """Return the message of the line that refuses, without what would work instead."""
    (message,) = re.findall(r"^error: (.*)$", output, re.MULTILINE)[-1:]
    return re.split("; (?:passes that work on it|targets that hold it)", message)[0]


def render_table(results: dict[str, dict[str, str]]) -> str:
    """Render the tables of the page of families; refusals become notes below them."""
    notes: dict[str, int] = {}
    lines: list[str] = []
    for at in range(0, len(CELLS), COLUMNS):
        lines += [""] if lines else []
        lines += _render_columns(CELLS[at : at + COLUMNS], results, notes)
    said = [f"[{number}] {message}" for message, number in notes.items()]
    return "\n".join([*lines, *(["", *said] if said else [])])


def _render_columns(
    cells: Sequence[Cell], results: dict[str, dict[str, str]], notes: dict[str, int]
) -> Iterator[str]:
    """Yield the lines of a table of some cells; new notes are added."""
    yield "| family | " + " | ".join(cell.title for cell in cells) + " |"
    yield "|---|" + ":-:|" * len(cells)
    for family, own in sorted(results.items()):
        marks = []
        for cell in cells:
            found = own[cell.title].replace(family, "FAMILY").removesuffix(".")
            found = re.sub(r"\bblock \d+", "block N", found)
            number = notes.setdefault(found, len(notes) + 1) if found != "yes" else 0
            marks.append(f"[{number}]" if number else "✓")
        yield f"| `{family}` | " + " | ".join(marks) + " |"
