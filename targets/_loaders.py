"""Programs that may load an output, judged by the table of verdicts."""

from __future__ import annotations

from collections.abc import Mapping

from moe2edge.model.model import Model
from moe2edge.pipeline.target import Loader, LoaderRule
from moe2edge.targets._loader_cases import Output, describe_case
from moe2edge.targets._loader_table import FINDINGS


class _AnyOutput:
    """Stands for outputs in general where a note names properties of one."""

    family = "such families"
    architecture = "the family's own class"
    unknown_form = "it does not know layers of such a form"
    split_fusion = "a module"
    uncomputed = "such a setting"


def judge_loaders(
    target: str, given: Model, stored: Model, options: Mapping[str, object] | None = None
) -> tuple[Loader, ...]:
    """Return the verdict on each program that may load an output of a target.

    Args:
        target: its name, or another key of `FINDINGS`.
        given: the model that was to be written.
        stored: the model as the target stores it.
        options: options of the target; None: they change no verdict.
    """
    output = Output(given, stored, options or {})
    loaders: dict[str, Loader] = {}
    for finding in FINDINGS[target]:
        if finding.program not in loaders and finding.case(output):
            loaders[finding.program] = finding.judge(output)
    return tuple(loaders.values())


def list_rules(target: str, option: str = "") -> tuple[LoaderRule, ...]:
    """List all verdicts on the programs of a target, with their conditions.

    Args:
        target: its name, or another key of `FINDINGS`.
        option: the option that the key is for.
    """
    return tuple(
        LoaderRule(
            finding.judge(_AnyOutput),
            ", ".join(filter(None, (option, describe_case(finding.case)))),
        )
        for finding in FINDINGS[target]
    )
