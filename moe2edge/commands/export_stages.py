"""Stages of an export: what each computes, moves and holds, from shapes alone.

The memory of a stage is what it holds beside the imported libraries; seconds follow from the rates
of a machine. Stages are in the order in which an export goes through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from moe2edge.commands.texts import NO_TEXT, SELF
from moe2edge.evaluation.machine_rates import MachineRates, count_solve_operations
from moe2edge.model.block import Block
from moe2edge.model.kinds import look_at_blocks, sum_weights
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import SCORING, Plan, group_stages
from moe2edge.pipeline.target import Target
from moe2edge.runtime.memory import Estimate, Memory, fits

# Memory of the process once libraries are imported; and what they allocate as they compute, and
# as a runtime generates, in PyTorch or beside it, all measured.
IMPORTED_FOR_EXPORT, COMPUTING = 460 << 20, 30 << 20
GENERATING_IN_TORCH, GENERATING = 140 << 20, 45 << 20
# Seconds of imports, of the trial of each runtime, and of small files.
STARTING = 6.0
# Tokens of the source check, and of the exact comparison of an output, about; and of one prompt.
CHECKED_TOKENS, COMPARED_TOKENS, PROMPT_TOKENS = 256, 200, 64
# Names of stages.
READING, FINISHING = "reading the source", "finishing"
# How much of an output is compared with the model in memory: see docs/reliability.md.
Extent = Literal["full", "quick"]


@dataclass(frozen=True)
class ExportStage:
    """A stage of an export.

    Attributes:
        name: its name, as the export says it when the stage begins.
        memory: bytes that it holds beside libraries.
        products: operations of matrix products in float32.
        narrow: the same in bfloat16.
        solving: operations of solving matrices.
        read: bytes that are read from the disk.
        written: bytes that are written to it.
        known: seconds that something else has estimated; None: nothing has.
        label: label of the progress lines that count all of it; empty: its name.
        step: position of its pass in the recipe, behind the last for the evaluation; None: nothing
            of it is kept by position.
        walk: name of the walk that is kept of it; empty: none is, or blocks themselves are.
        blocks: blocks that it goes through.
    """

    name: str
    memory: int
    products: float = 0.0
    narrow: float = 0.0
    solving: float = 0.0
    read: float = 0.0
    written: float = 0.0
    known: float | None = None
    label: str = ""
    step: int | None = None
    walk: str = ""
    blocks: int = 0

    def list_seconds(self, rates: MachineRates) -> Mapping[str, float]:
        """List the seconds that it takes at these rates, by the kind of work."""
        if self.known is not None:
            return {self.name: self.known}
        return {
            "products": self.products / rates.products + self.narrow / rates.narrow,
            "solving": self.solving / rates.solve,
            "reading": self.read / rates.disk,
            "writing": self.written / rates.disk,
        }

    def estimate_seconds(self, rates: MachineRates) -> float:
        """Return the seconds that it takes at these rates."""
        return sum(self.list_seconds(rates).values())


@dataclass(frozen=True)
class ExportTexts:
    """Tokens of the texts of an export.

    Attributes:
        calibration: tokens of the calibration text; 0: none is needed.
        evaluation: tokens of the evaluation text.
        figures: whether quality is measured on it.
    """

    calibration: int
    evaluation: int
    figures: bool


def measure_export_texts(recipe: Recipe) -> ExportTexts:
    """Return the tokens of the texts of a recipe, none of which is read."""
    from moe2edge.evaluation.margins import SAMPLES
    from moe2edge.evaluation.reference import PARITY_STEPS, PREFILL

    figures = recipe.evaluation.text != NO_TEXT
    evaluation = recipe.evaluation.samples * recipe.evaluation.length
    calibration = recipe.calibration.samples * recipe.calibration.length
    return ExportTexts(
        calibration if recipe.needs_calibration else 0,
        evaluation if figures else SAMPLES * (PREFILL + PARITY_STEPS),
        figures,
    )


def list_export_stages(
    plan: Plan,
    costs: Sequence[Estimate],
    recipe: Recipe,
    outputs: Sequence[tuple[Target, Model, Estimate]],
    budget: Memory,
    *,
    source_check: bool = True,
    verify: Extent = "full",
) -> list[ExportStage]:
    """List the stages of an export, by the names with which it begins them, in that order.

    Args:
        plan: the passes.
        costs: what each of them takes.
        recipe: the recipe, with every choice made.
        outputs: each target with what it gets, and what that takes.
        budget: memory that may be used.
        source_check: whether the source is compared with stock transformers first.
        verify: how much of each output is compared.
    """
    texts, source = measure_export_texts(recipe), plan.source
    figures = texts.evaluation * texts.figures
    stages = [ExportStage("starting", 0, known=STARTING)]
    stages.append(ExportStage(READING, 0, read=source.nbytes))
    if source_check:
        stages.append(_plan_source_check(source, budget))
    if recipe.needs_calibration and recipe.calibration.text == SELF:
        stages.append(_plan_writing(source, texts))
    stages += _list_passes(plan, costs, recipe, texts, budget)
    stages += _list_evaluation(plan, [model for _, model, _ in outputs], texts, budget)
    for target, model, estimate in outputs:
        stages += _list_output(target, model, estimate, texts, budget, verify)
    # Logits of the source, once by themselves and once beside those of the result; digests of
    # files; and the disk is waited for.
    heads = 3 * _count_head(source) * figures
    disk = sum(estimate.disk for _, _, estimate in outputs)
    stages.append(ExportStage(FINISHING, COMPUTING, heads, read=disk))
    return stages


def measure_peak(stages: Sequence[ExportStage]) -> int:
    """Return the peak of memory of an export with these stages, libraries included."""
    return IMPORTED_FOR_EXPORT + max(stage.memory for stage in stages)


# ---- stages --------------------------------------------------------------------------------------


def _plan_source_check(source: Model, budget: Memory) -> ExportStage:
    """Plan the comparison of the source with stock transformers, group of blocks by group."""
    from moe2edge.evaluation.stock_memory import estimate_source_check

    held = max(estimate_source_check(source, budget.limit or 0), source.block_nbytes)
    products = 2 * count_token_operations(source) * CHECKED_TOKENS
    return ExportStage("source check", held + COMPUTING, products, read=2 * source.nbytes)


def _plan_writing(source: Model, texts: ExportTexts) -> ExportStage:
    """Plan the text that the model writes itself, of which the most even samples are kept."""
    from moe2edge.calibration.self_sampling import WIDTH

    tokens = WIDTH * texts.calibration
    # Written, and walked over to see which experts it uses.
    products = (2 * count_token_operations(source) + _count_head(source)) * tokens
    held = 2 * source.parameters + COMPUTING
    return ExportStage("writing the text", held, products, read=2 * source.nbytes)


def _measure_stock_loading(model: Model) -> int:
    """Return the bytes of a whole model while transformers loads it in float32."""
    ends = sum(4 * weight.count + weight.nbytes for weight in model.rest.values())
    return ends + sum(look_at_blocks(model.blocks, _measure_loading))


def _measure_loading(block: Block) -> int:
    """Return the bytes of a block while transformers loads it.

    It is there in float32; the numbers of the file, which are mapped; and experts a second time,
    until they have become one tensor.
    """
    found = 0
    for role, weight in block.weights():
        found += 4 * weight.count + weight.nbytes
        found += 4 * weight.count if role.startswith("experts.") else 0
    return found


def _list_passes(
    plan: Plan, costs: Sequence[Estimate], recipe: Recipe, texts: ExportTexts, budget: Memory
) -> Iterator[ExportStage]:
    """Yield a stage for each pass: its walk, and what it computes."""
    known = iter(enumerate(zip(plan.steps, costs, strict=True)))
    for stage in group_stages(recipe.passes):
        walk: float | None = None
        for step in stage.passes:
            position, (planned, cost) = next(known)
            model = planned.before
            tokens = texts.calibration if stage.needs_tokens else 0
            # Passes of one stage share their walk.
            first = walk is None
            walk = count_token_operations(model) * tokens if first else 0.0
            held = max(cost.memory, model.block_nbytes if tokens else 0)
            if step.computes_numbers:
                # Parts of a block, of which some wait, and the new numbers of the block.
                held = cost.memory + min(budget.group_bytes, cost.memory)
                held += max(look_at_blocks(planned.after.blocks, lambda block: block.nbytes))
            held += _count_hidden(model, tokens, budget, _count_streams(step, model)) + COMPUTING
            count = len(model.blocks)
            if step.computes_numbers:
                products = 2 * walk + _count_hessians(model, tokens)
                wide, narrow = _split_by_dtype(getattr(step, "compute", ""), products)
                yield ExportStage(
                    step.name,
                    held,
                    wide,
                    narrow,
                    _count_solving(model, planned.after) if step.needs_tokens else 0.0,
                    model.nbytes,
                    cost.disk,
                    cost.time,
                    step=position,
                    blocks=count,
                )
            else:
                scored = stage.observers and first
                wide, narrow = _split_by_dtype(stage.compute, walk)
                runs = cost.runs * (count_token_operations(model) + _count_head(model))
                yield ExportStage(
                    step.name,
                    held,
                    wide + runs,
                    narrow,
                    read=model.nbytes * bool(tokens) * first,
                    known=cost.time,
                    label=stage.label if scored else "",
                    walk=SCORING if scored else "",
                    step=position,
                    blocks=count,
                )


def _count_streams(step: Pass, model: Model) -> float:
    """Return the sets of hidden states that a pass holds at once, in float32."""
    if not step.computes_numbers or model.family.generic:
        return 2
    # The inputs of all experts, too, in the dtype of products.
    return 2.5 if getattr(step, "compute", None) == "bfloat16" else 3


def _split_by_dtype(compute: str, products: float) -> tuple[float, float]:
    """Split the products of a pass on its walk into those in float32 and those in bfloat16.

    Which they are is said by its option ``compute``, once the recipe is resolved; passes without
    one compute in float32, and so do all that share their walk with one that does.
    """
    return (0.0, products) if compute == "bfloat16" else (products, 0.0)


def _list_evaluation(
    plan: Plan, results: Sequence[Model], texts: ExportTexts, budget: Memory
) -> Iterator[ExportStage]:
    """Yield the walks over source and result, and the record of what outputs have to hold."""
    source, result, step = plan.source, plan.result, len(plan.steps)
    apart = any(model is not source for model in results)
    models = [("source", source)] if texts.figures and apart else []
    for name, model in (*models, ("result", result)):
        held = model.block_nbytes + _count_hidden(model, texts.evaluation, budget, 3) + COMPUTING
        products = count_token_operations(model) * texts.evaluation
        yield ExportStage(
            f"evaluation: {name}",
            held,
            products,
            read=model.nbytes,
            step=step,
            walk=name,
            blocks=len(model.blocks),
        )
    largest = 4 * max(w.count for _, _, w in result.tensors())
    yield ExportStage("recording the reference", largest, read=result.nbytes)


def _list_output(
    target: Target,
    model: Model,
    estimate: Estimate,
    texts: ExportTexts,
    budget: Memory,
    verify: Extent,
) -> Iterator[ExportStage]:
    """Yield writing, reading back and running an output."""
    from moe2edge.evaluation.verify import RUNS_EXACT

    name, largest = target.name, 4 * max(w.count for _, _, w in model.tensors())
    each = count_token_operations(model)
    yield ExportStage(f"writing {name}", largest, written=estimate.disk)
    in_torch = any(library.startswith("transformers") for library in target.libraries)
    beside = (GENERATING_IN_TORCH if in_torch else GENERATING) + target.beside_nbytes
    if target.reads_calibration:
        yield ExportStage(
            f"calibrating {name}",
            estimate.memory + beside,
            each * texts.calibration,
            read=estimate.disk,
            label=f"calibration: {name}",
        )
    if verify == "full":
        yield ExportStage(f"checking {name}", largest, read=2 * estimate.disk)
    exact, wide = estimate.memory, 4 * model.parameters
    if target.streams and not fits(RUNS_EXACT * wide, budget.limit):
        exact = model.block_nbytes
    elif target.loads_by_transformers and model.is_uniform:
        exact = _measure_stock_loading(model)
    elif target.streams:
        exact = wide
    products = each * PROMPT_TOKENS * 2
    if verify == "full":
        # With the logits of the source, which they are compared with.
        evaluated = (each + 2 * _count_head(model)) * texts.evaluation * texts.figures
        products = each * COMPARED_TOKENS * 2 + evaluated
    # While a model is opened, its largest tensor is there once more, in float32.
    held = max(exact, estimate.memory if fits(estimate.memory, budget.limit) else 0) + largest
    yield ExportStage(f"running {name}", held + beside, products, read=2 * estimate.disk)


# ---- operations and bytes ------------------------------------------------------------------------


def count_token_operations(model: Model) -> float:
    """Return the operations of matrix products of one token, in blocks."""
    return 2.0 * sum(look_at_blocks(model.blocks, _count_used))


def _count_head(model: Model) -> float:
    """Return the operations of the logits of one token."""
    return 2.0 * prod(model.embedding.shape)


def _count_used(block: Block) -> float:
    """Return the parameters of the matrices of a block that one token uses."""
    used = float(block.parameters - sum(w.count for _, w in block.weights() if len(w.shape) < 2))
    if isinstance(block.mlp, MoELayer):
        used -= block.mlp.inactive_parameters
    return used


def _count_hidden(model: Model, tokens: int, budget: Memory, streams: float) -> int:
    """Return the bytes of hidden states that are in memory."""
    hidden = 4 * tokens * model.embedding.shape[1]
    if budget.hidden_bytes is not None and hidden > budget.hidden_bytes:
        return 0
    return int(streams * hidden)


def _count_hessians(model: Model, tokens: int) -> float:
    """Return the operations of summing Hessians; matrices with one input share theirs."""
    # Gate and up share theirs, and so do query, key and value: two of three count, about.
    return 2.0 * tokens * sum(look_at_blocks(model.blocks, _count_hessian)) * (2 / 3)


def _count_hessian(block: Block) -> float:
    """Return the products that one token adds to Hessians of a block, each matrix by itself."""
    layer, part = block.mlp, 1.0
    if isinstance(layer, MoELayer) and layer.experts:
        part = min(1.0, layer.router.top_k / len(layer.experts))
    return sum(
        (part if role.startswith("experts.") else 1.0) * weight.shape[1] ** 2
        for role, weight in block.weights()
        if len(weight.shape) == 2
    )


def _count_solving(before: Model, after: Model) -> float:
    """Return the operations of solving the matrices that become quantized."""
    new = (w for _, w in after.new_beside(before) if w.scheme is not None and len(w.shape) > 1)
    return float(
        sum_weights(new, lambda w: count_solve_operations(prod(w.shape[:-1]), w.shape[-1]))
    )
