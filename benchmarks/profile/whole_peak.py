"""Run what a process of ``profile`` runs, without setting its peak memory back between phases.

Linux forgets the peak for ``/usr/bin/time -v``, too, where a process sets it back.
"""

from __future__ import annotations

import sys

from moe2edge.evaluation.profile.child import serve_request
from moe2edge.evaluation.profile.memory import Meter

if __name__ == "__main__":
    setattr(Meter, "_reset_peak", lambda _: None)  # noqa: B010
    sys.exit(serve_request())
