"""Train the model that trimming, replacing or merging left, on text or towards the source.

The loss distill is in `moe2edge.passes._recover_teacher`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe2edge.errors import InputError
from moe2edge.model.architecture import build_meta_model, find_layers
from moe2edge.model.hf_config import build_transformers_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.passes._recover_estimate import (
    BEST_BYTES,
    NUMBER_BYTES,
    SAVED_BYTES,
    TRAINED_BYTES,
    TrainingSizes,
    estimate_activations,
    estimate_originals,
)
from moe2edge.passes._recover_selection import Selection, is_whole
from moe2edge.pipeline.contract import (
    Outcome,
    PassContext,
    PlannedStep,
    TextSize,
    TextSizes,
    Train,
)
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moe2edge.passes._recover_state import States
    from moe2edge.passes._recover_teacher import Objective
    from moe2edge.passes._recover_trainer import Anneals, Recovered, TrainerSettings

# Relative difference in perplexity between the two ways in which a model is run here.
NOISE = 1e-5
# Options that need a choice of another option.
ONLY_WITH = {
    "lora_rank": ("train", "lora"),
    "top_logits": ("loss", "distill"),
    "tail": ("loss", "distill"),
    "text_share": ("loss", "distill"),
}


class Recover(Train):
    """Train the model on the training text, as a whole or in part; the best weights stay.

    The loss is next-token cross-entropy (``text``), or the distance from the source's next-token
    distribution (``distill``), which is computed once and kept on the disk. The learning rate
    rises, then falls as a cosine (AdamW). The best weights are those of least perplexity on
    samples at the end of the training text, which are not trained on.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    may_change_nothing: ClassVar[bool] = True
    reads: ClassVar[tuple[type, ...]] = (UntiedModel,)

    train: Annotated[
        Literal["full", "experts", "router", "lora"],
        Field(
            description="full: every parameter; experts: experts, replacements and routers; "
            "router: routers only; lora: low-rank adapters of matrices, and replacements"
        ),
    ] = "full"
    loss: Annotated[
        Literal["text", "distill"],
        Field(description="text: cross-entropy of the text; distill: distance to the source"),
    ] = "text"
    top_logits: Annotated[
        int,
        Field(
            ge=1, description="distill: number of the source's most likely tokens that are compared"
        ),
    ] = 32
    tail: Annotated[
        Literal["bucket", "renormalize"],
        Field(
            description="distill: treatment of the source's other tokens; bucket: all others "
            "count as one token; renormalize: the likeliest are scaled to sum to one"
        ),
    ] = "bucket"
    text_share: Annotated[
        float,
        Field(ge=0, lt=1, description="distill: weight of the loss text in the sum of both losses"),
    ] = 0.0
    lora_rank: Annotated[int, Field(ge=1, description="lora: rank of adapters")] = 8
    steps: Annotated[int, Field(ge=1, description="maximum number of steps")] = 500
    batch: Annotated[int, Field(ge=1, description="samples per step")] = 8
    learning_rate: Annotated[float, Field(gt=0, description="the highest learning rate")] = 1e-4
    warmup: Annotated[
        float,
        Field(ge=0, le=1, description="fraction of the steps in which the learning rate rises"),
    ] = 0.05
    weight_decay: Annotated[
        float, Field(ge=0, description="weight decay of matrices, as in AdamW")
    ] = 0.01
    clip: Annotated[float, Field(gt=0, description="maximum norm of the gradient")] = 1.0
    seed: Annotated[
        int,
        Field(
            ge=0, le=2**32 - 1, description="seed of the order of samples and the initial adapters"
        ),
    ] = 0
    held_out: Annotated[
        int, Field(ge=1, description="samples at the end of the text that choose the best weights")
    ] = 16
    eval_every: Annotated[int, Field(ge=1, description="steps between evaluations")] = 50
    patience: Annotated[
        int, Field(ge=0, description="evaluations without improvement before it stops; 0: never")
    ] = 5
    save_every: Annotated[int, Field(ge=1, description="steps between checkpoints")] = 50
    anneal: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="fraction of the steps in which tied experts are blended from their "
            "originals into what they share; default: no blending",
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="device for training; auto: a GPU if there is one"),
    ] = "auto"

    @model_validator(mode="after")
    def _options_go_together(self) -> Recover:
        for name, (choice, wanted) in ONLY_WITH.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and getattr(self, choice) != wanted:
                raise ValueError(f"{name} is for {choice}: {wanted}; set that, or leave {name} out")
        return self

    # ---- what there will be ------------------------------------------------------------------

    @property
    def changes_routers(self) -> bool:
        """True if it trains routers; adapters are for other matrices only."""
        return self.train != "lora"

    def list_needs(self) -> tuple[Trait, ...]:
        """List what annealing needs: experts become others of the same three matrices."""
        return self.needs if self.anneal is None else (Trait.GATED, Trait.UNBIASED)

    def check(self, model: Model) -> None:
        """Refuse a quantized or sparse model, and options that do not apply to the model."""
        if any(weight.scheme or weight.pattern for _, _, weight in model.tensors()):
            raise InputError(
                "recover: the model has quantized or sparse weights, which training would undo; "
                "put recover before gptq, awq, rtn and sparsify"
            )
        if self.loss == "distill" and self.top_logits > model.vocabulary:
            raise InputError(
                f"recover: top_logits {self.top_logits}, but the vocabulary has "
                f"{model.vocabulary} entries; choose at most {model.vocabulary}"
            )
        if self.anneal is not None and not any(layer.sharing for _, layer in model.moe_blocks):
            raise InputError(
                "recover: anneal is for experts that share a base or became factors "
                "(expert_replace with base or svd, expert_merge with routing: members), and this "
                "model has none; leave it out"
            )
        roles = [(block, role) for block in model.blocks for role, _ in block.weights()]
        if not any(self._selection.takes(block, role) for block, role in roles):
            raise InputError(
                f"recover: train: {self.train} finds nothing to train here; set train: full"
            )
        if self.train == "lora":
            self._check_lora(model)

    def _check_lora(self, model: Model) -> None:
        """Refuse to continue without peft, ranks above those of matrices, and what peft refuses."""
        from moe2edge.passes._recover_lora import check_adapts, check_installed

        check_installed()
        adapted = [
            weight
            for block in model.blocks
            for role, weight in block.weights()
            if self._selection.takes(block, role) and not is_whole(role)
        ]
        smallest = min(adapted, key=lambda weight: min(weight.shape), default=None)
        if smallest is not None and self.lora_rank > min(smallest.shape):
            raise InputError(
                f"recover: lora_rank {self.lora_rank}, but {smallest.name} is "
                f"{list(smallest.shape)}; choose at most {min(smallest.shape)}"
            )
        if model.family.generic:
            from moe2edge.passes._recover_parameters import select_parameters
            from moe2edge.runtime.decoder_blocks import fit_meta_layers

            names = select_parameters(model, self._selection.takes_anywhere)
            built = build_meta_model(build_transformers_config(model))
            fit_meta_layers(find_layers(built)[1], model)
            check_adapts(built, names, self.lora_rank)

    def _count_samples(self, samples: int) -> int:
        """Count the samples that are run, if no step is left out; a gradient counts as two more."""
        evaluated = self.held_out * (2 + self.steps // self.eval_every)
        taught = samples - self.held_out if self.loss == "distill" else 0
        return 3 * self.steps * self.batch + evaluated + taught

    def check_text(self, text: TextSize) -> None:
        """Refuse fewer samples than are held out and in a step."""
        samples = text.samples
        if samples - self.held_out < self.batch:
            raise InputError(
                f"recover: of {samples} samples of text {self.held_out} are held out, and a step "
                f"takes {self.batch}: --set training.samples={self.held_out + self.batch}, or "
                "lower held_out or batch"
            )

    def plan(self, model: Model) -> Model:
        """Return the same shapes."""
        return model

    def place(self) -> torch.device:
        """Return the device on which it trains.

        Raises:
            InputError: there is no GPU, and one is requested.
        """
        from moe2edge.runtime.memory import choose_device

        return choose_device(self.device, self.name)

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what training takes, by the formulas of docs/recovery.md."""
        from moe2edge.passes import _recover_teacher, _recover_trainer

        if (text := texts.training) is None:
            return super().estimate(planned, texts)
        model = planned.before
        sizes = TrainingSizes.measure(model, self._selection, self.lora_rank)
        at_once = min(self.batch, _recover_trainer.count_samples_at_once(text.length))
        logits = 3 if self.loss == "text" else 5 if self.text_share else 4
        training = TRAINED_BYTES * sizes.trained + sizes.adapters
        training += estimate_activations(model, at_once * text.length, logits)
        training += estimate_originals(model) if self.anneal is not None else 0
        numbers, best = NUMBER_BYTES * model.parameters, BEST_BYTES * sizes.trained
        saved = 2 * SAVED_BYTES * sizes.trained
        saved += sum(weight.nbytes for _, _, weight in model.tensors())
        if self.loss == "distill":
            saved += _recover_teacher.estimate_teacher_bytes(
                text.samples - self.held_out, text.length, self.top_logits
            )
        on_gpu = self.place().type == "cuda"
        return Estimate(
            numbers + best + (0 if on_gpu else training),
            saved,
            gpu=numbers + training if on_gpu else 0,
            runs=text.length * self._count_samples(text.samples),
            purpose="recover trains",
            remedy="set batch to fewer samples, or train less: see train",
        )

    @property
    def _selection(self) -> Selection:
        return Selection(self.train, self.anneal is not None)

    # ---- doing it ----------------------------------------------------------------------------

    def search(self, context: PassContext) -> Outcome:
        """Train.

        Raises:
            Diverged: the loss is no number any more.
        """
        from moe2edge.passes import _recover_parameters
        from moe2edge.passes._recover_state import States

        if context.training is None:
            raise AssertionError("recover got no text to train on")
        text = TextSize(*context.training.shape)
        self.check_text(text)
        self._state_cost(context, text)
        with _open_folder(context) as folder:
            recovered, state = self._train(context, context.training, States(folder))
        model, after = context.model, None
        if state:
            model = _recover_parameters.attach_trained(model, state, context.store)
            after = self._measure_stored(context, model, recovered.progress.best)
        before = recovered.progress.history[0].perplexity
        better = after is not None and after < (1 - NOISE) * before
        notes, figures = self._account(recovered, after, better=better)
        if not better:
            return Outcome(context.model, notes=notes, figures=figures)
        known = _recover_parameters.locate_parameters(context.model)
        changed = dict.fromkeys(
            known[name].name if known[name].block is None else f"block {known[name].block}"
            for name in state
        )
        return Outcome(model, tuple(changed), notes=notes, figures=figures)

    def _measure_stored(self, context: PassContext, model: Model, perplexity: float) -> float:
        """Measure the held-out perplexity as stored, given the ``perplexity`` before rounding."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        assert context.training is not None
        if all(weight.dtype == "F32" for _, _, weight in model.tensors()):
            return perplexity
        ids, label = context.training[-self.held_out :], "recover: weights as stored"
        hidden = walk.observe(model, ids, (), context.reporter.advance, label, context.memory)
        return metrics.measure(ids, walk.compute_logits(model, hidden), None).perplexity

    def _state_cost(self, context: PassContext, text: TextSize) -> None:
        """Report the cost before it starts.

        Raises:
            DoesNotFit: there is less.
        """
        model = context.model
        count = TrainingSizes.measure(model, self._selection, self.lora_rank).trained
        cost = self.estimate(PlannedStep(self, model, model), context.texts)
        gpu = f"{cost.gpu / 1e9:.2f} GB of GPU memory, " if cost.gpu else ""
        context.reporter.log(
            f"recover: {count:,} of {model.parameters:,} parameters are trained ({self.train}) on "
            f"{text.samples - self.held_out} samples of {text.length} tokens, {self.held_out} are "
            f"held out; needs about {gpu}{cost.memory / 1e9:.2f} GB of memory and "
            f"{cost.disk / 1e9:.2f} GB of disk"
        )
        # Groups of experts that share a base can be others than planned.
        cost.check(context.memory.limit)

    def _train(
        self, context: PassContext, tokens: Tensor, states: States
    ) -> tuple[Recovered, dict[str, Tensor]]:
        """Train; return the result and the changed parameters by name, none if none got better."""
        import torch

        from moe2edge.passes import _recover_lora, _recover_parameters
        from moe2edge.passes._recover_trainer import Trainer
        from moe2edge.runtime.load import build_transformers_model

        text, held_out = tokens[: -self.held_out], tokens[-self.held_out :]
        saved = states.progress()
        over = saved is not None and saved.finished
        objective = self._make_objective(context, text, states.folder, over=over)
        names = _recover_parameters.select_parameters(context.model, self._selection.takes_anywhere)
        loaded: Any = build_transformers_model(context.model, torch.float32, packed=False)
        _recover_parameters.check_parameters(context.model, dict(loaded.named_parameters()))
        loaded.to(self.place())
        annealed = self._begin_annealing(context, loaded)
        if self.train == "lora":
            known = _recover_parameters.locate_parameters(context.model)
            whole = [name for name in names if is_whole(known[name].roles[0])]
            adapted = [name for name in names if not is_whole(known[name].roles[0])]
            loaded, parameters = _recover_lora.adapt(
                loaded, adapted, whole, self.lora_rank, self.seed
            )
        else:
            all_of_them = dict(loaded.named_parameters())
            parameters = {name: all_of_them[name] for name in names}
        loaded.to(self.place())
        recovered = Trainer(
            loaded,
            parameters,
            text,
            held_out,
            objective,
            self._make_settings(),
            states,
            context.reporter,
            annealed,
        ).run()
        if objective.teacher is not None:
            objective.teacher.forget()
        if not recovered.best:
            return recovered, {}
        return recovered, self._collect_numbers(loaded, parameters, recovered.best, names)

    def _make_objective(
        self, context: PassContext, text: Tensor, folder: Path, *, over: bool
    ) -> Objective:
        """Make the loss; a training that is over needs none."""
        from moe2edge.passes._recover_teacher import Objective, Teacher

        if self.loss == "text" or over:
            return Objective()
        teacher = Teacher.ask(
            context.source, text, self.top_logits, folder, context.reporter, context.memory
        )
        return Objective(teacher, self.text_share, self.tail == "bucket")

    def _make_settings(self) -> TrainerSettings:
        from moe2edge.passes._recover_trainer import TrainerSettings

        return TrainerSettings(
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(TrainerSettings)
            }
        )

    def _begin_annealing(self, context: PassContext, loaded: Any) -> list[Anneals]:
        """Let tied experts begin as the experts that they were before."""
        if self.anneal is None:
            return []
        from moe2edge.runtime.decoder_blocks import load_finite
        from moe2edge.runtime.mixed_experts import MixedExperts

        found: list[Anneals] = []
        left = context.facts.get(UntiedModel)
        untied = left.model if left else context.source
        twins = {block.origin: layer for block, layer in untied.moe_blocks}
        for block, layer in context.model.moe_blocks:
            if not layer.sharing:
                continue
            before = {expert.origin: expert for expert in twins[block.origin].experts}

            def original(row: int, layer: MoELayer = layer, before: Any = before) -> list[Tensor]:
                expert = before[layer.rows[row].origin]
                return [load_finite(weight) for weight in (expert.gate, expert.up, expert.down)]

            path = context.model.architecture.anatomy[block.origin].experts
            mixed: MixedExperts = find_layers(loaded)[1][block.index].get_submodule(str(path))
            found.append(mixed.anneal(layer, original))
        return found

    def _collect_numbers(
        self,
        loaded: Any,
        parameters: Mapping[str, nn.Parameter],
        best: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the best weights by names of the transformers model, with adapters merged."""
        from moe2edge.passes import _recover_lora

        if self.train != "lora":
            return dict(best)
        for name, parameter in parameters.items():
            parameter.data.copy_(best[name])
        merged = dict(_recover_lora.merge(loaded.cpu()).named_parameters())
        return {name: merged[name].detach() for name in names}

    def _account(
        self, recovered: Recovered, after: float | None, *, better: bool
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Make notes and figures, given the held-out perplexity ``after`` of the model as stored.

        Args:
            recovered: the result of training.
            after: None if no evaluation beat the model before training.
            better: whether the trained model stays.
        """
        progress = recovered.progress
        before, steps, at = progress.history[0].perplexity, progress.step, progress.best_step
        as_it_was = f"{before:.4f} from before; the model is as it was"
        if after is None:
            note = f"no evaluation in {steps} steps beat the held-out perplexity {as_it_was}"
        elif not better:
            note = (
                f"held-out perplexity is {progress.best:.4f} at step {at} of {steps}, but "
                f"{after:.4f} with weights rounded to the source's precision, no better than the "
                f"{as_it_was}"
            )
        else:
            note = (
                f"held-out perplexity {before:.4f} before, {after:.4f} after, at step {at} of "
                f"{steps}"
            )
        figures = {
            "best_step": at if better else 0,
            "steps": steps,
            "perplexity": {"before": before, "after": after if better else before},
            "history": [dataclasses.asdict(line) for line in progress.history],
        }
        return (note,), figures


@contextlib.contextmanager
def _open_folder(context: PassContext) -> Iterator[Path]:
    """Open the folder for checkpoints; a temporary one if none outlives the run."""
    if context.scratch is not None:
        yield context.scratch
        return
    with tempfile.TemporaryDirectory(prefix="recover-") as name:
        yield Path(name)
