"""Messages: the published spellings of a dialogue, read as [{"role", "content", ...}].

Reads      role and content, or ShareGPT's from and value; content in parts of text; a dialogue as a
           list, as {"messages": [...]}, as one list for each key (what datasets and TFDS write), as
           JSON text, or as Python's repr (what pandas writes into CSV); a single message
Refuses    messages without a role, and content that is no text, such as an image

Every other key of a message is kept (tool_calls, name, reasoning_content, ...), because chat
templates read them. Text that is no dialogue stays as it is.
"""

import ast
import json
import re

# What a role is called elsewhere, by the name that chat templates know.
ROLES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "bot", "chatgpt", "ai", "model", "function_call"),
    "tool": ("observation", "function_response"),
    "system": (),
}
NAMES = {other: role for role, others in ROLES.items() for other in (role, *others)}


def messages_of(value):
    """A list of messages where value is a dialogue or a message; any other value as it is.

    A system message without content is left out. Raises ValueError that says what is wrong.
    """
    if isinstance(value, str):
        found = parsed(value)
        return value if found is None else messages_of(found)
    if isinstance(value, dict):
        if inner := [value[key] for key in ("messages", "conversations") if value.get(key)]:
            return messages_of(inner[0])
        value = in_rows(value) if all(isinstance(x, list) for x in value.values()) else [value]
    if not isinstance(value, list):
        return value
    messages = map(message_of, value)
    return [m for m in messages if m["role"] != "system" or m["content"]]


def parsed(text: str):
    """The dialogue that a text is the JSON or the repr of; None where it is just text."""
    if not (re.match(r"\s*[\[{]", text) and re.search(r"""["'](role|from)["']""", text)):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        dialogue = found.get("messages") if isinstance(found, dict) else found
        several = isinstance(dialogue, list) and dialogue
        if several and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in dialogue):
            return dialogue
    return None


def in_rows(columns: dict[str, list]) -> list[dict]:
    """{"role": [...], "content": [...]} as one object for each message."""
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("a dialogue has lists of different lengths, one for each key")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def message_of(m) -> dict:
    """One message. Keys whose value is null or empty are left out, as parquet writes them into
    every message where one has them; only the content may be null, beside tool_calls."""
    if not isinstance(m, dict):
        raise ValueError(f"a message is not an object but {m!r:.40}")
    keys = ("role", "from"), ("content", "value")
    name, content = (next((m[k] for k in ks if m.get(k) is not None), None) for ks in keys)
    if not (isinstance(name, str) and name.strip()):
        raise ValueError(f"a message has no role; its keys are {sorted(m)}")
    known = name.strip().lower()
    message = {"role": NAMES.get(known, name), "content": content_of(content)}
    more = {k: v for k, v in m.items() if k not in sum(keys, ()) and v not in (None, "", [], {})}
    if known == "function_call" and (call := call_of(content)):
        message["content"], more["tool_calls"] = None, [call]
    says_more = any(isinstance(value, str | list | dict) for value in more.values())
    if message["content"] is None and not says_more and message["role"] != "system":
        raise ValueError("a message's content is null, and it has nothing else")
    if isinstance(more.get("tool_calls"), list):
        more["tool_calls"] = [with_arguments(call) for call in more["tool_calls"]]
    return message | more


def content_of(content) -> str | None:
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a message's content has parts that are not text")
        return "".join(texts)
    if not isinstance(content, str | None):
        raise ValueError(f"a message's content is not text but {content!r:.40}")
    return content


def call_of(content) -> dict | None:
    """ShareGPT's function_call, {"name", "arguments"} as JSON text, as one of tool_calls."""
    try:
        function = json.loads(content)
    except (TypeError, ValueError):
        return None
    if not isinstance(function, dict) or "name" not in function:
        return None
    return {"type": "function", "function": function}


def with_arguments(call):
    """OpenAI writes a call's arguments as JSON text. Chat templates write them as JSON themselves,
    and would put that text into quotation marks."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}}


def tools_of(value) -> list | None:
    """The column of tools that a template is given: a list, or JSON text of one; None without any.
    Raises ValueError."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("tools is text, but not JSON") from None
    if value and not isinstance(value, list):
        raise ValueError(f"tools must be a list, not {value!r:.40}")
    return value or None
