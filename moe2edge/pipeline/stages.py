"""Stages of a recipe, and the contract that the pipeline enforces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe2edge.calibration.observation import ObserverFactory
from moe2edge.errors import InputError, Moe2EdgeError, Unsupported
from moe2edge.model.edits import drop_mlp, hide_source_integers, restore_source_integers
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import find_missing
from moe2edge.pipeline.contract import Outcome, Pass, PlannedStep

# Name of the walk in which the passes of a stage are scored.
SCORING = "scoring"


@dataclass(frozen=True)
class Plan:
    """The passes of a recipe, with the shapes of the models between them.

    Attributes:
        source: the model before the first pass.
        steps: the passes, in order, which see integers of a quantized source as plain numbers.
    """

    source: Model
    steps: tuple[PlannedStep, ...]

    @property
    def result(self) -> Model:
        """The model after the last pass, with the integers of the source that nothing changes."""
        if not self.steps:
            return self.source
        return restore_source_integers(self.steps[-1].after, self.source)


def plan_passes(passes: Sequence[Pass], model: Model) -> Plan:
    """Check every pass on the shape of the model that it will get; no numbers are read.

    Raises:
        InputError, Unsupported: a pass cannot do its work on this model.
    """
    source, steps = model, []
    model = hide_source_integers(model)
    for step in passes:
        _check_needs(step, model)
        step.check(model)
        after = step.plan(model)
        after.verify()
        _check_routers_stay(step, model, after)
        steps.append(PlannedStep(step, model, after))
        model = after
    return Plan(source, tuple(steps))


def _check_routers_stay(step: Pass, before: Model, after: Model) -> None:
    """Refuse to leave a router nothing to choose in layers that only transformers knows.

    One expert that stays would be a plain MLP, and for none a shared expert would be alone: forms
    that transformers' layers of families without a row do not have. A layer may be dropped.

    Raises:
        InputError: names the block.
    """
    if not before.family.generic:
        return
    found = {block.origin: block for block in after.blocks}
    for block, _ in before.moe_blocks:
        new = found.get(block.origin)
        if new is None or isinstance(new.mlp, MoELayer):
            continue
        if new.mlp is None:
            dropped = drop_mlp(before, block, keep_norm=new.passes_norm)
            if new.norms.keys() == dropped.norms.keys():
                continue
        raise InputError(
            f"{step.name} may leave {len(new.expert_origins)} of {len(block.expert_origins)} "
            f"experts in block {block.index}, and layers of {before.family.model_type} have a "
            "router or none; keep at least 2 in each layer, or use block_drop"
        )


def _check_needs(step: Pass, model: Model) -> None:
    """Refuse a pass that needs of blocks what they do not have.

    Raises:
        Unsupported: names the pass, the family, what is missing, and passes that need it not.
    """
    source = model.family, model.architecture
    places = [block.origin for block, _ in model.moe_blocks]
    if (found := find_missing(*source, step.list_needs(), places)) is None:
        return
    from moe2edge.pipeline.registry import find_pass, list_passes

    trait, where = found
    needs = {name: find_pass(name).needs for name in list_passes()}
    others = [name for name, need in needs.items() if not find_missing(*source, need, places)]
    raise Unsupported(
        f"{step.name} does not work on {model.family.model_type}: it needs {trait.value}, "
        f"which {where}; passes that work on it: {', '.join(others)}"
    )


@dataclass(frozen=True)
class Stage:
    """Passes that share a walk: any number that trim, or one other."""

    passes: tuple[Pass, ...]

    @property
    def label(self) -> str:
        """Label of the progress of its walk."""
        return f"{', '.join(step.name for step in self.passes)}: {SCORING}"

    @property
    def needs_tokens(self) -> bool:
        """True if it needs the calibration text."""
        return any(step.needs_tokens for step in self.passes)

    @property
    def observers(self) -> tuple[ObserverFactory, ...]:
        """The kinds of observers that its passes need, each once."""
        kinds = (kind for step in self.passes for kind in step.observers())
        return tuple(dict.fromkeys(kinds))

    @property
    def compute(self) -> str:
        """Dtype of products while its passes are scored: the widest that one asks for."""
        asked = {getattr(step, "compute", "float32") for step in self.passes if step.observers()}
        return "bfloat16" if asked == {"bfloat16"} else "float32"


def group_stages(passes: Sequence[Pass]) -> list[Stage]:
    """Group passes into stages."""
    groups: list[list[Pass]] = []
    for step in passes:
        if groups and groups[-1][-1].shares_walk and step.joins_stage:
            groups[-1].append(step)
        else:
            groups.append([step])
    return [Stage(tuple(group)) for group in groups]


@dataclass(frozen=True)
class Step:
    """A line of the report: one pass that was run."""

    name: str
    options: Mapping[str, Any]
    changed: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float
    parameters: int
    nbytes: int
    figures: Mapping[str, Any] = field(default_factory=dict)


def enforce(step: Pass, before: Model, outcome: Outcome) -> None:
    """Check an outcome against the contract.

    Raises:
        Moe2EdgeError: the pass changed nothing, or left out something that it selected, or the
            result is not sound.
        AssertionError: it leaves a fact that it does not declare.
    """
    name = step.name
    for fact in outcome.facts:
        if type(fact) not in step.writes:
            raise AssertionError(f"{name} leaves {type(fact).__name__}, which is not in its writes")
    if not step.may_change_nothing and (not outcome.changed or outcome.model is before):
        reasons = "; ".join(f"{k}: {v}" for k, v in outcome.skipped.items())
        raise Moe2EdgeError(
            f"{name} changed nothing ({reasons or 'nothing matched'}); check its options, or leave "
            "it out"
        )
    if outcome.skipped:
        first, reason = next(iter(outcome.skipped.items()))
        raise Moe2EdgeError(
            f"{name} did not change {len(outcome.skipped)} parts that it had selected, such as "
            f"{first}: {reason}"
        )
    outcome.model.verify()
    step.check_result(before, outcome.model)
