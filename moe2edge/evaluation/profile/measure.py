"""Measure an output folder, or a source checkpoint run by transformers, in fresh processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.sources import AS_FLAGS
from moe2edge.calibration.tokens import encode_texts
from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError, Unsupported, VerificationFailed
from moe2edge.evaluation.profile.environment import describe_environment
from moe2edge.evaluation.profile.result import Profile, collect_metrics, collect_phases
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.manifest import (
    MANIFEST,
    SYSTEM_FOLDERS,
    check_sizes,
    is_artifact,
    list_files,
    open_artifact,
)
from moe2edge.storage.text_files import hash_file, read_json
from moe2edge.storage.tokenizer import encode_text, load_tokenizer, read_context_length

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

_ERRORS = {
    kind.exit_code: kind for kind in (InputError, DoesNotFit, Unsupported, VerificationFailed)
}

# Ends of the names of files with the weights of a graph.
_DATA_NAME = re.compile(r"(\.data|\.onnx_data(_\d+)?)$")
_SIZES = ("prompt_tokens", "gen_tokens")


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
    """

    prompt_tokens: int = 128
    gen_tokens: int = 32
    prompts: int = 3
    repeats: int = 3
    threads: int | None = None
    timeout_s: float = 3600

    def check(self) -> None:
        """Check that all settings are in range.

        Raises:
            InputError: a setting is below 1.
        """
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give 1 or more")


PRESETS: Mapping[str, ProfileSettings] = {
    "quick": ProfileSettings(prompt_tokens=64, gen_tokens=16, prompts=1, repeats=1),
    "ci": ProfileSettings(),
    "full": ProfileSettings(prompt_tokens=512, gen_tokens=128, prompts=5, repeats=5),
}


def profile_folder(
    folder: Path,
    *,
    text: str | TextSource = "",
    prompts: Sequence[Sequence[int]] | None = None,
    settings: ProfileSettings | None = None,
    fixed: Collection[str] | None = None,
    reporter: Reporter = QUIET,
) -> Profile:
    """Measure an output of moe2edge in its runtime, or a checkpoint in transformers in bfloat16.

    Args:
        folder: an output folder, or a checkpoint.
        text: natural text that prompts are cut from, or where it is; random tokens would be routed
            unnaturally.
        prompts: token ids instead of text, all of one length; the first is the warm-up.
        settings: amount of work; with ``prompts``, their number and length apply instead.
        fixed: names of the settings that the user chose. ``prompt_tokens`` and ``gen_tokens`` that
            are not among them are reduced, with a warning, to fit the context of the model. None:
            both are fixed if ``settings`` are given.
        reporter: receives progress after each process.

    Raises:
        InputError: the folder, the text or a setting is wrong.
        Moe2EdgeError: a process failed or took too long.
    """
    if fixed is None:
        fixed = _SIZES if settings else ()
    settings = settings or ProfileSettings()
    if prompts is not None:
        settings = _fit_prompts(settings, prompts)
        fixed = {*fixed, "prompt_tokens"}
    settings.check()
    artifact, request = _describe_subject(folder)
    settings, shrunk = fit_context(settings, _read_context(folder), fixed)
    if prompts is None:
        prompts = cut_prompts(load_tokenizer(folder), text, settings, reporter)
    request |= {
        "prompts": [list(prompt) for prompt in prompts],
        "gen_tokens": settings.gen_tokens,
        "threads": settings.threads,
    }
    env = describe_environment()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    replies = []
    for n in range(settings.repeats):
        replies.append(run_child(request, settings))
        reporter.advance("measure", n + 1, settings.repeats)
    memory, threads = replies[0]["memory"], replies[0]["threads"]
    return Profile(
        artifact={**artifact, "dtype": replies[0]["dtype"], "note": replies[0]["note"]},
        workload=_describe_workload(settings),
        env={**env, "threads": {"asked": settings.threads, "runtime": threads}},
        metrics=collect_metrics(replies, settings.prompt_tokens),
        phases=collect_phases(replies),
        memory_method=memory["method"],
        memory_reason=memory["reason"],
        sizes=measure_sizes(folder),
        created=created,
        warnings=(*shrunk, *_list_warnings(env, replies)),
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


def run_child(request: Mapping[str, Any], settings: ProfileSettings) -> dict[str, Any]:
    """Measure once in a fresh process.

    Returns:
        The reply, as `moe2edge.evaluation.profile.child.measure_once` returns it.

    Raises:
        Moe2EdgeError: the process failed, was killed, or took too long. The message ends in the
            last line that the process wrote; one of our errors is raised again as the same class.
    """
    env = dict(os.environ)
    if settings.threads is not None:
        env["OMP_NUM_THREADS"] = str(settings.threads)
    try:
        # -P: import nothing from the working folder, which is the user's.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moe2edge.evaluation.profile.child"],
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=env,
            timeout=settings.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Moe2EdgeError(
            f"measuring {request['folder']} took longer than {settings.timeout_s:g} s and was "
            "stopped; ask for fewer tokens (--prompt-tokens, --gen-tokens)"
        ) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = "; this machine may have too little memory" if name == "SIGKILL" else ""
        raise Moe2EdgeError(f"the measuring process was killed by {name}{hint}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it wrote no message"]
        if kind := _ERRORS.get(done.returncode):
            raise kind(lines[-1])
        raise Moe2EdgeError(f"the measuring process failed: {lines[-1]}")
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def measure_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the files of a folder by class, such as ``weights``.

    A clone keeps every file once more, in a folder of its own; that does not count.
    """
    files = {n: path for n, path in list_files(folder).items() if not n.startswith(SYSTEM_FOLDERS)}
    sizes = dict.fromkeys(("weights", "graph", "tokenizer", "config", "other"), 0)
    outside = any(_DATA_NAME.search(name) for name in files)
    for name, path in files.items():
        sizes[_classify_file(name, outside)] += path.stat().st_size
    return sizes


def _classify_file(name: str, weights_outside_graph: bool) -> str:
    """Return the class of a file. A graph without a data file contains the weights itself."""
    base = name.rpartition("/")[2]
    if base.endswith((".safetensors", ".gguf")) or _DATA_NAME.search(base):
        return "weights"
    if base.endswith(".onnx"):
        return "graph" if weights_outside_graph else "weights"
    vocabulary = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    if base.startswith(("tokenizer", "chat_template")) or base in vocabulary:
        return "tokenizer"
    return "config" if base.endswith((".json", ".yaml")) else "other"


def _describe_subject(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the measured folder: for the profile, and as a request to the child process."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name an output folder or a checkpoint")
    path = str(folder.resolve())
    if is_artifact(folder):
        artifact = open_artifact(folder)
        check_sizes(artifact)
        about = {
            "path": str(folder),
            "target": artifact.target,
            "manifest_sha256": hash_file(folder / MANIFEST),
            "model": artifact.manifest.get("model"),
        }
        how = {"target": artifact.target, "options": dict(artifact.options)}
        return about, {"folder": path, **how, "dtype": None}
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is neither an output folder (no {MANIFEST}) nor a checkpoint "
            "(no config.json); name one of them"
        )
    about = {"path": str(folder), "target": None, "runtime": "transformers"}
    return about, {"folder": path, "target": None, "dtype": "bfloat16"}


def _fit_prompts(settings: ProfileSettings, prompts: Sequence[Sequence[int]]) -> ProfileSettings:
    lengths = {len(prompt) for prompt in prompts}
    if len(prompts) < 2 or len(lengths) != 1:
        raise InputError(
            f"{len(prompts)} prompts of lengths {sorted(lengths)}; give at least two, of one "
            "length: the first is the warm-up"
        )
    return replace(settings, prompts=len(prompts) - 1, prompt_tokens=lengths.pop())


def _read_context(folder: Path) -> int | None:
    """Return the context length of the model in a folder; None if its config has none."""
    path = folder / "config.json"
    return read_context_length(read_json(path)) if path.is_file() else None


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


def _describe_workload(settings: ProfileSettings) -> dict[str, Any]:
    return {
        "prompt_tokens": settings.prompt_tokens,
        "gen_tokens": settings.gen_tokens,
        "prompts": settings.prompts,
        "processes": settings.repeats,
        "batch": 1,
        "sampling": "greedy",
        "warmup": {"mode": "prompt", "runs": 1},
    }


def _list_warnings(env: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """List the reasons to distrust the figures."""
    warnings = []
    cores = env["cpu"]["usable"] or env["cpu"]["logical"] or 1
    if env["load_avg"] > cores / 2:
        warnings.append(
            f"other programs kept the processors busy at the start (load {env['load_avg']:.1f} "
            f"on {cores} cores): times are too high and vary"
        )
    tokens = [[run["tokens"] for run in reply["runs"]] for reply in replies]
    if any(other != tokens[0] for other in tokens):
        warnings.append("greedy decoding gave different tokens in different processes")
    return tuple(warnings)
