"""Profile models and output folders, one or several in turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe2edge.errors import InputError
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.durable import check_writable, write_file

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.evaluation.profile.result import ProfileSet
    from moe2edge.storage.checkpoint import Checkpoint

# Views that show what only an explained profile has.
EXPLAINED_VIEWS = ("report", "trace")
VIEWS = ("output", *EXPLAINED_VIEWS, "markdown", "junit")


def profile_models(
    models: Sequence[str | Path | Checkpoint],
    *,
    preset: Literal["quick", "ci", "full"] = "ci",
    text: str | Path | TextSource | None = None,
    sizes: Mapping[str, int | bool | None] | None = None,
    quality: TextSource | None = None,
    reporter: Reporter = QUIET,
) -> ProfileSet:
    """Measure models in turns, each time in a fresh process.

    Args:
        models: output folders, and models as `open_checkpoint` takes them.
        preset: how much is measured.
        text: file of natural text for the prompts, or a text with options, as recipes have it;
            None: the built-in text.
        sizes: values in place of the preset's, by the names of `ProfileSettings`; None: the
            preset's own.
        quality: text to measure the perplexity of outputs on; None: that of the report is taken.
        reporter: receives progress.

    Raises:
        InputError: a model, the text or a number is wrong.
        Unsupported: the runtime of an output is not installed.
        Moe2EdgeError: a process failed or took too long.
    """
    from moe2edge.calibration.builtin_texts import BUILTIN_TEXT
    from moe2edge.calibration.sources import TextSource
    from moe2edge.evaluation.profile.measure import profile_folders
    from moe2edge.evaluation.profile.settings import PRESETS

    given: dict[str, Any] = {
        name: value for name, value in (sizes or {}).items() if value is not None
    }
    if not isinstance(text, TextSource):
        text = TextSource(text=str(text) if text else BUILTIN_TEXT)
    return profile_folders(
        [_find_folder(model) for model in models],
        text=text,
        settings=replace(PRESETS[preset], **given),
        fixed=given.keys(),
        quality=quality,
        reporter=reporter,
    )


def check_views(places: Mapping[str, Path]) -> None:
    """Try, before anything is measured, whether the files can be written.

    Args:
        places: file of each view, by its name in `VIEWS`.

    Raises:
        InputError: one cannot, or two are the same.
    """
    if len({path.resolve() for path in places.values()}) < len(places):
        names = ", ".join(str(path) for path in places.values())
        raise InputError(f"two views have one file ({names}); give each a file of its own")
    for path in places.values():
        check_writable(path)


def write_views(document: Mapping[str, Any], places: Mapping[str, Path]) -> None:
    """Write views of the document of one folder or of several.

    Args:
        document: as `Profile.to_json` or `ProfileSet.to_json` returns it.
        places: file of each view, by its name in `VIEWS`.
    """
    for name, path in places.items():
        write_file(path, _build_view(name, document).encode("utf-8"))


def _build_view(name: str, document: Mapping[str, Any]) -> str:
    from moe2edge.evaluation.profile.views.junit import build_junit
    from moe2edge.evaluation.profile.views.markdown import build_markdown
    from moe2edge.evaluation.profile.views.page import build_page
    from moe2edge.evaluation.profile.views.trace import build_trace

    match name:
        case "report":
            return build_page(document)
        case "markdown":
            return build_markdown(document)
        case "junit":
            return build_junit(document)
        case "trace":
            return json.dumps(build_trace(document))
        case "output":
            return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    raise AssertionError(f"unknown view {name}")


def _find_folder(model: str | Path | Checkpoint) -> Path:
    from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint

    if isinstance(model, Checkpoint):
        return model.folder
    return Path(model) if Path(model).is_dir() else open_checkpoint(model).folder
