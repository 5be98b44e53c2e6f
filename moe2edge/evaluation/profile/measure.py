"""Measure output folders, or checkpoints run by transformers, in fresh processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.sources import AS_FLAGS
from moe2edge.calibration.tokens import encode_texts
from moe2edge.errors import InputError
from moe2edge.evaluation.output_quality import load_own_text
from moe2edge.evaluation.profile.environment import describe_environment
from moe2edge.evaluation.profile.interleave import Job, run_in_turns
from moe2edge.evaluation.profile.metrics import Metric, collect_metrics, collect_phases
from moe2edge.evaluation.profile.page_cache import warm_files
from moe2edge.evaluation.profile.process import run_child
from moe2edge.evaluation.profile.quality import measure_quality, read_quality
from moe2edge.evaluation.profile.result import Profile, ProfileSet, make_explanation, make_id
from moe2edge.evaluation.profile.roofline import make_roofline
from moe2edge.evaluation.profile.settings import (
    TOKEN_SIZES,
    ProfileSettings,
    fit_context,
    fit_prompts,
)
from moe2edge.evaluation.profile.subject import Subject, open_subject
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.manifest import list_files
from moe2edge.storage.tokenizer import encode_text, load_tokenizer

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

GIVEN_IDS = "the prompts were given as token ids"
Prompts = Sequence[Sequence[int]]


def profile_folder(
    folder: Path,
    *,
    text: str | TextSource = "",
    prompts: Prompts | None = None,
    settings: ProfileSettings | None = None,
    fixed: Collection[str] | None = None,
    reporter: Reporter = QUIET,
) -> Profile:
    """Measure an output of moe2edge in its runtime, or a checkpoint in transformers in bfloat16.

    Arguments and errors are those of `profile_folders`.
    """
    return profile_folders(
        [folder], text=text, prompts=prompts, settings=settings, fixed=fixed, reporter=reporter
    ).profiles[0]


def profile_folders(
    folders: Sequence[Path],
    *,
    text: str | TextSource = "",
    prompts: Prompts | None = None,
    settings: ProfileSettings | None = None,
    fixed: Collection[str] | None = None,
    quality: TextSource | None = None,
    reporter: Reporter = QUIET,
) -> ProfileSet:
    """Measure folders in turns: A B C, C B A, each time in a fresh process.

    Args:
        folders: output folders of any targets, and checkpoints.
        text: natural text that prompts are cut from, or where it is; random tokens would be routed
            unnaturally.
        prompts: token ids instead of text, all of one length; the first is the warm-up.
        settings: amount of work; with ``prompts``, their number and length apply instead.
        fixed: names of the settings that the user chose. ``prompt_tokens`` and ``gen_tokens`` that
            are not among them are reduced, with a warning, to fit the shortest context of the
            models. None: both are fixed if ``settings`` are given.
        quality: text to measure the perplexity of outputs on, after all that is timed; None: the
            quality in the report of the export is taken over.
        reporter: receives progress after each process.

    Raises:
        InputError: a folder, the text or a setting is wrong.
        Unsupported: the runtime of a folder is not installed.
        Moe2EdgeError: a process failed or took too long.
    """
    settings, fixed = _check_settings(settings, prompts, fixed)
    if not folders:
        raise InputError("there is nothing to measure; name an output folder or a checkpoint")
    for subject in (subjects := [open_subject(folder) for folder in folders]):
        subject.check_installed()
    contexts = [subject.context for subject in subjects if subject.context is not None]
    settings, shrunk = fit_context(settings, min(contexts, default=None), fixed)
    about: dict[str, Any] = {
        "now": datetime.now(UTC),
        "env": describe_environment(),
        "workload": settings.describe(),
        "threads": settings.threads,
        "shrunk": shrunk,
    }
    labels = _name_subjects(subjects)
    requests, encoded = {}, {}
    for label, subject in zip(labels, subjects, strict=True):
        given, encoded[label] = _find_prompts(subject, prompts, text, settings, reporter)
        requests[label] = _make_request(subject, given, settings)
        if quality is not None and subject.request["target"] is not None:
            load_own_text(subject.folder, quality)  # a text that is wrong is refused now
    # First, because it loads from the disk what all others then find in the system's cache.
    explained = None
    if settings.explain:
        looks = {label: {**request, "explain": True} for label, request in requests.items()}
        explained = run_in_turns(_make_jobs(looks, settings), 1, reporter=reporter, at="explain")[0]
    for subject in subjects:
        warm_files(list_files(subject.folder).values())
    rounds = run_in_turns(_make_jobs(requests, settings), settings.repeats, reporter=reporter)
    profiles = []
    for label, subject in zip(labels, subjects, strict=True):
        beside = {
            "explained": explained.found[label] if explained else None,
            "tokenise_ms": encoded[label],
            "quality": _find_quality(subject, quality, reporter),
            "workload": {**about["workload"], "prompts_sha256": _hash_prompts(requests[label])},
        }
        replies = [done.found[label] for done in rounds]
        profiles.append(_make_profile(subject, replies, about | beside))
    return ProfileSet(tuple(labels), tuple(profiles), tuple(done.order for done in rounds))


def _check_settings(
    settings: ProfileSettings | None, prompts: Prompts | None, fixed: Collection[str] | None
) -> tuple[ProfileSettings, Collection[str]]:
    """Return checked settings, with the sizes of given prompts, and the names of fixed ones."""
    if fixed is None:
        fixed = TOKEN_SIZES if settings else ()
    settings = settings or ProfileSettings()
    if prompts is not None:
        settings = fit_prompts(settings, prompts)
        fixed = {*fixed, "prompt_tokens"}
    settings.check()
    return settings, fixed


def _find_prompts(
    subject: Subject,
    prompts: Prompts | None,
    text: str | TextSource,
    settings: ProfileSettings,
    reporter: Reporter,
) -> tuple[Prompts, Metric]:
    """Return the prompts, cut from the text if there are none, and the times of the tokenizer."""
    if prompts:
        return prompts, Metric("ms", "lower", (), GIVEN_IDS, processes=0)
    tokenizer = load_tokenizer(subject.folder)
    prompts = cut_prompts(tokenizer, text, settings, reporter)
    return prompts, time_tokenizer(tokenizer, prompts)


def _make_jobs(
    requests: Mapping[str, Mapping[str, Any]], settings: ProfileSettings
) -> list[Job[dict[str, Any]]]:
    """Make a job for each request, by its label."""
    return [Job(label, partial(run_child, one, settings)) for label, one in requests.items()]


def _hash_prompts(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request["prompts"]).encode()).hexdigest()


def _find_quality(subject: Subject, text: TextSource | None, reporter: Reporter) -> dict[str, Any]:
    target = subject.request["target"]
    if text is None or target is None:
        return read_quality(subject.folder, target)
    return measure_quality(subject.folder, text, reporter)


def _name_subjects(subjects: Sequence[Subject]) -> list[str]:
    """Return a name for each folder: its path, with a number where it is given again."""
    names: list[str] = []
    for subject in subjects:
        path = str(subject.folder)
        again = sum(str(other.folder) == path for other in subjects[: len(names)])
        names.append(f"{path} ({again + 1})" if again else path)
    return names


def _make_request(subject: Subject, prompts: Prompts, settings: ProfileSettings) -> dict[str, Any]:
    return {
        **subject.request,
        "prompts": [list(prompt) for prompt in prompts],
        "gen_tokens": settings.gen_tokens,
        "threads": settings.threads,
    }


def _make_profile(
    subject: Subject,
    replies: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> Profile:
    """Sum up the replies of the processes that measured one folder."""
    memory, threads = replies[0]["memory"], replies[0]["threads"]
    work, env = about["workload"], about["env"]
    metrics = collect_metrics(replies, work["prompt_tokens"])
    metrics["tokenise_ms"] = about["tokenise_ms"]
    doubts = _list_warnings(env, replies)
    return Profile(
        artifact={**subject.about, "dtype": replies[0]["dtype"], "note": replies[0]["note"]},
        workload=work,
        env={**env, "threads": {"asked": about["threads"], "runtime": threads}},
        metrics=metrics,
        phases=collect_phases(replies),
        memory_method=memory["method"],
        memory_reason=memory["reason"],
        shares_reason=memory.get("shares_reason"),
        sizes=subject.sizes,
        created=about["now"].isoformat(timespec="seconds"),
        id=make_id(about["now"].timestamp()),
        explanation=make_explanation(about["explained"]),
        quality=about["quality"],
        sensors=[reply.get("sensors") for reply in replies],
        roofline=make_roofline(
            subject.count_reads(), replies, metrics["decode_tok_s"].median, work
        ),
        warnings=(*about["shrunk"], *doubts.values()),
        verdict=next(iter(doubts), "stable"),
    )


def cut_prompts(
    tokenizer: Any, text: str | TextSource, settings: ProfileSettings, reporter: Reporter = QUIET
) -> list[list[int]]:
    """Cut prompts without overlap from evenly spaced places of a text.

    Args:
        tokenizer: tokenizer of the model.
        text: the text, or where it is.
        settings: number and length of the prompts.
        reporter: receives progress.

    Returns:
        Token ids of ``settings.prompts + 1`` prompts; the first is the warm-up.

    Raises:
        InputError: the text has too few tokens.
    """
    ids: Sequence[int]
    if isinstance(text, str):
        ids = encode_text(tokenizer, text, special=False)
    else:
        ids = encode_texts(text, tokenizer, "evaluation", AS_FLAGS, reporter)
    number, length = settings.prompts + 1, settings.prompt_tokens
    if len(ids) < number * length:
        raise InputError(
            f"the text has {len(ids)} tokens; {number} prompts of {length} tokens need "
            f"{number * length}: give a longer text, or shorter prompts (--prompt-tokens)"
        )
    stride = len(ids) // number
    return [list(ids[n * stride : n * stride + length]) for n in range(number)]


def time_tokenizer(
    tokenizer: Any, prompts: Prompts, *, clock: Callable[[], float] = time.perf_counter
) -> Metric:
    """Time the tokenizer on the text of each prompt but the first, which is the warm-up.

    Args:
        tokenizer: tokenizer of the model.
        prompts: token ids of texts that it can encode.
        clock: returns the time in seconds.
    """
    took = []
    for prompt in prompts:
        text = tokenizer.decode(prompt)
        begin = clock()
        encode_text(tokenizer, text, special=False)
        took.append((clock() - begin) * 1000)
    return Metric("ms", "lower", tuple(took[1:]), processes=0)


def _list_warnings(env: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """List the reasons to distrust the figures, by the verdict that each leads to; worst first."""
    warnings = {}
    tokens = [[run["tokens"] for run in reply["runs"]] for reply in replies]
    if any(other != tokens[0] for other in tokens):
        warnings["invalid"] = "greedy decoding gave different tokens in different processes"
    if any((reply.get("sensors") or {}).get("throttled") for reply in replies):
        warnings["throttled"] = (
            "the processors were throttled for their heat: times are too high and vary"
        )
    cores = env["cpu"]["usable"] or env["cpu"]["logical"] or 1
    if env["load_avg"] > cores / 2:
        warnings["noisy"] = (
            f"other programs kept the processors busy at the start (load {env['load_avg']:.1f} "
            f"on {cores} cores): times are too high and vary"
        )
    return warnings
