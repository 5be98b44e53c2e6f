"""Training a model: AdamW on a text, the best weights on held-out text stay.

Everything that happens in a step follows from its number and what was saved behind the one before,
so that a training that is killed and resumed ends with the same bits (on a processor with the
same number of threads).
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

# Tokens in a forward pass; a larger batch is gone through in parts, whose gradients add up.
TOKENS_AT_ONCE = 4096
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a training.

    Attributes:
        steps: at most.
        batch: samples in a step.
        learning_rate: the highest.
        warmup: part of the steps in which the learning rate rises; then it falls as a cosine.
        weight_decay: of matrices.
        clip: highest norm of all gradients together.
        seed: of the order of samples.
        eval_every: steps between evaluations.
        patience: evaluations without improvement after which it stops; 0: never.
        save_every: steps between checkpoints.
        anneal: fraction of the steps in which tied experts are blended from their originals;
            None: they have none.
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
    """Merged experts that compute ``share * original + (1 - share) * merged``."""

    original_share: float

    def forget_originals(self) -> None:
        """Their share is 0 from now on."""
        ...


def compute_original_share(step: int, settings: TrainerSettings) -> float:
    """Compute the share of originals in tied experts, from 1 down to 0."""
    if not settings.anneal:
        return 0.0
    return max(0.0, 1.0 - step / (settings.anneal * settings.steps))


def choose_rows(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Choose the samples of a step out of ``count``: all in turn, each time in another order.

    >>> sorted(choose_rows(0, 2, 4, 7) + choose_rows(1, 2, 4, 7))
    [0, 1, 2, 3]
    """
    found = []
    for place in range(step * batch, (step + 1) * batch):
        order = np.random.default_rng([seed, place // count]).permutation(count)
        found.append(int(order[place % count]))
    return found


@dataclass(frozen=True)
class Recovered:
    """Result of a training.

    Attributes:
        best: weights by name; empty if those from before the first step are the best.
        progress: where it ended.
    """

    best: Mapping[str, Tensor]
    progress: Progress


class Trainer:
    """Trains some parameters of a transformers model.

    Args:
        model: called with ids int64 [samples, length], it gives ``logits``.
        parameters: those that are trained, by name.
        tokens: to train on, int64 [samples, length].
        held_out: to evaluate on, int64 [samples, length].
        loss: of samples: which they are, their ids, and the logits that the model gives them.
        settings: how to train.
        states: where checkpoints are; None: there are none.
        reporter: receives progress.
        annealed: experts that share bases, with originals.
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
        self._settings, self._states, self._watcher = settings, states, reporter
        self._annealed = annealed
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._device = next(iter(parameters.values())).device
        # The default of torch on a GPU takes another copy of all parameters.
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
        # A function of the step alone, so that there is no state to keep.
        self._factor = schedule.lr_lambdas[0]
        self._progress = Progress()
        self._best: Mapping[str, Tensor] = {}

    def run(self) -> Recovered:
        """Train to the end, or from where a run before stood.

        Raises:
            Diverged: the loss is no number any more.
        """
        settings = self._settings
        self._restore()
        if not self._is_over():
            self._tell_time()
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
        tired = 0 < patience <= progress.since
        return progress.finished or tired or progress.step >= self._settings.steps

    # ---- steps -------------------------------------------------------------------------------

    def _make_step(self) -> None:
        settings, step = self._settings, self._progress.step
        self._share(share := compute_original_share(step, settings))
        if not share:
            for experts in self._annealed:
                experts.forget_originals()
        rate = settings.learning_rate * self._factor(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(choose_rows(step, settings.batch, len(self._tokens), settings.seed))
        self._check("loss", loss)
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # every one has moments of the same age
                parameter.grad = torch.zeros_like(parameter)
        self._check("gradient", float(nn.utils.clip_grad_norm_(parameters, settings.clip)))
        self._optimizer.step()
        done, losses = step + 1, (*self._progress.losses, loss)
        self._progress = replace(self._progress, step=done, losses=losses)
        self._watcher.advance("recover", done, settings.steps, f"loss {loss:.3f}")

    def _backward(self, rows: Sequence[int]) -> float:
        """Compute the loss of some samples; its gradient is added up in the parameters."""
        total = 0.0
        for part in _parts(torch.tensor(rows), self._tokens.shape[1]):
            ids = self._tokens[part].to(self._device)
            loss = self._loss(part, ids, self._logits(ids)) * (len(part) / len(rows))
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def _check(self, what: str, value: float) -> None:
        """Stop a training that has become none.

        Raises:
            Diverged: it has.
        """
        if not math.isfinite(value):
            found = "NaN" if math.isnan(value) else "infinite"
            raise Diverged(
                f"recover: the {what} became {found} at step {self._progress.step}; lower "
                f"learning_rate (now {self._settings.learning_rate:g})"
            )

    def _share(self, share: float) -> None:
        """Set the share of originals in tied experts."""
        for experts in self._annealed:
            experts.original_share = share

    # ---- evaluation --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Look at held-out text, and keep the weights if they are the best so far."""
        progress, settings = self._progress, self._settings
        if progress.step and compute_original_share(progress.step, settings):
            return  # what is trained still leans on what will be gone
        self._share(0.0)
        perplexity = metrics.measure(self._held_out, self._held_out_logits(), None).perplexity
        self._check("held-out perplexity", perplexity)
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
        self._watcher.log(
            f"recover: step {progress.step} of {settings.steps}: {loss}held-out perplexity "
            f"{perplexity:.4f}, learning rate {line.learning_rate:.2e}"
        )

    @torch.no_grad()
    def _held_out_logits(self) -> Iterator[Tensor]:
        for part in _parts(torch.arange(len(self._held_out)), self._held_out.shape[1]):
            yield from self._logits(self._held_out[part].to(self._device)).detach().float().cpu()

    def _tell_time(self) -> None:
        """Say how long all will take, by a step that is thrown away.

        In an evaluation there is a forward pass alone, a third of a step for as many samples.
        """
        settings, step = self._settings, self._progress.step
        rows = choose_rows(step, settings.batch, len(self._tokens), settings.seed)
        self._share(compute_original_share(step, settings))
        seconds = 0.0
        for _ in range(2):  # in the first one memory is found
            begun = time.perf_counter()
            self._backward(rows)
            seconds = time.perf_counter() - begun
        self._optimizer.zero_grad(set_to_none=True)
        left = settings.steps - step
        looks = left // settings.eval_every + 1
        evaluations = looks * len(self._held_out) / (3 * settings.batch)
        self._watcher.log(
            f"recover: {seconds:.2f} s for a step, about {(left + evaluations) * seconds / 60:.1f} "
            f"minutes for {left} more steps, held-out text {looks} times"
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
        """Go on from the last checkpoint, if there is one."""
        saved = self._states.load() if self._states is not None else None
        if saved is None:
            return
        self._check_saved(saved)
        self._progress, self._best = saved.progress, saved.best
        if saved.progress.finished:
            return
        self._watcher.log(f"recover: resuming after step {saved.progress.step}")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(saved.now[name])
            state: dict[str, Any] = {
                moment: saved.now[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
            }
            # Where the optimizer keeps it: on a GPU beside the parameter, as it is fused there.
            where = parameter.device if self._fused else "cpu"
            state["step"] = torch.tensor(float(saved.progress.step), device=where)
            self._optimizer.state[parameter] = state

    def _check_saved(self, saved: Saved) -> None:
        """Hold what was saved against the parameters.

        Raises:
            InputError: it is not of these.
        """
        assert self._states is not None
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        moments = {f"{moment}.{name}": s for name, s in shapes.items() for moment in MOMENTS}
        for stem, wanted in (("best", shapes), ("now", shapes | moments)):
            found = {name: tensor.shape for name, tensor in getattr(saved, stem).items()}
            if found and found != wanted:
                odd = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
                raise describe_damage(
                    self._states.folder / f"{stem}-*.safetensors",
                    f"it has {odd} as {_shape(found.get(odd))}, expected {_shape(wanted.get(odd))}",
                )


def _shape(shape: Sequence[int] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _parts(rows: Tensor, length: int) -> tuple[Tensor, ...]:
    """Rows in parts of about `TOKENS_AT_ONCE` tokens."""
    return torch.split(rows, count_samples_at_once(length))


def count_samples_at_once(length: int) -> int:
    """Count the samples of a length in one forward pass."""
    return max(1, TOKENS_AT_ONCE // length)
