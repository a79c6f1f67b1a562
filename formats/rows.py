"""Preference rows: JSON Lines with prompt, chosen and rejected, as strings or as messages.

Reads      the forms that `load_preferences` lists
Refuses    everything else with FILE:LINE and what is wrong there; tools/prepare.py converts the
           many other forms in which preference data is published

By hand and not by the datasets library, because a row's complaint needs its line.
"""

import codecs
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from formats.messages import kwargs_of, looks_like_dialogue, messages_of, same, tools_of


class Preference(NamedTuple):
    """One row. A string is used as it is; a list of messages goes through the chat template."""

    prompt: str | list[dict]
    chosen: str | list[dict]  # messages: the one assistant message that answers the prompt
    rejected: str | list[dict]
    accept: list[str] | None  # answers that count as right, where they can be listed
    where: str  # FILE:LINE
    ignored: tuple[str, ...] = ()  # keys that are neither used nor repeated elsewhere in the row
    guessed: bool = False  # no key held the prompt: it is how both answers begin
    repeated: bool = False  # both answers began with the prompt, which is taken away from them
    tools: list | None = None  # for the chat template
    template_kwargs: dict | None = None  # what else it is given, as in TRL
    key: str = "prompt"  # which of PROMPTS held it

    @property
    def for_template(self) -> dict:
        """What the chat template is given beside the messages."""
        return {"tools": self.tools, **(self.template_kwargs or {})}

    @property
    def file(self) -> str:
        return self.where.rpartition(":")[0]


def load_preferences(path) -> list[Preference]:
    """Reads JSON Lines with prompt, chosen, rejected: strings, or messages (formats/messages.py).

    `instruction`, `question`, `messages` or `conversations` may stand for `prompt`, in this order.
    Where chosen and rejected are whole dialogues, the prompt is their common beginning; where they
    are strings and no other key holds text, too. `accept` is a list of right answers (strings);
    `tools` and `chat_template_kwargs` go to the chat template. Other keys are ignored, and noted in
    `ignored`. Raises FileNotFoundError, or ValueError that begins with FILE:LINE.
    """
    path = Path(path)
    expected = "UTF-8 text, a JSON object a line, is expected (tools/prepare.py makes it)"
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {problem}; {expected}")
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if number == 1 and line.startswith((b"PAR1", b"\x1f\x8b")):
                raise ValueError(f"{path}: is a parquet or gzip file; {expected}")
            if not (line := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            if not rows and line.startswith(b"["):
                raise ValueError(f"{path}:{number}: a JSON array begins here; {expected}")
            try:
                rows.append(preference(parse_json(line), f"{path}:{number}"))
            except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}; {expected}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error!s:.300}") from None
    if not rows:
        raise ValueError(f"{path}: the file has no rows; {expected}")
    return rows


def parse_json(line: bytes):
    """A line's value. Raises json.JSONDecodeError, RecursionError, UnicodeError."""
    value = json.loads(line.decode("utf-8"))
    if b"\\u" in line:  # half a surrogate pair can only be written so, and has no bytes
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")


def preference(row, where: str) -> Preference:
    """A row as parsed from JSON. Raises ValueError that says what is wrong with it, without
    `where`."""
    _check_keys(row)
    # An empty prompt gives way to another column that asks.
    name = next((key for key in PROMPTS if row.get(key) not in (None, [], "")), None)
    name = name or next((key for key in PROMPTS if row.get(key) == ""), "prompt")
    prompt, (chosen, rejected) = _read(row, name), read_answers(row)
    prompt, accept = (None if prompt == [] else prompt), row.get("accept")
    if not isinstance(accept, list | None) or not all(isinstance(x, str) for x in accept or ()):
        raise ValueError("accept must be a list of strings")
    for key, value in ((name, prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list) and (value is not None or key != name):
            raise ValueError(f"{key} must be text or a list of messages, not {value!r:.30}")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        return _of_strings(row, prompt, chosen, rejected, accept, where)._replace(key=name)

    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not value or isinstance(value, str):
            raise ValueError(f"{key} must be text or a list of messages, like its neighbours")
    given, common = prompt, chosen[: _n_common(chosen[:-1], rejected[:-1])]
    if isinstance(given, str) and given and len(chosen) == len(rejected) == 1:
        raise ValueError(
            f"{name} is text, but chosen and rejected are messages that do not repeat it: "
            "make it a list of messages too (tools/prepare.py does)"
        )
    if not isinstance(given, list) or _begins(common, given) or (common and name != "prompt"):
        prompt = common  # whole dialogues; UltraFeedback repeats their prompt beside them, as text
    if not prompt and (others := _with_text(row)):
        raise ValueError(_no_prompt(others))
    answers = [_answer(key, prompt, m) for key, m in (("chosen", chosen), ("rejected", rejected))]
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{name} ends with a message of the assistant, where its answer should begin: move "
            "that text into chosen and rejected, or remove the message"
        )
    tools, kwargs = tools_of(row.get("tools")), kwargs_of(row.get("chat_template_kwargs"))
    said = [m["content"] for m in prompt + chosen + rejected]
    used = [row["chosen"], row["rejected"], row.get("tools"), *said]
    used.append(row.get("chat_template_kwargs"))
    if isinstance(given, list):
        is_used = prompt is given or _begins(chosen, given)
    else:
        is_used = (given or "").strip() in {text.strip() for text in said if text}
    used += [row.get(name)] if is_used else []
    ignored = _ignored(row, used)
    return Preference(prompt, *answers, accept, where, ignored, tools=tools, template_kwargs=kwargs)


def _n_common(a: list[dict], b: list[dict]) -> int:
    """How many messages two dialogues have in common at their beginning."""
    alike = [same(x, y) for x, y in zip(a, b, strict=False)]
    return [*alike, False].index(False)


def _begins(dialogue: list[dict], first: list[dict]) -> bool:
    return _n_common(first, dialogue) == len(first)


def read_answers(row: dict) -> list:
    """chosen and rejected. Where one of two texts is a dialogue in JSON and the other is not, it is
    an answer about such things."""
    found = [_read(row, key) for key in ("chosen", "rejected")]
    given = [row.get(key) for key in ("chosen", "rejected")]
    if all(isinstance(x, str) for x in given) and any(isinstance(x, str) for x in found):
        return given
    return found


def _read(row: dict, key: str):
    try:
        return messages_of(row.get(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _check_keys(row):
    """Raises ValueError where a row is not one of pairs at all."""
    if not isinstance(row, dict):
        hint = " (tools/prepare.py reads such a file)" if isinstance(row, list) else ""
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}{hint}")
    for key in ("image", "images", "video", "videos", "audio"):
        value = row.get(key)
        if any(value) if isinstance(value, list) else value:
            raise ValueError(f"{key} is not text, and this program trains on text only")
    if not {"chosen", "rejected"} & set(row):
        if "label" in row:
            raise ValueError(
                "completion and label are unpaired ratings, as KTO takes them; ORPO compares two "
                "answers to one prompt, chosen and rejected"
            )
        raise ValueError(f"neither chosen nor rejected is among the row's keys: {sorted(row)}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the row has {sorted(row)}")


def _of_strings(row: dict, prompt, chosen: str, rejected: str, accept, where: str) -> Preference:
    guessed = prompt is None
    if guessed:
        if others := _with_text(row):
            raise ValueError(_no_prompt(others))
        prompt = _common_text(chosen, rejected)
    repeated = bool(prompt) and chosen.startswith(prompt) and rejected.startswith(prompt)
    if repeated:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    ignored = _ignored(row, [prompt, row["chosen"], row["rejected"]])
    return Preference(
        prompt, chosen, rejected, accept, where, ignored, guessed, repeated and not guessed
    )


def _answer(key: str, prompt: list[dict], messages: list[dict]) -> list[dict]:
    """The one message that answers the prompt, of a whole dialogue or of itself."""
    answer = messages[len(prompt) :] if _begins(messages, prompt) else messages
    if not prompt or len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = [m["role"] for m in messages]
        wanted = "the prompt's messages and one assistant message more, or only that message"
        raise ValueError(f"{key} must be {wanted}; it is {roles} after {len(prompt)} messages")
    return answer


def _with_text(row: dict) -> list[str]:
    """The keys, other than those of answers, that hold sentences or messages: one of them may be
    the prompt."""
    answers = ("chosen", "rejected", "accept", "tools", "chat_template_kwargs")
    asking = ("query", "history", "context", "input", "text", "problem", "trajectory", "post")

    def is_text(key: str, value) -> bool:
        if isinstance(value, str):
            return len(value.split()) > 1 or (key in asking and bool(value.strip()))
        one = value[0] if isinstance(value, list) and value else value
        return (key in asking and bool(value)) or (isinstance(one, dict) and "content" in one)

    return [key for key, value in row.items() if key not in answers and is_text(key, value)]


def _no_prompt(others: list[str]) -> str:
    return (
        f"there is no prompt, but text in {', '.join(others)}: if a column of these asks, convert "
        f"the file with tools/prepare.py --prompt {others[0]}; if chosen and rejected both begin "
        "with the question, with --prompt chosen"
    )


def _ignored(row: dict, used: list) -> tuple[str, ...]:
    """The keys whose values are neither empty nor among those used: UltraFeedback's rows repeat
    their prompt and the chosen dialogue."""
    used = [None, "", [], {}, *used]
    known = ("chosen", "rejected", "accept")
    keys = (key for key in row if key not in known and row[key] not in used)
    return tuple(map(sys.intern, keys))


def _looks_odd(answer) -> bool:
    return isinstance(answer, str) and looks_like_dialogue(answer)


def _common_text(a: str, b: str) -> str:
    """The common beginning of two texts, up to a space in both of them."""
    n = len(os.path.commonprefix([a, b]))
    while n and not (a[n : n + 1].isspace() and b[n : n + 1].isspace()):
        n -= 1
    return a[:n]


def warnings_of(rows: list[Preference]) -> list[str]:
    """What in the rows is lost, or probably not meant so: a line each."""
    warnings = []
    if ignored := Counter(key for row in rows for key in row.ignored):
        keys = [f"{key} ({n} rows)" for key, n in ignored.most_common(20)]
        more = f" and {len(ignored) - 20} others" if len(ignored) > 20 else ""
        warnings.append(f"ignored columns: {', '.join(keys)}{more}")
    if guessed := [row for row in rows if row.guessed]:
        text = f"{len(guessed)} of {len(rows)} rows have no prompt (first: {guessed[0].where});"
        warnings.append(f"{text} the common beginning of chosen and rejected is used")
    if repeated := [row for row in rows if row.repeated]:
        text = f"{len(repeated)} of {len(rows)} rows repeat the prompt in both answers"
        warnings.append(f"{text} (first: {repeated[0].where}); it is taken away from them")
    texts = [row for row in rows if row.prompt and isinstance(row.prompt, str)]
    if plain := [row for row in texts if row.key != "prompt"]:
        keys = " or ".join(sorted({row.key for row in plain}))
        text = f"{len(plain)} of {len(rows)} prompts are text under {keys}, as at"
        text = f"{text} {plain[0].where}: used without a chat template"
        warnings.append(f"{text} (tools/prepare.py makes messages of them)")
    if odd := [row for row in rows if any(map(_looks_odd, (row.chosen, row.rejected)))]:
        text = f"warning: {len(odd)} of {len(rows)} rows have answers that look like messages in"
        warnings.append(f"{text} JSON, and are trained on as text (first: {odd[0].where})")
    if empty := [row for row in rows if not row.prompt]:
        some = f"{len(empty)} of {len(rows)} prompts are empty (first: {empty[0].where})"
        text = "all prompts are empty" if len(empty) == len(rows) else some
        warnings.append(f"warning: {text}")
    # The last character of the prompt and the first of the answer. Not all scripts have spaces.
    joined = re.compile(r"[\w.,:;?!)][^\W_]", re.ASCII)
    joins = [
        row
        for row in rows
        if isinstance(row.prompt, str) and joined.fullmatch(row.prompt[-1:] + row.chosen[:1])
    ]
    if joins:
        prompt, chosen = joins[0].prompt, joins[0].chosen
        warnings.append(
            f"warning: {len(joins)} of {len(rows)} prompts run into their answer without a space, "
            f"as at {joins[0].where}: {(prompt[-20:] + chosen[:20])!r}"
        )
    return warnings
