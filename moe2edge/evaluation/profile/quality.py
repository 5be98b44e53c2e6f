"""Quality beside speed: taken over from the report of a folder, or measured on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError, join_lines
from moe2edge.evaluation.output_quality import evaluate_on_text
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import BUILTIN, Checkpoint, open_checkpoint
from moe2edge.storage.manifest import open_artifact
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

REPORT = "report.json"
_NAMES = ("tokens", "perplexity", "kl", "top1")
# Reports of older versions have no errors.
_ERRORS = ("perplexity_error", "kl_error", "top1_error")
NO_ERRORS = "the report has none (an older moe2edge wrote it)"
ONE_SAMPLE = "the text is one sample; an error takes two"
NO_SOURCE_THEN = "the report has no comparison with the source"
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
    numbers = {name: found.get(name) for name in (*_NAMES, *_ERRORS)}
    unknown = None
    if numbers["perplexity_error"] is None:
        unknown = ONE_SAMPLE if "perplexity_error" in found else NO_ERRORS
    about = {"kl_reason": None if numbers["kl"] is not None else NO_SOURCE_THEN}
    return _describe("report", text.get("text"), text.get("sha256"), numbers, unknown) | about


def measure_quality(folder: Path, source: TextSource, reporter: Reporter) -> dict[str, Any]:
    """Measure an output folder on a text, in its runtime.

    KL and top-1 agreement are measured as well if the source is where the manifest says.

    Raises:
        InputError: the folder is no output, or the text is too short or cannot be read.
    """
    reference, reason = find_source(folder)
    quality, sha256 = evaluate_on_text(folder, source, reference, reporter)
    numbers = {name: getattr(quality, name) for name in (*_NAMES, *_ERRORS)}
    unknown = ONE_SAMPLE if quality.perplexity_error is None else None
    about = {"kl_reason": reason}
    return _describe("measured", str(source.text), sha256, numbers, unknown) | about


def find_source(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """Find the source of an output on this machine, without the network.

    Args:
        folder: the output folder.

    Returns:
        The source, or None and the reason.

    Raises:
        InputError: the folder is no output.
    """
    artifact = open_artifact(folder)
    name, more = artifact.source, f"moe2edge evaluate {folder} --reference MODEL measures KL"
    if not name:
        return None, f"the manifest names no source; {more}"
    if name != BUILTIN and not Path(name).is_dir():
        return None, f"the source {name} is no folder of this machine; {more}"
    try:
        found = open_checkpoint(name)
        same = found.sha256 == artifact.manifest["source"].get("sha256")
    except Moe2EdgeError as error:
        return None, f"the source {name} cannot be read ({join_lines(error)}); {more}"
    if not same:
        return None, f"{name} is another model than the source of this output; {more}"
    return found, None


def _is_of(result: Any, target: str) -> bool:
    return isinstance(result, Mapping) and result.get("form") == f"{target}{_OWN}"


def _describe(
    origin: str, text: Any, sha256: Any, numbers: Mapping[str, Any], unknown: str | None
) -> dict[str, Any]:
    """Describe the quality; ``unknown`` says why there are no errors."""
    where = {"reason": None, "origin": origin, "text": text, "sha256": sha256}
    return {**where, **numbers, "error_reason": unknown}
