"""Turn chats into text with the chat template of a model."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from moe2edge.errors import InputError, suggest
from moe2edge.runtime.chat_worker import MOST_BYTES, SECONDS

# Limits of waiting. A machine may be busy, so the limit of processor time is the one that counts.
START_SECONDS, ANSWER_SECONDS = 300, 120


class TemplateFailedError(Exception):
    """A chat template cannot be filled in; the text says why."""


def list_chat_templates(tokenizer: Any) -> dict[str, str]:
    """List the chat templates of a tokenizer by name, the default one first."""
    found = tokenizer.chat_template or {}
    named = {"default": found} if isinstance(found, str) else dict(found)
    return dict(sorted(named.items(), key=lambda item: item[0] != "default"))


def choose_chat_template(tokenizer: Any, name: str | None, *, tools: bool = False) -> str:
    """Choose a chat template as transformers does: by name, ``tool_use`` for tools, the default.

    Raises:
        InputError: there is no template of the name, or no name was given and none is the default.
    """
    known = list_chat_templates(tokenizer)
    if name is not None and name not in known:
        raise InputError(suggest("chat template", name, known))
    if name is None and tools and "tool_use" in known:
        name = "tool_use"
    if name is None and "default" not in known and len(known) > 1:
        raise InputError(
            f"the model has several chat templates and none is the default; choose one of "
            f"{', '.join(known)}"
        )
    return known[name or next(iter(known))]


class ChatRenderer:
    """Renders chats as text; a process for each template runs until `close`."""

    def __init__(
        self,
        tokenizer: Any,
        name: str | None = None,
        *,
        today: bool = False,
        seconds: float = SECONDS,
    ) -> None:
        """Prepare to render; nothing is started yet.

        Args:
            tokenizer: the tokenizer of transformers, with at least one chat template.
            name: name of the template, where there are several.
            today: let templates see the date; otherwise the same chat gives the same text always.
            seconds: processor time for one chat.
        """
        self._tokenizer, self._name = tokenizer, name
        self._limits = {"today": today, "seconds": seconds}
        self._workers: dict[str, _Worker] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render one chat.

        Args:
            messages: at least one, with role and content.
            tools: descriptions of functions for the template.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            InputError: there is no such template.
            TemplateFailedError: the template refuses the chat, or takes too much time or memory.
        """
        template = choose_chat_template(self._tokenizer, self._name, tools=bool(tools))
        if template not in self._workers:
            tokens = {
                key: [str(each) for each in value] if isinstance(value, list) else str(value)
                for key, value in self._tokenizer.special_tokens_map.items()
            }
            setup = {"template": template, "tokens": tokens, **self._limits}
            self._workers[template] = _Worker(setup)
        # As transformers does: templates handle an absent key, but may write "None" for None.
        given = [{key: m[key] for key in m if m[key] is not None} for m in messages]
        return self._workers[template].ask(
            {
                "messages": given,
                "tools": list(tools) if tools else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process of `moe2edge.runtime.chat_worker`."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        # -P: import nothing from the working folder, which is the user's. The new session keeps
        # Ctrl-C from it, so that an interrupt is handled here alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moe2edge.runtime.chat_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        self._seconds = setup["seconds"]
        self._answers: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._answers), daemon=True
        )
        self._reader.start()
        self._send(setup, START_SECONDS)

    def ask(self, request: Mapping[str, Any]) -> str:
        """Return the text of a chat.

        Raises:
            TemplateFailedError: there is none.
        """
        answer = self._send(request, ANSWER_SECONDS)
        if "error" in answer:
            raise TemplateFailedError(answer["error"])
        text: str = answer["text"]
        return text

    def _send(self, data: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except (BrokenPipeError, queue.Empty):
            line = ""
        if not line:
            self.close()
            raise TemplateFailedError(
                f"it takes more than {self._seconds:g} s or {MOST_BYTES >> 30} GB of memory, and "
                "was stopped"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # what was not written yet
                continue


def _read_lines(file: IO[str], found: queue.Queue[str]) -> None:
    """Put each line into a queue, and an empty one at the end."""
    try:
        for line in file:
            found.put(line)
    except ValueError:  # the file was closed
        pass
    found.put("")
