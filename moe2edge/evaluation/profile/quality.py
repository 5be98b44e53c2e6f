"""Quality beside speed: taken over from the report of a folder, or measured on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError
from moe2edge.evaluation.output_quality import evaluate_on_text
from moe2edge.progress import Reporter
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

REPORT = "report.json"
_NAMES = ("tokens", "perplexity", "kl", "top1")
# Ends the name of the form of an output that was measured in its own runtime.
_OWN = ", in its runtime"


def read_quality(folder: Path, target: str | None) -> dict[str, Any]:
    """Take the quality over that the export measured, or say why there is none.

    Args:
        folder: the output folder.
        target: target that wrote it; None: it is a checkpoint.
    """
    if target is None:
        return {"reason": "a checkpoint has no report; --quality TEXT measures outputs"}
    try:
        report = read_json(folder / REPORT)
    except InputError:
        return {"reason": f"there is no {REPORT} that can be read; --quality TEXT measures it"}
    results, text = report.get("results"), report.get("evaluation")
    own = [r for r in results if _is_of(r, target)] if isinstance(results, list) else []
    found = own[0].get("quality") if own else None
    if not isinstance(found, Mapping) or not isinstance(text, Mapping):
        how = "--eval none, --verify quick"
        return {"reason": f"the export measured none ({how}); --quality TEXT measures it"}
    numbers = {name: found.get(name) for name in _NAMES}
    return _describe("report", text.get("text"), text.get("sha256"), numbers)


def measure_quality(folder: Path, source: TextSource, reporter: Reporter) -> dict[str, Any]:
    """Measure the perplexity of an output folder on a text, in its runtime.

    Raises:
        InputError: the folder is no output, or the text is too short or cannot be read.
    """
    quality, sha256 = evaluate_on_text(folder, source, None, reporter)
    numbers = {name: getattr(quality, name) for name in _NAMES}
    return _describe("measured", str(source.text), sha256, numbers)


def _is_of(result: Any, target: str) -> bool:
    return isinstance(result, Mapping) and result.get("form") == f"{target}{_OWN}"


def _describe(origin: str, text: Any, sha256: Any, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"reason": None, "origin": origin, "text": text, "sha256": sha256, **numbers}
