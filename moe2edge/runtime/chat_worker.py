"""Fill in a chat template in a process of its own, with limits of time, memory and output.

``python -m moe2edge.runtime.chat_worker`` reads a line of JSON with the template, says that it is
ready, and then answers each line with a chat by a line with the text, or with an error. A template
comes with a model, so it is not trusted: transformers runs it in a sandbox, which keeps it from
files and Python's insides, but not from loops without an end or text without one.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

# Limits for one chat.
SECONDS = 10
MOST_WRITTEN = 8 << 20
MOST_BYTES = 1 << 30
# The date that templates see where the text should be the same every day.
FIXED_DATE = datetime(2025, 1, 1)


def serve() -> None:
    """Answer requests until stdin ends."""
    setup = json.loads(sys.stdin.readline())
    from transformers.utils import chat_template_utils

    _limit_memory()
    if not setup["today"]:
        chat_template_utils.datetime = _FixedDate
    _reply({"ready": True})
    for line in sys.stdin:
        _set_timer(setup["seconds"])
        reply = _answer(chat_template_utils.render_jinja_template, setup, json.loads(line))
        _set_timer(0)
        _reply(reply)


class _FixedDate(datetime):
    """A calendar whose today does not change."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """Return the fixed date."""
        return FIXED_DATE


def _answer(render: Any, setup: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, str]:
    try:
        texts, _ = render(
            [request["messages"]],
            tools=request["tools"],
            chat_template=setup["template"],
            add_generation_prompt=request["add_generation_prompt"],
            **setup["tokens"],
        )
        text: str = texts[0]
        if len(text) > MOST_WRITTEN:
            return {"error": f"it writes {len(text):,} characters, more than {MOST_WRITTEN:,}"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it takes more than {MOST_BYTES >> 30} GB of memory"}
    # Templates call methods of the values of a chat, so any error can come.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return {"error": reason[:300] or type(error).__name__}


def _reply(data: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def _set_timer(seconds: float) -> None:
    """Let the system end this process after so much processor time, also inside of C code."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    import psutil

    most = psutil.Process().memory_info().vms + MOST_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    serve()
