"""Let threads that wait for each other spin for a moment, and then sleep.

Libraries let them spin for long, which takes the processor from whatever else runs; and a thread
that sleeps takes a while to go on, of which decoding a token has hundreds. Measured by
``benchmarks/load``.
"""

from __future__ import annotations

from collections.abc import Mapping

POLICY, COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# Rounds of the loop of libgomp; its own count is 300,000.
MOMENT = "300"
# The same for ONNX Runtime; older versions do not know it, and their threads spin for long.
ONNX_KEY, ONNX_MOMENT_US = "session.intra_op.spin_duration_us", "10"


def choose_waiting(environment: Mapping[str, str], *, spin: bool = True) -> dict[str, str]:
    """Return environment variables for a process, to be set before OpenMP is loaded.

    Args:
        environment: what is set already; who set one of the two decides on both.
        spin: threads spin for a moment, which short operators need; False: they sleep at once.

    >>> choose_waiting({}), choose_waiting({"OMP_WAIT_POLICY": "active"})
    ({'OMP_WAIT_POLICY': 'passive', 'GOMP_SPINCOUNT': '300'}, {})
    """
    if POLICY in environment or COUNT in environment:
        return {}
    return {POLICY: "passive", **({COUNT: MOMENT} if spin else {})}
