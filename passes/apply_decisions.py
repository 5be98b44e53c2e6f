"""Trim a model by decisions that were made before, without calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.pipeline import decisions
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, Trim


class ApplyDecisions(Trim):
    """Keep the blocks and experts, and set the thresholds, that a file of decisions names.

    The file is written by ``moe2edge decide``. What comes out is the model that an export with
    the recipe of the file would give.
    """

    file: Annotated[str, Field(description="file of decisions, written by moe2edge decide")]
    any_source: Annotated[
        bool,
        Field(
            description="apply them to another model of the same family and shape, such as a "
            "fine-tuned one"
        ),
    ] = False
    sha256: Annotated[
        str | None, Field(description="digest of the file; filled in when the recipe is resolved")
    ] = None

    def resolve(self, model: Model) -> Self:
        """Fill in the digest of the file, so that the recipe identifies it."""
        return self.model_copy(update={"sha256": self._read()[1]})

    def _read(self) -> tuple[decisions.Decisions, str]:
        return decisions.read_decisions(Path(self.file), self.sha256)

    def check_source(self, sha256: Callable[[], str]) -> None:
        """Refuse another model than the one that the decisions are about, unless that is asked for.

        Raises:
            InputError: it is another one.
        """
        if self.any_source:
            return
        source, found = self._read()[0].source, sha256()
        if source.sha256 != found:
            raise InputError(
                f"apply_decisions: {self.file} is about {source.model} (sha256 "
                f"{source.sha256[:12]}...), this model has {found[:12]}...; decide for this one, "
                "or set any_source: true"
            )

    def check(self, model: Model) -> None:
        """Refuse a model whose experts were replaced."""
        refuse_replaced("apply_decisions", model)

    def plan(self, model: Model) -> Model:
        """Return the result itself, as all of it is known.

        Raises:
            InputError: the model is of another shape, or the decisions change nothing.
        """
        result = decisions.carry_out_decisions(self._read()[0], model)
        if decisions.describe_blocks(result) == decisions.describe_blocks(model):
            raise InputError(f"apply_decisions: {self.file} keeps everything; nothing to do")
        return result

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Carry out what the file says."""
        result = self.plan(model)
        pairs = zip(
            decisions.describe_blocks(model), decisions.describe_blocks(result), strict=True
        )
        changed = tuple(f"block {new.origin}: {new.text}" for old, new in pairs if old != new)
        return Outcome(result, changed=changed)
