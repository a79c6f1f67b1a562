"""Messages: the published spellings of a dialogue, read as [{"role", "content", ...}].

Reads      role and content, or ShareGPT's from and value; content in parts of text; a dialogue as a
           list, as {"messages": [...]}, as one list for each key (what datasets and TFDS write), as
           JSON text, or as Python's repr (what pandas writes into CSV); a single message
Refuses    messages without a role, and content that is no text, such as an image

Every other key of a message is kept (tool_calls, name, reasoning_content, ...), because chat
templates read them. Text that is no dialogue stays as it is.
"""

import ast
import contextlib
import json
import re

# What a role is called elsewhere, by the name that chat templates know.
ROLES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "bot", "chatgpt", "ai", "model", "function_call", "tool_call"),
    "tool": ("observation", "function_response", "tool_response"),
    "system": (),
}
NAMES = {other: role for role, others in ROLES.items() for other in (role, *others)}
# The keys by which a message says something; others are notes about it, or ids.
SAYS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def messages_of(value):
    """A list of messages where value is a dialogue or a message; any other value as it is.

    A system message that has nothing is left out. Raises ValueError that says what is wrong.
    """
    if isinstance(value, str):
        found = parsed(value)
        return value if found is None else messages_of(found)
    if isinstance(value, dict):
        for key in ("messages", "conversations"):
            if value.get(key):
                more = ("system", "instructions", "tools", "functions")
                if lost := [name for name in more if value.get(name)]:
                    raise ValueError(f"{' and '.join(lost)} must stand in the row, not in {key}")
                return messages_of(value[key])
        value = in_rows(value) if all(isinstance(x, list) for x in value.values()) else [value]
    if not isinstance(value, list):
        return value
    messages = map(message_of, value)
    return [m for m in messages if m["role"] != "system" or m["content"] or len(m) > 2]


def parsed(text: str):
    """The dialogue that a text is the JSON or the repr of; None where it is just text, also where
    it is an answer in JSON that has roles of another kind."""
    if not looks_like_dialogue(text):
        return None
    with_commas = re.sub(r"\}\s+\{", "}, {", text)  # numpy writes none
    for parse, written in (
        (json.loads, text),
        (ast.literal_eval, text),
        (ast.literal_eval, with_commas),
    ):
        try:
            found = parse(written.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if "\\u" in text:  # half a surrogate pair has no bytes
            json.dumps(found, ensure_ascii=False, default=str).encode()
        if isinstance(found, dict) and all(isinstance(x, list) and x for x in found.values()):
            found = found.get("messages") or found.get("conversations") or in_rows(found)
        dialogue = found if isinstance(found, list) else [found]
        if dialogue and all(map(is_message, dialogue)):
            return dialogue
    return None


def looks_like_dialogue(text: str) -> bool:
    return bool(re.match(r"\s*[\[{]", text) and re.search(r"""["'](role|from)["']""", text))


def is_message(m) -> bool:
    if not isinstance(m, dict):
        return False
    role = m.get("role", m.get("from"))
    known = isinstance(role, str) and role.strip().lower() in NAMES
    return known and bool({"value", *SAYS} & m.keys())


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
    plain = m.keys() == {"role", "content"} and all(isinstance(x, str) for x in m.values())
    if plain and m["role"] in ROLES:
        return m  # as most are, and files have many of them
    role_key = "from" if m.get("role") is None else "role"
    name, content_key = m.get(role_key), "value" if m.get("content") in (None, "") else "content"
    if not (isinstance(name, str) and name.strip()):
        raise ValueError(f"a message has no role; its keys are {sorted(map(str, m))}")
    if content_key == "value" and m.get("value") is None:
        content_key = "content"
    known, content = name.strip().lower(), m.get(content_key)
    more = {k: v for k, v in m.items() if v not in (None, "", [], {})}
    more = {k: v for k, v in more.items() if k not in (role_key, content_key)}
    message = {"role": NAMES.get(known, name)}
    if known in ("function_call", "tool_call") and (calls := calls_of(content)):
        content, more["tool_calls"] = None, calls
    if message["role"] == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    message["content"] = content_of(content)
    says_more = any(isinstance(value, str | list | dict) for value in more.values())
    if message["content"] is None and not says_more and message["role"] != "system":
        raise ValueError("a message's content is null, and it has nothing else")
    if calls := without_nulls(more.get("tool_calls")):
        calls = from_json(calls)
        if isinstance(calls, list):
            more["tool_calls"] = [with_arguments(from_json(call)) for call in calls]
    return message | more


def without_nulls(value):
    """Without the keys that only other rows have: `datasets` gives each object the keys of all, in
    parquet and in what it writes as JSON."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def from_json(value):
    """What a text in JSON says; any other value, and any other text, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def says(message: dict) -> bool:
    """Whether a message says anything at all."""
    content = message.get("content")
    blank = isinstance(content, str) and not content.strip()
    return any(message.get(key) for key in SAYS if not (key == "content" and blank))


def same(a: dict, b: dict) -> bool:
    """Whether two messages say the same; their ids and notes may differ."""
    return all(a.get(key) == b.get(key) for key in ("role", "name", *SAYS))


def content_of(content) -> str | None:
    """A message's content as one text, its parts joined. Raises ValueError where it has others."""
    if isinstance(content, list):
        for part in content:
            part = part if isinstance(part, dict) else {"type": type(part).__name__}
            others = [k for k, v in part.items() if v and k not in ("type", "text")]
            kind = part.get("type") or "text"
            if kind not in ("text", "input_text", "output_text") or others:
                what = others[0] if others else kind
                raise ValueError(f"a message's content has parts that are not text: {what!s:.40}")
            if not isinstance(part.get("text"), str):
                raise ValueError("a message's content has parts that are not text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"a message's content is not text but {content!r:.40}")
    return content


def calls_of(content) -> list[dict] | None:
    """ShareGPT's function_call, {"name", "arguments"} or several of it as JSON text, as the calls
    of tool_calls."""
    found = from_json(content) if isinstance(content, str) else None
    functions = found if isinstance(found, list) else [found]
    if not functions or not all(isinstance(f, dict) and "name" in f for f in functions):
        return None
    return [{"type": "function", "function": function} for function in functions]


def with_arguments(call):
    """OpenAI writes a call's arguments as JSON text. Chat templates write them as JSON themselves,
    and would put that text into quotation marks."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": with_arguments(call["function"])}
    arguments = from_json(call.get("arguments"))
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def tools_of(value) -> list | None:
    """The column of tools that a template is given: a list, or JSON text of one, or a list of JSON
    texts; None without any. Raises ValueError."""
    value = without_nulls(value)  # those in a text of JSON are the author's own
    if isinstance(value, str):
        text, value = value, from_json(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError):
                value = ast.literal_eval(text)
        if isinstance(value, str):
            if text.strip():
                raise ValueError("tools is text, but not JSON")
            return None
    if value and not isinstance(value, list):
        raise ValueError(f"tools must be a list, not {value!r:.40}")
    return [*map(from_json, value)] if value else None


def kwargs_of(value) -> dict | None:
    """The column chat_template_kwargs, what else a template is given (`enable_thinking` and the
    like): an object, or JSON text of one; None without any. Raises ValueError."""
    value = from_json(value) if isinstance(value, str) else value
    if not isinstance(value, dict | None):
        raise ValueError(f"chat_template_kwargs must be an object, not {value!r:.40}")
    ours = ("messages", "add_generation_prompt", "tools")
    if value and (taken := [name for name in ours if name in value]):
        raise ValueError(f"chat_template_kwargs has {taken[0]}, which this program gives by itself")
    return value or None
