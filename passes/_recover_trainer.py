"""Training of a model: AdamW on a text, with the best weights on held-out text as result.

A step depends only on its number and on what is saved after the step before it. So a training that
is killed and resumed ends with the same bits (on a CPU, with the same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from moe2edge.errors import Diverged
from moe2edge.numerics import metrics
from moe2edge.passes._recover_state import Line, Progress, Saved, States, describe_damage

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.progress import Reporter

# Tokens in a forward pass; a larger batch is split into parts, whose gradients are summed.
TOKENS_AT_ONCE = 4096
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a training.

    Attributes:
        steps: most steps.
        batch: number of samples in a step.
        learning_rate: highest learning rate.
        warmup: fraction of the steps in which the learning rate rises; then it falls as a cosine.
        weight_decay: weight decay of matrices.
        clip: largest norm of all gradients together.
        seed: seed of the order of samples.
        eval_every: steps between evaluations.
        patience: evaluations without improvement after which training stops; 0: never.
        save_every: steps between checkpoints.
        anneal: fraction of the steps in which tied experts fade from their original matrices to
            base and factors; None: there is no annealing.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float
    seed: int
    eval_every: int
    patience: int
    save_every: int
    anneal: float | None = None


class Anneals(Protocol):
    """Tied experts whose output is ``share * original + (1 - share) * tied``."""

    original_share: float

    def forget_originals(self) -> None:
        """Drop the original matrices; their share stays 0."""
        ...


def compute_original_share(step: int, settings: TrainerSettings) -> float:
    """Compute the share of the originals in the outputs of tied experts, from 1 down to 0."""
    if not settings.anneal:
        return 0.0
    return max(0.0, 1.0 - step / (settings.anneal * settings.steps))


def choose_rows(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Choose the samples of a step, out of ``count``: all in turn, each epoch in another order.

    >>> sorted(choose_rows(0, 2, 4, 7) + choose_rows(1, 2, 4, 7))
    [0, 1, 2, 3]
    """
    rows = []
    for place in range(step * batch, (step + 1) * batch):
        order = np.random.default_rng([seed, place // count]).permutation(count)
        rows.append(int(order[place % count]))
    return rows


@dataclass(frozen=True)
class Recovered:
    """Result of a training.

    Attributes:
        best: the best weights by name; empty if those before the first step are the best.
        progress: final progress.
    """

    best: Mapping[str, Tensor]
    progress: Progress


class Trainer:
    """Trains some parameters of a transformers model.

    Args:
        model: model that returns ``logits`` for ids int64 [samples, length].
        parameters: parameters to train, by name.
        tokens: text to train on, int64 [samples, length].
        held_out: text to evaluate on, int64 [samples, length].
        loss: loss of samples, given their indices, their ids, and the model's logits.
        settings: settings of the training.
        states: folder of the checkpoint; None: no checkpoints are saved.
        reporter: gets progress and log lines.
        annealed: tied experts that still have their original matrices.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        tokens: Tensor,
        held_out: Tensor,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        settings: TrainerSettings,
        states: States | None,
        reporter: Reporter,
        annealed: Sequence[Anneals] = (),
    ) -> None:
        from transformers import get_cosine_schedule_with_warmup

        self._model, self._parameters, self._loss = model, parameters, loss
        self._tokens, self._held_out = tokens, held_out
        self._settings, self._states, self._reporter = settings, states, reporter
        self._annealed = annealed
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._device = next(iter(parameters.values())).device
        # The default on a GPU, not fused, takes another copy of all parameters.
        self._fused = self._device.type == "cuda"
        decay = settings.weight_decay
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        rate = settings.learning_rate
        self._optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=rate, fused=self._fused
        )
        warm = round(settings.warmup * settings.steps)
        schedule = get_cosine_schedule_with_warmup(self._optimizer, warm, settings.steps)
        # A function of the step alone, so the schedule has no state to save.
        self._factor = schedule.lr_lambdas[0]
        self._progress = Progress()
        self._best: Mapping[str, Tensor] = {}

    def run(self) -> Recovered:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            Diverged: the loss, gradient or perplexity is NaN or infinite.
        """
        settings = self._settings
        self._restore()
        if not self._is_over():
            self._report_time()
        if not self._progress.history:
            self._evaluate()
        while not self._is_over():
            self._make_step()
            step = self._progress.step
            if step % settings.eval_every == 0 or step == settings.steps:
                self._evaluate()
            if step % settings.save_every == 0:
                self._save()
        if not self._progress.finished:
            self._progress = replace(self._progress, losses=(), finished=True)
            self._save()
        return Recovered(self._best, self._progress)

    def _is_over(self) -> bool:
        progress, patience = self._progress, self._settings.patience
        stalled = 0 < patience <= progress.since
        return progress.finished or stalled or progress.step >= self._settings.steps

    # ---- steps -------------------------------------------------------------------------------

    def _make_step(self) -> None:
        settings, step = self._settings, self._progress.step
        self._set_share(share := compute_original_share(step, settings))
        if not share:
            for experts in self._annealed:
                experts.forget_originals()
        rate = settings.learning_rate * self._factor(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(choose_rows(step, settings.batch, len(self._tokens), settings.seed))
        self._check_finite("loss", loss)
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # so that all moments have had the same number of steps
                parameter.grad = torch.zeros_like(parameter)
        self._check_finite("gradient", float(nn.utils.clip_grad_norm_(parameters, settings.clip)))
        self._optimizer.step()
        done, losses = step + 1, (*self._progress.losses, loss)
        self._progress = replace(self._progress, step=done, losses=losses)
        self._reporter.advance("recover", done, settings.steps, f"loss {loss:.3f}")

    def _backward(self, rows: Sequence[int]) -> float:
        """Return the loss of some samples; add its gradient to that of the parameters."""
        total = 0.0
        for part in _split(torch.tensor(rows), self._tokens.shape[1]):
            ids = self._tokens[part].to(self._device)
            loss = self._loss(part, ids, self._compute_logits(ids)) * (len(part) / len(rows))
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total

    def _compute_logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def _check_finite(self, what: str, value: float) -> None:
        """Stop the training if a value is not finite.

        Raises:
            Diverged: it is not.
        """
        if not math.isfinite(value):
            found = "NaN" if math.isnan(value) else "infinite"
            raise Diverged(
                f"recover: the {what} became {found} at step {self._progress.step}; lower "
                f"learning_rate (now {self._settings.learning_rate:g})"
            )

    def _set_share(self, share: float) -> None:
        """Set the share of the originals in the outputs of tied experts."""
        for experts in self._annealed:
            experts.original_share = share

    # ---- evaluation --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure perplexity on held-out text, and keep the weights if they are the best so far."""
        progress, settings = self._progress, self._settings
        if progress.step and compute_original_share(progress.step, settings):
            return  # the trained weights still rely on the originals
        self._set_share(0.0)
        logits = self._compute_held_out_logits()
        perplexity = metrics.measure(self._held_out, logits, None).perplexity
        self._check_finite("held-out perplexity", perplexity)
        better = perplexity < progress.best
        if better and progress.step:
            self._best = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()}
        losses = progress.losses
        line = Line(
            step=progress.step,
            loss=sum(losses) / len(losses) if losses else None,
            perplexity=perplexity,
            learning_rate=settings.learning_rate * self._factor(progress.step),
        )
        self._progress = replace(
            progress,
            best_step=progress.step if better else progress.best_step,
            since=0 if better else progress.since + 1,
            losses=(),
            history=(*progress.history, line),
        )
        loss = "" if line.loss is None else f"loss {line.loss:.4f}, "
        self._reporter.log(
            f"recover: step {progress.step} of {settings.steps}: {loss}held-out perplexity "
            f"{perplexity:.4f}, learning rate {line.learning_rate:.2e}"
        )

    @torch.no_grad()
    def _compute_held_out_logits(self) -> Iterator[Tensor]:
        for part in _split(torch.arange(len(self._held_out)), self._held_out.shape[1]):
            ids = self._held_out[part].to(self._device)
            yield from self._compute_logits(ids).detach().float().cpu()

    def _report_time(self) -> None:
        """Report the estimated time of the training, measured on a step that is discarded.

        An evaluation is a forward pass only, a third of a step for as many samples.
        """
        settings, step = self._settings, self._progress.step
        rows = choose_rows(step, settings.batch, len(self._tokens), settings.seed)
        self._set_share(compute_original_share(step, settings))
        seconds = 0.0
        for _ in range(2):  # the first one is slower: it allocates memory
            begun = time.perf_counter()
            self._backward(rows)
            seconds = time.perf_counter() - begun
        self._optimizer.zero_grad(set_to_none=True)
        left = settings.steps - step
        evaluations = left // settings.eval_every + 1
        as_steps = evaluations * len(self._held_out) / (3 * settings.batch)
        self._reporter.log(
            f"recover: {seconds:.2f} s per step; about {(left + as_steps) * seconds / 60:.1f} "
            f"minutes for {left} more steps and {evaluations} evaluations on held-out text"
        )

    # ---- checkpoints -------------------------------------------------------------------------

    def _save(self) -> None:
        if self._states is None:
            return
        now: dict[str, Tensor] = {}
        if not self._progress.finished:
            for name, parameter in self._parameters.items():
                now[name] = parameter.detach()
                for moment in MOMENTS:
                    now[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]
        self._states.save(Saved(self._progress, self._best, now))

    def _restore(self) -> None:
        """Resume from the last checkpoint, if there is one."""
        saved = self._states.load() if self._states is not None else None
        if saved is None:
            return
        self._check_saved(saved)
        self._progress, self._best = saved.progress, saved.best
        if saved.progress.finished:
            return
        self._reporter.log(f"recover: resuming after step {saved.progress.step}")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(saved.now[name])
            state: dict[str, Any] = {
                moment: saved.now[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
            }
            # A fused optimizer expects the step on the device of the parameter, others on the CPU.
            device = parameter.device if self._fused else "cpu"
            state["step"] = torch.tensor(float(saved.progress.step), device=device)
            self._optimizer.state[parameter] = state

    def _check_saved(self, saved: Saved) -> None:
        """Check that a checkpoint has the names and shapes of the parameters.

        Raises:
            InputError: it does not.
        """
        assert self._states is not None
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        moments = {f"{moment}.{name}": s for name, s in shapes.items() for moment in MOMENTS}
        for stem, expected in (("best", shapes), ("now", shapes | moments)):
            found = {name: tensor.shape for name, tensor in getattr(saved, stem).items()}
            if found and found != expected:
                odd = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
                raise describe_damage(
                    self._states.folder / f"{stem}-*.safetensors",
                    f"shape of {odd} is {_describe_shape(found.get(odd))}, expected "
                    f"{_describe_shape(expected.get(odd))}",
                )


def _describe_shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _split(rows: Tensor, length: int) -> tuple[Tensor, ...]:
    """Split rows into parts of about `TOKENS_AT_ONCE` tokens."""
    return torch.split(rows, count_samples_at_once(length))


def count_samples_at_once(length: int) -> int:
    """Count the samples of a length in one forward pass."""
    return max(1, TOKENS_AT_ONCE // length)
