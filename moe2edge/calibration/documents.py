"""Documents of a text: a plain text is one, and each row of JSON or parquet is one.

A row gives its text by a field, by a template with several fields, or as a chat, which the chat
template of the model makes text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from moe2edge.calibration.mixes import TextPart
from moe2edge.calibration.sources import Spelling, split_template
from moe2edge.calibration.text_formats import JSON_SUFFIXES, TextFile, read_pieces, read_rows
from moe2edge.errors import InputError

CHAT_FIELDS = ("messages", "conversations")
DEFAULT_FIELDS = ("text", *CHAT_FIELDS)
# Fields that data sets have in pairs, for proposals.
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("question", "answer"), ("query", "response"),
    ("problem", "solution"), ("input", "output"), ("question", "response"),
)  # fmt: skip
# Roles of `from`, which ShareGPT and its kin write.
ROLES: Mapping[str, str] = {
    "human": "user", "gpt": "assistant", "system": "system", "user": "user",
    "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip

Render = Callable[[list[dict[str, Any]], list[Any] | None], str]


def read_documents(
    part: TextPart, file: TextFile, tokenizer: Any, spelling: Spelling
) -> Iterator[Iterable[str]]:
    """Read the documents of one part, each as pieces of text.

    Args:
        part: the part of the mix.
        file: its file.
        tokenizer: tokenizer of the model, for chats; None refuses them.
        spelling: how the command at hand spells options.

    Raises:
        InputError: the file is empty or damaged, or a row gives no text.
    """
    if not file.has_rows:
        yield read_pieces(file)
        return
    reader = _RowReader(part, file, tokenizer, spelling)
    empty = True
    with closing(reader):
        for where, row in read_rows(file, reader.is_row):
            text = reader.build(row, where)
            empty = empty and not text.strip()
            yield (text,)
    if empty:
        raise InputError(f"{file.label} is empty; give another file")


class _RowReader:
    """Makes documents of rows."""

    def __init__(self, part: TextPart, file: TextFile, tokenizer: Any, spelling: Spelling) -> None:
        self._form, self._place = part.form, part.place
        self._file, self._tokenizer, self._spelling = file, tokenizer, spelling
        self._renderer: Any = None
        template = part.form.template
        self._pieces = split_template(template) if template else None

    def close(self) -> None:
        """End what renders chats."""
        if self._renderer is not None:
            self._renderer.close()

    def is_row(self, value: Mapping[str, Any]) -> bool:
        """Return whether an object is a row, because it has a field that is asked for."""
        if self._pieces:
            return any(field in value for _, field in self._pieces)
        return any(name in value for name in self._fields)

    @property
    def _fields(self) -> tuple[str, ...]:
        """Fields that may have the text, or the chat, in order."""
        if self._form.field is not None:
            return (self._form.field,)
        if self._form.chat or self._form.chat_template:
            return CHAT_FIELDS
        return DEFAULT_FIELDS if self._form.chat is None else DEFAULT_FIELDS[:1]

    def build(self, row: Any, where: str) -> str:
        """Return the text of a row.

        Raises:
            InputError: it has none.
        """
        text = self._fill(row, where) if self._pieces else self._read_field(row, where)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} holds {text[error.start]!a}, an unpaired surrogate, which is no "
                "character; fix or remove the line"
            ) from error
        return text

    def _fill(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise self._make_kind_error(row, where)
        document = ""
        for literal, field in self._pieces or ():
            document += literal
            if field is None:
                continue
            value = row.get(field)
            # A template may insert a number, but a number alone is not a text.
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise InputError(
                    f"{where} has no text in field {field!r} ({_describe(row, field)}); fix the "
                    "template or the line"
                )
            document += str(value)
        return document

    def _read_field(self, row: Any, where: str) -> str:
        chats = bool(self._form.chat or self._form.chat_template)
        for name in self._fields:
            value = row.get(name) if isinstance(row, dict) else None
            if isinstance(value, str) and not chats and name in (self._form.field, "text"):
                return value
            if self._form.chat is not False and isinstance(value, list) and _are_messages(value):
                return self._render(row, name, where)
        raise self._make_field_error(row, where, chats=chats)

    # ---- chats -----------------------------------------------------------------------------------

    def _render(self, row: Mapping[str, Any], name: str, where: str) -> str:
        from moe2edge.runtime.chat_templates import TemplateFailedError

        if self._renderer is None:
            self._renderer = self._start(row, name, where)
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise InputError(f"{where}: tools is not a list of descriptions; fix the line")
        messages = [_make_message(m, f"{where}, message {n}") for n, m in enumerate(row[name], 1)]
        try:
            text: str = self._renderer.render(messages, tools)
        except TemplateFailedError as error:
            raise InputError(
                f"{where}: the model's chat template cannot be filled in ({error}); fix or remove "
                "the line"
            ) from error
        return text

    def _start(self, row: Mapping[str, Any], name: str, where: str) -> Any:
        from moe2edge.runtime.chat_templates import ChatRenderer, choose_chat_template

        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise InputError(
                f"{where} has a chat in field {name!r}, but the model has no chat template; put "
                "the chat_template.jinja of a model that chats beside its tokenizer, or "
                + self._propose(row, "give rows with text")
            )
        asked = self._form.chat_template
        try:
            choose_chat_template(self._tokenizer, asked)
        except InputError as error:
            give = self._spelling.give(self._place, "chat_template", "NAME")
            raise InputError(f"{error} ({give})") from error
        return ChatRenderer(self._tokenizer, asked)

    # ---- messages --------------------------------------------------------------------------------

    def _make_field_error(self, row: Any, where: str, *, chats: bool) -> InputError:
        field = self._fields[0]
        if not isinstance(row, dict):
            return self._make_kind_error(row, where)
        if broken := next((n for n in CHAT_FIELDS if n in row and n in self._fields), None):
            return InputError(
                f"{where}: {broken} is {_describe_chat(row[broken])}, expected: a list of messages "
                "with role and content; fix or remove the line"
            )
        if chats:
            return InputError(
                f"{where} has no chat in field {' or '.join(map(repr, self._fields))} "
                f"({_describe(row, field)}); a chat is a list of messages with role and content: "
                "fix the line, or " + self._propose(row, "give rows with chats")
            )
        proposal = self._propose(row, 'give rows such as {"text": "..."}')
        return InputError(
            f"{where} has no text in field {field!r} ({_describe(row, field)}); {proposal}"
        )

    def _make_kind_error(self, row: Any, where: str) -> InputError:
        if isinstance(row, list) and _are_messages(row):
            remedy = 'give rows such as {"messages": [...]}'
        else:
            remedy = 'give rows such as {"text": "..."}'
        if self._file.path.suffix.lower() not in JSON_SUFFIXES:
            remedy += ", or, if it is plain text, begin it with a line of words"
        return InputError(f"{where} is not an object but {str(row)[:30]!r}; {remedy}")

    def _propose(self, row: Mapping[str, Any], otherwise: str) -> str:
        """Propose options with which this row has a text."""
        texts = [key for key, value in row.items() if isinstance(value, str) and value.strip()]
        texts = [key for key in texts if key not in self._fields]
        chats = [k for k, v in row.items() if isinstance(v, list) and _are_messages(v)]
        give, place = self._spelling.give, self._place
        said = [give(place, "field", chats[0])] if chats and chats[0] not in self._fields else []
        if chats and self._form.chat is False:
            said = [f"leave {self._spelling.name(place, 'chat')} out"]
        pair = next((pair for pair in PAIRS if set(pair) <= set(texts)), None)
        if texts and not said:
            longest = max(texts, key=lambda key: len(row[key]))
            said.append(give(place, "field", pair[1] if pair else longest))
        if pair:
            said.append(give(place, "template", f"{{{pair[0]}}} {{{pair[1]}}}"))
        if not said:
            return otherwise
        return f"give {', or '.join(said)}" if said[0][:5] != "leave" else said[0]


def _are_messages(value: list[Any]) -> bool:
    """Return whether a list is a chat: objects that say who speaks."""
    return bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def _make_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message with role and content, the content as one text."""
    if "role" in message:
        role, made = message["role"], dict(message)
    else:
        role = ROLES.get(str(message["from"]).lower())
        made = {key: value for key, value in message.items() if key not in ("from", "value")}
        made["content"] = message.get("value")
        if role is None:
            raise InputError(
                f"{where} is from {str(message['from'])[:50]!r}, expected: {', '.join(ROLES)}; fix "
                "the line"
            )
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}: role is {str(role)[:50]!r}, not a word; fix the line")
    return {**made, "role": role, "content": _join_content(made, where)}


def _join_content(message: Mapping[str, Any], where: str) -> str | None:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = part.get("text") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(text, str):
                raise InputError(
                    f"{where} has a part of type {str(kind)[:50]!r}, expected: text alone; "
                    "remove the line"
                )
            texts.append(text)
        return "".join(texts)
    if not isinstance(content, str):
        found = "no content" if content is None else "content that is no text"
        raise InputError(f"{where} has {found}; fix or remove the line")
    return content


def _describe_chat(value: Any) -> str:
    """Describe what stands in the place of a chat."""
    if isinstance(value, list):
        return "a list of something else" if value else "an empty list"
    return _describe_kind(value)


def _describe(row: Mapping[str, Any], field: str) -> str:
    """Describe the fields of a row, and what is in one of them."""
    names = ", ".join(sorted(map(str, row))[:20]) or "no field"
    if field not in row:
        return f"it has {names}"
    return f"it is {_describe_kind(row[field])}; the line has {names}"


def _describe_kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    kinds |= {dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
