"""Prune a model by a file of decisions, without calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field

from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.pipeline import decisions
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, Trim


class ApplyDecisions(Trim):
    """Prune by a file of decisions: keep its blocks and experts, and set its thresholds.

    ``moe2edge decide`` writes the file. The result is the model that an export with the recipe of
    the file would give.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    file: Annotated[str, Field(description="file of decisions, written by moe2edge decide")]
    any_source: Annotated[
        bool,
        Field(
            description="apply the decisions to another model of the same family and shape, such "
            "as a fine-tuned one"
        ),
    ] = False
    sha256: Annotated[
        str | None, Field(description="digest of the file; filled in when the recipe is resolved")
    ] = None

    def resolve(self, model: Model) -> Self:
        """Return the pass with the digest of the file, so that the recipe identifies the file."""
        return self.model_copy(update={"sha256": self._read()[1]})

    def _read(self) -> tuple[decisions.Decisions, str]:
        return decisions.read_decisions(Path(self.file), self.sha256)

    def check_source(self, sha256: Callable[[], str]) -> None:
        """Refuse other models than the source of the decisions, unless ``any_source`` is set.

        Raises:
            InputError: it is another model.
        """
        if self.any_source:
            return
        source, digest = self._read()[0].source, sha256()
        if source.sha256 != digest:
            raise InputError(
                f"apply_decisions: {self.file} was made for {source.model} (sha256 "
                f"{source.sha256[:12]}...), but this model has {digest[:12]}...; run moe2edge "
                "decide for this model, or set any_source: true"
            )

    def check(self, model: Model) -> None:
        """Refuse a model whose experts were replaced."""
        refuse_replaced("apply_decisions", model)

    def plan(self, model: Model) -> Model:
        """Return the result itself, which the decisions determine.

        Raises:
            InputError: the model is of another shape, or the decisions change nothing.
        """
        result = decisions.carry_out_decisions(self._read()[0], model)
        if decisions.describe_blocks(result) == decisions.describe_blocks(model):
            raise InputError(f"apply_decisions: {self.file} keeps everything; nothing to do")
        return result

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Carry out the decisions."""
        result = self.plan(model)
        pairs = zip(
            decisions.describe_blocks(model), decisions.describe_blocks(result), strict=True
        )
        changed = tuple(f"block {new.origin}: {new.text}" for old, new in pairs if old != new)
        return Outcome(result, changed=changed)
