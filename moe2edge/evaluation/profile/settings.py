"""Amount of work of a profile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe2edge.errors import InputError

TOKEN_SIZES = ("prompt_tokens", "gen_tokens")


@dataclass(frozen=True)
class ProfileSettings:
    """Amount of work that is measured.

    Attributes:
        prompt_tokens: length of each prompt.
        gen_tokens: tokens generated after each prompt, greedily.
        prompts: measured prompts per process; one more runs before them as a warm-up.
        repeats: number of fresh processes.
        threads: threads of torch and of ONNX sessions; None: one per core.
        timeout_s: time limit of one process, in seconds.
        explain: measure a cold load, and sample memory, times of operators and choices of experts,
            in one more process before those that are timed.
    """

    prompt_tokens: int = 128
    gen_tokens: int = 32
    prompts: int = 3
    repeats: int = 3
    threads: int | None = None
    timeout_s: float = 3600
    explain: bool = False

    def check(self) -> None:
        """Check that all settings are in range.

        Raises:
            InputError: a setting is below 1.
        """
        for name, value in asdict(self).items():
            if name != "explain" and value is not None and value < 1:
                raise InputError(f"{name} is {value}; give 1 or more")

    def describe(self) -> dict[str, Any]:
        """Return the work as JSON values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "gen_tokens": self.gen_tokens,
            "prompts": self.prompts,
            "processes": self.repeats,
            "batch": 1,
            "sampling": "greedy",
            "warmup": {"mode": "prompt", "runs": 1},
        }


PRESETS: Mapping[str, ProfileSettings] = {
    "quick": ProfileSettings(prompt_tokens=64, gen_tokens=16, prompts=1, repeats=1),
    "ci": ProfileSettings(explain=True),
    "full": ProfileSettings(prompt_tokens=512, gen_tokens=128, prompts=5, repeats=5, explain=True),
}


def fit_prompts(settings: ProfileSettings, prompts: Sequence[Sequence[int]]) -> ProfileSettings:
    """Return the settings with number and length of given prompts.

    Raises:
        InputError: there are fewer than two, or they differ in length.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(prompts) < 2 or len(lengths) != 1:
        raise InputError(
            f"{len(prompts)} prompts of lengths {sorted(lengths)}; give at least two, of one "
            "length: the first is the warm-up"
        )
    return replace(settings, prompts=len(prompts) - 1, prompt_tokens=lengths.pop())


def fit_context(
    settings: ProfileSettings, context: int | None, fixed: Collection[str]
) -> tuple[ProfileSettings, tuple[str, ...]]:
    """Reduce the number of tokens to fit the context of the model.

    Args:
        settings: the requested settings.
        context: context length of the model in tokens; None if it is not known.
        fixed: names of the settings that the user chose; they do not change.

    Returns:
        The settings, and a warning if they changed.

    Raises:
        InputError: the fixed settings do not fit.
    """
    prompt, new = settings.prompt_tokens, settings.gen_tokens
    if context is None or prompt + new <= context:
        return settings, ()
    if "gen_tokens" not in fixed:
        # If the prompt is not fixed either, both shrink by the same factor.
        new = context - prompt if "prompt_tokens" in fixed else new * context // (prompt + new)
        new = max(new, 1)
    if "prompt_tokens" not in fixed:
        prompt = max(context - new, 1)
    if prompt + new > context:
        raise InputError(
            f"{prompt} prompt tokens and {new} generated ones do not fit the context of "
            f"{context} tokens of the model; ask for fewer (--prompt-tokens, --gen-tokens)"
        )
    return replace(settings, prompt_tokens=prompt, gen_tokens=new), (
        f"the context of the model is {context} tokens: measured with {prompt} prompt tokens and "
        f"{new} generated ones, not {settings.prompt_tokens} and {settings.gen_tokens}",
    )
