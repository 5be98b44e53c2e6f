"""Run prompts in onnxruntime-genai's own loop; a request on stdin, times and memory on stdout.

The request and the reply are those of ``moe2edge.evaluation.profile.child``, in part. Imports only
what the loop needs, since all of it counts as memory.
"""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def read_memory() -> dict[str, int]:
    """Return the resident bytes of this process, and the most that it had."""
    text = Path("/proc/self/status").read_text()
    found = {key: int(size) for key, size in re.findall(r"^(VmHWM|VmRSS):\s+(\d+)", text, re.M)}
    return {"peak_rss": 1024 * found["VmHWM"], "rss": 1024 * found["VmRSS"]}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Run the first prompt to warm up, and time the others."""
    import numpy as np
    import onnxruntime_genai as og

    phases = {"import": read_memory()}
    config = og.Config(request["folder"])
    threads = {"intra_op_num_threads": request["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    runs = []
    for prompt in request["prompts"]:
        params = og.GeneratorParams(model)
        length = len(prompt) + request["gen_tokens"]
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        marks = [time.perf_counter()]
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(request["gen_tokens"]):
            generator.generate_next_token()
            marks.append(time.perf_counter())
        gaps = [after - before for before, after in pairwise(marks[1:])]
        runs.append({"ttft_s": marks[1] - marks[0], "gaps_s": gaps})
    phases["decode"] = read_memory()
    return {"runs": runs[1:], "memory": {"phases": phases}, "version": og.__version__}


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
