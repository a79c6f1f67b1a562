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


class Preference(NamedTuple):
    """One row. A string is used as it is; a list of messages goes through the chat template."""

    prompt: str | list[dict]
    chosen: str | list[dict]  # messages: the one assistant message that answers the prompt
    rejected: str | list[dict]
    accept: list[str] | None  # answers that count as right, where they can be listed
    where: str  # FILE:LINE
    ignored: tuple[str, ...] = ()  # keys that are neither used nor repeated elsewhere in the row
    guessed: bool = False  # no key held the prompt: it is how both answers begin

    @property
    def file(self) -> str:
        return self.where.rpartition(":")[0]


def load_preferences(path) -> list[Preference]:
    """Reads JSON Lines with prompt, chosen, rejected: strings, or lists of {role, content}.

    `instruction` or `question` may stand for `prompt`. Without one, or where chosen and rejected
    are whole dialogues, the prompt is their common beginning. Other keys are ignored, and noted in
    `ignored`, but for `accept`, a list of right answers (strings). Raises FileNotFoundError, or
    ValueError that begins with FILE:LINE.
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


def preference(row, where: str) -> Preference:
    """A row as parsed from JSON. Raises ValueError that says what is wrong with it, without
    `where`."""
    if not isinstance(row, dict):
        hint = " (tools/prepare.py reads such a file)" if isinstance(row, list) else ""
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}{hint}")
    if not {"chosen", "rejected"} & set(row):
        raise ValueError(f"neither chosen nor rejected is among the row's keys: {sorted(row)}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"key {key!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[key], str | list):
            raise ValueError(f"{key} must be text or a list of messages, not {row[key]!r:.30}")
    name = next((key for key in ("prompt", "instruction", "question") if key in row), "prompt")
    prompt, chosen, rejected, accept = map(row.get, (name, "chosen", "rejected", "accept"))
    if not isinstance(accept, list | None) or not all(isinstance(x, str) for x in accept or ()):
        raise ValueError("accept must be a list of strings")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        if guessed := prompt is None:
            prompt = _common_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        ignored = _ignored(row, [prompt, chosen, rejected])
        return Preference(prompt, chosen, rejected, accept, where, ignored, guessed)

    for key in (name, "chosen", "rejected"):
        if not (key == name and isinstance(prompt, str | None)):
            _check_messages(key, row[key])
    if not isinstance(prompt, list):  # whole dialogues; UltraFeedback repeats a string beside them
        if prompt and len(chosen) == len(rejected) == 1:
            raise ValueError(
                f"{name} is text, but chosen and rejected are messages that do not repeat it: "
                "make it a list of messages too (tools/prepare.py does)"
            )
        same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
        prompt = chosen[: [*same, False].index(False)]
    answers = []
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        answer = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if not prompt or len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = [m["role"] for m in messages]
            wanted = "the prompt's messages and one assistant message more, or only that message"
            raise ValueError(f"{key} must be {wanted}; it is {roles} after {len(prompt)} messages")
        answers.append(answer)
    used = [prompt, chosen, rejected, *(m["content"] for m in prompt + chosen + rejected)]
    return Preference(prompt, *answers, accept, where, _ignored(row, used))


def _ignored(row: dict, used: list) -> tuple[str, ...]:
    """The keys whose values are neither empty nor among those used: UltraFeedback's rows repeat
    their prompt and the chosen dialogue."""
    used = [None, "", [], {}, *used]
    known = ("chosen", "rejected", "accept")
    keys = (key for key in row if key not in known and row[key] not in used)
    return tuple(map(sys.intern, keys))


def _check_messages(key: str, messages):
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} must be text or a list of messages, like its neighbours")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or {type(m.get(x)) for x in ("role", "content")} != {str}:
            raise ValueError(f"{key}[{i}] must be a message: role and content, both strings")


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
    if not any(row.prompt for row in rows):
        warnings.append("warning: all prompts are empty")
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
