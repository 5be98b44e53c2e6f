"""Ask a fresh process for a measurement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError, Unsupported, VerificationFailed
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.runtime.waiting import choose_waiting

_ERRORS = {
    kind.exit_code: kind for kind in (InputError, DoesNotFit, Unsupported, VerificationFailed)
}


def run_child(request: Mapping[str, Any], settings: ProfileSettings) -> dict[str, Any]:
    """Measure once in a fresh process.

    Returns:
        The reply, as `moe2edge.evaluation.profile.child.measure_once` returns it.

    Raises:
        Moe2EdgeError: the process failed, was killed, or took too long. The message ends in the
            last line that the process wrote; one of our errors is raised again as the same class.
    """
    env = {**os.environ, **choose_waiting(os.environ)}
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
