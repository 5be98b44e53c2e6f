"""Compare two profiles, or two output folders, by the rules of a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError
from moe2edge.evaluation.gate.comparison import GateResult, compare_documents
from moe2edge.evaluation.gate.rules import DEFAULT_GATE, read_gate
from moe2edge.evaluation.profile.document import parse_profile
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.durable import write_file
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.evaluation.profile.settings import ProfileSettings

COMPARISON_VIEWS = ("output", "markdown", "junit")


def compare_outputs(
    base: str | Path,
    head: str | Path,
    *,
    gate: str | Path | None = None,
    pairs: int | None = None,
    settings: ProfileSettings | None = None,
    text: TextSource | None = None,
    reporter: Reporter = QUIET,
) -> GateResult:
    """Compare two profile files, or two output folders that run in turns.

    Args:
        base: a JSON file of ``moe2edge profile``, or an output folder.
        head: another one of the same kind, to be judged.
        gate: file of rules; None: the default.
        pairs: pairs of runs in a round, in place of the gate's; folders only.
        settings: amount of work of one run; None: that of the preset ``quick``. Folders only.
        text: text that prompts are cut from; None: the built-in text. Folders only.
        reporter: receives progress.

    Raises:
        InputError: a side or the gate is wrong, or the two sides are of different kinds or work.
        Unsupported: the runtime of a folder is not installed.
        Moe2EdgeError: a process failed or took too long.
    """
    rules = read_gate(Path(gate) if gate is not None else DEFAULT_GATE)
    sides = Path(base), Path(head)
    for side in sides:
        if not side.exists():
            raise InputError(
                f"{side} is not there; name two output folders, or two files that moe2edge "
                "profile --output wrote"
            )
    folders = [side.is_dir() for side in sides]
    if all(folders):
        from moe2edge.calibration.builtin_texts import BUILTIN_TEXT
        from moe2edge.calibration.sources import TextSource
        from moe2edge.evaluation.gate.folders import compare_folders
        from moe2edge.evaluation.profile.settings import PRESETS

        work = replace(settings or PRESETS["quick"], repeats=pairs or rules.pairs)
        return compare_folders(
            *sides,
            rules,
            text=text or TextSource(text=BUILTIN_TEXT),
            settings=work,
            reporter=reporter,
        )
    if any(folders):
        raise InputError(
            f"one of {base} and {head} is a folder, the other a file; compare two folders, or two "
            "files"
        )
    if pairs is not None:
        raise InputError("--pairs is for two folders; files hold what was measured")
    documents = [read_profile(side) for side in sides]
    return compare_documents(documents[0], documents[1], rules, (str(base), str(head)))


def read_profile(path: Path) -> dict[str, Any]:
    """Read a file that ``moe2edge profile`` wrote.

    Raises:
        InputError: it is none, or of another version.
    """
    document: dict[str, Any] = read_json(path)
    parse_profile(document, str(path))
    return document


def write_comparison(found: GateResult, places: Mapping[str, Path]) -> None:
    """Write views of a comparison.

    Args:
        found: the comparison.
        places: file of each view, by its name in `COMPARISON_VIEWS`.
    """
    import json

    from moe2edge.evaluation.gate.views import build_comparison_junit, build_comparison_markdown

    for name, path in places.items():
        if name == "output":
            text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
        elif name == "markdown":
            text = build_comparison_markdown(found)
        else:
            text = build_comparison_junit(found)
        write_file(path, text.encode("utf-8"))
