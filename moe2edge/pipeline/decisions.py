"""Decisions of a recipe: the blocks, experts and thresholds that it chose, as a document.

A file of decisions is written once, by ``moe2edge decide``; it can be read, compared with that of
another calibration text, and applied later without calibration (pass ``apply_decisions``). It is
made from models before and after, whatever passes lay between them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moe2edge.errors import InputError, join_lines
from moe2edge.model.block import Block, Form, get_form
from moe2edge.model.edits import drop_mlp
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.storage.output_checks import OutputForm
from moe2edge.storage.text_files import LARGEST_JSON, find_read_remedy, read_bytes, read_json

DECISIONS_KIND: Final = "moe2edge.decisions"
DECISIONS_VERSION: Final = 1

# Routed experts that stay where nothing routes.
MAX_EXPERTS = {"dense": 1, "dense+shared": 1, "none": 0, "norm": 0, "shared": 0}


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BlockDecision(_Data):
    """The decision about one block of the source.

    Attributes:
        origin: position in the source.
        experts_before: routed experts in the source; 0 for a dense block.
        dropped: whether the block is gone; then the other fields are empty.
        mlp: the form of the layer after attention.
        experts: origins of the routed experts that stay, in order.
        top_k: experts chosen per token, of an MoE layer.
        skip_below: thresholds of dynamic skipping, of an MoE layer.
    """

    origin: int
    experts_before: int
    dropped: bool = False
    mlp: Form | None = None
    experts: tuple[int, ...] = ()
    top_k: int | None = None
    skip_below: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        inside = all(0 <= expert < self.experts_before for expert in self.experts)
        if not inside or len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts {list(self.experts)} of {self.experts_before}")
        if self.dropped:
            if self.mlp or self.experts or self.top_k or self.skip_below:
                raise ValueError("a dropped block has nothing else")
        elif self.mlp is None:
            raise ValueError("mlp is missing")
        elif self.mlp == "moe":
            if not 1 <= (self.top_k or 0) <= len(self.experts):
                raise ValueError(f"top_k {self.top_k} of {len(self.experts)} experts")
            if (
                len(self.skip_below) not in (0, (self.top_k or 0) - 1)
                or min(self.skip_below, default=0) < 0
            ):
                raise ValueError(f"skip_below {list(self.skip_below)} for top_k {self.top_k}")
        else:
            own = self.mlp == "dense" and not self.experts_before
            if len(self.experts) != (0 if own else MAX_EXPERTS[self.mlp]):
                raise ValueError(f"{len(self.experts)} experts for mlp {self.mlp}")
            if self.top_k is not None or self.skip_below:
                raise ValueError(f"top_k and skip_below go with mlp moe, not {self.mlp}")
        return self

    @property
    def text(self) -> str:
        """The decision in words."""
        if self.dropped:
            return "dropped"
        rule = f" top-{self.top_k}" if self.top_k else ""
        skips = " with skipping" if self.skip_below else ""
        return f"{self.mlp} of experts {list(self.experts)}{rule}{skips}"


class SourceModel(_Data):
    """The model that decisions are about."""

    model: str
    revision: str | None
    sha256: str
    family: str


class SourceCheck(_Data):
    """The result of the source check, as in manifests.

    Attributes:
        status: passed, not run, or left out.
        reason: why it was not run.
        transformers: version that the source was compared with; empty if it was not.
        window: tokens of a window of attention that its text was too short for; 0: there is none.
    """

    status: Literal["passed", "not run", "left out"]
    reason: str = ""
    transformers: str = ""
    window: int = 0


class CalibrationText(BaseModel):
    """The origin of the calibration text, as in reports, with its parts."""

    model_config = ConfigDict(extra="allow", frozen=True)

    text: str
    samples: int
    length: int


class Decisions(_Data):
    """The document.

    Attributes:
        source: the model that was trimmed.
        source_check: whether its numbers were compared with stock transformers first; None: the
            file is older than that check.
        recipe: as it was carried out, YAML.
        calibration: where the calibration text is from; None if none was needed.
        versions: of the libraries that the numbers behind the decisions depend on.
        blocks: one entry per block of the source, in order.
    """

    kind: Literal["moe2edge.decisions"] = DECISIONS_KIND
    schema_version: Literal[1] = DECISIONS_VERSION
    source: SourceModel
    recipe: str
    calibration: CalibrationText | None
    versions: dict[str, str]
    source_check: SourceCheck | None = None
    blocks: tuple[BlockDecision, ...]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if [block.origin for block in self.blocks] != list(range(len(self.blocks))):
            raise ValueError("the blocks are not those of a source, in order")
        if all(block.dropped for block in self.blocks):
            raise ValueError("no block is left")
        return self

    @property
    def experts_before(self) -> tuple[int, ...]:
        """Number of routed experts of each block of the source."""
        return tuple(block.experts_before for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, in which the entry of a dropped block has no other fields."""
        data = self.model_dump(mode="json")
        data["blocks"] = [
            {"origin": own.origin, "experts_before": own.experts_before, "dropped": True}
            if own.dropped
            else own.model_dump(mode="json", exclude={"dropped"})
            for own in self.blocks
        ]
        return data


# ---- between models and decisions --------------------------------------------------------------


def count_experts_before(model: Model) -> tuple[int, ...]:
    """Count the routed experts of each block of the source, by its config; 0 where dense."""
    family, config = model.family, model.config
    if family.generic:
        return tuple(layer.count for layer in model.architecture.anatomy)
    count = family.num_experts(config)
    blocks = range(int(config["num_hidden_layers"]))
    return tuple(count if family.is_moe(config, index) else 0 for index in blocks)


def describe_blocks(model: Model) -> tuple[BlockDecision, ...]:
    """Describe each block of the source as it is in ``model``."""
    left = {block.origin: block for block in model.blocks}
    return tuple(
        _describe(left[origin], before)
        if origin in left
        else BlockDecision(origin=origin, experts_before=before, dropped=True)
        for origin, before in enumerate(count_experts_before(model))
    )


def _describe(block: Block, before: int) -> BlockDecision:
    router = block.mlp.router if isinstance(block.mlp, MoELayer) else None
    return BlockDecision(
        origin=block.origin,
        experts_before=before,
        mlp=get_form(block),
        experts=block.expert_origins,
        top_k=router.top_k if router else None,
        skip_below=router.skip_below if router else (),
    )


def carry_out_decisions(decisions: Decisions, model: Model) -> Model:
    """Return ``model`` with exactly what was decided; blocks and experts are found by origin.

    Raises:
        InputError: the model is of another family or shape, or lacks what should stay.
    """
    theirs, mine = decisions.source.family, model.family.model_type
    before = count_experts_before(model)
    if theirs != mine or before != decisions.experts_before:
        raise InputError(
            f"the decisions are for {describe_shape(theirs, decisions.experts_before)}, but this "
            f"model is {describe_shape(mine, before)}; run moe2edge decide for "
            "this model"
        )
    kept = [entry for entry in decisions.blocks if not entry.dropped]
    places = {block.origin: block.index for block in model.blocks}
    if lost := [entry.origin for entry in kept if entry.origin not in places]:
        raise InputError(
            f"the decisions keep blocks {lost}, which an earlier pass dropped; put apply_decisions "
            "first"
        )
    model = model.keep_blocks([places[entry.origin] for entry in kept])
    for entry, block in zip(kept, model.blocks, strict=True):
        new = _carry_out(entry, model, block)
        if (found := _describe(new, entry.experts_before)) != entry:
            raise InputError(
                f"block {entry.origin} is {found.text} and cannot become {entry.text}; put "
                "apply_decisions before other pruning passes"
            )
        model = model.replace_block(new)
    return model


def describe_shape(family: str, before: tuple[int, ...]) -> str:
    """Describe family and routed experts in runs: ``mixtral with 32 blocks of 8 experts``."""
    runs: list[list[int]] = []
    for count in before:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return f"{family} with {', '.join(f'{n} blocks of {count} experts' for count, n in runs)}"


def _carry_out(entry: BlockDecision, model: Model, block: Block) -> Block:
    """Return the block as decided, or as near to that as possible."""
    if entry == _describe(block, entry.experts_before):
        return block
    if entry.mlp in ("none", "norm"):
        return drop_mlp(model, block, keep_norm=entry.mlp == "norm")
    if not isinstance(block.mlp, MoELayer):
        return block
    layer, bases = block.mlp, block.mlp.bases
    places = {layer.rows[n].origin: base for n in layer.routed if (base := bases[n]) is not None}
    if not set(entry.experts) <= set(places):
        return block
    skipped = block.mlp.router.skip_below
    if entry.experts != block.expert_origins:
        block = block.keep_experts([places[o] for o in entry.experts], clamp_top_k=True)
    if not isinstance(block.mlp, MoELayer):
        return block
    router = block.mlp.router
    top_k = min(router.top_k, entry.top_k or router.top_k)
    # Thresholds that an earlier pass set are not thrown away.
    router = replace(
        router, top_k=top_k, skip_below=router.skip_below if skipped else entry.skip_below
    )
    return replace(block, mlp=replace(block.mlp, router=router))


# ---- files -------------------------------------------------------------------------------------


def read_decisions(path: Path, sha256: str | None = None) -> tuple[Decisions, str]:
    """Read the decisions in a file, and compute the digest of the file.

    Args:
        path: a file that `moe2edge decide` wrote.
        sha256: digest that the file must have, None for any.

    Raises:
        InputError: there is no such file, it is damaged, of another kind or version, or another.
    """
    try:
        content = read_bytes(path.expanduser(), LARGEST_JSON)
    except (InputError, RuntimeError) as error:  # the latter: there is no such user's home
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = getattr(cause, "strerror", None) or join_lines(cause, 200)
        raise InputError(
            f"decisions {str(path)[:100]} cannot be read ({reason}); "
            f"{find_read_remedy(cause, 'write them with moe2edge decide')}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise InputError(
            f"{path} has sha256 {digest[:12]}..., the recipe was made with {sha256[:12]}...; use "
            "that file, or leave sha256 out"
        )
    head = read_json(path.expanduser())
    if head.get("kind") != DECISIONS_KIND:
        raise InputError(f"{path} holds no decisions; write them with moe2edge decide")
    if head.get("schema_version") != DECISIONS_VERSION:
        raise InputError(
            f"{path} has schema_version {head.get('schema_version')!r}, this moe2edge reads "
            f"{DECISIONS_VERSION}: use the moe2edge that wrote it, or decide again"
        )
    try:
        return Decisions.model_validate_json(content, strict=True), digest
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path} is damaged ({place}: {reason}); decide again") from error


def _is_ours(path: Path) -> bool:
    try:
        return read_json(path).get("kind") == DECISIONS_KIND
    except InputError:
        return False


def _list_damage(path: Path) -> list[str]:
    try:
        read_decisions(path)
    except InputError as error:
        return [str(error)]
    return []


DECISIONS = OutputForm(False, _is_ours, "holds no decisions", lambda _: [], _list_damage)
