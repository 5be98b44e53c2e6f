"""Run an output in the program that users run, where the target reopens it in another one."""

from __future__ import annotations

from dataclasses import dataclass

from moe2edge.errors import Unsupported
from moe2edge.evaluation.verify import Parity, Verification, measure_shipped
from moe2edge.pipeline import registry
from moe2edge.runtime.generation import describe_runtime


@dataclass(frozen=True)
class Elsewhere:
    """Result of `verify_elsewhere`.

    Attributes:
        program: what ran it, in one line.
        parity: agreement with the reference.
        unchecked: reason why it was not run; empty if it was.
    """

    program: str = ""
    parity: Parity | None = None
    unchecked: str = ""


def verify_elsewhere(done: Verification) -> Elsewhere | None:
    """Compare an output in the program that it is for; None if `verify_output` did so.

    Raises:
        VerificationFailed: the program refuses the output, or its logits differ.
    """
    artifact = done.artifact
    target = registry.make_target(artifact.target, artifact.options)
    try:
        runtime = target.reopen_elsewhere(artifact.folder)
    except Unsupported as error:
        return Elsewhere(unchecked=f"the program that the folder is for was not run: {error}")
    if runtime is None:
        return None
    return Elsewhere(
        describe_runtime(runtime), measure_shipped(done.reference, runtime, done.parity)
    )
